"""A recipe: everything a training run is made of, as a small YAML file shipped beside this module."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from bvit_interp.errors import UserError, choices

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: `model` is a timm name and its arguments."""

    model: dict[str, Any]
    """`name` and constructor arguments of the model."""
    data: str
    """Data set of the catalog."""
    init: str | None = None
    """Checkpoint to start from; what it lacks (a time embedding, registers) starts at its own beginning."""
    epochs: int
    """Passes of `images_per_epoch` images."""
    images_per_epoch: int
    """Images an epoch; digits-s draws fresh scenes for each."""
    easy_epochs: float = 0.0
    """Epochs on plain ground before the photographs fade in (digits-s)."""
    fade_epochs: float = 0.0
    """Epochs over which photographs and distractors fade in (digits-s)."""
    batch_size: int = 32
    """Images a step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 500
    """Steps of linear warm-up, then cosine to zero."""
    weight_decay: float = 0.05
    """On matrices only: norms, biases, tokens and positions are free of it."""
    positions: str = "random"
    """How the learned positions start: random (timm's, std 0.02) or sincos (2-D sines and cosines of amplitude 1)."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    autocast: str = "bf16"
    """bf16 or off."""
    compile: bool = False
    """Compile the one shared block (needs a C++ compiler on a CPU)."""
    seed: int = 0
    """Of the initial weights and the order of images."""

    def __post_init__(self) -> None:
        if "name" not in self.model:
            raise UserError("recipe: model needs a name")
        for name in ("epochs", "images_per_epoch", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} must be >= 1, got {getattr(self, name)}")
        if self.images_per_epoch < self.batch_size:
            raise UserError(f"recipe: an epoch of {self.images_per_epoch} images is less than a batch")
        if self.positions not in ("random", "sincos"):
            raise UserError(f"recipe: positions must be random or sincos, got {self.positions!r}")
        if self.autocast not in ("bf16", "off"):
            raise UserError(f"recipe: autocast must be bf16 or off, got {self.autocast!r}")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * (self.images_per_epoch // self.batch_size)

    def hardness(self, epoch: int) -> float:
        """Share of photographs and distractors in epoch `epoch` (from 0): 0 easy .. 1 the data set."""
        past_easy = epoch - self.easy_epochs
        return min(max(past_easy / self.fade_epochs if self.fade_epochs else float(past_easy >= 0), 0.0), 1.0)


def available() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str, settings: list[str] | None = None) -> Recipe:
    """A recipe with settings on top.

    Parameters
    ----------
    name : a shipped recipe or a YAML file; a recipe that `extends` another changes only what it names.
    settings : ``key=value``, and ``model.key=value`` for the model's arguments.
    """
    content = _content(name)
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, got {setting!r}")
        target = _typed(name, "model", content["model"]) if key.startswith("model.") else content
        try:
            target[key.removeprefix("model.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {key}: not YAML: {value!r}") from None
    known = [f.name for f in fields(Recipe)]
    if unknown := sorted({str(key) for key in content} - set(known)):
        raise UserError(f"recipe {name}: unknown setting {choices(unknown)}; settings: {choices(known, 20)}")
    try:
        return Recipe(**{key: _typed(name, key, value) for key, value in content.items()})
    except TypeError as error:
        raise UserError(f"recipe {name}: {error}") from error


_EXPECTED = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", str | None: "text or null",
    dict[str, Any]: "a mapping",
}  # fmt: skip


def _typed(recipe: str, key: str, value: Any) -> Any:
    """A setting read from YAML in its field's type; YAML 1.1 takes 1e-3 for text and off for false."""
    kind = get_type_hints(Recipe)[key]
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if kind is float and math.isfinite(number):
            return number
        if kind is int and number.is_integer():
            return value if isinstance(value, int) else int(number)
    elif key == "autocast" and value is False:
        return "off"
    elif kind not in (int, float) and isinstance(value, dict if key == "model" else kind):
        return value
    raise UserError(f"recipe {recipe}: {key} must be {_EXPECTED[kind]}, got {value!r}")


def _content(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.yaml" if name in available() else Path(name)
    if not path.is_file():
        raise UserError(f"no recipe {name!r}; shipped: {choices(available())}; or give a YAML file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model", {}), dict):
        raise UserError(f"{path}: not a recipe (a mapping of settings, with a mapping `model`)")
    base = _content(content.pop("extends")) if "extends" in content else {}
    return {**base, **content, "model": {**base.get("model", {}), **content.get("model", {})}}
