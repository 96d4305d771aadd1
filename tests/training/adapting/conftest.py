"""A small model, pictures of three colours, and their transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bvit_interp.data.catalog import open_samples
from bvit_interp.training.adapting.transfer import Transfer
from bvit_interp.training.adapting.transfer_plan import Plan

COLOURS = {"red": 0, "green": 1, "blue": 2}


def write_pictures(root: Path, colours: dict[str, int], train: int = 6, test: int = 3) -> Path:
    """Noisy pictures of one colour each, in folders of classes in train and test."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        for name, channel in colours.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 90, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 160
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A folder of red, green and blue pictures."""
    return write_pictures(tmp_path / "colours", COLOURS)


@pytest.fixture
def one_colour(tmp_path: Path) -> Path:
    """A folder of red pictures alone."""
    return write_pictures(tmp_path / "one", {"red": 0})


@pytest.fixture
def small(make: Any) -> Any:
    """bViT of 3 steps."""
    return make(num_steps=3)


@pytest.fixture
def work(small: Any, colours: Path, tmp_path: Path) -> Any:
    """``work(**plan)``: the transfer of the small model to the pictures."""

    def make_transfer(model: Any = None, out: str = "out", **plan: Any) -> Transfer:
        train, test = (open_samples(str(colours), split) for split in ("train", "test"))
        settings = Plan(**{"seeds": (0,), "epochs": 3, "train_batch": 4, **plan})
        return Transfer("small", model or small, "colours", train, test, settings, tmp_path / out)

    return make_transfer
