"""The tied unroll: one module per step around the same parameters.

Tools address modules (captum a layer, lucent a name, `torch.nn.utils.prune` a weight), and on a
recurrent model silently answer for the first or the last of its T calls. `unroll(model)` gives each
step a module of its own around the same Parameter objects: bit-equal output, no extra memory for
weights, and any tool that works on a stacked ViT works on a step.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.models.memory import MemoryBlock, MemorySteps, UnrolledSteps, as_plain
from bvit_interp.models.steps import Steps, TimedBlock

_TIED = "tied_to_a_model"


def unroll(model: VisionTransformer, steps: int | None = None) -> VisionTransformer:
    """A view of `model` in which step t is the module ``blocks[t - 1]``, whose output is z_t.

    In a model with a memory that module's own parts are the block that gives z_t, and inner update
    i of the memory is the ordinary block ``blocks[t - 1].inner[i - 1]``.

    Every module is cloned, every Parameter and buffer shared: training the model is seen by the
    view, and hooks that a tool leaves on the view never reach the model. Hooks the model already
    bears are copied, so that a pruned model unrolls pruned. A stacked ViT unrolls to itself, tied.
    Save the model, not the view.

    Parameters
    ----------
    model : a `BViT`, or any timm `VisionTransformer` (its blocks are its steps).
    steps : how many steps; by default as many as the model takes. Beyond them a `BViT` goes on
        applying its blocks in the same order (a time embedding stays at its last row); a stacked
        ViT can only be cut.

    Raises
    ------
    UserError
        For another kind of model, or a number of steps that cannot be had.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"only a BViT or a timm VisionTransformer unrolls, got {type(model).__name__}"
        )
    container = model.blocks if isinstance(model.blocks, Steps) else None
    steps = len(model.blocks) if steps is None else steps
    if steps < 1:
        raise UserError(f"steps must be >= 1, got {steps}")
    if is_unrolled(model) and steps != len(model.blocks):
        raise UserError(
            f"this is an unroll of {len(model.blocks)} steps: unroll the model it came from instead"
        )
    if container is None and steps > len(model.blocks):
        raise UserError(
            f"this model is a stack of {len(model.blocks)} blocks and cannot take {steps} steps"
        )
    shared = _tensors(model)
    blocks = []
    for i in range(steps):
        if container is not None:
            blocks.append(_step(container, i, shared))
        else:
            blocks.append(copy.deepcopy(model.blocks[i], dict(shared)))
    remembers = isinstance(model.blocks, (MemorySteps, UnrolledSteps))
    unrolled = UnrolledSteps(*blocks) if remembers else nn.Sequential(*blocks)
    view = copy.deepcopy(model, {**shared, id(model.blocks): unrolled})
    view.blocks.training = model.blocks.training
    view.feature_info = [{**model.feature_info[0], "module": f"blocks.{i}"} for i in range(steps)]
    setattr(view, _TIED, True)
    return view


def run_on(model: VisionTransformer, steps: int) -> VisionTransformer:
    """The unroll of `steps` steps, also past the trained ones; of a stack, or an unroll, at most as
    many as it has.

    A `BViT` with as many blocks as steps, and more than one, is a stack: its first block does not
    come again.
    """
    stored, own = len(list(model.blocks.children())), len(model.blocks)
    recurrent = isinstance(model.blocks, Steps) and not 1 < stored == own
    return unroll(model, steps if recurrent else min(steps, own))


def is_unrolled(model: nn.Module) -> bool:
    """Whether `model` is a view made by `unroll`."""
    return getattr(model, _TIED, False)


def _tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Every tensor of the model by id: parameters, buffers, and the plain attributes pruning
    computes."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    # non-leaves cannot be copied
    plain = (value for value in attributes if isinstance(value, torch.Tensor))
    return {
        id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers(), plain)
    }


def _step(container: Steps, i: int, shared: dict[int, torch.Tensor]) -> nn.Module:
    """The clone for application i (from 0), owning its row of the time embedding and its inner
    updates, if any."""
    stored: Any = list(container._modules.values())[container.block_index(i)]
    block = copy.deepcopy(stored, dict(shared))
    if isinstance(block, TimedBlock) and container.step_embed is not None:
        block.own_step(container.step_embed, container.embed_index(i))
    if isinstance(block, MemoryBlock):
        updates = range(block.memory.updates(i))
        block.own_updates([as_plain(copy.deepcopy(stored, dict(shared))) for _ in updates])
    return block
