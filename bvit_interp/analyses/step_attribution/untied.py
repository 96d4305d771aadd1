"""A copy of a model whose every step has its own parameters.

The gradient of a shared weight is a sum over the steps that apply it, ``dL/dW = sum_t dL/dW_t``,
and autograd returns the sum only. In the copy the parameters of the steps are equal in value but
not shared, so their gradients are the terms of the sum, exactly. A stacked ViT is copied the same
way; each of its weights has one term.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite
from bvit_interp.models.looped import Model
from bvit_interp.models.masks import PLACES
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe

LAYERS = ("q", "k", "v", "proj", "fc1", "fc2", "vectors", "all")
"""Groups of a block's weights: its six matrices, all biases and norm weights together, and
everything."""
MATRICES = (
    tuple(f"{module}.weight" for module in PLACES.values()),
    ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"),
    (
        "self_attention.in_proj_weight",
        "self_attention.out_proj.weight",
        "mlp.0.weight",
        "mlp.3.weight",
    ),
)
"""The names of qkv, proj, fc1 and fc2 in a block of timm, `nn.TransformerEncoderLayer` and
torchvision."""


class Untied:
    """A copy of a model in which every step has its own parameters; the model is never written.

    Inner updates of a memory belong to their step.

    Parameters
    ----------
    model : any model that `unroll` takes, with blocks of qkv, proj, fc1 and fc2 (`MATRICES`), all
        of one shape.
    dtype : of the copy.

    Attributes
    ----------
    model : the copy; call it for logits.
    layout : the order of the weights.
    weights : parameters of each stored block, ``(blocks, weights)``.

    Raises
    ------
    UserError
        For other blocks, and for weights that a pruning hook or a parametrization computes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        unrolled = unroll(model)
        self.layout = Layout.of(unrolled)
        unrolled = copy.deepcopy(unrolled)  # a copy whose steps are still tied to one another
        for i in range(len(unrolled.blocks)):
            unrolled.blocks[i] = copy.deepcopy(unrolled.blocks[i])
        self.model = unrolled.to(dtype).eval().requires_grad_(False)
        self.parameters: list[list[nn.Parameter]] = [
            [block.get_parameter(name) for name in self.layout.names] for block in unrolled.blocks
        ]
        for parameter in itertools.chain(*self.parameters):
            parameter.requires_grad_(True)
        first_steps = [steps[0] for steps in self.layout.steps_of_blocks]
        self.weights: Float[Tensor, "blocks weights"] = torch.stack(
            [_flat(self.parameters[step]) for step in first_steps]
        )

    def gradients(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, "steps weights"]:
        """Terms of the gradient of the cross-entropy, in nats, summed over the images."""
        with torch.enable_grad():
            logits = self.model(images.to(self.weights))
            loss = F.cross_entropy(logits, labels.to(self.weights.device), reduction="sum")
            gradients = torch.autograd.grad(loss, list(itertools.chain(*self.parameters)))
        count = len(self.layout.names)
        terms = [_flat(gradients[i : i + count]) for i in range(0, len(gradients), count)]
        return check_finite(torch.stack(terms), "gradients")

    @contextmanager
    def pruned(self, masks: Bool[Tensor, "masks matrix_weights"]) -> Iterator[None]:
        """Every step's matrices are ``W * M`` while the context lasts.

        Parameters
        ----------
        masks : one per step, or one per stored block for all its steps; over the weights of
            matrices only.
        """
        try:
            for step, block in enumerate(self.layout.blocks):
                own_mask = len(masks) == len(self.layout.blocks)
                self._set_matrices(step, masks[step if own_mask else block])
            yield
        finally:
            for step in range(len(self.layout.blocks)):
                self._set_matrices(step, None)

    @torch.no_grad()
    def _set_matrices(self, step: int, mask: Tensor | None) -> None:
        row = self.weights[self.layout.blocks[step], : self.layout.matrix_weights]
        if mask is not None:
            row = row * mask.to(row)
        begin = 0
        for parameter in self.parameters[step][: len(PLACES)]:
            parameter.copy_(row[begin : begin + parameter.numel()].view_as(parameter))
            begin += parameter.numel()


@dataclass(frozen=True, eq=False)
class Layout:
    """The parameters of a block in one row: the four of `MATRICES` first, then the vectors.

    A time embedding is left out, because each of its rows belongs to one step anyway.

    Attributes
    ----------
    blocks : which stored block each step applies, T numbers.
    names, shapes : of the parameters, in order.
    layers : name in `LAYERS`, without "all" -> its slice of the row.
    heads, neurons : head and neuron of every weight; the number of heads or neurons where a weight
        belongs to none.
    matrix_weights : how many weights, from the first, belong to matrices.
    """

    blocks: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    layers: dict[str, slice]
    heads: Int[Tensor, " weights"]
    neurons: Int[Tensor, " weights"]
    matrix_weights: int

    @classmethod
    def of(cls, unrolled: Model) -> Layout:
        """The common layout of an unroll's blocks.

        Raises
        ------
        UserError
            If there is none.
        """
        layouts, blocks, stored = set(), list[int](), dict[int, int]()
        for step, block in enumerate(unrolled.blocks, start=1):
            parameters = _block_parameters(step, block)
            layouts.add((tuple(parameters), tuple(each.shape for each in parameters.values())))
            first = next(iter(parameters.values()))
            blocks.append(stored.setdefault(id(first), len(stored)))
        if len(layouts) > 1:
            raise UserError(
                "gradients of steps are compared weight by weight: the model's blocks differ in"
                " shape"
            )
        ((names, shapes),) = layouts
        qkv, proj, fc1, fc2 = shapes[:4]
        sizes = [qkv.numel() // 3] * 3 + [proj.numel(), fc1.numel(), fc2.numel()]
        sizes.append(sum(shape.numel() for shape in shapes[4:]))
        ends = list(itertools.accumulate(sizes))
        layers = {
            layer: slice(end - size, end)
            for layer, size, end in zip(LAYERS, sizes, ends, strict=False)
        }
        probe = Probe(unrolled)
        head = torch.arange(qkv[0] // 3) // probe.head_width
        heads = torch.full((ends[-1],), probe.num_heads)
        heads[: layers["proj"].stop] = torch.cat(
            [head.repeat_interleave(qkv[1]).repeat(3), head.repeat(proj[0])]
        )
        neuron = torch.arange(fc1[0])
        neurons = torch.full((ends[-1],), len(neuron))
        neurons[layers["fc1"].start : layers["fc2"].stop] = torch.cat(
            [neuron.repeat_interleave(fc1[1]), neuron.repeat(fc2[0])]
        )
        return cls(tuple(blocks), names, shapes, layers, heads, neurons, layers["fc2"].stop)

    @property
    def slices(self) -> list[slice]:
        """The slice of each of the `LAYERS`, "all" included."""
        return [*self.layers.values(), slice(None)]

    @property
    def steps_of_blocks(self) -> list[list[int]]:
        """The steps (from 0) of each stored block."""
        return [
            [step for step, own in enumerate(self.blocks) if own == block]
            for block in range(max(self.blocks) + 1)
        ]


def _block_parameters(step: int, block: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, the matrices first; an error for other blocks than expected."""
    parameters = {
        name: parameter
        for name, parameter in block.named_parameters()
        if not name.startswith("inner.") and name != "step_embed"
    }
    matrices = next((names for names in MATRICES if all(name in parameters for name in names)), ())
    other = [
        name
        for name, parameter in parameters.items()
        if parameter.ndim > 1 and name not in matrices
    ]
    if other or not matrices:
        wrong = f"also has {', '.join(other)}"
        if not matrices:
            instead = f" and has {', '.join(other)}" if other else ""
            wrong = f"lacks some of them, or computes a weight from others{instead}"
        raise UserError(
            f"step {step}: gradients are split over blocks of qkv, proj, fc1 and fc2; this {wrong}"
        )
    ordered = (*matrices, *(name for name in parameters if name not in matrices))
    return {name: parameters[name] for name in ordered}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
