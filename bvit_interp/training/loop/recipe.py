"""A recipe: all settings of a training run, in a YAML file."""

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
# arguments of timm.create_model that would load weights or make another kind of model
_REFUSED_ARGUMENTS = {
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
_SHARE = (0, 1)
_NUMBER = (0, 10**6)
_RANGES: dict[str, tuple[int, int]] = {
    "epochs": (1, 10**6),
    "images_per_epoch": (1, 10**8),
    "easy_epochs": _NUMBER,
    "fade_epochs": _NUMBER,
    "batch_size": (1, 65_536),
    "accumulate": (1, 65_536),
    "lr": _NUMBER,
    "min_lr": _NUMBER,
    "warmup_epochs": _NUMBER,
    "warmup_factor": _SHARE,
    "weight_decay": _NUMBER,
    "erase": _SHARE,
    "mixup": _NUMBER,
    "cutmix": _NUMBER,
    "label_smoothing": _SHARE,
    "ema": _SHARE,
    "clip": _NUMBER,
    "patch_drop_until": _SHARE,
    "workers": (0, 256),
    "score_every": (1, 10**6),
    "seed": (0, 2**63 - 1),
}
"""Setting -> its smallest and its largest value. Beyond the largest, a run would not fit in memory
or never end."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: `model` is a timm name and its arguments."""

    model: dict[str, Any]
    """`name` of the model in timm, and its arguments."""
    data: str
    """Data set of the catalog: NAME or NAME:PATH."""
    init: str | None = None
    """Checkpoint to start from. Patch embedding and positions are resampled to the model's sizes.
    Weights that it lacks (a time embedding, registers, the head of other classes) start at their
    initial values."""
    teacher: str | None = None
    """Teacher for distillation (DeiT, hard labels): a checkpoint, timm:NAME or torchvision:NAME. It
    needs a distilled model."""
    epochs: int
    """Number of epochs."""
    images_per_epoch: int | None = None
    """Images per epoch; by default all. digits-s draws new scenes for each epoch."""
    easy_epochs: float = 0.0
    """Epochs on a plain background, before the photographs (digits-s)."""
    fade_epochs: float = 0.0
    """Epochs in which the share of photographs and distractors grows (digits-s)."""
    batch_size: int = 128
    """Images per optimiser step, over all processes."""
    accumulate: int = 1
    """Number of parts in which each process computes its share of a batch."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up, from `warmup_factor` times the peak; a cosine follows."""
    warmup_factor: float = 0.033
    """Learning rate at the start of the warm-up, as a share of the peak."""
    schedule: str = "step"
    """Whether the learning rate changes with every `step` or with every `epoch`."""
    weight_decay: float = 0.05
    """Decoupled weight decay of AdamW."""
    decay_all: bool = False
    """Apply weight decay to every tensor; by default not to norms, biases, tokens and positions."""
    crop: str = "none"
    """none, padded (padded by an eighth, then cropped at random) or random-resized (area 0.08..1,
    ratio 3/4..4/3)."""
    flip: bool = False
    """Mirror half of the images."""
    randaugment: str | None = None
    """RandAugment: torchvision (2 operations of magnitude 9), or as timm writes it, for instance
    rand-m9-mstd0.5-inc1."""
    erase: float = 0.0
    """Probability of Random Erasing, 0..1."""
    mixup: float = 0.0
    """Alpha of Mixup. With `cutmix`, one of the two is drawn for each image."""
    cutmix: float = 0.0
    """Alpha of CutMix."""
    label_smoothing: float = 0.0
    """Label smoothing: share of each label that is given to all classes equally."""
    ema: float | None = None
    """Decay of the averaged weights; by default one that averages over 5.3 % of the steps, as the
    paper does."""
    clip: float | None = 1.0
    """Largest norm of the gradient; null for no clipping."""
    positions: str = "random"
    """Initial values of the learned positions: random (as in timm, std 0.02) or sincos (2-D sines
    and cosines of amplitude 1)."""
    autocast: str = "auto"
    """bf16, off, or auto (the faster of the two in a short trial on the device)."""
    patch_drop_until: float = 1.0
    """Share of the epochs, from the first, in which patches are left out (`model.patch_drop_rate`),
    0..1."""
    compile: bool = False
    """Compile the blocks (needs a C++ compiler on a CPU)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and costs time."""
    workers: int = 0
    """Number of processes that prepare images for each training process."""
    skip_corrupt: bool = False
    """Report images that cannot be read, and show the next one instead of stopping."""
    score_every: int = 1
    """Epochs between two evaluations on the test images; the last epoch is always evaluated."""
    seed: int = 0
    """Random seed of the initial weights, the order of images and the augmentation."""

    def __post_init__(self) -> None:
        if "name" not in self.model:
            raise UserError("recipe: model needs a name")
        if loaded := sorted(_REFUSED_ARGUMENTS & self.model.keys()):
            raise UserError(
                f"recipe: the model does not take {choices(loaded)}; weights come from init"
            )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None or low <= value <= high:
                continue
            if (low, high) == _SHARE:
                raise UserError(f"recipe: {name} must be in 0..1, got {value}")
            bound = f">= {low}" if value < low else f"<= {high}"
            raise UserError(f"recipe: {name} must be {bound}, got {value}")
        if self.images_per_epoch is not None and self.images_per_epoch < self.batch_size:
            raise UserError(
                f"recipe: an epoch of {self.images_per_epoch} images is less than a batch"
            )
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
        """The settings that the weights depend on: a run is continued only with the same ones."""
        settings = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("workers", "score_every")
        }
        return settings | {"data": self.data.partition(":")[0]}

    def patch_drop(self, epoch: float) -> float:
        """Share of each image's patches that is left out in epoch `epoch` (from 0)."""
        rate = float(self.model.get("patch_drop_rate") or 0.0)
        return (
            rate
            if self.patch_drop_until == 1 or epoch < round(self.patch_drop_until * self.epochs)
            else 0.0
        )

    def hardness(self, epoch: int) -> float:
        """Share of photographs and distractors in epoch `epoch` (from 0), 0..1 (digits-s)."""
        past_easy = epoch - self.easy_epochs
        return min(
            max(past_easy / self.fade_epochs if self.fade_epochs else float(past_easy >= 0), 0.0),
            1.0,
        )


def available() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str, settings: Sequence[str] = (), data: str | None = None) -> Recipe:
    """Read a recipe and change some of its settings.

    Parameters
    ----------
    name : a shipped recipe or a YAML file. A recipe that `extends` another one holds only the
        settings that differ.
    settings : ``key=value``, and ``model.key=value`` for the model's arguments.
    data : data set in place of the recipe's.

    Raises
    ------
    UserError
        For a file that cannot be read, and for unknown, missing or impossible settings.
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
    """A setting in the type of its field: YAML 1.1 reads 1e-3 as text and off as false."""
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
