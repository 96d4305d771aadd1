"""Early exits: classifiers at chosen steps, and runs that stop there.

Appendix B of bViT (arXiv 2605.10661): exit e predicts ``y_e = C_e(z_{t_e}^cls)`` from the CLS token
of the frozen model, with confidence ``max softmax(y_e)``. An image leaves at the first exit whose
confidence exceeds the threshold, else it gets the prediction of the model's own head after step T.
The paper does not define C_e. Here it is a weight-only RMSNorm and a Linear; the norm is needed
because the residual grows with t.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bvit_interp.errors import CheckpointError, UserError, choices
from bvit_interp.metrics.exits import is_confident
from bvit_interp.models import tensor_file
from bvit_interp.models.stepping import advance, answer, device_of, embed, states
from bvit_interp.results import weights_hash

FILE = "exits.safetensors"


class Exits(nn.Module):
    """One classifier after each step of `steps`, all of them computed at once.

    Parameters
    ----------
    steps : t_e, ascending, each before the last step of the model.
    width : D.
    classes : C.
    """

    def __init__(self, steps: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.steps = steps
        self.norm = nn.Parameter(torch.ones(len(steps), width))
        self.weight = nn.Parameter(torch.zeros(len(steps), classes, width))
        self.bias = nn.Parameter(torch.zeros(len(steps), classes))

    def forward(
        self, states: Float[Tensor, "batch exits width"]
    ) -> Float[Tensor, "batch exits classes"]:
        """Logits for the CLS tokens after the exits' steps."""
        return (
            torch.einsum("bed,ecd->bec", self._normed(states) * self.norm, self.weight) + self.bias
        )

    def one(self, e: int, state: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """Logits of exit e (from 0) for CLS tokens."""
        return F.linear(self._normed(state) * self.norm[e], self.weight[e], self.bias[e])

    @staticmethod
    def _normed(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def save(self, path: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
        """Write the exits and the hash of `model`'s weights, with facts `about` their training."""
        kept = {"steps": self.steps, "weights": weights_hash(model), **about}
        tensor_file.write(path, "exits", kept, self.state_dict())

    @classmethod
    def load(cls, path: Path, model: VisionTransformer) -> Exits:
        """Read the exits of `model`.

        Raises
        ------
        CheckpointError
            For a missing or damaged file, NaN or infinite weights, exits of another model's
            weights, and exits whose steps, width or classes do not fit the model.
        """
        if not path.is_file():
            raise CheckpointError(
                f"no exits at {path}: make them with `bvit-interp early-exit train`"
            )
        try:
            about, tensors = tensor_file.read(path, "exits")
            steps, weights = about["steps"], about.get("weights")
        except tensor_file.UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: truncated or not a file of exits ({reason})") from error
        if weights != weights_hash(model):
            raise CheckpointError(f"{path}: exits of another model's weights")
        if found := _misfit(steps, tensors, model):
            raise CheckpointError(f"{path}: {found}")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise CheckpointError(f"{path}: the exits hold NaN or infinite weights")
        exits = cls(tuple(steps), model.embed_dim, model.num_classes)
        exits.load_state_dict(tensors)
        return exits.to(device_of(model)).eval()


def _misfit(steps: Any, tensors: Mapping[str, Tensor], model: VisionTransformer) -> str | None:
    """Why what a file holds cannot be exits of the model, or None."""
    whole = isinstance(steps, list) and all(type(step) is int for step in steps)
    if not whole or not steps or steps != sorted(set(steps)):
        return f"the steps of exits must be whole numbers, ascending, got {str(steps)[:60]}"
    try:
        check_exits(tuple(steps), model)
    except UserError as error:
        return str(error)
    wanted = Exits(tuple(steps), model.embed_dim, model.num_classes).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if found != shapes:
        return f"the exits have tensors {found}, this model's would be {shapes}"
    others = [
        f"{name} is {each.dtype}" for name, each in tensors.items() if not each.is_floating_point()
    ]
    return f"exits are floating numbers, but {choices(others)}" if others else None


def check_exits(steps: tuple[int, ...], model: VisionTransformer) -> tuple[int, ...]:
    """Check the steps of exits, and return them in ascending order.

    Raises
    ------
    UserError
        For no exit, a repeated one, one that is not before the last step, and a model without a CLS
        token.
    """
    last = len(model.blocks)
    if last < 2:
        raise UserError("a model of one step has no earlier step at which to exit")
    if not steps or len(set(steps)) < len(steps) or not all(1 <= t < last for t in steps):
        raise UserError(
            f"exits must be different steps of 1..{last - 1}, got {steps}; the head is after {last}"
        )
    if not model.has_class_token:
        raise UserError("exits read the CLS token; this model has none")
    return tuple(sorted(steps))


def exit_logits(
    unrolled: VisionTransformer, exits: Exits, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch exits classes"]:
    """Logits of every exit and, last, of the model's own head, for images that run all steps.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : normalised.
    """
    logits = []
    for state in states(unrolled, images):
        if state.step in exits.steps:
            logits.append(exits.one(exits.steps.index(state.step), state.tokens[:, 0]))
    return torch.stack([*logits, answer(unrolled, state)], 1)


@torch.inference_mode()
def run_with_exits(
    unrolled: VisionTransformer,
    exits: Exits,
    images: Float[Tensor, "batch channels height width"],
    threshold: float,
) -> tuple[Float[Tensor, "batch classes"], Int[Tensor, " batch"]]:
    """Run a batch; images that leave are dropped, so that the later steps cost less.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : normalised.
    threshold : tau, 0..1; an image leaves where its confidence exceeds it.

    Returns
    -------
    The logits, and the step after which each image left.
    """
    state, last = embed(unrolled, images), len(unrolled.blocks)
    remaining = torch.arange(len(images), device=images.device)
    left_at = torch.full_like(remaining, last)
    logits: Tensor | None = None
    for t in range(1, last + 1):
        state = advance(unrolled, state)
        if t == last:
            predicted = answer(unrolled, state)
            leaves = torch.ones(len(remaining), dtype=torch.bool, device=images.device)
        elif t in exits.steps:
            predicted = exits.one(exits.steps.index(t), state.tokens[:, 0])
            leaves = is_confident(predicted.softmax(-1).amax(-1), threshold)
        else:
            continue
        if logits is None:
            logits = predicted.new_empty(len(images), predicted.shape[-1])
        leaving = remaining[leaves]
        logits[leaving], left_at[leaving] = predicted[leaves].to(logits.dtype), t
        remaining = remaining[~leaves]
        if not len(remaining):
            break
        if len(leaving):
            state = state[~leaves]
    assert logits is not None
    return logits, left_at
