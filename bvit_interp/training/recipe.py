"""A recipe: everything a training run is made of, as a small YAML file shipped beside this module."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from bvit_interp.errors import UserError, choices

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. `model` is a timm name and its arguments, the rest is listed in order of use."""

    model: dict[str, Any]
    """`name` and constructor arguments of the model."""
    data: str
    """Data set of the catalog."""
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
    clip: float = 1.0
    """Largest norm of the gradient."""
    autocast: str = "bf16"
    """"bf16" or "off"."""
    compile: bool = False
    """Compile the one shared block (needs a C++ compiler on a CPU)."""
    seed: int = 0
    """Of the initial weights and the order of images."""
    about: dict[str, str] = field(default_factory=dict)
    """Free text for the model card."""

    def __post_init__(self) -> None:
        if "name" not in self.model:
            raise UserError("recipe: model needs a name")
        for name in ("epochs", "images_per_epoch", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} must be >= 1, got {getattr(self, name)}")
        if self.autocast not in ("bf16", "off"):
            raise UserError(f"recipe: autocast must be bf16 or off, got {self.autocast!r}")

    @property
    def total_steps(self) -> int:
        return self.epochs * (self.images_per_epoch // self.batch_size)

    def hardness(self, epoch: int) -> float:
        """Share of photographs and distractors in epoch `epoch` (from 0): 0 easy .. 1 the data set."""
        past_easy = epoch - self.easy_epochs
        return min(max(past_easy / self.fade_epochs if self.fade_epochs else float(past_easy >= 0), 0.0), 1.0)


def available() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str, settings: list[str] | None = None) -> Recipe:
    """A shipped recipe, or a YAML file, with `key=value` settings on top (`model.embed_dim=128` for the model's)."""
    path = FOLDER / f"{name}.yaml" if name in available() else Path(name)
    if not path.is_file():
        raise UserError(f"no recipe {name!r}; shipped: {choices(available())}; or give a YAML file")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a recipe (a mapping of settings)")
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, got {setting!r}")
        inside, _, last = key.rpartition(".")
        target = content.setdefault(inside, {}) if inside else content
        target[last] = yaml.safe_load(value)
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(content) - known):
        raise UserError(f"{path}: unknown setting {choices(unknown)}; settings: {choices(sorted(known), 20)}")
    try:
        return replace(Recipe(**content))
    except TypeError as error:
        raise UserError(f"{path}: {error}") from error
