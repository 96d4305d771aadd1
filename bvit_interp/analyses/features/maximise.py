"""Activation maximisation of many neurons and steps in one batch.

The method is that of Ghiasi et al., "What do Vision Transformers Learn?" (2022,
https://arxiv.org/abs/2212.06727), read from their code
(github.com/hamidkazemi22/vit-visualization, experiments/it15/vis35.py): Adam on the pixels, on
eight copies that are changed in colour, noise and position, with total variation as penalty. Ours:
one image per neuron and step, which leaves the forward pass at its step, so that no image costs
more than its steps; and sizes other than 224 px. Only lucent's parametrisation of images is used:
its transforms draw from numpy's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bvit_interp.analyses.features.augmentations import PAPER_SIZE, AugmentationSequence
from bvit_interp.analyses.features.neurons import NeuronActivations
from bvit_interp.analyses.features.recipe import Recipe
from bvit_interp.errors import MissingExtra, UserError
from bvit_interp.models.layout import layout_of
from bvit_interp.results import rank_and_world

TV_UNIT = 5e-4
"""Unit of the weight of total variation."""
Render = Callable[[], Tensor]
"""Renders the images ``(K, 3, height, width)`` in 0..1 from the variable that is optimised."""


def maximise(
    activations: NeuronActivations,
    neurons: Int[Tensor, " images"],
    steps: Int[Tensor, " images"],
    recipe: Recipe,
    progress: str | None = None,
) -> tuple[Float[Tensor, "3 height width"], Float[Tensor, "images 3 height width"]]:
    """Optimise an image for each neuron and step.

    The loss of an image is ``- activation_weight activation + 5e-4 tv_weight TV / (S / 224)``, with
    S the side in pixels. Both terms are means over the augmented copies; TV is that of the copies
    before they are normalised. The norm of a plane grows with its side, so that with the last
    factor (ours) the weight means the same at every size. The losses are added up, Adam acts on
    each pixel alone, and start image and augmentations depend on the seed alone: an image does not
    depend on the others of its batch.

    Parameters
    ----------
    activations : of the model.
    neurons : neuron of each image, from 0.
    steps : step of each image, from 1.
    progress : text of a progress bar on stderr; by default none.

    Returns
    -------
    The start image and the optimised images, in 0..1, on the CPU.

    Raises
    ------
    UserError
        If one image does not fit in GPU memory; several are halved.
    """
    try:
        return _maximise(activations, neurons, steps, recipe, progress)
    except torch.OutOfMemoryError:
        if len(neurons) == 1:
            raise UserError(
                f"out of GPU memory with one image of {recipe.n_copies} copies: use fewer copies,"
                " or --device cpu"
            ) from None
    # outside the handler: the exception holds the failed run's tensors
    torch.cuda.empty_cache()
    middle = len(neurons) // 2
    halves = [
        maximise(activations, neurons[half], steps[half], recipe, progress)
        for half in (slice(middle), slice(middle, None))
    ]
    return halves[0][0], torch.cat([images for _, images in halves])


def maximise_in_chunks(
    activations: NeuronActivations,
    neurons: Int[Tensor, " images"],
    steps: Int[Tensor, " images"],
    recipe: Recipe,
    chunk_size: int,
    progress: str,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`maximise` for `chunk_size` images at a time, so that memory is bounded.

    Each process makes a share of the chunks, and gets the chunks of all processes.

    Yields
    ------
    Which images, the start image, and the optimised images, in order.
    """
    rank, world = rank_and_world()
    chunks = [slice(first, first + chunk_size) for first in range(0, len(neurons), chunk_size)]
    for first in range(0, len(chunks), world):
        concurrent = chunks[first : first + world]
        title = f"{progress} {concurrent[0].start}/{len(neurons)}" if rank == 0 else None
        own = [
            maximise(activations, neurons[chunk], steps[chunk], recipe, title)
            for chunk in concurrent[rank : rank + 1]
        ]
        for chunk, (start, images) in zip(concurrent, _gather(own, world), strict=True):
            yield chunk, start, images


def total_variation(
    images: Float[Tensor, "*batch channels height width"],
) -> Float[Tensor, "*batch"]:
    """Total variation of images, mean over channels.

    For each channel the sum, over four directions (right, down, both diagonals), of the L2 norm of
    the differences of neighbouring pixels.
    """
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    norms = [torch.linalg.vector_norm(difference, dim=(-2, -1)) for difference in differences]
    return torch.stack(norms).sum(0).mean(-1)


def _maximise(
    activations: NeuronActivations,
    neurons: Tensor,
    steps: Tensor,
    recipe: Recipe,
    progress: str | None,
) -> tuple[Tensor, Tensor]:
    parameter = next(activations.model.parameters())
    height, width = layout_of(activations.model).image_size
    parametrise = _PARAMETRISATIONS[recipe.parametrisation]
    variable, render = parametrise(len(neurons), (height, width), recipe.seed, parameter)
    adam = torch.optim.Adam([variable], lr=recipe.lr, betas=(0.5, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, recipe.iterations)
    augmentations = AugmentationSequence(recipe, (height, width))
    n_copies = recipe.n_copies
    tv_weight = TV_UNIT * recipe.tv_weight * PAPER_SIZE / math.sqrt(height * width)
    start = render().detach()[0].cpu().clone()
    of_copies = neurons.repeat_interleave(n_copies), steps.repeat_interleave(n_copies)
    with torch.enable_grad():
        for i in tqdm(range(recipe.iterations), desc=progress, disable=progress is None):
            copies = augmentations.draw(i)(render())
            activation = activations(copies.flatten(0, 1), *of_copies, recipe.site)
            loss = (
                tv_weight * total_variation(copies).sum() / n_copies
                - recipe.activation_weight * activation.sum() / n_copies
            )
            (variable.grad,) = torch.autograd.grad(loss, [variable])
            adam.step()
            cosine.step()
            if recipe.parametrisation == "pixel":
                variable.data.clamp_(0, 1)
    return start, render().detach().cpu()


def _pixels(count: int, size: tuple[int, int], seed: int, like: Tensor) -> tuple[Tensor, Render]:
    """The images themselves; the start image is U(0, 1)."""
    start = torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))
    variable = start.repeat(count, 1, 1, 1).to(like).requires_grad_()
    return variable, lambda: variable


def _fourier(count: int, size: tuple[int, int], seed: int, like: Tensor) -> tuple[Tensor, Render]:
    """lucent's spectrum with decorrelated colours; it starts at N(0, 0.01^2), as in lucent."""
    try:
        from lucent.optvis import param
    except ImportError:
        raise MissingExtra("torch-lucent", "viz") from None
    with torch.random.fork_rng(devices=[]):  # lucent draws from the global generator
        (variable,), render = param.image(size[1], size[0], batch=count)
    start = 0.01 * torch.randn(variable.shape[1:], generator=torch.Generator().manual_seed(seed))
    variable.data.copy_(start)
    return variable, lambda: render().to(like)  # lucent chooses the device of the spectrum


_PARAMETRISATIONS: dict[str, Callable[..., tuple[Tensor, Render]]] = {
    "pixel": _pixels,
    "fourier": _fourier,
}


def _gather(own: list[Any], world: int) -> list[Any]:
    """The lists of all processes, one after the other."""
    if world == 1:
        return own
    lists: list[Any] = [None] * world
    dist.all_gather_object(lists, own)
    return [each for of_process in lists for each in of_process]
