"""A study: one recipe trained at several points of a grid and with several seeds, into one tidy
table.

Fig. 2 (width, steps, heads) and Table 2 (blocks) of the paper (arXiv 2605.10661), at the scale of
CIFAR-10 or digits-s. A study is a YAML file, as those beside this module: a recipe, settings for
all runs, and points that change some of them. It goes on where it stopped, also in the middle of a
run.
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
    "heads": "attention heads",
    "blocks": "distinct blocks",
    "steps": "applications of a block",
    "seed": "of the run",
    "epochs": "of the run",
    "parameters": "of the model",
    "gflops": "an image, without attention products",
    "top1": "share of test images classified right by the raw weights, 0..1",
    "ema_top1": "the same of the averaged weights, 0..1",
    "test_loss": "test cross-entropy of the raw weights, nats",
    "chance": "the null: share of the most frequent test class, 0..1",
}
_SCORES = ("top1", "ema_top1", "test_loss", "chance")
_SHAPE = ("width", "heads", "blocks", "steps")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained: every point with every seed.

    Parameters
    ----------
    name : what is varied, a column of the table.
    recipe : the recipe all runs share.
    settings : ``key=value`` for all runs.
    points : `series`, and the settings of this point by key.
    data : data set in place of the recipe's.
    """

    name: str
    recipe: str
    settings: tuple[str, ...]
    points: tuple[dict[str, Any], ...]
    data: str | None = None

    def __post_init__(self) -> None:
        own = {"seed", "series"}.union(*self.points)
        if taken := [setting for setting in self.settings if setting.partition("=")[0] in own]:
            raise UserError(
                f"study {self.name}: its points and seeds set {choices(sorted(own))}; not {choices(taken)}"
            )

    def runs(self, seeds: tuple[int, ...]) -> list[tuple[str, int, recipes.Recipe]]:
        """Series, seed and full recipe of every run, the first seed of all points first."""
        listed = []
        for seed in seeds:
            for point in self.points:
                own = [f"{key}={value}" for key, value in point.items() if key != "series"]
                plan = recipes.read(self.recipe, [*self.settings, *own, f"seed={seed}"], self.data)
                listed.append((str(point["series"]), seed, plan))
        return listed


def available() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(
    name: str, recipe: str | None = None, settings: tuple[str, ...] = (), data: str | None = None
) -> Study:
    """A shipped study or a .yaml file of one, with another recipe or further settings for all its
    runs."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no study {name!r}; studies: {choices(available())}, or a .yaml file")
    content = yaml.safe_load(path.read_text())
    lacking = {"recipe", "settings", "points"} - {*(content if isinstance(content, dict) else ())}
    if lacking:
        raise UserError(f"{path}: not a study, it lacks {choices(sorted(lacking))}")
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
    """Train what is missing and return the table, a row of `COLUMNS` a run; it is written after
    each.

    Parameters
    ----------
    study : the recipe and its points.
    seeds : every point is trained with each.
    out : folder of the table `study_NAME.csv` and of a checkpoint folder for every run.
    device : as in `train`.
    overwrite : start again where a table would be continued.
    save_minutes : as in `train`.
    """
    plans = study.runs(seeds)
    if not plans:
        raise UserError("a study needs at least one seed")
    samples = open_samples(plans[0][2].data, "train")
    abouts = [
        _about(build.make_model(plan, samples)) for _, _, plan in plans
    ]  # one that cannot be built stops at once
    options = {"study": study.name, "recipe": _shared(plans), "images": feed.fingerprint(samples)}
    table = Table(out / f"study_{study.name}.csv", options, overwrite)
    for (series, seed, plan), about in zip(plans, abouts, strict=True):
        keys = {
            "study": study.name,
            "series": series,
            **{key: about[key] for key in _SHAPE},
            "seed": seed,
        }
        if table.has(**keys):
            continue
        slug = re.sub(r"\W+", "-", "-".join(str(value) for value in keys.values())).lower()
        supervised.train(plan, out / slug, device, overwrite=overwrite, save_minutes=save_minutes)
        history = read_table(out / slug / HISTORY)
        if not len(history) or not {*_SCORES} <= {*history.columns}:
            raise UserError(
                f"{out / slug / HISTORY}: not the history of a run; --overwrite starts again"
            )
        scores = {name: float(history[name].iloc[-1]) for name in _SCORES}
        table.append({**keys, **about, "epochs": plan.epochs, **scores})
    return pd.DataFrame(table.rows)[list(COLUMNS)]


def _shared(plans: list[tuple[str, int, recipes.Recipe]]) -> dict[str, Any]:
    """The settings that all runs have in common; the model's as one text, so that one more or less
    is seen too."""
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


def _about(model: BViT) -> dict[str, Any]:
    """The columns that the model alone decides."""
    stored = list(model.blocks.children())
    return {
        "width": model.embed_dim,
        "heads": stored[0].attn.num_heads,
        "blocks": len(stored),
        "steps": len(model.blocks),
        "parameters": cost.parameters(model),
        "gflops": cost.flops(model, count_attention=False) / 1e9,
    }
