"""The words of the analyses, and the page that gathers their results."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import tyro

from bvit_interp.cli.options import gathered, parse, processes
from bvit_interp.errors import MissingExtra, UserError

if TYPE_CHECKING:
    import pandas as pd
    from timm.models.vision_transformer import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is looked at, and where the results go."""

    ckpt: tuple[str, ...] = ("checkpoints/bvit-digits-s",)
    """Checkpoints, one or more: a folder, FOLDER@ema (averaged weights), timm:NAME,
    timm:NAME@random (seeded weights) or timm:NAME@FILE."""
    data: str = "digits-s"
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH."""
    split: str | None = None
    """Its split; by default the one to evaluate on."""
    out: Path = Path("figures")
    """Folder for the table (.csv), the figure (.png) and what made them (.json)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Start again where a sweep would continue a table that is there."""
    download: bool = False
    """Fetch CIFAR with torchvision if it is not there."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Gather the tables and figures of a folder into one HTML page that opens from disk."""

    folder: tyro.conf.Positional[Path] = Path("figures")
    """Folder of results."""
    out: Path | None = None
    """The page; by default report.html in that folder."""


def module_of(word: str) -> ModuleType:
    """The module of an analysis."""
    return importlib.import_module(f"bvit_interp.analyses.{word}")


def question(module: ModuleType) -> str:
    """An analysis in one sentence: the first line of its docstring."""
    return (module.__doc__ or "").splitlines()[0]


def analyse(word: str, given: list[str]) -> None:
    """`bvit-interp WORD` of an analysis."""
    module = module_of(word)
    options = make_dataclass(
        "Options", [("inputs", Inputs), ("config", module.Config)], frozen=True
    )
    parsed = parse(options, word.replace("_", "-"), gathered(given, "--ckpt"), module.__doc__)
    with processes(parsed.inputs.device) as device:
        run_analysis(word, parsed.inputs, parsed.config, device)


def run_analysis(word: str, inputs: Inputs, config: Any, device: str = "cpu") -> pd.DataFrame:
    """Measure, write `<word>.csv`, `.png` and `.json`, and print a summary; returns the table."""
    from bvit_interp import results
    from bvit_interp.data.catalog import open_samples

    module = module_of(word)
    data = open_samples(inputs.data, inputs.split, inputs.download)
    models = _load(_with_ema(inputs.ckpt) if word == "evaluate" else inputs.ckpt, device)
    results.check_folder(inputs.out)
    path = inputs.out / f"{word}.csv"
    rows_of = {
        "analysis": word,
        "data": inputs.data,
        "split": inputs.split,
        "config": config.resume_key(),
        "weights": {name: results.weights_hash(model) for name, model in models.items()},
    }
    wanted = inspect.signature(module.measure).parameters
    given: dict[str, Any] = {"folder": inputs.out} if "folder" in wanted else {}
    if "table" in wanted:
        given["table"] = results.Table(path, rows_of, inputs.overwrite)
    frame = module.measure(models, data, config, **given)
    if results.rank_and_world()[0] == 0:
        results.write_table(frame, path)
        results.write_json(
            results.provenance({**rows_of, "config": asdict(config)}), path.with_suffix(".json")
        )
        print(
            module.summary(frame)
            .drop(columns="path", errors="ignore")
            .to_string(index=False, float_format="{:.3f}".format)
        )
        print(f"\nwrote {path}")
        draw(module, frame, path.with_suffix(".png"))
    return frame


def _with_ema(specs: Sequence[str]) -> list[str]:
    """The checkpoints, each followed by its averaged weights where it has them."""
    from bvit_interp.models.checkpoint import versions

    return [
        version
        for spec in specs
        for version in versions(spec)
        if version == spec or version not in specs
    ]


def _load(specs: Sequence[str], device: str) -> dict[str, VisionTransformer]:
    from bvit_interp.models import checkpoint

    names = [checkpoint.display_name(spec) for spec in specs]
    if len(set(specs)) < len(specs):
        raise UserError(f"a checkpoint is given twice: {', '.join(specs)}")
    if len(set(names)) < len(names):  # two folders of one name: with the folder they are in
        names = ["/".join(Path(spec).parts[-2:]) for spec in specs]
    labels = names if len(set(names)) == len(names) else list(specs)
    return {label: checkpoint.load(spec, device) for label, spec in zip(labels, specs, strict=True)}


def draw(module: ModuleType, frame: pd.DataFrame, path: Path) -> None:
    """Write the figure that the module's `plot` makes of a table."""
    try:
        from bvit_interp import plotting
    except ImportError:
        raise MissingExtra("matplotlib", "viz") from None
    plotting.save(module.plot(frame), path)
    print(f"wrote {path}")


def report(given: list[str]) -> None:
    """`bvit-interp report`."""
    options = parse(Report, "report", given)
    from bvit_interp.report import page

    print(f"wrote {page.write(options.folder, options.out)}")
