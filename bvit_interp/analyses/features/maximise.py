"""Images that make a neuron of a step fire: activation maximisation, all (neuron, step) pairs in
one batch.

The method is Ghiasi et al.'s, "What do Vision Transformers Learn?" (2022,
https://arxiv.org/abs/2212.06727), read from their code (github.com/hamidkazemi22/vit-visualization,
experiments/it15/vis35.py): Adam on the pixels, on eight copies that are shifted in colour, by noise
and in place, against total variation. Ours: one image a pair that leaves the forward at its own
step, so that no pair costs more than its steps; and sizes other than 224 px. Of lucent only the
image parametrisation serves: its transforms draw from numpy's global generator, and its shifts are
Ghiasi's roll here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from bvit_interp.errors import MissingExtra, UserError, choices
from bvit_interp.models.stepping import State, advance, embed
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.sites import Step, record
from bvit_interp.results import rank_and_world
from bvit_interp.vocabulary import check_step

PAPER_SIZE = 224  # pixels, at which Ghiasi's jitter and total variation are given
JITTER = 32  # pixels there
VARIATION = 5e-4
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images are optimised; the defaults are Ghiasi's.

    Parameters
    ----------
    iterations : steps of Adam (betas 0.5, 0.99); the learning rate falls to 0 along a cosine.
    lr : learning rate at the start, in units of an image in 0..1.
    copies : augmented copies an iteration.
    noise : "channel" adds one number a copy and channel (as their code), "pixel" one a pixel (the
        usual meaning).
    jitter : largest shift, pixels; None is 32 at 224 px and in proportion for other sizes (ours).
    weight : of the activation in the loss; 1/8 is what their code amounts to (a diagonal of 8
        numbers is averaged as an 8 x 8 matrix).
    tv : v, weight of total variation in units of 5e-4; they use 0.1 and 1.
    site : what is maximised, "mlp_post" as Ghiasi, or "mlp_pre" (ours): below -0.75 the slope of
        GELU leads further down, to its flat end at 0, and an ascent that begins there never finds
        the neuron.
    image : "pixel", clamped to 0..1, or "fourier", lucent's decorrelated spectrum behind a sigmoid.
    seed : of the start image and of the augmentations.

    Raises
    ------
    UserError
        For a value out of range.
    """

    iterations: int = 400
    lr: float = 0.1
    copies: int = 8
    noise: Literal["channel", "pixel"] = "channel"
    jitter: int | None = None
    weight: float = 1 / 8
    tv: float = 0.1
    site: Literal["mlp_post", "mlp_pre"] = "mlp_post"
    image: Literal["pixel", "fourier"] = "pixel"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("iterations", 1), ("copies", 1), ("jitter", 0), ("tv", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} must be >= {low}, got {value}")
        for name in ("lr", "weight"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be > 0, got {getattr(self, name)}")
        words = {
            "noise": ("channel", "pixel"),
            "site": ("mlp_post", "mlp_pre"),
            "image": ("pixel", "fourier"),
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {choices(allowed)}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Augmentation:
    """What one iteration does to every image alike: C copies, each ``roll((x - mean) / spread +
    noise)``.

    Attributes
    ----------
    mean, spread : colour shift ``(C, 3, 1, 1)``; mean ~ U(-1, 1), log spread ~ U(-1, 1).
    noise : ``(C, 3, 1, 1)`` or ``(C, 3, height, width)``.
    shift : pixels down and to the right, the same for all copies.
    """

    mean: Tensor
    spread: Tensor
    noise: Tensor
    shift: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """``(K, 3, height, width)`` -> ``(K, C, 3, height, width)``."""
        mean, spread, noise = (part.to(images) for part in (self.mean, self.spread, self.noise))
        return ((images[:, None] - mean) / spread + noise).roll(self.shift, dims=(-2, -1))


class Stream:
    """The augmentations of a run, drawn from a generator of its own: the same for every pair of the
    same seed."""

    def __init__(self, recipe: Recipe, size: Shape) -> None:
        self.recipe, self.size = recipe, size
        self.jitter = (
            round(JITTER * min(size) / PAPER_SIZE) if recipe.jitter is None else recipe.jitter
        )
        self._generator = torch.Generator().manual_seed(
            recipe.seed + 1
        )  # the start image has the seed itself

    def draw(self, iteration: int) -> Augmentation:
        """That of an iteration, from 0, in turn; the noise falls to 0 at the last (in their code it
        then wraps)."""
        recipe = self.recipe
        shape = (recipe.copies, 3, 1, 1)
        mean, log_spread = (2 * torch.rand(shape, generator=self._generator) - 1 for _ in range(2))
        noise = torch.randn(
            shape if recipe.noise == "channel" else (recipe.copies, 3, *self.size),
            generator=self._generator,
        )
        down, right = torch.randint(
            -self.jitter, self.jitter + 1, (2,), generator=self._generator
        ).tolist()
        remaining = (recipe.iterations - 1 - iteration) / recipe.iterations
        return Augmentation(mean, log_spread.exp(), 0.5 * remaining * noise, (down, right))


def total_variation(images: Tensor) -> Tensor:
    """Sum over four directions (right, down, both diagonals) of the L2 norm of a plane's
    differences.

    Parameters
    ----------
    images : ``(..., channels, height, width)``.

    Returns
    -------
    ``(...)``, the mean over channels.
    """
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    norms = [torch.linalg.vector_norm(difference, dim=(-2, -1)) for difference in differences]
    return torch.stack(norms).sum(0).mean(-1)


class _Read(Exception):
    """The neuron is there: the rest of its step need not be computed."""


class Neurons:
    """One neuron an image, each at its own step: an image is computed up to there and no further.

    Parameters
    ----------
    model : a `BViT`, a timm `VisionTransformer`, or an unroll of one. It is not touched: the
        activations come from a tied unroll whose parameters share their storage but ask for no
        gradient.
    mean, std : of the model's normalisation, per channel of an image in 0..1.
    """

    def __init__(
        self, model: VisionTransformer, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.model = _without_gradients(unroll(model))
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self._steps = [Step(block) for block in self.model.blocks]
        self.num_steps, self.num_neurons = len(self._steps), self._steps[0].neurons

    def check(self, neuron: int, step: int) -> int:
        """The step counted from 1, or a UserError that names the valid neurons or steps."""
        if not 0 <= neuron < self.num_neurons:
            raise UserError(f"no neuron {neuron}; neurons: 0..{self.num_neurons - 1}")
        return check_step(step, self.num_steps)

    def __call__(
        self, images: Tensor, neurons: Tensor, steps: Tensor, site: str = "mlp_post"
    ) -> Tensor:
        """Mean of the neuron over the patches (no CLS, no registers), differentiable in the images.

        Parameters
        ----------
        images : ``(B, 3, height, width)``, an image being in 0..1, before the model's
            normalisation.
        neurons, steps : ``(B,)`` int64, neuron from 0 and step from 1 of each image.
        site : "mlp_post" or "mlp_pre".

        Returns
        -------
        ``(B,)``, on the model's device.
        """
        parameter = next(self.model.parameters())
        images, neurons, steps = (
            images.to(parameter),
            neurons.to(parameter.device),
            steps.to(parameter.device),
        )
        views = (images - self._mean.to(images)) / self._std.to(images)
        order = steps.argsort(
            descending=True, stable=True
        )  # so that those that leave are a slice at the end
        neurons, last = neurons[order], steps[order].tolist()
        state, read = embed(self.model, views[order]), list[Tensor]()
        for step in range(1, max(last) + 1):
            staying = sum(own > step for own in last)
            if staying < len(state.tokens):
                read.insert(
                    0, self._read(state[staying:], neurons[staying : len(state.tokens)], site)
                )
                state = state[:staying]
            if staying:
                state = advance(self.model, state)
        return torch.cat(read)[order.argsort()]

    def _read(self, state: State, neurons: Tensor, site: str) -> Tensor:
        """The neurons in the step after `state`, which ends as soon as they are there."""
        found: list[Tensor] = []

        def keep(every: Tensor) -> None:
            index = neurons[:, None, None].expand(-1, every.shape[1], 1)
            found.append(every.gather(-1, index)[..., 0])
            raise _Read

        handle = record(
            self._steps[state.step], site, slice(self.model.num_prefix_tokens, None), keep
        )
        try:
            advance(self.model, state)
        except _Read:
            return found[0].mean(1)
        finally:
            handle.remove()
        raise UserError("the step ended without its neurons; is a block replaced?")


def _without_gradients(view: VisionTransformer) -> VisionTransformer:
    """The view itself, its own modules now holding parameters of the same storage that ask for no
    gradient."""
    frozen: dict[int, nn.Parameter] = {}
    for module in view.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kept = frozen.setdefault(
                    id(parameter), nn.Parameter(parameter.detach(), requires_grad=False)
                )
                module._parameters[name] = kept
    return view


Render = Callable[[], Tensor]
"""The images ``(K, 3, height, width)`` in 0..1 that a variable stands for."""


def _pixels(count: int, size: Shape, seed: int, like: Tensor) -> tuple[Tensor, Render]:
    """The images themselves; the start is U(0, 1)."""
    start = torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))
    variable = start.repeat(count, 1, 1, 1).to(like).requires_grad_()
    return variable, lambda: variable


def _fourier(count: int, size: Shape, seed: int, like: Tensor) -> tuple[Tensor, Render]:
    """lucent's spectrum of decorrelated colours; the start is its own N(0, 0.01^2), from our
    generator."""
    try:
        from lucent.optvis import param
    except ImportError:
        raise MissingExtra("torch-lucent", "viz") from None
    with torch.random.fork_rng(devices=[]):  # it draws from the global generator
        (variable,), render = param.image(size[1], size[0], batch=count)
    start = 0.01 * torch.randn(variable.shape[1:], generator=torch.Generator().manual_seed(seed))
    variable.data.copy_(start)
    return variable, lambda: render().to(like)  # it lives on lucent's own choice of device


_IMAGES: dict[str, Callable[[int, Shape, int, Tensor], tuple[Tensor, Render]]] = {
    "pixel": _pixels,
    "fourier": _fourier,
}


def maximise(
    of: Neurons, neurons: Tensor, steps: Tensor, recipe: Recipe, progress: str | None = None
) -> tuple[Tensor, Tensor]:
    """Optimise an image for each (neuron, step) pair.

    The loss of a pair is ``- weight activation + 5e-4 v TV / (S / 224)``, S the side in pixels,
    both means over the augmented copies, TV of the augmented ones before they are normalised. The
    norm of a plane grows as its side, so with the last factor (ours) v means the same at every
    size. Losses add up, Adam acts on each pixel alone, and start and augmentations are those of the
    seed: an image does not depend on the others of its batch.

    Parameters
    ----------
    of : the model's neurons.
    neurons, steps : ``(K,)`` int64.
    progress : text of a progress bar on stderr; by default none.

    Returns
    -------
    Start image ``(3, height, width)`` and the K images ``(K, 3, height, width)``, in 0..1, on the
    CPU.

    Raises
    ------
    UserError
        If GPU memory does not suffice for one image; several are made in halves.
    """
    try:
        return _maximise(of, neurons, steps, recipe, progress)
    except torch.OutOfMemoryError:
        if len(neurons) == 1:
            raise UserError(
                f"out of GPU memory with one image of {recipe.copies} copies: fewer copies, or device=cpu"
            ) from None
    # outside the handler: the exception holds the failed run's tensors
    torch.cuda.empty_cache()
    middle = len(neurons) // 2
    halves = [
        maximise(of, neurons[half], steps[half], recipe, progress)
        for half in (slice(middle), slice(middle, None))
    ]
    return halves[0][0], torch.cat([images for _, images in halves])


def _maximise(
    of: Neurons, neurons: Tensor, steps: Tensor, recipe: Recipe, progress: str | None
) -> tuple[Tensor, Tensor]:
    parameter = next(of.model.parameters())
    size: Shape = tuple(of.model.patch_embed.img_size)
    variable, render = _IMAGES[recipe.image](len(neurons), size, recipe.seed, parameter)
    adam = torch.optim.Adam([variable], lr=recipe.lr, betas=(0.5, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, recipe.iterations)
    stream, copies = Stream(recipe, size), recipe.copies
    variation = VARIATION * recipe.tv * PAPER_SIZE / math.sqrt(size[0] * size[1])
    start = render().detach()[0].cpu().clone()
    pairs = neurons.repeat_interleave(copies), steps.repeat_interleave(copies)
    with torch.enable_grad():
        for i in tqdm(range(recipe.iterations), desc=progress, disable=progress is None):
            augmented = stream.draw(i)(render())
            fired = of(augmented.flatten(0, 1), *pairs, recipe.site)
            loss = (
                variation * total_variation(augmented).sum() / copies
                - recipe.weight * fired.sum() / copies
            )
            (variable.grad,) = torch.autograd.grad(loss, [variable])
            adam.step()
            cosine.step()
            if recipe.image == "pixel":
                variable.data.clamp_(0, 1)
    return start, render().detach().cpu()


def maximise_in_chunks(
    of: Neurons, neurons: Tensor, steps: Tensor, recipe: Recipe, chunk: int, progress: str
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`maximise`, `chunk` images at once: memory is bounded, and what is finished can be kept.

    Each process makes a share of the chunks; all of them get all, in order: which of the K pairs,
    start, images.
    """
    rank, world = rank_and_world()
    chunks = [slice(first, first + chunk) for first in range(0, len(neurons), chunk)]
    for first in range(0, len(chunks), world):
        together = chunks[first : first + world]
        done = f"{progress} {together[0].start}/{len(neurons)}" if rank == 0 else None
        own = [
            maximise(of, neurons[part], steps[part], recipe, done)
            for part in together[rank : rank + 1]
        ]
        yield from (
            (part, *made) for part, made in zip(together, _from_all(own, world), strict=True)
        )


def _from_all(own: list[Any], world: int) -> list[Any]:
    """The lists of all processes behind each other."""
    if world == 1:
        return own
    lists: list[Any] = [None] * world
    dist.all_gather_object(lists, own)
    return [one for of_process in lists for one in of_process]
