"""A study: train one recipe on a grid of shapes and seeds.

Fig. 2 (width, steps, heads) and Table 2 (blocks) of the paper (arXiv 2605.10661), at the scale of
CIFAR-10 or digits-s. A study is a YAML file, such as those in `training/studies`: a recipe,
settings for all runs, and points that change some of the settings. It continues where it stopped,
even in the middle of a run, and gives one table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError, choices
from bvit_interp.models import cost
from bvit_interp.models.bvit import BViT
from bvit_interp.results import Table, read_table
from bvit_interp.training.loop import build, feed, supervised
from bvit_interp.training.loop import recipe as recipes
from bvit_interp.training.loop.trainer import HISTORY

FOLDER = Path(__file__).parents[1] / "studies"
COLUMNS = {
    "study": "what is varied: width, steps, heads or blocks",
    "series": "line of the figure",
    "width": "embedding dimension",
    "heads": "number of attention heads",
    "blocks": "number of distinct blocks",
    "steps": "number of steps",
    "seed": "random seed of the run",
    "epochs": "number of training epochs",
    "parameters": "number of the model's parameters",
    "gflops": "cost per image, without attention products, GFLOPs",
    "accuracy": "share of test images that the raw weights classify correctly, 0..1",
    "ema_accuracy": "share of test images that the averaged weights classify correctly, 0..1",
    "test_loss": "test cross-entropy of the raw weights, nats",
    "chance": "the null: share of the most frequent test class, 0..1",
}
_SCORES = {  # column of the study -> column of a run's history
    "accuracy": "top1",
    "ema_accuracy": "ema_top1",
    "test_loss": "test_loss",
    "chance": "chance",
}
_SHAPE = ("width", "heads", "blocks", "steps")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to train: every point with every seed.

    Parameters
    ----------
    name : what is varied, a column of the table.
    recipe : recipe of all runs.
    settings : ``key=value`` for all runs.
    points : for each point its `series`, and the settings that it changes.
    data : data set in place of the recipe's.
    """

    name: str
    recipe: str
    settings: tuple[str, ...]
    points: tuple[dict[str, Any], ...]
    data: str | None = None

    def __post_init__(self) -> None:
        varied = {"seed", "series"}.union(*self.points)
        if refused := [text for text in self.settings if text.partition("=")[0] in varied]:
            raise UserError(
                f"study {self.name}: its points and seeds set {choices(sorted(varied))};"
                f" not {choices(refused)}"
            )

    def runs(self, seeds: tuple[int, ...]) -> list[tuple[str, int, recipes.Recipe]]:
        """Series, seed and complete recipe of every run; all points of the first seed first."""
        return [
            (str(point["series"]), seed, self._recipe(point, seed))
            for seed in seeds
            for point in self.points
        ]

    def _recipe(self, point: dict[str, Any], seed: int) -> recipes.Recipe:
        changes = [f"{key}={value}" for key, value in point.items() if key != "series"]
        return recipes.read(self.recipe, [*self.settings, *changes, f"seed={seed}"], self.data)


def available() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(
    name: str, recipe: str | None = None, settings: tuple[str, ...] = (), data: str | None = None
) -> Study:
    """Read a study.

    Parameters
    ----------
    name : a shipped study or a .yaml file.
    recipe : recipe in place of the study's; the study's settings are then not used.
    settings : further ``key=value`` for all runs.
    data : data set in place of the recipe's.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no study {name!r}; studies: {choices(available())}, or a .yaml file")
    content = yaml.safe_load(path.read_text())
    missing = {"recipe", "settings", "points"} - {*(content if isinstance(content, dict) else ())}
    if missing:
        raise UserError(f"{path}: not a study, it lacks {choices(sorted(missing))}")
    varied = content.get("varies", path.stem)
    if varied not in _SHAPE:
        raise UserError(f"{path}: varies must be one of {', '.join(_SHAPE)}, got {varied!r}")
    return Study(
        name=varied,
        recipe=recipe or content["recipe"],
        points=tuple(content["points"]),
        settings=(*(content["settings"] if recipe is None else ()), *settings),
        data=data,
    )


def run(
    study: Study,
    seeds: tuple[int, ...],
    out: Path,
    device: str = "cpu",
    *,
    overwrite: bool = False,
    save_minutes: float = 2.0,
) -> pd.DataFrame:
    """Train the missing runs and return the table, one row of `COLUMNS` per run.

    The table is written after each run.

    Parameters
    ----------
    study : the recipe and its points.
    seeds : every point is trained with each seed.
    out : folder of the table `study_NAME.csv` and of one checkpoint folder per run.
    device : as in `supervised.train`.
    overwrite : start again instead of continuing a table.
    save_minutes : as in `supervised.train`.
    """
    plans = study.runs(seeds)
    if not plans:
        raise UserError("a study needs at least one seed")
    samples = open_samples(plans[0][2].data, "train")
    # before the first run, so that a model that cannot be built stops the study at once
    shapes = [_shape(build.make_model(plan, samples)) for _, _, plan in plans]
    options = {"study": study.name, "recipe": _shared(plans), "images": feed.fingerprint(samples)}
    table = Table(out / f"study_{study.name}.csv", options, overwrite)
    for (series, seed, plan), shape in zip(plans, shapes, strict=True):
        keys = {
            "study": study.name,
            "series": series,
            **{key: shape[key] for key in _SHAPE},
            "seed": seed,
        }
        if table.has(**keys):
            continue
        slug = re.sub(r"\W+", "-", "-".join(str(value) for value in keys.values())).lower()
        supervised.train(plan, out / slug, device, overwrite=overwrite, save_minutes=save_minutes)
        scores = _last_scores(out / slug / HISTORY)
        table.append({**keys, **shape, "epochs": plan.epochs, **scores})
    return pd.DataFrame(table.rows)[list(COLUMNS)]


def _last_scores(path: Path) -> dict[str, float]:
    """The scores of a run's last epoch, by the study's columns."""
    history = read_table(path)
    if not len(history) or not {*_SCORES.values()} <= {*history.columns}:
        raise UserError(f"{path}: not the history of a run; --overwrite starts again")
    return {column: float(history[source].iloc[-1]) for column, source in _SCORES.items()}


def _shared(plans: list[tuple[str, int, recipes.Recipe]]) -> dict[str, Any]:
    """The settings that all runs have in common.

    The model's settings become one text, so that an added or removed setting counts as a change.
    """
    settings = [plan.resume_key() | plan.model for _, _, plan in plans]
    common = {
        key: value
        for key, value in settings[0].items()
        if key != "seed" and all(key in other and other[key] == value for other in settings)
    }
    model = [f"{key}={common.pop(key)}" for key in sorted(plans[0][2].model) if key in common]
    return {key: value for key, value in common.items() if key != "model"} | {
        "model": ", ".join(model)
    }


def _shape(model: BViT) -> dict[str, Any]:
    """The columns that depend on the model alone."""
    return {
        "width": model.embed_dim,
        "heads": build.heads(model),
        "blocks": len(list(model.blocks.children())),
        "steps": len(model.blocks),
        "parameters": cost.parameters(model),
        "gflops": cost.flops(model, count_attention=False) / 1e9,
    }
