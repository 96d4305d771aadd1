"""Opens a timm model with published, random or a file's weights."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bvit_interp.errors import CheckpointError, choices, first_line
from bvit_interp.models.checkpoint.resizing import resize
from bvit_interp.models.checkpoint.specs import AVERAGED, MASKED, Spec
from bvit_interp.models.checkpoint.weights import classes_in, fill, read


def open_timm(spec: Spec) -> nn.Module:
    """A model of timm, on the CPU."""
    name = spec.name
    if spec.version == MASKED:
        raise CheckpointError(f"{spec.text}: masks are in a checkpoint folder: FOLDER{MASKED}")
    if not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name!r}; close: {choices(close_names(name))}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs too
            model: Any = timm.create_model(name, pretrained=not (spec.random or spec.file))
    except CheckpointError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(
            f"timm:{name}: weights could not be loaded ({reason}); timm:{name}@random or"
            f" timm:{name}@FILE work offline"
        ) from error
    model = resize(model, spec.size, spec.text)
    if spec.file:
        path = Path(spec.file)
        content = read(path)
        classifier = model.pretrained_cfg.get("classifier")
        first = classifier if isinstance(classifier, str) else (classifier or [""])[0]
        classes = classes_in(content, first)
        if classes not in (None, model.num_classes):  # fine-tuned for other classes
            model.reset_classifier(classes)
        averaged, resample = spec.version == AVERAGED, spec.size is not None
        fill(model, content, path, spec.text, averaged, _filter(name, model), resample)
    return model


def close_names(name: str) -> list[str]:
    """Names of timm's models that are similar to `name`."""
    return difflib.get_close_matches(name, timm.list_models(), n=5) or timm.list_models("bvit_*")


def _filter(name: str, model: nn.Module) -> Any:
    """timm's own filter for weights of this model in another layout or size, if it has one."""
    module: Any = sys.modules[timm.models.model_entrypoint(name).__module__]
    filter_fn = getattr(module, "checkpoint_filter_fn", None)
    if filter_fn is None:
        return None

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return filter_fn(weights, model)

    return convert
