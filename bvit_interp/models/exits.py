"""Early exits: classifiers that read CLS at chosen steps of a frozen model, and a run that really
stops at them.

Appendix B of bViT (arXiv 2605.10661): exit e answers ``y_e = C_e(z_{t_e}^cls)`` with confidence
``max softmax(y_e)``; an image leaves at the first exit whose confidence exceeds the threshold, else
the model's own head answers after T. C_e is a weight-only RMSNorm and a Linear (ours: the paper
does not print it; the residual grows with t).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models.stepping import advance, answer, embed
from bvit_interp.results import replacing, weights_hash

FILE = "exits.safetensors"


class Exits(nn.Module):
    """One classifier after each of the steps `steps`, all of them computed at once.

    Parameters
    ----------
    steps : t_e, ascending, each before the last step of the model.
    width, classes : D and C.
    """

    def __init__(self, steps: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.steps = steps
        self.norm = nn.Parameter(torch.ones(len(steps), width))
        self.weight = nn.Parameter(torch.zeros(len(steps), classes, width))
        self.bias = nn.Parameter(torch.zeros(len(steps), classes))

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``(B, E, C)`` of the CLS tokens after the exits' steps ``(B, E, D)``."""
        return (
            torch.einsum("bed,ecd->bec", self._normed(states) * self.norm, self.weight) + self.bias
        )

    def one(self, e: int, state: Tensor) -> Tensor:
        """Logits ``(B, C)`` of exit e (from 0) for CLS tokens ``(B, D)``."""
        return F.linear(self._normed(state) * self.norm[e], self.weight[e], self.bias[e])

    @staticmethod
    def _normed(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def save(self, path: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
        """Write them as the exits of `model`'s weights."""
        kept = {"steps": self.steps, "weights": weights_hash(model), **about}
        with replacing(path) as temporary:
            tensors = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in self.state_dict().items()
            }
            save_file(tensors, str(temporary), metadata={"exits": json.dumps(kept)})
            temporary.chmod(0o644)  # safetensors leaves it to its owner alone

    @classmethod
    def load(cls, path: Path, model: VisionTransformer) -> Exits:
        """Read the exits of `model`; those of other weights are refused."""
        if not path.is_file():
            raise CheckpointError(
                f"no exits at {path}: make them with `bvit-interp early-exit train`"
            )
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {})["exits"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            exits = cls(tuple(about["steps"]), *reversed(tensors["weight"].shape[1:]))
            exits.load_state_dict(tensors)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: truncated or not a file of exits ({error})") from error
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise CheckpointError(f"{path}: the exits hold NaN or infinite weights")
        if about.get("weights") != weights_hash(model):
            raise CheckpointError(f"{path}: exits of another model's weights")
        return exits.to(next(model.parameters()).device).eval()


def check_exits(steps: tuple[int, ...], model: VisionTransformer) -> tuple[int, ...]:
    """The exits' steps, ascending; a UserError for none, repeated ones, or one that is not before
    the last step."""
    last = len(model.blocks)
    if last < 2:
        raise UserError("a model of one step has no step to leave before its head")
    if not steps or len(set(steps)) < len(steps) or not all(1 <= t < last for t in steps):
        raise UserError(
            f"exits must be different steps of 1..{last - 1}, got {steps}; after step {last} the head answers"
        )
    if not model.has_class_token:
        raise UserError("exits read the CLS token; this model has none")
    return tuple(sorted(steps))


@torch.inference_mode()
def run_with_exits(
    unrolled: VisionTransformer, exits: Exits, images: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Run a batch; images that leave are dropped, so the steps after cost less.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : ``(B, 3, H, W)``, normalised.
    threshold : tau, 0..1; an image leaves where its confidence is larger.

    Returns
    -------
    Logits ``(B, C)`` and the step each image left at ``(B,)``.
    """
    state, last = embed(unrolled, images), len(unrolled.blocks)
    places = torch.arange(len(images), device=images.device)
    left = torch.full_like(places, last)
    logits: Tensor | None = None
    for t in range(1, last + 1):
        state = advance(unrolled, state)
        if t == last:
            found, leaves = (
                answer(unrolled, state),
                torch.ones(len(places), dtype=torch.bool, device=images.device),
            )
        elif t in exits.steps:
            found = exits.one(exits.steps.index(t), state.tokens[:, 0])
            leaves = found.softmax(-1).amax(-1) > threshold
        else:
            continue
        if logits is None:
            logits = found.new_empty(len(images), found.shape[-1])
        gone = places[leaves]
        logits[gone], left[gone] = found[leaves].to(logits.dtype), t
        places = places[~leaves]
        if not len(places):
            break
        if len(gone):
            state = state[~leaves]
    assert logits is not None
    return logits, left
