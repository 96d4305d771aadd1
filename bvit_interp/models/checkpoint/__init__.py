"""Checkpoints: a folder with `model.safetensors`, `config.json` and `README.md`.

Weights averaged over training (EMA) are stored beside the raw ones as `ema.safetensors`;
`FOLDER@ema` opens them. Masks of the steps are stored there as `masks.safetensors`; `FOLDER@masked`
opens the raw weights under them. The layout is that of timm's hub and local folders, so
`timm.create_model("local-dir:checkpoints/NAME", pretrained=True)` opens it too once `bvit_interp`
is imported.

`load` also opens models of timm, torchvision and Hugging Face, other weights files, and models of
the user's own code. A pickle is never allowed to run code. A Python file or module runs only if
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
