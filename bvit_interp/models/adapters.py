"""Adapters: parameters trained beside a frozen backbone.

Section 4.3 and appendix H of bViT (arXiv 2605.10661): a new head alone, a time embedding, low-rank
updates (LoRA, Hu et al. 2022, https://arxiv.org/abs/2106.09685) of q and v or of both FFN matrices,
or all weights. A low-rank update is a parametrization ``W -> W + alpha / r * B A`` of the tied
unroll's linear layers. A shared block has one pair (A, B) per matrix for all of its steps. An
update that is active only at chosen steps is ours and not in the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models import tensor_file
from bvit_interp.models.bvit import BViT
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import is_unrolled, unroll
from bvit_interp.results import weights_hash
from bvit_interp.vocabulary import AdapterMode

FILE = "adapter.safetensors"
PLACES = {"lora-qv": ("attn.qkv",), "lora-ffn": ("mlp.fc1", "mlp.fc2")}
_EMBED = "blocks.step_embed"
_HEADS = ("head.", "head_dist.")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is trained in addition to a new head."""

    mode: AdapterMode
    """probe (nothing), te (a time embedding that starts at zero), full (all weights), lora-qv or
    lora-ffn (low-rank updates)."""
    rank: int = 8
    """Rank r of the low-rank modes, from 1 to the model's width."""
    alpha: float = 16.0
    """The update is scaled by alpha / r; alpha > 0."""
    steps: tuple[int, ...] | None = None
    """Steps (from 1) at which a low-rank update is active: None for all, () for none."""
    train_final_norm: bool = True
    """Whether the low-rank modes also train the final norm. The paper's parameter counts contain
    its D parameters."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(AdapterMode):
            raise UserError(
                f"mode must be one of {', '.join(get_args(AdapterMode))}, got {self.mode!r}"
            )
        if self.steps is not None and self.mode not in PLACES:
            raise UserError(f"steps are chosen for {' and '.join(PLACES)}, not for {self.mode}")
        if not self.alpha > 0:
            raise UserError(f"alpha must be > 0, got {self.alpha}")

    def check(self, model: VisionTransformer) -> None:
        """Raise a UserError if `model` cannot be trained in this way."""
        width, last = model.embed_dim, len(model.blocks)
        if self.mode in PLACES and not 1 <= self.rank <= width:
            raise UserError(f"rank must be in 1..{width}, the model's width, got {self.rank}")
        if self.steps is not None and not (set(self.steps) <= set(range(1, last + 1))):
            raise UserError(f"steps must be of 1..{last}, got {' '.join(map(str, self.steps))}")
        if self.mode == "te" and not isinstance(model, BViT):
            raise UserError(
                "te needs a BViT, whose steps can have a time embedding; got"
                f" {type(model).__name__}"
            )
        if self.mode == "te" and model.blocks.step_embed is not None:
            raise UserError(
                "te adds a time embedding, and the model has one already: use mode full, or"
                " another model"
            )
        if is_unrolled(model):
            raise UserError(
                "an adapter belongs to a model's weights: give the model, not an unroll or masked"
                " view of it"
            )


class LowRank(nn.Module):
    """The parametrization ``W -> W + scaling * B A`` of parts of a matrix; the rows of other parts
    keep their weights.

    Parameters
    ----------
    a, b : factors of each adapted part, ``(P, r, in)`` and ``(P, rows, r)``; P = 2 for q and v.
    parts : for each part of the matrix's rows, from the top, the index of its factors in `a` and
        `b`, or None for a part without an update.
    scaling : alpha / r.
    """

    def __init__(
        self, a: nn.Parameter, b: nn.Parameter, parts: tuple[int | None, ...], scaling: float
    ) -> None:
        super().__init__()
        self.a, self.b, self.parts, self.scaling = a, b, parts, scaling

    def delta(self) -> Float[Tensor, "out in_"]:
        """What is added to the weight, ``(out, in)``."""
        update = self.scaling * (self.b @ self.a)
        rows = [
            torch.zeros_like(update[0]) if part is None else update[part] for part in self.parts
        ]
        return torch.cat(rows)

    def forward(self, weight: Float[Tensor, "out in_"]) -> Float[Tensor, "out in_"]:
        return weight + self.delta()


class Adapted:
    """A model with a new head and the parameters that `spec` trains; the base is not changed.

    Parameters
    ----------
    model : the base, a `BViT` or a stacked ViT.
    spec : what is trained.
    classes : names of the new head's classes.
    seed : random seed of the head and of every A. B starts at zero, so a new low-rank update
        changes nothing.

    Attributes
    ----------
    model : a copy of the base with the new head, recurrent if the base is.
    view : the unroll of `model`, in eval mode. It carries the adapter, and is what is trained and
        run.
    trained : the parameters to train, by name.
    base : the model as given.
    """

    def __init__(
        self, model: VisionTransformer, spec: Spec, classes: Sequence[str], seed: int = 0
    ) -> None:
        spec.check(model)
        self.spec, self.classes, self.base = spec, tuple(classes), model
        self.model = _with_head(model, self.classes, timed=spec.mode == "te")
        self.view, self._mixed = unroll(self.model), False
        own = dict(self.model.named_parameters())
        self.trained: dict[str, nn.Parameter] = {
            name: own[name] for name in own if name.startswith(_HEADS)
        }
        if spec.mode == "full":
            self.trained = own
        elif spec.mode == "te":
            self.trained[_EMBED] = own[_EMBED]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
            for name, tensor in self.trained.items():
                if name.startswith(_HEADS):
                    # drawn on the CPU: a GPU has its own generator
                    drawn = torch.zeros(tensor.shape)
                    tensor.data.copy_(
                        drawn if name.endswith("bias") else nn.init.trunc_normal_(drawn, std=0.02)
                    )
            if spec.mode in PLACES:
                self._adapt()
        if spec.mode in PLACES and spec.train_final_norm:
            self.trained |= {
                name: own[name] for name in own if name.startswith(("norm.", "fc_norm."))
            }
        for tensor in self.trained.values():
            tensor.requires_grad_()

    def _adapt(self) -> None:
        """Make one pair of factors for each stored matrix that a chosen step uses, and put the
        update on it in each of these steps."""
        names = {
            id(tensor): name.removesuffix("weight")
            for name, tensor in self.model.named_parameters()
        }
        chosen = range(1, len(self.view.blocks) + 1) if self.spec.steps is None else self.spec.steps
        uses: dict[str, set[bool]] = {}
        for t, block in enumerate(self.view.blocks, start=1):
            # the inner updates of a memory belong to the step
            for part in (
                block,
                *getattr(block, "inner", ()),
            ):
                for place in PLACES[self.spec.mode]:
                    linear = part.get_submodule(place)
                    name = names[id(linear.weight)]
                    uses.setdefault(name, set()).add(t in chosen)
                    if t in chosen:
                        self._put_on(linear, f"{name}lora_")
        self._mixed = any(len(used) > 1 for used in uses.values())

    def _put_on(self, linear: nn.Linear, name: str) -> None:
        weight, rank = linear.weight, self.spec.rank
        parts = (0, None, 1) if self.spec.mode == "lora-qv" else (0,)  # rows of q, k and v
        if f"{name}a" not in self.trained:
            count = len(parts) - parts.count(None)
            a, b = (
                torch.empty(count, rank, weight.shape[1]),
                torch.zeros(count, weight.shape[0] // len(parts), rank),
            )
            for part in a:
                nn.init.kaiming_uniform_(part, a=math.sqrt(5))  # as in peft
            self.trained |= {
                f"{name}a": nn.Parameter(a.to(weight)),
                f"{name}b": nn.Parameter(b.to(weight)),
            }
        update = LowRank(
            self.trained[f"{name}a"], self.trained[f"{name}b"], parts, self.spec.alpha / rank
        )
        parametrize.register_parametrization(linear, "weight", update)

    def count(self) -> int:
        """Number of trained parameters without the new head, as the paper counts them."""
        return sum(
            tensor.numel() for name, tensor in self.trained.items() if not name.startswith(_HEADS)
        )

    def head_count(self) -> int:
        """Number of parameters of the new head."""
        return sum(
            tensor.numel() for name, tensor in self.trained.items() if name.startswith(_HEADS)
        )

    def merged(self) -> VisionTransformer:
        """The adapted model without parametrizations: each W becomes ``W + alpha / r * B A``.

        Raises
        ------
        UserError
            For an update of a shared block that is active only at some of its steps.
        """
        self.check_merges()
        merged = copy.deepcopy(self.model).requires_grad_().eval()
        if self.spec.mode in PLACES:
            names = {id(tensor): name for name, tensor in self.model.named_parameters()}
            own = dict(merged.named_parameters())
            with torch.no_grad():
                for layer in self.view.modules():
                    if parametrize.is_parametrized(layer, "weight"):
                        adapted: Any = layer
                        original = adapted.parametrizations.weight.original
                        own[names[id(original)]].copy_(adapted.weight)
        return merged

    def check_merges(self) -> None:
        """Raise a UserError if `merged` is not possible."""
        if self.spec.mode in PLACES and self._mixed:
            raise UserError(
                "an adapter of chosen steps of a shared block does not merge: its steps have"
                " different weights"
            )

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the trained parameters and the hash of the base's weights."""
        kept = {
            "spec": asdict(self.spec),
            "classes": self.classes,
            "weights": weights_hash(self.base),
            **(about or {}),
        }
        tensor_file.write(path, "adapter", kept, self.trained)

    @classmethod
    def load(cls, path: Path, model: VisionTransformer) -> Adapted:
        """Read an adapter of `model`; an adapter of another base is refused."""
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"no adapter at {path}: make one with `bvit-interp transfer`")
        try:
            about, tensors = tensor_file.read(path, "adapter")
            steps = about["spec"]["steps"]
            spec = Spec(**{**about["spec"], "steps": None if steps is None else tuple(steps)})
            weights, classes = about["weights"], [str(name) for name in about["classes"]]
        except tensor_file.UNREADABLE as error:
            raise CheckpointError(f"{path}: truncated or not an adapter ({error})") from error
        if weights != weights_hash(model):
            raise CheckpointError(f"{path}: an adapter of another base model (weights {weights})")
        adapted = cls(model, spec, classes)
        found, own = ({name: of[name].shape for name in of} for of in (tensors, adapted.trained))
        if found != own:
            raise CheckpointError(f"{path}: not the tensors of a {spec.mode} adapter of this model")
        with torch.no_grad():
            for name, tensor in tensors.items():
                adapted.trained[name].copy_(tensor)
        return adapted


def load(path: str | Path, model: VisionTransformer) -> VisionTransformer:
    """The model with an adapter: an unroll in eval mode, whose parameters need no gradients. Every
    probe and analysis accepts it.

    Parameters
    ----------
    path : `adapter.safetensors` or its folder.
    model : the base the adapter was trained for; it is not changed.

    Raises
    ------
    CheckpointError
        If there is no adapter, or it is truncated or belongs to another base.
    """
    return Adapted.load(Path(path), model).view.requires_grad_(False)


def _with_head(
    model: VisionTransformer, classes: tuple[str, ...], *, timed: bool
) -> VisionTransformer:
    """A frozen copy of the model, in eval mode, with a head for `classes`; if `timed`, also with a
    time embedding of zeros."""
    with torch.random.fork_rng(devices=[]), device_of(model):
        other = _with_time(model) if timed else copy.deepcopy(model)
        other.reset_classifier(len(classes))
    other.pretrained_cfg = {**other.pretrained_cfg, "label_names": list(classes)}  # type: ignore[assignment, dict-item]
    return other.requires_grad_(False).eval()


def _with_time(model: VisionTransformer) -> VisionTransformer:
    if not hasattr(model, "model_args"):
        raise UserError(
            "a BViT is rebuilt under its name with a time embedding: make it with timm.create_model"
        )
    size = list(model.patch_embed.img_size)
    rebuilt: Any = model
    own: dict[str, Any] = dict(rebuilt.model_args)
    arguments = own | {"num_classes": model.num_classes, "img_size": size, "step_embed": True}
    other: Any = timm.create_model(rebuilt.pretrained_cfg["architecture"], **arguments)
    other.pretrained_cfg = model.pretrained_cfg
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    if missing != [_EMBED] or unexpected:
        raise UserError(
            "the model was changed since it was made: a time embedding cannot be added to it"
        )
    return other
