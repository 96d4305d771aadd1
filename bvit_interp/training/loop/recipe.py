"""A recipe: everything a training run is made of, as a small YAML file shipped beside this
module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from bvit_interp.errors import UserError, choices

FOLDER = Path(__file__).parents[1] / "recipes"
# arguments of timm's factory that would load weights or make another kind of model
_NOT_OF_A_MODEL = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "device",
    "dtype",
    "scriptable",
    "exportable",
}
_WORDS = {
    "schedule": ("step", "epoch"),
    "crop": ("none", "padded", "random-resized"),
    "positions": ("random", "sincos"),
    "autocast": ("auto", "bf16", "off"),
}
_NOT_NEGATIVE = (
    "lr",
    "min_lr",
    "warmup_epochs",
    "weight_decay",
    "easy_epochs",
    "fade_epochs",
    "mixup",
    "cutmix",
    "workers",
    "seed",
    "clip",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: `model` is a timm name and its arguments."""

    model: dict[str, Any]
    """`name` and constructor arguments of the model."""
    data: str
    """Data set of the catalog, NAME or NAME:PATH."""
    init: str | None = None
    """Checkpoint to start from; what it lacks (a time embedding, registers) starts at its own
    beginning."""
    teacher: str | None = None
    """Distil from it (DeiT, hard labels): a checkpoint, timm:NAME or torchvision:NAME; needs a
    distilled model."""
    epochs: int
    """Passes over the training images."""
    images_per_epoch: int | None = None
    """Images an epoch; by default all there are (digits-s draws fresh scenes for each)."""
    easy_epochs: float = 0.0
    """Epochs on plain ground before the photographs fade in (digits-s)."""
    fade_epochs: float = 0.0
    """Epochs over which photographs and distractors fade in (digits-s)."""
    batch_size: int = 128
    """Images an optimiser step, all processes together."""
    accumulate: int = 1
    """Parts in which each process computes its share of a batch."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up, from `warmup_factor` times the peak; then cosine."""
    warmup_factor: float = 0.033
    """Where the warm-up starts, as a share of the peak."""
    schedule: str = "step"
    """The learning rate changes with every step or with every epoch."""
    weight_decay: float = 0.05
    """Of AdamW, decoupled."""
    decay_all: bool = False
    """Decay every tensor; by default norms, biases, tokens and positions are free of it."""
    crop: str = "none"
    """none, padded (by an eighth, then cut at random) or random-resized (area 0.08..1, ratio
    3/4..4/3)."""
    flip: bool = False
    """Mirror half of the images."""
    randaugment: str | None = None
    """torchvision (RandAugment, 2 operations of magnitude 9) or timm's words, as
    rand-m9-mstd0.5-inc1."""
    erase: float = 0.0
    """Probability of Random Erasing, 0..1."""
    mixup: float = 0.0
    """Alpha of Mixup; with `cutmix`, one of the two is drawn for each image."""
    cutmix: float = 0.0
    """Alpha of CutMix."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes."""
    ema: float | None = None
    """Decay of the averaged weights; by default a horizon of 5.3 % of the steps, the paper's share
    of its run."""
    clip: float | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    positions: str = "random"
    """How the learned positions start: random (timm's, std 0.02) or sincos (2-D sines and cosines
    of amplitude 1)."""
    autocast: str = "auto"
    """bf16, off, or auto: what a short trial on the device shows to be faster."""
    patch_drop_until: float = 1.0
    """Share of the epochs in which `model.patch_drop_rate` holds, 0..1; afterwards no patch is left
    out."""
    compile: bool = False
    """Compile the blocks (needs a C++ compiler on a CPU)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    workers: int = 0
    """Processes that prepare images beside each training process."""
    skip_corrupt: bool = False
    """Show the next image in place of one that cannot be read, and say so, instead of stopping."""
    score_every: int = 1
    """Epochs between two scores on the test images; the last epoch is always scored."""
    seed: int = 0
    """Of the initial weights, the order of images and every augmentation."""

    def __post_init__(self) -> None:
        if "name" not in self.model:
            raise UserError("recipe: model needs a name")
        if loaded := sorted(_NOT_OF_A_MODEL & self.model.keys()):
            raise UserError(
                f"recipe: the model does not take {choices(loaded)}; weights come from init"
            )
        for name in ("epochs", "images_per_epoch", "batch_size", "accumulate", "score_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"recipe: {name} must be >= 1, got {value}")
        if self.images_per_epoch is not None and self.images_per_epoch < self.batch_size:
            raise UserError(
                f"recipe: an epoch of {self.images_per_epoch} images is less than a batch"
            )
        for name in ("erase", "label_smoothing", "warmup_factor", "ema", "patch_drop_until"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"recipe: {name} must be in 0..1, got {value}")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"recipe: {name} must be >= 0, got {value}")
        if self.clip == 0:
            raise UserError("recipe: clip must be > 0, or null for no clipping, got 0")
        if self.ema == 1:
            raise UserError("recipe: ema must be less than 1: averaged weights would never move")
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise UserError(
                f"recipe: warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}"
            )
        if self.schedule == "epoch" and self.warmup_epochs % 1:
            raise UserError(
                f"recipe: schedule epoch needs whole warmup_epochs, got {self.warmup_epochs}"
            )
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"recipe: {name} must be {choices(allowed)}, got {getattr(self, name)!r}"
                )

    def resume_key(self) -> dict[str, Any]:
        """The settings that the weights depend on: those a run must share to be continued."""
        settings = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("workers", "score_every")
        }
        return settings | {"data": self.data.partition(":")[0]}

    def patch_drop(self, epoch: float) -> float:
        """Share of the patches that epoch `epoch` (from 0) leaves out of each image."""
        rate = float(self.model.get("patch_drop_rate") or 0.0)
        return (
            rate
            if self.patch_drop_until == 1 or epoch < round(self.patch_drop_until * self.epochs)
            else 0.0
        )

    def hardness(self, epoch: int) -> float:
        """Share of photographs and distractors in epoch `epoch` (from 0): 0 easy .. 1 the data
        set."""
        past_easy = epoch - self.easy_epochs
        return min(
            max(past_easy / self.fade_epochs if self.fade_epochs else float(past_easy >= 0), 0.0),
            1.0,
        )


def available() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str, settings: Sequence[str] = (), data: str | None = None) -> Recipe:
    """A recipe with settings on top.

    Parameters
    ----------
    name : a shipped recipe or a YAML file; a recipe that `extends` another changes only what it
        names.
    settings : ``key=value``, and ``model.key=value`` for the model's arguments.
    data : data set in place of the recipe's.
    """
    content = _content(name) | ({} if data is None else {"data": data})
    for setting in settings:
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
        raise UserError(
            f"recipe {name}: unknown setting {choices(unknown)}; settings: {choices(known, 20)}"
        )
    if missing := [
        f.name for f in fields(Recipe) if f.default is MISSING and f.name not in content
    ]:
        raise UserError(f"recipe {name}: {choices(missing)} must be given")
    return Recipe(**{key: _typed(name, key, value) for key, value in content.items()})


_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict[str, Any]: "a mapping",
}


def _typed(recipe: str, key: str, value: Any) -> Any:
    """A setting read from YAML in its field's type; YAML 1.1 takes 1e-3 for text and off for
    false."""
    kind = get_type_hints(Recipe)[key]
    optional = get_origin(kind) is UnionType
    if optional:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if optional and value is None:
        return value
    if (
        kind in (int, float)
        and isinstance(value, int | float | str)
        and not isinstance(value, bool)
    ):
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
    expected = choices(_WORDS[key]) if key in _WORDS else _EXPECTED[kind]
    expected += " or null" if optional else ""
    raise UserError(f"recipe {recipe}: {key} must be {expected}, got {value!r}")


def _content(name: str, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    if name in extending:
        raise UserError(f"recipe {name} extends itself")
    path = FOLDER / f"{name}.yaml" if name in available() else Path(name)
    if extending and not path.is_file():
        path = Path(extending[-1]).parent / name  # beside the file that extends it
    if not path.is_file():
        raise UserError(f"no recipe {name!r}; shipped: {choices(available())}; or give a YAML file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model", {}), dict):
        raise UserError(f"{path}: not a recipe (a mapping of settings, with a mapping `model`)")
    base = _content(str(content.pop("extends")), (*extending, name)) if "extends" in content else {}
    return {**base, **content, "model": {**base.get("model", {}), **content.get("model", {})}}
