"""Opens a folder written by `save_pretrained` of Hugging Face's transformers.

Only local files are read, and no code of the folder runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from bvit_interp.errors import CheckpointError, MissingExtra, choices
from bvit_interp.models.checkpoint.config import checked_cfg, read_json
from bvit_interp.models.checkpoint.resizing import resample_huggingface, takes_other_sizes
from bvit_interp.models.checkpoint.specs import CONFIG, Spec

PREPROCESSOR = "preprocessor_config.json"
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""In the order of Pillow's numbers, which the entry `resample` uses."""
_UNNAMED = re.compile(r"LABEL_\d+")


def open_huggingface(spec: Spec) -> nn.Module:
    """The model of a folder, on the CPU, with a `pretrained_cfg` like timm's."""
    folder = Path(spec.name)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{spec.text}: no {CONFIG} in {folder}; hf: takes a folder on disk, written by"
            " save_pretrained"
        )
    config = read_json(folder / CONFIG)
    if not config.get("model_type"):
        raise CheckpointError(f"{folder / CONFIG}: no model_type, so not a model of transformers")
    model = _opened(spec, folder, config)
    view = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    try:
        cfg = _cfg(model.config, view)
        view_size = _view_size(view)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / PREPROCESSOR}: not understood ({type(error).__name__}: {error})"
        ) from error
    model.pretrained_cfg = checked_cfg(cfg, folder / PREPROCESSOR)
    if spec.size is not None:
        resample_huggingface(model, spec.size, spec.text)
    elif view_size is not None and takes_other_sizes(model):
        model.image_size = view_size
    return model


def _opened(spec: Spec, folder: Path, config: dict[str, Any]) -> Any:
    """The model with its weights; keys that do not fit are refused."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "huggingface") from error

    named = [str(each) for each in config.get("architectures") or []]
    classifies = any(each.endswith("ForImageClassification") for each in named)
    auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    try:
        with _quiet(transformers):
            model, found = auto.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises whatever its readers raise
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise CheckpointError(f"{spec.text}: transformers cannot open it ({reason})") from error
    kinds = {
        "missing": found.get("missing_keys"),
        "unexpected": found.get("unexpected_keys"),
        "of another shape": found.get("mismatched_keys"),
    }
    wrong = [f"{kind}: {choices(sorted(map(str, keys)))}" for kind, keys in kinds.items() if keys]
    if wrong:
        raise CheckpointError(f"{spec.text} does not fit the model. {'; '.join(wrong)}")
    return model.float()


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Turn off the progress bars and messages of transformers while the context lasts."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _cfg(config: Any, view: dict[str, Any]) -> dict[str, Any]:
    """Normalisation, interpolation, crop and class names, by timm's names, if they are known."""
    cfg: dict[str, Any] = {}
    if view.get("do_normalize", True) and "image_mean" in view:
        cfg |= {"mean": tuple(view["image_mean"]), "std": tuple(view["image_std"])}
    elif not view.get("do_normalize", True):
        cfg |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if view.get("resample") is not None:
        cfg["interpolation"] = _INTERPOLATIONS[int(view["resample"])]
    crop = _view_size(view)
    if crop is not None:
        cfg["crop_pct"] = crop[0] / (_shorter_side(view) or min(crop))
    labels = getattr(config, "id2label", None) or {}
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    if names and not all(_UNNAMED.fullmatch(name) for name in names):
        cfg["label_names"] = names
    return cfg


def _view_size(view: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the image that the preprocessor returns; None if it does not say."""
    centred = view.get("do_center_crop") and view.get("crop_size")
    size = view["crop_size"] if centred else view.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and "height" in size:
        return int(size["height"]), int(size["width"])
    if isinstance(size, dict) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _shorter_side(view: dict[str, Any]) -> int | None:
    """Length of the shorter side after resizing and before the crop."""
    size = view.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size
