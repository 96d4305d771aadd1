"""Opens a torchvision model with published, random or a file's weights."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from bvit_interp.errors import CheckpointError, choices, first_line
from bvit_interp.models.checkpoint.resizing import check_patches
from bvit_interp.models.checkpoint.specs import AVERAGED, MASKED, Spec
from bvit_interp.models.checkpoint.weights import classes_in, fill, read

_CLASSIFIER = "heads.head"  # of the vision transformers


def open_torchvision(spec: Spec) -> nn.Module:
    """A model of torchvision, on the CPU, with a `pretrained_cfg` like timm's."""
    name = spec.name
    if spec.version == MASKED:
        raise CheckpointError(f"{spec.text}: masks are in a checkpoint folder: FOLDER{MASKED}")
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5) or ["vit_b_16", "vit_l_16"]
        raise CheckpointError(f"torchvision has no model {name!r}; close: {choices(close)}")
    weights = models.get_model_weights(name).DEFAULT
    published = not (spec.random or spec.file)
    path, content = Path(spec.file), read(Path(spec.file)) if spec.file else None
    classes = classes_in(content, _CLASSIFIER)
    options = {} if classes is None else {"num_classes": classes}
    model = _created(spec, weights if published else None, **options)
    if spec.size is not None:
        model = _resized(model, spec)
    if spec.file:
        convert = None if spec.size is None else _interpolation(model)
        averaged, resample = spec.version == AVERAGED, spec.size is not None
        fill(model, content, path, spec.text, averaged, convert, resample)
    model.pretrained_cfg = _cfg(weights, published)
    if not hasattr(model, "image_size"):
        model.image_size = weights.transforms().crop_size[0]
    return model


def _created(spec: Spec, weights: Any, **options: Any) -> Any:
    """The model; random weights come from a fixed seed."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs too
            return models.get_model(spec.name, weights=weights, **options)
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(
            f"torchvision:{spec.name}: weights could not be loaded ({reason});"
            f" torchvision:{spec.name}@random or torchvision:{spec.name}@FILE work offline"
        ) from error


def _resized(model: Any, spec: Spec) -> Any:
    """The same model for another size, with resampled position embeddings."""
    assert spec.size is not None
    rows, columns = spec.size
    if not isinstance(model, VisionTransformer) or rows != columns:
        raise CheckpointError(
            f"{spec.text}: {spec.name} has no image size of {rows} x {columns}; only"
            " torchvision's vit_* take another size, with as many rows as columns"
        )
    check_patches(spec.size, model.patch_size, spec.text)
    other = _created(spec, None, image_size=rows, num_classes=model.heads[-1].out_features)
    other.load_state_dict(_interpolation(other)(model.state_dict()))
    return other


def _interpolation(model: VisionTransformer) -> Any:
    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(interpolate_embeddings(model.image_size, model.patch_size, weights))  # type: ignore[arg-type]

    return convert


def _cfg(weights: Any, published: bool) -> dict[str, Any]:
    """Normalisation, interpolation and crop of the published weights, by timm's names.

    The class names are given for published weights only: other weights may have other classes.
    """
    view = weights.transforms()
    cfg = {
        "mean": tuple(view.mean),
        "std": tuple(view.std),
        "interpolation": view.interpolation.value,
        "crop_pct": view.crop_size[0] / view.resize_size[0],
    }
    return cfg | ({"label_names": list(weights.meta["categories"])} if published else {})
