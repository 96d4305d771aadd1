"""The command line: `bvit-interp WORD ...` reads options, runs, writes; no arithmetic."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import tyro

from bvit_interp import __version__
from bvit_interp.analyses import ANALYSES
from bvit_interp.errors import MissingExtra, UserError, choices

if TYPE_CHECKING:
    import pandas as pd
    from timm.models.vision_transformer import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is looked at, and where the results go."""

    ckpt: tuple[str, ...] = ("checkpoints/bvit-digits-s",)
    """Checkpoints, one or more: a folder, timm:NAME, timm:NAME@random (seeded weights) or timm:NAME@FILE."""
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
class Train:
    """Train a model by a recipe and leave a checkpoint folder."""

    recipe: str
    """A shipped recipe (digits-s, digits-s-te, digits-s-reg4) or a YAML file."""
    out: Path | None = None
    """Checkpoint folder; by default runs/RECIPE."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change: key=value ..., model.key=value for the model's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads to use; by default all."""


@dataclass(frozen=True, kw_only=True)
class DataExport:
    """Write a data set with masks in ImageNet-S layout."""

    samples: tyro.conf.Positional[str]
    """Data set, as --data elsewhere."""
    out: tyro.conf.Positional[Path]
    """Folder to write, new or empty."""
    split: str | None = None
    """Its split; by default the one to evaluate on."""
    limit: int | None = None
    """Write this many images, spread evenly over the data set."""


@dataclass(frozen=True, kw_only=True)
class DataList:
    """List the data sets there are and where each is looked for."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Gather the tables and figures of a folder into one HTML page that opens from disk."""

    folder: tyro.conf.Positional[Path] = Path("figures")
    """Folder of results."""
    out: Path | None = None
    """The page; by default report.html in that folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 a user's error, 130 interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        print(f"bvit-interp {__version__}")
        return 0
    try:
        _dispatch(given[0], given[1:])
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"bvit-interp: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("bvit-interp: interrupted; finished rows of a sweep are kept", file=sys.stderr)
        return 130
    except RuntimeError:
        if debug or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        print("bvit-interp: error: another process stopped", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _commands() -> dict[str, Callable[[list[str]], None]]:
    """Word -> function of its arguments."""
    commands: dict[str, Callable[[list[str]], None]] = {}
    for word in ANALYSES:
        commands[word.replace("_", "-")] = lambda given, word=word: _analyse(word, given)  # type: ignore[misc]
    return commands | {"train": _train, "data": _data, "report": _report}


def _dispatch(word: str, given: list[str]) -> None:
    commands = _commands()
    if word not in commands:
        raise UserError(f"no command {word!r}; commands: {choices(commands)}")
    commands[word](given)


def _question(module: ModuleType) -> str:
    """An analysis in one sentence: the first line of its docstring."""
    return (module.__doc__ or "").splitlines()[0]


def _overview() -> str:
    rows = {word.replace("_", "-"): _question(_module(word)) for word in ANALYSES}
    rows |= {"train": str(Train.__doc__), "data": "List data sets (data list) or write one (data export).",
             "report": str(Report.__doc__)}  # fmt: skip
    listed = "\n".join(f"  {word:<15} {text}" for word, text in rows.items())
    return (
        "usage: bvit-interp WORD [options]     (bvit-interp WORD --help tells the options)\n\n"
        "Follow heads and neurons through the steps of a recurrent Vision Transformer.\n\n"
        f"{listed}\n\n--debug shows the traceback of an error; --version the version."
    )


def _module(word: str) -> ModuleType:
    return importlib.import_module(f"bvit_interp.analyses.{word}")


def _parse(options: Any, word: str, given: list[str], description: str | None = None) -> Any:
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return _tyro(options, word, given, description)
    except SystemExit as stopped:
        cause = stopped.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:  # a value that its Config refuses: one line, as everywhere
            raise cause from None
        sys.stderr.write(printed.getvalue())
        raise


def _tyro(options: Any, word: str, given: list[str], description: str | None) -> Any:
    return tyro.cli(
        options,
        args=given,
        prog=f"bvit-interp {word}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _gathered(given: list[str], flag: str) -> list[str]:
    """`--ckpt A --ckpt B` as `--ckpt A B`: a repeated flag would otherwise replace the earlier one."""
    values: list[str] = []
    rest: list[str] = []
    position: int | None = None
    taking = False
    for argument in given:
        if argument == flag or argument.startswith(f"{flag}="):
            position = len(rest) if position is None else position
            taking = argument == flag
            values += [] if taking else [argument.partition("=")[2]]
        elif taking and not argument.startswith("--"):
            values.append(argument)
        else:
            taking = False
            rest.append(argument)
    return rest if position is None else [*rest[:position], flag, *values, *rest[position:]]


# ---- analyses ------------------------------------------------------------------------------------------


def _analyse(word: str, given: list[str]) -> None:
    module = _module(word)
    options = make_dataclass("Options", [("inputs", Inputs), ("config", module.Config)], frozen=True)
    parsed = _parse(options, word.replace("_", "-"), _gathered(given, "--ckpt"), module.__doc__)
    with _processes(parsed.inputs.device) as device:
        run_analysis(word, parsed.inputs, parsed.config, device)


def run_analysis(word: str, inputs: Inputs, config: Any, device: str = "cpu") -> pd.DataFrame:
    """Measure, write `<word>.csv`, `.png` and `.json`, and print a summary; returns the table."""
    from bvit_interp import results
    from bvit_interp.data.catalog import open_samples

    module = _module(word)
    data = open_samples(inputs.data, inputs.split, inputs.download)
    models = _load(inputs.ckpt, device)
    results.check_folder(inputs.out)
    path = inputs.out / f"{word}.csv"
    rows_of = {
        "analysis": word, "data": inputs.data, "split": inputs.split, "config": config.identity(),
        "weights": {name: results.weights_hash(model) for name, model in models.items()},
    }  # fmt: skip
    wanted = inspect.signature(module.measure).parameters
    given: dict[str, Any] = {"folder": inputs.out} if "folder" in wanted else {}
    if "table" in wanted:
        given["table"] = results.Table(path, rows_of, inputs.overwrite)
    frame = module.measure(models, data, config, **given)
    if results.rank_and_world()[0] == 0:
        results.write_table(frame, path)
        results.write_json(results.provenance({**rows_of, "config": asdict(config)}), path.with_suffix(".json"))
        print(_summary(frame))
        print(f"\nwrote {path}")
        _draw(module, frame, path.with_suffix(".png"))
    return frame


def _load(specs: Sequence[str], device: str) -> dict[str, VisionTransformer]:
    from bvit_interp.models import checkpoint

    names = [checkpoint.display_name(spec) for spec in specs]
    if len(set(specs)) < len(specs):
        raise UserError(f"a checkpoint is given twice: {', '.join(specs)}")
    if len(set(names)) < len(names):  # two folders of one name: with the folder they are in
        names = ["/".join(Path(spec).parts[-2:]) for spec in specs]
    labels = names if len(set(names)) == len(names) else list(specs)
    return {label: checkpoint.load(spec, device) for label, spec in zip(labels, specs, strict=True)}


def _draw(module: ModuleType, frame: pd.DataFrame, path: Path) -> None:
    try:
        from bvit_interp import plotting
    except ImportError:
        raise MissingExtra("matplotlib", "viz") from None
    plotting.save(module.plot(frame), path)
    print(f"wrote {path}")


def _summary(frame: pd.DataFrame) -> str:
    """The table as text: without its rows of single heads, and without the columns that only name files."""
    if "head" in frame and (frame["head"] == "mean").any():
        frame = frame[frame["head"].isin(["mean", "best", "best-split"])]
    return str(frame.drop(columns="path", errors="ignore").to_string(index=False, float_format="{:.3f}".format))


@contextmanager
def _processes(device: str) -> Iterator[str]:
    """The device of this process; under torchrun, with its process group open."""
    import torch
    import torch.distributed as dist

    import bvit_interp.models.bvit  # noqa: F401  registers the models with timm

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; devices: auto, cpu, cuda, cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; devices: auto, cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")  # tables are gathered on the CPU
    try:
        yield device
    finally:
        dist.destroy_process_group()


# ---- the other words -----------------------------------------------------------------------------------


def _train(given: list[str]) -> None:
    options = _parse(Train, "train", given)
    from bvit_interp.training import recipe

    plan = recipe.read(options.recipe, list(options.set))
    out = options.out or Path("runs") / Path(options.recipe).stem
    with _processes(options.device) as device:
        import torch

        from bvit_interp.training import supervised

        if options.threads:
            torch.set_num_threads(options.threads)
        supervised.train(plan, out, device)
    print(f"wrote {out}")


def _data(given: list[str]) -> None:
    words = {"list": DataList, "export": DataExport}
    if not given or given[0] not in words:
        if given and given[0] in ("-h", "--help"):
            print("\n".join(f"  bvit-interp data {word:<8} {options.__doc__}" for word, options in words.items()))
            return
        raise UserError("data takes list or export: bvit-interp data list")
    options = _parse(words[given[0]], f"data {given[0]}", given[1:])
    from bvit_interp.data import catalog

    if isinstance(options, DataList):
        for row in catalog.listing():
            print("  ".join(f"{key}: {value}" for key, value in row.items()))
        return
    written = catalog.export(catalog.open_samples(options.samples, options.split), options.out, options.limit)
    print(f"wrote {written} images and masks to {options.out}")


def _report(given: list[str]) -> None:
    options = _parse(Report, "report", given)
    from bvit_interp.report import page

    print(f"wrote {page.write(options.folder, options.out)}")


if __name__ == "__main__":
    sys.exit(main())
