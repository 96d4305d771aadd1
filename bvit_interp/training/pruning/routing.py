"""Subnetworks of one dense tensor: routing by a known subset, and training in which pruned weights
do not move.

Algorithm 2 of Routing the Lottery (arXiv 2601.22141): on a batch of subset k the model computes
with ``theta * m_k`` and ``theta <- theta - eta (grad * m_k)``; `masked_adam.py` says what that is
with Adam. Whatever is not masked (norms, biases, tokens, the classifier, and a batch norm's running
statistics) is dense and shared, as in the paper. Of a one-vs-rest part, output k of the classifier
is the binary answer of subset k and moves on its batches only (ours: so all methods train one and
the same architecture).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import Dataset

from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import PLACES, Masks
from bvit_interp.models.unroll import unroll
from bvit_interp.training.loop import build as start
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.augment import Augmentation
from bvit_interp.training.loop.draws import Draws, drawn_for
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.throughput import precision
from bvit_interp.training.pruning import grafts as graft
from bvit_interp.training.pruning.masked_adam import MaskedAdam
from bvit_interp.training.pruning.subsets import Part, Pool

Places = Mapping[str, tuple[str, ...]]
"""Masked weight of the model -> its names in the module that computes, one for each of a subset's
mask rows."""


def build(recipe: Recipe, pool: Pool, device: str = "cpu") -> nn.Module:
    """The recipe's model before its first step, with an output for each class of the pool: a bViT
    or any timm model."""
    model = _build(recipe, pool)
    if device == "cpu" and precision(recipe.autocast, device) != "off":
        for inner in model.modules():
            if hasattr(inner, "fused_attn"):
                inner.fused_attn = False  # type: ignore[assignment]  # its bf16 backward is slow on a CPU
    return model


def _build(recipe: Recipe, pool: Pool) -> nn.Module:
    recipe = replace(recipe, model={**recipe.model, "num_classes": len(pool.classes)})
    name = str(recipe.model["name"])
    if not timm.is_model(name) or timm.model_entrypoint(name).__module__.startswith("bvit_interp."):
        about = SimpleNamespace(classes=pool.classes, native_size=pool.samples.native_size)
        return start.make_model(recipe, cast("Samples", about))
    with drawn_for(recipe.seed):
        try:
            return timm.create_model(
                **{"model_name": name, **{k: v for k, v in recipe.model.items() if k != "name"}}
            )
        except (
            TypeError,
            ValueError,
            AssertionError,
            RuntimeError,
            LookupError,
            ArithmeticError,
        ) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"recipe: cannot make the model {name}: {reason}") from error


def seen_by(model: nn.Module, samples: Samples) -> Any:
    """What `Augmentation` and `Geometry` ask of a model: a timm model without patches sees a set's
    own size."""
    if hasattr(getattr(model, "patch_embed", None), "img_size"):
        return model
    cfg = cast("dict[str, Any]", model.pretrained_cfg)
    side = samples.native_size or cfg["input_size"][-1]
    return SimpleNamespace(patch_embed=SimpleNamespace(img_size=(side, side)), pretrained_cfg=cfg)


def places_of(model: nn.Module, by_step: bool = False) -> dict[str, tuple[str, ...]]:
    """The weights that are masked: of every Linear and convolution but the classifier; `by_step`,
    of the block."""
    if by_step:
        if not isinstance(model, BViT):
            raise UserError(f"masks of steps are of a bViT, not of {type(model).__name__}")
        graft.check(model)
        steps = range(len(model.blocks))
        return {
            f"blocks.0.{at}.weight": tuple(f"blocks.{t}.{at}.weight" for t in steps)
            for at in PLACES.values()
        }
    dense = set(_classifier(model).modules())
    kinds = (nn.Linear, _ConvNd)
    names = [
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, kinds) and m not in dense
    ]
    if not names:
        raise UserError(f"{type(model).__name__} has no linear layer or convolution to mask")
    return {name: (name,) for name in names}


def _classifier(model: nn.Module) -> nn.Module:
    found = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(found, nn.Linear | _ConvNd):
        raise UserError(
            f"{type(model).__name__} has not one classifier (a distilled model has two)"
        )
    return found


def untied(model: nn.Module) -> nn.Module:
    """The unroll of a bViT in which every step has masked weights of its own, equal at first."""
    view = copy.deepcopy(unroll(model))  # type: ignore[arg-type]
    for block in view.blocks:
        for place in PLACES.values():
            linear = block.get_submodule(place)
            linear.weight = nn.Parameter(linear.weight.detach().clone())
    return view


class Subnets:
    """K subnetworks in one module.

    Parameters
    ----------
    module : what computes: the model, its tied unroll or `untied`; trained in place.
    places : where its masked weights are, R a weight.
    masks : K * R of them by weight, those of subset k in rows k R to k R + R - 1.
    outputs : the class that subset k tells from the rest, or None.
    """

    def __init__(
        self, module: nn.Module, places: Places, masks: Masks, outputs: Sequence[int | None]
    ) -> None:
        self.module, self.outputs = module, tuple(outputs)
        own = dict(module.named_parameters(remove_duplicate=False))
        device = next(iter(own.values())).device
        rows = len(next(iter(places.values())))
        self.masks: list[dict[str, Tensor]] = []
        self.kept: list[dict[nn.Parameter, Tensor]] = []
        for k, output in enumerate(self.outputs):
            masked = {
                at: masks[name][k * rows + r].to(device)
                for name, of in places.items()
                for r, at in enumerate(of)
            }
            kept: dict[nn.Parameter, Tensor] = {}
            for at, mask in masked.items():  # tied steps: what any of them keeps may move
                kept[own[at]] = kept[own[at]] | mask if own[at] in kept else mask
            if output is not None:
                for parameter in _classifier(module).parameters():
                    chosen = torch.arange(len(parameter), device=device) == output
                    kept[parameter] = chosen.view(-1, *[1] * (parameter.ndim - 1))
            self.masks.append(masked)
            self.kept.append(kept)

    def weights(self, k: int) -> dict[str, Tensor]:
        """``theta * m_k`` by place in the module."""
        return {at: self.module.get_parameter(at) * mask for at, mask in self.masks[k].items()}

    def __call__(
        self, images: Tensor, k: int, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits of subnetwork k: of its own class ``(B,)``, or of all classes ``(B, C)``."""
        logits = functional_call(
            self.module, weights or self.weights(k), (images,), tie_weights=False
        )
        output = self.outputs[k]
        return logits if output is None else logits[:, output]

    def loss(self, images: Tensor, labels: Tensor, k: int, smoothing: float) -> Tensor:
        """Cross-entropy on a batch of subset k: binary for one-vs-rest."""
        logits, output = self(images, k), self.outputs[k]
        if output is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return F.binary_cross_entropy_with_logits(
            logits, (labels == output) * (1 - smoothing) + smoothing / 2
        )


Route = tuple[Subnets, int, int]


class Batches(Dataset[feed.Share | str]):
    """Batch j is of part ``j mod K``; those of a part go through its images again and again, in
    ever new orders.

    Of a class, half of a batch are its own images and half others, drawn alike. Every draw is a
    function of the seed, `key`, the part and how often its images were seen.
    """

    def __init__(
        self,
        recipe: Recipe,
        pool: Pool,
        parts: Sequence[Part],
        view: Augmentation,
        key: tuple[int, ...],
        total: int,
    ) -> None:
        self.pool, self.parts, self.view, self.total = pool, tuple(parts), view, total
        self.size, self.key = recipe.batch_size, (recipe.seed, *key)

    def __len__(self) -> int:
        return self.total

    def places(self, j: int) -> np.ndarray:
        """Places in the pool of the images of batch j."""
        m, k = divmod(j, len(self.parts))
        part = self.parts[k]
        own = own_images(part, self.size)
        drawn = [self._stream(part.own, m * own, own, (k, 0))]
        if part.output is not None:
            drawn.append(self._stream(part.others, m * (self.size - own), self.size - own, (k, 1)))
        return np.concatenate(drawn)

    def _stream(
        self, images: np.ndarray, begin: int, count: int, of: tuple[int, ...]
    ) -> np.ndarray:
        """Images `begin` to `begin + count` of one permutation after another."""
        n = len(images)
        passes = range(begin // n, (begin + count - 1) // n + 1)
        orders = [np.random.default_rng([*self.key, *of, p]).permutation(n) for p in passes]
        return images[np.concatenate(orders)[begin % n :][:count]]

    def __getitem__(self, j: int) -> feed.Share | str:
        places, images = self.places(j).tolist(), []
        draws = Draws((*self.key, j), self.view.width).table(len(places))
        for place, numbers in zip(places, draws, strict=True):
            try:
                pixels = torch.from_numpy(self.pool.read(place)).permute(2, 0, 1)
                images.append(self.view.cropped(pixels[None], numbers[None])[0])
            except UserError as error:  # out of a worker it would come as a traceback
                return str(error)
        return self.view.coloured(torch.stack(images), draws), torch.from_numpy(
            self.pool.labels[places]
        )


def own_images(part: Part, size: int) -> int:
    """How many images of a batch are the part's own: all, or half of them where it is told from the
    rest."""
    return size if part.output is None else max(size // 2, 1)


def train(
    subnets: Subnets,
    batches: Batches,
    recipe: Recipe,
    device: str,
    advance: Callable[[], object] = lambda: None,
) -> float:
    """Train in place over all batches, and return the mean loss of the last quarter of them.

    Warm-up and cosine take the shares of the recipe; weight decay, clipping, smoothing and bf16 are
    its.

    Raises
    ------
    UserError
        For a loss that is not finite.
    """
    module = subnets.module.train()
    free: set[str] = getattr(module, "no_weight_decay", set)()
    groups = [{"params": list(module.parameters()), "weight_decay": recipe.weight_decay}]
    if not recipe.decay_all:
        groups = param_groups_weight_decay(module, recipe.weight_decay, no_weight_decay_list=free)
    optimizer = MaskedAdam(groups, lr=recipe.lr)
    schedule = start.schedule(
        optimizer, replace(graft.shortened(recipe, 1), schedule="step"), len(batches)
    )
    losses: list[Tensor] = []
    drop: Any = getattr(module, "patch_drop", None)
    for j, (images, labels) in enumerate(feed.batches(cast("Any", batches), 0, recipe.workers)):
        k = j % len(batches.parts)
        schedule.step_update(j)
        if hasattr(drop, "prob"):
            drop.prob = recipe.patch_drop(recipe.epochs * j / len(batches))
        with drawn_for(*batches.key, j), _autocast(recipe, device):
            loss = subnets.loss(images.to(device), labels.to(device), k, recipe.label_smoothing)
            loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip or math.inf)
        optimizer.step(subnets.kept[k])
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        advance()
    tail = torch.stack(losses[-max(len(losses) // 4, 1) :]).float().mean().item()
    if not math.isfinite(tail):
        raise UserError(f"the loss is {tail}: a lower lr, or autocast=off")
    return tail


@torch.inference_mode()
def answers(
    routes: Sequence[Route], pool: Pool, view: Geometry, device: str, size: int = 250
) -> Tensor:
    """What every route says of every image, ``(routes, n)`` float32: its logit (one-vs-rest), or
    the class it names.

    Parameters
    ----------
    routes : subnetworks, the subset that is asked for, and the one whose mask they take for it.
    pool : images.
    view, device, size : how and where, so many images at once.
    """
    weights = [subnets.weights(taken) for subnets, _, taken in routes]
    for subnets, _, _ in routes:
        subnets.module.eval()
    said = []
    for begin in range(0, len(pool), size):
        places = range(begin, min(begin + size, len(pool)))
        images = torch.stack([view(pool.read(i))[0] for i in places]).to(device)
        logits = [
            subnets(images, k, own) for (subnets, k, _), own in zip(routes, weights, strict=True)
        ]
        said.append(
            torch.stack([(x if x.ndim == 1 else x.argmax(1)).float().cpu() for x in logits])
        )
    return torch.cat(said, 1)


def _autocast(recipe: Recipe, device: str) -> torch.autocast:
    on = precision(recipe.autocast, device) != "off"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=on)
