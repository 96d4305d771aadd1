"""A dry run: which modules of a model run, how often.

Nothing about a loop is believed from the type of a model: it is seen here. The pass costs two
images of the model's size, without gradients, in eval mode, on a copy that shares the weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.nested import first_tensor
from bvit_interp.models.tied import tensors_of

IMAGES = 2
"""Images of a dry run: what differs between them comes from the image."""


@dataclass(frozen=True)
class Ran:
    """One run of a module: the shapes of its first input and output tensor."""

    path: str
    module: nn.Module
    given: tuple[int, ...]
    returned: tuple[int, ...]

    @property
    def keeps_tokens(self) -> bool:
        """Whether tokens ``(B, N, D)`` came and went."""
        return len(self.given) == 3 and self.given == self.returned


def example_images(model: nn.Module, image_size: Any = None) -> Tensor:
    """Two images of fixed noise, of the size and on the device of the model.

    Raises
    ------
    UserError
        For a model that does not say its image size.
    """
    rows, columns = _pair(_image_size(model) if image_size is None else image_size)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    shape = (IMAGES, _channels(model), rows, columns)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return noise.to(device=parameter.device, dtype=parameter.dtype)


@contextmanager
def dry(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and random numbers and modes put back at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def dry_run(model: nn.Module, images: Tensor) -> list[Ran]:
    """The runs of all modules that have parameters and parts, in the order in which they start.

    Parameters
    ----------
    model : stays as it is: a copy runs, around the same tensors.
    images : as of `example_images`.
    """
    view = copy.deepcopy(model, tensors_of(model))
    started: list[Ran | None] = []
    open_runs: list[tuple[int, tuple[int, ...]]] = []
    for path, module in view.named_modules():
        if not path or not any(True for _ in module.children()):
            continue
        if not any(True for _ in module.parameters()):
            continue
        module.register_forward_pre_hook(_start(started, open_runs), with_kwargs=True)
        module.register_forward_hook(_end(path, module, started, open_runs))
    with dry(view):
        view(images)
    return [run for run in started if run is not None]


def counts_of(runs: list[Ran]) -> Counter[str]:
    """How often each module ran, by path."""
    return Counter(run.path for run in runs)


def _start(started: list[Ran | None], open_runs: list[tuple[int, tuple[int, ...]]]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = first_tensor((args, kwargs))
        open_runs.append((len(started), () if tensor is None else tuple(tensor.shape)))
        started.append(None)

    return hook


def _end(
    path: str,
    module: nn.Module,
    started: list[Ran | None],
    open_runs: list[tuple[int, tuple[int, ...]]],
) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        place, given = open_runs.pop()
        tensor = first_tensor(output)
        returned = () if tensor is None else tuple(tensor.shape)
        started[place] = Ran(path, module, given, returned)

    return hook


def _image_size(model: Any) -> Any:
    """The image size a model states, as timm, torchvision and Hugging Face write it."""
    config = getattr(model, "config", None)
    for owner, name in (
        (getattr(model, "patch_embed", None), "img_size"),
        (model, "image_size"),
        (model, "img_size"),
        (config, "image_size"),
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
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return int(rows), int(columns)


def _channels(model: nn.Module) -> int:
    """Channels of an image: those that the first convolution reads, else three."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return 3 if first is None else first.in_channels
