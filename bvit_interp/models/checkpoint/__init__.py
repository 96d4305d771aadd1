"""Checkpoints: a folder with `model.safetensors`, `config.json` and `README.md`.

Weights averaged over training (EMA) lie beside the raw ones as `ema.safetensors`; `FOLDER@ema`
opens them. Masks of the steps lie there as `masks.safetensors`; `FOLDER@masked` opens the raw
weights under them. The layout is timm's for a hub or local folder, so
`timm.create_model("local-dir:checkpoints/NAME", pretrained=True)` opens it too once `bvit_interp`
is imported.

`load` also opens models of timm, torchvision and Hugging Face, weights files of others, and models
of a user's own code. A pickle is never allowed to run code. A Python file or module runs only if
the user names it.
"""

from bvit_interp.models.checkpoint.opening import class_names, load, load_vit
from bvit_interp.models.checkpoint.saving import save
from bvit_interp.models.checkpoint.specs import (
    CARD,
    CONFIG,
    EMA,
    WEIGHTS,
    display_name,
    location,
    versions,
)

__all__ = [
    "CARD",
    "CONFIG",
    "EMA",
    "WEIGHTS",
    "class_names",
    "display_name",
    "load",
    "load_vit",
    "location",
    "save",
    "versions",
]
