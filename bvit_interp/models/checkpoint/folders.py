"""Opens a checkpoint folder, or a weights file beside its `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bvit_interp.errors import REFUSALS, CheckpointError, UserError, choices
from bvit_interp.models import masks
from bvit_interp.models.checkpoint.config import ModelConfig, check_names, read_config
from bvit_interp.models.checkpoint.resizing import resize
from bvit_interp.models.checkpoint.specs import AVERAGED, CONFIG, EMA, MASKED, WEIGHTS, Spec
from bvit_interp.models.checkpoint.timm_models import close_names
from bvit_interp.models.checkpoint.weights import fill, read


def open_path(spec: Spec) -> nn.Module:
    """The model of a folder, or of a weights file beside its config, on the CPU."""
    path = Path(spec.name)
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}: give a folder, a weights file, timm:NAME, torchvision:NAME,"
            " hf:FOLDER or FILE.py:factory"
        )
    averaged = spec.version == AVERAGED
    if path.is_dir() and averaged and not (path / EMA).is_file():
        raise CheckpointError(
            f"{path} has no averaged weights ({EMA}): leave out {AVERAGED} for the raw ones"
        )
    if spec.version == MASKED and not (path / masks.FILE).is_file():
        raise CheckpointError(
            f"{path} has no masks ({masks.FILE}): leave out {MASKED} for its weights without masks"
        )
    if path.is_dir():
        folder, weights = path, path / (EMA if averaged else WEIGHTS)
    else:
        folder, weights = path.parent, path
    config = _config(folder, path)
    content = read(weights)
    config.check_size(weights)
    model = _built(config)
    fill(model, content, weights, spec.text, averaged and not path.is_dir())
    if spec.version != MASKED:
        return resize(model, spec.size, spec.text)
    if spec.size is not None:
        raise CheckpointError(f"{spec.text}: masks are of one image size; leave out @size=")
    return _under_masks(model, path / masks.FILE)


def _config(folder: Path, given: Path) -> ModelConfig:
    """The config of a folder, checked."""
    file = folder / CONFIG
    if not file.is_file():
        hint = f"; for a bare weights file say timm:NAME@{given}" if given.is_file() else ""
        raise CheckpointError(f"{folder} has no {CONFIG}{hint}")
    config = read_config(file)
    if not timm.is_model(config.architecture):
        close = choices(close_names(config.architecture))
        raise CheckpointError(
            f"{file}: unknown architecture {config.architecture!r}; close: {close}"
        )
    return config


def _built(config: ModelConfig) -> nn.Module:
    """The model that a config describes, with random weights."""
    name = config.architecture
    try:
        model: Any = timm.create_model(
            name, pretrained=False, pretrained_cfg_overlay=config.cfg, **config.model_args
        )
    except (*REFUSALS, AttributeError, MemoryError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{config.file}: {name} cannot be built from its model_args ({reason})"
        ) from error
    check_names(config.cfg.get("label_names"), model.num_classes, config.file)
    return model


def _under_masks(model: nn.Module, file: Path) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        raise CheckpointError(f"{file}: masks of a {type(model).__name__} cannot be opened")
    try:
        return masks.masked(model, masks.Masks.load(file, model), baked=True)
    except CheckpointError:
        raise
    except UserError as error:  # these are not masks of steps
        raise CheckpointError(f"{file}: {error}") from error
