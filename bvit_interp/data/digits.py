"""digits-s: handwritten digits hidden in photographs, with the ink as mask.

The scenes are made on the fly from data in scikit-learn: 1,797 real handwritten digits (8 x 8, from
the UCI set of Alpaydin & Kaynak, 1998) and two photographs. A digit is put into a crop of a
photograph with random size, position, tilt and colour, among distractor strokes. The class is the
digit, and the mask is its ink. Train and test share no handwritten digit and no pixel of a
photograph. Scene i of a split is the same on every machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

from bvit_interp.errors import DataError

SIZE = 32  # pixels
CLASSES = tuple(str(digit) for digit in range(10))
LENGTHS = {"train": 50_000, "test": 2_000}
SMALLEST, LARGEST = 20, 26  # side of the digit's box, pixels
TILT = 12  # degrees
PHOTO_CUT = 0.6  # train uses the left 60 % of each photograph, test the rest

Split = Literal["train", "test"]


@lru_cache(maxsize=2)
def _sources(split: Split) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The digits ``(n, 8, 8)`` in 0..1, their labels ``(n,)`` and the photographs of one split."""
    digits = load_digits()
    held_out = np.random.default_rng(1998).permutation(len(digits.target)) < len(digits.target) // 5
    chosen = held_out if split == "test" else ~held_out
    photos = []
    for photo in load_sample_images().images:
        cut = int(photo.shape[1] * PHOTO_CUT)
        photos.append(photo[:, :cut] if split == "train" else photo[:, cut:])
    return digits.images[chosen] / 16.0, digits.target[chosen], photos


class DigitScenes:
    """Scenes `start` to `start + length` of a split.

    Parameters
    ----------
    split : "train" or "test".
    length : number of scenes; by default 50,000 for train and 2,000 for test.
    start : index of the first scene. Training uses scenes beyond the default length too.
    hardness : 0 for digits on a plain background, 1 for full photographs and distractors (the data
        set); values in between mix the two, for curricula.
    """

    classes = CLASSES
    official = True
    native_size: int | None = SIZE
    has_masks = True

    def __init__(
        self, split: str = "test", length: int | None = None, start: int = 0, hardness: float = 1.0
    ) -> None:
        if split not in LENGTHS:
            raise DataError(f"digits-s has no split {split!r}; splits: {', '.join(LENGTHS)}")
        self.split: Split = "train" if split == "train" else "test"
        self.length = LENGTHS[split] if length is None else length
        self.start, self.hardness = start, hardness

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"digits-s/{self.split}/{self.start + i:06d}"

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Scene i: image ``(32, 32, 3)`` uint8, label, and mask ``(32, 32)`` int32.

        The mask is label + 1 on the ink and 0 elsewhere.
        """
        digits, labels, photos = _sources(self.split)
        rng = np.random.default_rng([self.split == "test", self.start + i])
        chosen = int(rng.integers(len(digits)))
        ink = _ink(digits[chosen], rng)
        scene = _background(photos[int(rng.integers(len(photos)))], self.hardness, rng)
        for _ in range(rng.binomial(2, self.hardness)):
            stroke = _stroke(rng)[..., None]
            scene = scene * (1 - stroke) + stroke * _bright_colour(rng)
        scene = scene * (1 - ink[..., None]) + ink[..., None] * _bright_colour(rng)
        label = int(labels[chosen])
        mask = np.where(ink > 0.5, label + 1, 0).astype(np.int32)
        return np.round(scene * 255).astype(np.uint8), label, mask


def _ink(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Opacity ``(32, 32)`` of the digit, with random size, tilt and position."""
    side = int(rng.integers(SMALLEST, LARGEST + 1))
    box = Image.fromarray((digit * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    box = box.rotate(float(rng.uniform(-TILT, TILT)), Image.Resampling.BILINEAR)
    row, col = rng.integers(0, SIZE - side + 1, size=2)
    ink = np.zeros((SIZE, SIZE), np.float32)
    ink[row : row + side, col : col + side] = np.clip(
        np.asarray(box, np.float32) / 255 * 2.5 - 0.75, 0, 1
    )
    return ink


def _background(photo: np.ndarray, hardness: float, rng: np.random.Generator) -> np.ndarray:
    """A dimmed crop of a photograph ``(32, 32, 3)`` in 0..1; plain at hardness 0."""
    side = int(rng.integers(48, 161))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32) / 255
    plain = pixels.mean(axis=(0, 1))
    return 0.5 * (plain + hardness * (pixels - plain))


def _stroke(rng: np.random.Generator) -> np.ndarray:
    """Opacity ``(32, 32)`` of a short straight line, as thick as the lines of a digit."""
    zoom = 4
    canvas = Image.new("L", (SIZE * zoom, SIZE * zoom))
    centre, angle, length = rng.uniform(3, SIZE - 3, 2), rng.uniform(0, np.pi), rng.uniform(5, 11)
    half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
    ends = [tuple((centre + sign * half) * zoom) for sign in (-1, 1)]
    ImageDraw.Draw(canvas).line(ends, fill=255, width=int(rng.integers(6, 11)))
    return np.asarray(canvas.reduce(zoom), np.float32) / 255


def _bright_colour(rng: np.random.Generator) -> np.ndarray:
    """An RGB colour in 0..1 whose strongest channel is near 1."""
    colour = rng.uniform(0.4, 1.0, 3)
    return (colour / colour.max() * rng.uniform(0.85, 1.0)).astype(np.float32)
