"""Binary masks over shared weights, one per step or subset of data.

At step t a masked matrix is ``W * M_t``. So one dense tensor holds a sparse network per step
(Fig. 5 and section 4.2.3 of bViT, arXiv 2605.10661; Routing the Lottery, arXiv 2601.22141). The
masked model is an unroll like any other, so every probe and analysis works on it. Masks are stored
bit-packed beside a checkpoint's weights; ``FOLDER@masked`` opens both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bvit_interp.errors import CheckpointError, UserError, choices
from bvit_interp.models import tensor_file
from bvit_interp.models.unroll import unroll
from bvit_interp.results import weights_hash

FILE = "masks.safetensors"
PLACES = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""Component of a step's masks -> the module of the block whose weight it masks; biases and norms
are not masked."""


class Masks(Mapping[str, Tensor]):
    """K masks over the same tensors: component -> bool ``(K, *shape of the weight)``, true where a
    weight is active.

    Parameters
    ----------
    of : component -> masks. In masks of steps, the components are those of `PLACES`, and K = T. In
        masks of subsets of the data, they are names of parameters.
    blocks : in masks of steps, the index of the stored block that each step uses; by default 0 for
        all. `union` joins the masks of the same block.

    Raises
    ------
    UserError
        For tensors that are not bool, or have different numbers of masks, and for a wrong number of
        `blocks`.
    """

    def __init__(self, of: Mapping[str, Tensor], blocks: tuple[int, ...] | None = None) -> None:
        counts = {name: len(mask) for name, mask in of.items()}
        if (
            not counts
            or len(set(counts.values())) > 1
            or any(mask.dtype != torch.bool for mask in of.values())
        ):
            raise UserError(
                f"masks must be bool tensors with the same number of masks, got {counts or 'none'}"
            )
        self.of = dict(of)
        self.count = next(iter(counts.values()))
        self.blocks = (0,) * self.count if blocks is None else blocks
        if len(self.blocks) != self.count:
            raise UserError(f"{self.count} masks need as many blocks, got {len(self.blocks)}")

    def __getitem__(self, component: str) -> Bool[Tensor, "masks ..."]:
        return self.of[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)

    def __deepcopy__(self, memo: object) -> Masks:
        return self  # never changed, so an unroll shares them as it shares weights

    def flat(self, i: int) -> Bool[Tensor, " weights"]:
        """Mask i (from 0) of all components as one vector ``(W,)``."""
        return torch.cat([mask[i].flatten() for mask in self.of.values()])

    def density(self, component: str | None = None) -> Tensor:
        """Share of active weights of each mask ``(K,)``, 0..1, in a component or in all of them."""
        if component is not None:
            return self.of[component].flatten(1).double().mean(1)
        return torch.stack([self.flat(i).double().mean() for i in range(self.count)])

    def union(self) -> dict[str, Tensor]:
        """Weights that any mask keeps: component -> bool ``(blocks, *shape)``."""
        rows = [
            [i for i, block in enumerate(self.blocks) if block == b] for b in sorted({*self.blocks})
        ]
        return {
            name: torch.stack([mask[own].any(0) for own in rows]) for name, mask in self.of.items()
        }

    def fingerprint(self) -> str:
        """A hash of the masks, 16 hex digits."""
        digest = hashlib.sha256(repr(self.blocks).encode())
        for name, bits in self._packed().items():
            digest.update(
                repr((name, tuple(self.of[name].shape))).encode() + bits.numpy().tobytes()
            )
        return digest.hexdigest()[:16]

    def _packed(self) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy().ravel()))
            for name, mask in self.of.items()
        }

    def save(self, path: Path, model: nn.Module) -> None:
        """Write the masks, eight weights per byte, with the hash of `model`'s weights."""
        packed = self._packed()
        shapes = {name: tuple(mask.shape) for name, mask in self.of.items()}
        about = {"shapes": shapes, "blocks": self.blocks, "weights": weights_hash(model)}
        tensor_file.write(path, "masks", about, packed)

    @classmethod
    def load(cls, path: Path, model: nn.Module | None = None) -> Masks:
        """Read masks; with `model`, refuse masks of other weights, steps or shapes."""
        if not path.is_file():
            raise CheckpointError(f"no masks at {path}")
        try:
            about, packed = tensor_file.read(path, "masks")
            of = _read(about, packed)
            masks, weights = cls(of, tuple(about["blocks"])), about.get("weights")
        except tensor_file.UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: truncated or not a file of masks ({reason})") from error
        if model is not None and (found := _foreign(masks, weights, model)):
            raise CheckpointError(f"{path}: {found}")
        return masks


def _read(about: Any, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The unpacked masks of a file; a ValueError if its contents do not fit its facts."""
    if not isinstance(about, dict) or not isinstance(about.get("shapes"), dict):
        raise ValueError("it does not say the shapes of masks")
    shapes, blocks = about["shapes"], about.get("blocks")
    if set(shapes) != set(packed):
        raise ValueError(f"masks of {choices(packed)}, shapes of {choices(shapes)}")
    if not isinstance(blocks, list) or not all(type(b) is int and b >= 0 for b in blocks):
        raise ValueError(f"blocks must be whole numbers, got {str(blocks)[:60]}")
    for name, shape in shapes.items():
        sizes = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        if not sizes or len(shape) < 2:
            raise ValueError(f"{name} cannot have the shape {str(shape)[:60]}")
        bits = packed[name]
        if bits.dtype != torch.uint8 or bits.ndim != 1:
            raise ValueError(f"{name} is {bits.dtype} of {bits.ndim} axes, not a row of bytes")
    return {name: _unpacked(packed[name].numpy(), shape) for name, shape in shapes.items()}


def _unpacked(bits: np.ndarray, shape: list[int]) -> Tensor:
    n = math.prod(shape)
    if bits.size != -(-n // 8):
        raise ValueError(f"{bits.size} bytes for masks of {tuple(shape)}")
    return torch.from_numpy(np.unpackbits(bits, count=n).astype(bool)).reshape(shape)


def _foreign(masks: Masks, weights: Any, model: nn.Module) -> str | None:
    """Why masks of these weights are not those of a model, or None."""
    if set(masks) == set(PLACES) and isinstance(model, VisionTransformer):
        view = unroll(model)
        if found := _misfit(view, masks):
            return found
        if (blocks := _stored_blocks(view)) != masks.blocks:
            return f"masks of the stored blocks {masks.blocks}, the model has {blocks}"
    else:
        own = dict(model.named_parameters())
        for name, mask in masks.items():
            if name not in own:
                return f"masks of {name}, which the model does not have"
            found_shape, wanted = tuple(mask.shape[1:]), tuple(own[name].shape)
            if found_shape != wanted:
                return f"masks of {name} are {found_shape}, its weight is {wanted}"
    return None if weights == weights_hash(model) else "masks of other weights than these"


def full(model: VisionTransformer) -> Masks:
    """Masks that keep every weight of every step."""
    view = unroll(model)
    weights = {
        name: [block.get_submodule(place).weight for block in view.blocks]
        for name, place in PLACES.items()
    }
    return Masks(
        {name: torch.ones(len(of), *of[0].shape, dtype=torch.bool) for name, of in weights.items()},
        _stored_blocks(view),
    )


def _stored_blocks(view: VisionTransformer) -> tuple[int, ...]:
    """The index of the stored block that each step uses, known by the weight that they share."""
    stored: dict[int, int] = {}
    weights = [block.get_submodule(PLACES["qkv"]).weight for block in view.blocks]
    return tuple(stored.setdefault(id(weight), len(stored)) for weight in weights)


class Masked(nn.Module):
    """The parametrization ``W -> W * M``; only active weights get gradients."""

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "*weight"]) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Float[Tensor, "*weight"]) -> Float[Tensor, "*weight"]:
        return weight * self.mask


def masked(model: VisionTransformer, masks: Masks, *, baked: bool = False) -> VisionTransformer:
    """The unroll of `model` in which step t uses ``W * M_t``.

    Parameters
    ----------
    model : a `BViT` or a stacked ViT.
    masks : one per step.
    baked : multiply only once: each step gets frozen weights of its own, for evaluation. Otherwise
        the weights stay the model's Parameters and are multiplied in every forward, for training.

    Raises
    ------
    UserError
        For masks of another number of steps, other shapes or other components.
    """
    view = unroll(model)
    if found := _misfit(view, masks):
        raise UserError(found)
    for t, block in enumerate(view.blocks):
        # the inner updates of a memory belong to the step
        for part in (
            block,
            *getattr(block, "inner", ()),
        ):
            put_on(part, masks, t, baked=baked)
    view.masks = masks  # type: ignore[assignment]
    return view


def put_on(block: nn.Module, masks: Masks, t: int, *, baked: bool = False) -> None:
    """Put mask `t` (from 0) on a block in place, as `masked` does for every step."""
    for name, place in PLACES.items():
        linear: Any = block.get_submodule(place)
        mask = masks[name][t].to(linear.weight.device)
        if baked:
            linear.weight = nn.Parameter(linear.weight.detach() * mask, requires_grad=False)
        else:
            parametrize.register_parametrization(linear, "weight", Masked(mask))


def masks_of(model: nn.Module) -> Masks | None:
    """The masks of a model made by `masked`, or None."""
    return getattr(model, "masks", None)


def _misfit(view: VisionTransformer, masks: Masks) -> str | None:
    """Why the masks are not of this unroll's steps, or None."""
    if set(masks) != set(PLACES):
        return f"masks of {choices(masks)}; expected those of {', '.join(PLACES)}"
    if masks.count != len(view.blocks):
        return f"masks of {masks.count} steps for a model of {len(view.blocks)}"
    for name, place in PLACES.items():
        linear: Any = view.blocks[0].get_submodule(place)
        found, wanted = tuple(masks[name].shape[1:]), tuple(linear.weight.shape)
        if found != wanted:
            return f"masks of {name} are {found}, its weight is {wanted}"
    return None
