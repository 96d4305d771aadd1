"""Runs an analysis: measures, writes table, figure and provenance, prints a summary."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from bvit_interp import results
from bvit_interp.cli.options.analysis import Inputs
from bvit_interp.cli.run.output import draw, show
from bvit_interp.cli.run.processes import processes
from bvit_interp.data import inventory, labels
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError, choices
from bvit_interp.models import checkpoint
from bvit_interp.models.looped import Model


def run(inputs: Inputs, config: Any, analysis: str) -> None:
    """Run an analysis on the chosen device, under torchrun in several processes."""
    with processes(inputs.device) as device:
        run_analysis(analysis, inputs, config, device)


def run_analysis(word: str, inputs: Inputs, config: Any, device: str = "cpu") -> pd.DataFrame:
    """Measure, write `<word>.csv`, `.png` and `.json`, print a summary; returns the table."""
    question = importlib.import_module(f"bvit_interp.analyses.{word}")
    data = open_samples(inputs.data, inputs.split, inputs.download)
    both = getattr(question, "WITH_AVERAGED_WEIGHTS", False)
    models = _load(_with_averaged(inputs.ckpt) if both else inputs.ckpt, device)
    out = inputs.out or Path("runs") / word
    _lock = results.check_folder(out)  # held until the results are written
    path = out / f"{word}.csv"
    options = {
        "analysis": word,
        "data": inputs.data,
        "split": inputs.split,
        "config": config.resume_key(),
        "weights": {name: results.weights_hash(model) for name, model in models.items()},
    }
    wanted = inspect.signature(question.measure).parameters
    further: dict[str, Any] = {"folder": out} if "folder" in wanted else {}
    if "table" in wanted:
        further["table"] = results.Table(path, options, inputs.overwrite)
    elif not inputs.overwrite:
        results.refuse_other_options(path, options, whole="weights")
    try:
        frame = question.measure(models, data, config, **further)
    except KeyError as error:
        there = further["table"].columns if "table" in further else None
        if there is not None and (
            lacking := [name for name in question.COLUMNS if name not in there]
        ):
            lost = choices(lacking)
            raise UserError(f"{path} lacks the columns {lost}; --overwrite replaces it") from error
        raise
    if results.rank_and_world()[0] == 0:
        about = results.provenance({**options, "config": asdict(config)})
        about["intake"] = _intake(data, models, config)
        results.write_result(frame, about, path)
        show(question.summary(frame))
        print(f"\nwrote {path}")
        draw(f"bvit_interp.analyses.{word}.plot", frame, path.with_suffix(".png"))
    return frame


def _intake(data: Samples, models: Mapping[str, Model], config: Any) -> dict[str, Any]:
    """What the data set holds, and how its classes match each model's; null where they do not."""
    matched = {name: labels.evidence(data, model, config.classes) for name, model in models.items()}
    return {**inventory.about(data), "matched": matched}


def _with_averaged(specs: Sequence[str]) -> list[str]:
    """The checkpoints, each followed by its averaged weights where it has them."""
    return [
        version
        for spec in specs
        for version in checkpoint.versions(spec)
        if version == spec or version not in specs
    ]


def _load(specs: Sequence[str], device: str) -> dict[str, Model]:
    """The models by name; where two folders have one name, by the folder they are in too."""
    if not specs:
        raise UserError("--ckpt needs one or more checkpoints")
    if len({checkpoint.location(spec) for spec in specs}) < len(specs):
        raise UserError(f"a checkpoint is given twice: {', '.join(specs)}")
    names = [checkpoint.display_name(spec) for spec in specs]
    if len(set(names)) < len(names):
        names = ["/".join(Path(spec).parts[-2:]) for spec in specs]
    unique = names if len(set(names)) == len(names) else list(specs)
    return {name: checkpoint.load(spec, device) for name, spec in zip(unique, specs, strict=True)}
