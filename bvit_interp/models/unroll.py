"""The tied unroll: one module per step around the same parameters.

Tools address modules (captum a layer, lucent a name, `torch.nn.utils.prune` a weight), and on a
recurrent model silently answer for the first or the last of its T calls. `unroll(model)` gives each
step a module of its own around the same Parameter objects: bit-equal output, no extra memory for
weights, and any tool that works on a stacked ViT works on a step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.models import stepping
from bvit_interp.models.bvit import BViT
from bvit_interp.models.dry_run import counts_of, dry, dry_run, example_images
from bvit_interp.models.looped import CalledSteps, Model, answer_of
from bvit_interp.models.loops import find_calls
from bvit_interp.models.memory import MemoryBlock, MemorySteps, UnrolledSteps, as_plain
from bvit_interp.models.prefix import check_state
from bvit_interp.models.steps import Steps, TimedBlock
from bvit_interp.models.tied import clone, tensors_of
from bvit_interp.models.token_state import find_tokens

_TIED = "tied_to_a_model"
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def unroll(
    model: nn.Module,
    steps: int | None = None,
    *,
    loop: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    prefix: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
) -> Any:
    """A view of `model` in which step t is the module ``blocks[t - 1]``, whose output is z_t.

    Every module is cloned, and every Parameter and buffer is shared: the view follows the training
    of the model, and hooks that a tool leaves on the view never reach the model. Hooks that the
    model already has are copied, so a pruned model unrolls pruned. Save the model, not the view.

    A `BViT`, or a timm `VisionTransformer` that runs each of its blocks once, unrolls to a
    `VisionTransformer`. In a model with a memory the step's own parts are the block that gives z_t,
    and inner update i of the memory is the ordinary block ``blocks[t - 1].inner[i - 1]``. Any other
    model, and any model for which an option other than `steps` is given, unrolls to a
    `CalledSteps`, by the calls that a dry run of two images sees.

    Parameters
    ----------
    model : any module that maps images ``(B, C, H, W)`` to logits or features.
    steps : number of steps, >= 1; by default as many as the model has. Beyond them a `BViT` goes on
        applying its blocks in the same order (with ``order="repeat"``, its last block; a time
        embedding stays at its last row). A stacked ViT and a loop of another model can only be cut.
    loop : path of the block that is called repeatedly, or of the list of blocks. By default what
        runs more than once, else the one list of blocks.
    image_size : size of the images of the dry run, if the model does not say it.
    prefix : kinds of the tokens before the patches ("cls", "dist", "reg"), if the names of the
        model's parameters do not tell them.
    grid : rows and columns of patches, if the first convolution does not tell them.

    Raises
    ------
    UserError
        For a model whose steps are not clear, and a number of steps that the model cannot take.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps must be >= 1, got {steps}")
    if "forward" in vars(model):
        raise UserError(
            f"the forward of this {type(model).__name__} was replaced on the instance, where it"
            " still calls the modules of the model it was taken from: replace it in a subclass"
        )
    told = {"loop": loop, "image_size": image_size, "prefix": prefix, "grid": grid}
    told = {name: value for name, value in told.items() if value is not None}
    if is_unrolled(model) and told:
        raise UserError(f"this is an unroll: give {', '.join(told)} where the model is unrolled")
    if isinstance(model, CalledSteps):
        return _cut(copy.deepcopy(model, tensors_of(model)), steps)
    if is_unrolled(model) and steps not in (None, len(model.blocks)):  # type: ignore[arg-type]
        raise UserError(
            f"this is an unroll of {len(model.blocks)} steps:"  # type: ignore[arg-type]
            " unroll the model it came from instead"
        )
    if isinstance(model, VisionTransformer) and not told:
        view = _unroll_vit(model, None)
        if _is_its_own_unroll(view):
            return view if steps in (None, len(view.blocks)) else _unroll_vit(model, steps)
    images = example_images(model, image_size)
    runs, output = dry_run(model, images)
    calls = find_calls(model, runs, loop)
    called = [run for run in runs if run.path in set(calls)]
    check_state(called[0].given, len(images))
    count = called[0].given[1]
    entered = (run.fixed for run in runs if len(run.given) == 3 and run.given[1] == count)
    fixed, tokens = next(entered, ()), find_tokens(called)
    by_call = CalledSteps(model, calls, images, output, fixed, prefix, grid, tokens)
    setattr(by_call, _TIED, True)
    return _cut(by_call, steps)


def with_steps(model: nn.Module) -> Model:
    """The model as analyses take it: itself where its own blocks are its steps, else its unroll.

    Raises
    ------
    UserError
        As `unroll`.
    """
    if isinstance(model, CalledSteps) or is_unrolled(model):
        return model  # type: ignore[return-value]
    view: Model = unroll(model)
    return view if isinstance(view, CalledSteps) else model  # type: ignore[return-value]


def for_any_model(
    measure: Callable[Concatenate[Mapping[str, Model], Rest], Result],
) -> Callable[Concatenate[Mapping[str, nn.Module], Rest], Result]:
    """Decorate a function of a mapping name -> model: it gets each as `with_steps` returns it."""

    @functools.wraps(measure)
    def of_any(models: Mapping[str, nn.Module], *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        return measure({name: with_steps(each) for name, each in models.items()}, *args, **kwargs)

    return of_any


def run_on(model: nn.Module, steps: int) -> Any:
    """The unroll with `steps` steps, also beyond the trained ones; a stack, another model's loop
    and an unroll give at most as many steps as they have.

    A `BViT` with as many blocks as steps, and more than one, is a stack: its first block is not
    applied again.
    """
    blocks: Any = getattr(model, "blocks", None)
    if isinstance(blocks, Steps) and not 1 < len(list(blocks.children())) == len(blocks):
        return unroll(model, steps)
    view = unroll(model)
    return view if steps >= len(view.blocks) else unroll(model, steps)


def is_unrolled(model: nn.Module) -> bool:
    """Whether `model` is a view made by `unroll`."""
    return getattr(model, _TIED, False)


def _cut(view: CalledSteps, steps: int | None) -> CalledSteps:
    """The view with its first `steps` steps; all for None."""
    if steps is None or steps == len(view.blocks):
        return view
    if steps > len(view.blocks):
        raise UserError(
            f"{' and '.join(view.loop)} runs {len(view.blocks)} times in the model's own forward"
            f" and cannot take {steps} steps"
        )
    return view.cut(steps)


def _unroll_vit(model: VisionTransformer, steps: int | None) -> VisionTransformer:
    """The view of a model that runs its `blocks` in turn."""
    container = model.blocks if isinstance(model.blocks, Steps) else None
    steps = len(model.blocks) if steps is None else steps
    if container is None and steps > len(model.blocks):
        raise UserError(
            f"this model is a stack of {len(model.blocks)} blocks and cannot take {steps} steps"
        )
    shared = tensors_of(model)
    blocks = [
        clone(model.blocks[i], shared) if container is None else _step(container, i, shared)
        for i in range(steps)
    ]
    remembers = isinstance(model.blocks, (MemorySteps, UnrolledSteps))
    unrolled = UnrolledSteps(*blocks) if remembers else nn.Sequential(*blocks)
    view = copy.deepcopy(model, {**shared, id(model.blocks): unrolled})
    view.blocks.training = model.blocks.training
    view.feature_info = [{**model.feature_info[0], "module": f"blocks.{i}"} for i in range(steps)]
    setattr(view, _TIED, True)
    return view


def _is_its_own_unroll(view: VisionTransformer) -> bool:
    """Whether a dry run calls the blocks in turn, each once, and nothing like a block twice, and
    whether the model's output is that of timm's embedding, the blocks and timm's head in turn."""
    images = example_images(view)
    runs, output = dry_run(view, images)
    kept = [run for run in runs if run.keeps_tokens and any(True for _ in run.module.children())]
    steps = [f"blocks.{i}" for i in range(len(view.blocks))]
    if [run.path for run in kept if run.path in steps] != steps:
        return False
    if set(counts_of(kept).values()) != {1}:
        return False
    if type(view).forward_features in _STOCK or images.is_meta:
        return True
    with dry(view):
        answer = stepping.answer(view, stepping.proceed(view, stepping.embed(view, images)))
    return torch.allclose(answer, answer_of(output), rtol=1e-3, atol=1e-4)


_STOCK = (VisionTransformer.forward_features, BViT.forward_features)
"""Forwards that do nothing between the blocks."""


def _step(container: Steps, i: int, shared: dict[int, torch.Tensor]) -> nn.Module:
    """The clone for application i (from 0), with its own row of the time embedding and its own
    inner updates, if there are any."""
    stored = list(container._modules.values())[container.block_index(i)]
    block: Any = clone(stored, shared)
    if isinstance(block, TimedBlock) and container.step_embed is not None:
        block.own_step(container.step_embed, container.embed_index(i))
    if isinstance(block, MemoryBlock):
        updates = range(block.memory.updates(i))
        block.own_updates([as_plain(cast(Block, clone(stored, shared))) for _ in updates])
    return block
