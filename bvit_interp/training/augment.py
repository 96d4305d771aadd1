"""How training images vary: crop, flip, RandAugment, erasing, and Mixup or CutMix of a batch.

The order is the paper's (arXiv 2605.10661, section 3.3): crop, flip, RandAugment, normalise, Random Erasing.
Every draw is a function of the run's seed and of what is drawn for, never of how far the process has come: a run
that was killed goes on with the same images, on any number of workers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms import InterpolationMode, v2

from bvit_interp.errors import UserError
from bvit_interp.training.recipe import Recipe

# rand_augment_transform passes over words that it does not know
_WORDS = re.compile(r"rand(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3aw?)))*")
View = Callable[[np.ndarray], torch.Tensor]
"""An image ``(H, W, 3)`` uint8 -> the model's input ``(3, H', W')``."""


@contextmanager
def drawn_for(*numbers: int) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's random numbers depend on `numbers` alone; outside nothing changes.

    A GPU's generator is seeded too and not put back: nothing else draws from it in training.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  timm draws from it
    try:
        reseed(*numbers)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(torch.initial_seed())
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def reseed(*numbers: int) -> None:
    """Seed the three global generators by `numbers`."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(numbers).generate_state(3).tolist()
    torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would reseed the GPUs too
    np.random.seed(for_numpy)  # noqa: NPY002
    random.seed(for_python)


def training_view(recipe: Recipe, model: VisionTransformer) -> View:
    """The recipe's transforms at the model's input size."""
    cfg = model.pretrained_cfg
    size = list(model.patch_embed.img_size)
    mode = InterpolationMode(cfg["interpolation"])
    steps: list[Callable[[Image.Image], Image.Image]] = []
    resizes = recipe.crop == "random-resized"
    if recipe.crop == "padded":
        steps.append(v2.RandomCrop(size, padding=size[0] // 8))
    elif resizes:
        steps.append(v2.RandomResizedCrop(size, interpolation=mode))
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.randaugment == "torchvision":
        steps.append(v2.RandAugment(num_ops=2, magnitude=9, interpolation=mode))
    elif recipe.randaugment is not None:
        grey = tuple(round(255 * mean) for mean in cfg["mean"])
        if not _WORDS.fullmatch(recipe.randaugment):
            raise UserError(
                f"recipe: randaugment must be torchvision or timm's words, as rand-m9-mstd0.5-inc1, "
                f"got {recipe.randaugment!r}"
            )
        about = {"translate_const": int(0.45 * min(size)), "img_mean": grey}
        drawn = rand_augment_transform(recipe.randaugment, about)
        for operation in drawn.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
        steps.append(drawn)
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    erase = v2.RandomErasing(recipe.erase) if recipe.erase else None

    def view(image: np.ndarray) -> torch.Tensor:
        if not resizes and list(image.shape[:2]) != size:
            found, wanted = (" x ".join(map(str, sides)) for sides in (image.shape[:2], size))
            raise UserError(f"an image of {found} pixels for a model of {wanted}: use crop=random-resized")
        picture = Image.fromarray(image)
        for step in steps:
            picture = step(picture)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        pixels = (pixels - mean) / std
        return pixels if erase is None else erase(pixels)

    return view


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the `bits` highest bits; timm also asks for none, which newer Pillows refuse."""
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))


def mixing(recipe: Recipe, classes: int) -> Mixup | None:
    """Mixup and CutMix of whole batches as the recipe has them; targets come out soft and smoothed."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
