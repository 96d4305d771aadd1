"""A tiny training run, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bvit_interp.data import digits
from bvit_interp.results import read_table
from bvit_interp.training.loop import trainer as run_trainer
from bvit_interp.training.loop.recipe import Recipe

MODEL = {
    "name": "bvit_small_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "num_heads": 2,
    "num_steps": 3,
    "num_classes": 10,
    "weight_init": "jax",
}
PLAIN = {
    "data": "digits-s",
    "epochs": 2,
    "images_per_epoch": 40,
    "batch_size": 8,
    "warmup_epochs": 0.5,
    "autocast": "off",
}
FULL = {
    "crop": "padded",
    "flip": True,
    "randaugment": "torchvision",
    "erase": 0.5,
    "mixup": 0.2,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "autocast": "bf16",
    "easy_epochs": 0.5,
    "fade_epochs": 1.5,
}
OF_THE_MACHINE = ["images_per_second", "mfu", "memory"]


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores on 40 images."""
    monkeypatch.setitem(digits.LENGTHS, "test", 40)


@pytest.fixture
def settings() -> Callable[..., dict[str, Any]]:
    """``settings(full=False, **changes)``: a tiny recipe's settings; `model` changes the model's
    arguments."""

    def merge(full: bool = False, **changes: Any) -> dict[str, Any]:
        model = {**MODEL, **({"patch_drop_rate": 0.25} if full else {}), **changes.pop("model", {})}
        return {**PLAIN, **(FULL if full else {}), "model": model, **changes}

    return merge


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    """Settings for a folder of 40 + 8 pictures of one size, dark and light noise, which lie on the
    device."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 4)):
        for name, level in (("dark", 0), ("light", 135)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(level + rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    return {
        "data": f"folder:{tmp_path / 'pictures'}",
        "images_per_epoch": None,
        "model": {"num_classes": 2},
    }


@pytest.fixture
def recipe(settings: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """``recipe(full=False, **changes)``: the recipe of `settings`."""
    return lambda **changes: Recipe(**settings(**changes))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., run_trainer.Trainer]:
    """``trainer(recipe)``: what `train` makes before its first step."""
    return lambda recipe, save_minutes=2.0: run_trainer.Trainer(
        recipe, tmp_path / "run", "cpu", save_minutes
    )


@pytest.fixture
def history() -> Callable[[Path], pd.DataFrame]:
    """``history(folder)``: a run's table without the columns that the machine decides."""
    return lambda folder: read_table(folder / run_trainer.HISTORY).drop(columns=OF_THE_MACHINE)


@pytest.fixture
def same_run(history: Callable[[Path], pd.DataFrame]) -> Callable[[Path, Path], None]:
    """``same_run(a, b)``: weights byte for byte, averaged weights too, and the tables."""

    def compare(one: Path, other: Path) -> None:
        for file in ("model.safetensors", "ema.safetensors"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
        pd.testing.assert_frame_equal(history(one), history(other), check_exact=True)

    return compare
