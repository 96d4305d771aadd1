"""Every analysis on a tiny model and a few images, as the tests of devices run it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from bvit_interp.analyses import ANALYSES
from bvit_interp.models import masks
from bvit_interp.models.exits import FILE, Exits

OPTIONS: dict[str, dict[str, Any]] = {
    word: importlib.import_module(f"bvit_interp.analyses.{word}").QUICK for word in ANALYSES
}
"""Options that make each of them small; 41 images and batches of 8 unless it says otherwise."""


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options as they are typed on the command line."""
    typed = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            typed.append(flag)
        else:
            values = value if isinstance(value, tuple) else (value,)
            typed += [flag, *map(str, values)]
    return typed


VARIANTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "rollout": ("pointing_game", {"saliency": "rollout", "target": "any", "tolerance": 2.0}, None),
    "gradient-x-activation": (
        "pointing_game",
        {"saliency": "gradient-x-activation", "limit": 12},
        "captum",
    ),
    "integrated-gradients": (
        "pointing_game",
        {"saliency": "integrated-gradients", "limit": 4},
        "captum",
    ),
    "each block, every rank": (
        "rank_sweep",
        {"methods": ("svd", "whitened", "random"), "blocks": "each", "ranks": (8,)},
        None,
    ),
    "heads moved": ("patching", {"site": "z", "unit": 1, "mode": ("other",), "limit": 9}, None),
    "noise": (
        "patching",
        {"corruption": "noise", "mode": ("corrupted",), "limit": 9, "steps": (1, 3)},
        None,
    ),
    "ablated to zero": (
        "selectivity",
        {"n_ablated": 4, "random_units": 1, "zero": True, "units": ("z:1", "mlp_post:3")},
        None,
    ),
    "neurons before GELU": (
        "features",
        {
            "neurons": "auto",
            "n_neurons": 2,
            "steps": (2,),
            "iterations": 2,
            "limit": 24,
            "site": "mlp_pre",
            "noise": "pixel",
        },
        None,
    ),
    "images as spectra": ("features", {"parametrisation": "fourier"}, "lucent"),
    "gates to zero": ("circuits", {"ablation": "zero", "methods": ("gradient",)}, None),
}
"""Ways through an analysis that its own options here do not take: analysis, options, package that
it needs."""


def table(word: str, model: nn.Module, data: Any, folder: Path, **options: Any) -> pd.DataFrame:
    """The table of an analysis of `model`, where its weights are; what it needs beside them is
    drawn by seed."""
    module = importlib.import_module(f"bvit_interp.analyses.{word}")
    given = {"limit": 41, "batch_size": 8, **OPTIONS[word], **options}
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    if word == "pathways":
        drawn = {
            name: torch.rand(mask.shape, generator=generator) < 0.6
            for name, mask in masks.full(model).items()
        }
        model = masks.masked(model, masks.Masks(drawn), baked=True)
    if word == "early_exit":
        exits = Exits((1, 2), model.embed_dim, model.num_classes).to(device)
        for parameter in exits.parameters():
            parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(device)
        folder.mkdir(parents=True, exist_ok=True)
        exits.save(folder / FILE, model, {})
        given["exits"] = (folder,)
    wanted = (
        {"folder": folder / word}
        if word in ("attention", "selectivity", "features", "lens", "pointing_game")
        else {}
    )
    return module.measure({"m": model}, data, module.Config(**given), **wanted)


OF_THE_MACHINE = [
    "saved_time",
    "latency_ms",
    "latency_low",
    "latency_high",
    "latency_ratio",
    "throughput",
    "peak_memory",
    "device",
    "threads",
]
"""Columns that differ from run to run, or say where it was."""


def turned(found: pd.DataFrame, wanted: pd.DataFrame, rtol: float, atol: float) -> pd.DataFrame:
    """The cells that differ: text and whole numbers at all, others by more than ``atol + rtol
    |wanted|``."""
    assert list(found) == list(wanted)
    assert len(found) == len(wanted)
    cells = []
    for column in wanted.columns.drop(["path", *OF_THE_MACHINE], errors="ignore"):
        one, other = found[column], wanted[column]
        if other.dtype == np.float64:
            differs = ~np.isclose(
                one.to_numpy(float), other.to_numpy(float), rtol=rtol, atol=atol, equal_nan=True
            )
        else:
            differs = one.astype(object).where(one.notna(), None) != other.astype(object).where(
                other.notna(), None
            )
            differs = (differs & (one.notna() | other.notna())).to_numpy()
        for i in np.flatnonzero(differs):
            cells.append(
                {"row": i, "column": column, "found": one.iloc[i], "wanted": other.iloc[i]}
            )
    return pd.DataFrame(cells, columns=["row", "column", "found", "wanted"])
