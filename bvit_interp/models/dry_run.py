"""A dry run shows which modules of a model run, how often.

The loop of a model is observed here; it is not inferred from the type of the model. A dry run is
one forward of two images of the model's size, without gradients, in eval mode, on a copy that
shares the weights.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bvit_interp.errors import UserError, first_line
from bvit_interp.models.attention import unfused
from bvit_interp.models.layout import channels_of
from bvit_interp.models.nested import Path, at_path, first_tensor, token_paths
from bvit_interp.models.tied import tensors_of

IMAGES = 2
"""Number of images of a dry run: what differs between them depends on the image."""


@dataclass(frozen=True, eq=False)
class Argument:
    """A tensor among the arguments of a module: its path in ``[args, kwargs]``, and a copy."""

    path: Path
    value: Tensor


@dataclass(frozen=True, eq=False)
class Ran:
    """One run of a module: the shapes of the tokens that it got and returned.

    Attributes
    ----------
    given : shape of the argument that may be its tokens: the first of `arguments`, else
        `first_tensor`.
    returned : shape of the tokens that it returned.
    fixed : for each token ``(B, N, D)`` that it got, whether it is the same for both images.
    arguments : the arguments with the shape of the output, if the module got several tensors of
        three axes or more.
    output : the tokens that it returned, if there are several `arguments`.
    """

    path: str
    module: nn.Module
    given: tuple[int, ...] = ()
    returned: tuple[int, ...] = ()
    fixed: tuple[bool, ...] = ()
    arguments: tuple[Argument, ...] = ()
    output: Tensor | None = None

    @property
    def keeps_tokens(self) -> bool:
        """Whether it got and returned tokens ``(B, N, D)`` of one shape."""
        return len(self.given) == 3 and self.given == self.returned


def example_images(model: nn.Module, image_size: Any = None, channels: int | None = None) -> Tensor:
    """Two images of fixed noise, of the size and on the device of the model.

    Raises
    ------
    UserError
        For a model that does not say its image size, and for an invalid image size.
    """
    rows, columns = _pair(_image_size(model) if image_size is None else image_size)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    shape = (IMAGES, channels_of(model) if channels is None else channels, rows, columns)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return noise.to(device=parameter.device, dtype=parameter.dtype)


@contextmanager
def dry(model: nn.Module) -> Iterator[None]:
    """A context in eval mode, without gradients and without the model's own hooks. The CPU's random
    state, modes, buffers and hooks are restored at the end.

    The user's hooks must not see the noise images. Weights that a hook computes, as in pruning,
    stay as its last run left them.
    """
    modules = list(model.modules())
    modes = {module: module.training for module in modules}
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.eval()
    for module in modules:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), unfused():
            yield
    finally:
        for module, before_it, after_it in hooks:
            module._forward_pre_hooks, module._forward_hooks = before_it, after_it
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)


def dry_run(model: nn.Module, images: Tensor) -> tuple[list[Ran], Any]:
    """The runs of all modules that have parameters, in the order in which they start, and the
    output of the model.

    Parameters
    ----------
    model : it is not changed: a copy with the same tensors runs.
    images : as from `example_images`.

    Raises
    ------
    UserError
        For a model that is compiled by torch.jit, that cannot be copied, whose forward fails on the
        images, or whose copy calls modules of the original.
    """
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(f"{name} is compiled by torch.jit, and its modules have no hooks")
    try:
        view = copy.deepcopy(model, tensors_of(model))
    except Exception as error:
        raise UserError(f"{name} cannot be copied: {first_line(error)}") from error
    started: list[Ran] = []
    outside: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: outside.append(path))
        for path, module in model.named_modules()
    ]
    try:
        with dry(view):
            for path, module in view.named_modules():
                if path and any(True for _ in module.parameters()):
                    _watch(path, module, started)
            output = view(images)
    except UserError:
        raise
    except Exception as error:
        shape = " x ".join(map(str, images.shape[1:]))
        raise UserError(f"{name} fails on two images of {shape}: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    if outside:
        raise UserError(
            f"{name} calls {outside[0] or 'itself'} through a function that was made for this very"
            " model (a lambda, or a forward that was replaced on the instance): a copy of the model"
            " still calls the original; write it as a method of the class"
        )
    return started, output


def counts_of(runs: Iterable[Ran]) -> Counter[str]:
    """How often each module ran, by path."""
    return Counter(run.path for run in runs)


def _watch(path: str, module: nn.Module, started: list[Ran]) -> None:
    """Add an entry for each run of a module."""
    open_runs: list[int] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        open_runs.append(len(started))
        values = [args, kwargs]
        tokens, paths = first_tensor(values), token_paths(values)
        several = paths if len(paths) > 1 else []
        arguments = [Argument(each, at_path(values, each).clone()) for each in several]
        started.append(
            Ran(path, module, _shape(tokens), (), _fixed(tokens), arguments=tuple(arguments))
        )

    def after(_: nn.Module, __: Any, output: Any) -> None:
        place = open_runs.pop()
        ran, tokens = started[place], first_tensor(output)
        fit = tuple(each for each in ran.arguments if _shape(each.value) == _shape(tokens))
        ran = replace(ran, returned=_shape(tokens), arguments=fit)
        if fit:
            ran = replace(ran, given=ran.returned, fixed=_fixed(fit[0].value))
        if tokens is not None and len(fit) > 1:
            ran = replace(ran, output=tokens.clone())
        started[place] = ran

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.shape)


def _fixed(tokens: Tensor | None) -> tuple[bool, ...]:
    """For each token of two images, whether it is the same for both."""
    if tokens is None or tokens.is_meta or tokens.ndim != 3 or len(tokens) != IMAGES:
        return ()
    return tuple((tokens[0] == tokens[1]).all(-1).tolist())


def _image_size(model: Any) -> Any:
    """The image size that a model states, under the names of timm, torchvision and Hugging Face."""
    config = getattr(model, "config", None)
    for owner, name in (
        (getattr(model, "patch_embed", None), "img_size"),
        (model, "image_size"),
        (model, "img_size"),
        (config, "image_size"),
        (getattr(config, "vision_config", None), "image_size"),
    ):
        if (size := getattr(owner, name, None)) is not None:
            return size
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("input_size"):
        return tuple(cfg["input_size"][-2:])
    raise UserError(
        f"{type(model).__name__} does not say the size of its images: give image_size, or give the"
        " model an attribute image_size"
    )


def _pair(size: Any) -> tuple[int, int]:
    """Rows and columns, of a number or of the last two of several."""
    pair = [size, size] if isinstance(size, int) else list(size)[-2:] if _is_list(size) else []
    if len(pair) != 2 or not all(isinstance(each, int) and each > 0 for each in pair):
        raise UserError(f"image_size must be a whole number or (rows, columns), got {size!r}")
    return pair[0], pair[1]


def _is_list(size: Any) -> bool:
    return isinstance(size, (tuple, list))
