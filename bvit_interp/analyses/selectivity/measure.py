"""What does each neuron and head answer to at every step: when is it born, does it die, does it
change its role?

Ours; not in bViT (arXiv 2605.10661), whose Fig. 3 shows pictures of a few neurons. A unit's answer
to an image is, of a neuron, the mean of `mlp_post` over the patches, of a head the mean norm of `z`
over them; its profile at a step the mean answer to each class. `selectivity` is the share of the
answer's variance over images that lies between classes, eta^2, debiased: 0 on average where labels
are permuted. A unit is alive at a step whose selectivity is at least `threshold` and beyond chance
by the F test (0.05, Bonferroni over all units and steps); `birth` and `death` are its first and
last such step. `role_change` is 1 - the correlation of the profiles of successive steps,
`stability` that of any two, over steps alive. `share_class`, `share_step` and `share_interaction`
divide the variance of a unit's table of class means, classes x steps, and sum to 1. `reliability`
correlates the profiles of two random halves of the images. Formulas and sources are in
`probes/lives.py`.

Nulls: images in random groups in place of classes (selectivity, units alive, shares), the next
unit's profile in place of a unit's own (roles, reliability), other units of the kind, drawn at
random (ablation). Chosen units are ablated at one step, or at all, to their mean at each token, and
told in full: class means, top images, effect on accuracy and on the logit of the true class; the
report has a page for each. A unit of a stacked ViT is another one in each block, tied to its
namesakes by nothing but a number: its roles show what a shared block must beat.

Cost: a forward an image, and V (T + 3) / 2 of each of the `ablated` for V ablated units, up to 14
by default. Two models of width 128, 1000 images of 32 px, 200 of them ablated: 316 s of one core's
time. By the number of forwards, not measured, all of ImageNet's are a pass and 10,000 images more;
its sums take 0.9 GB a bViT-B. Expected: unknown before; if neurons of a shared block keep their
meaning, their roles change less than a stack's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from bvit_interp.analyses.selectivity import COLUMNS, LISTS, Config
from bvit_interp.analyses.selectivity.class_selectivity import Lives
from bvit_interp.analyses.selectivity.responses import (
    Biographies,
    Effects,
    ablate_all,
    drawn,
    named,
    sheet,
    watch_all,
)
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples
from bvit_interp.metrics import bootstrap_means, interval, wilson_interval
from bvit_interp.results import rank_and_world, replacing

_KINDS = ("neuron", "head")


def measure(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Lives of every unit of every model.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes.
    folder : where the top images and the .npz go; without it none are kept.

    Returns
    -------
    A table of `COLUMNS`.
    """
    given = {name: named(name, model, config.units) for name, model in models.items()}
    seen = watch_all(models, data, config, config.top, config.seed)
    lives = {
        name: {
            kind: Lives.of(sums.compute(), config.threshold) for kind, sums in of.profiles.items()
        }
        for name, of in seen.items()
    }
    chosen = {
        name: given[name]
        or [
            (kind, unit)
            for kind in _KINDS
            for unit in of[kind].first_of(LISTS, config.count, config.lifetime)
        ]
        for name, of in lives.items()
    }
    others = {name: drawn(of.probe, config.nulls, config.seed) for name, of in seen.items()}
    ablated = {name: list(dict.fromkeys(chosen[name] + others[name])) for name in models}
    fewer = replace(config, limit=min(config.ablated, config.limit or config.ablated))
    effects = ablate_all(seen, ablated, models, data, fewer, config.zero)
    frames = []
    for name, kinds in lives.items():
        folders = None if folder is None else (folder, name.replace("/", "_").replace("@", "_"))
        parts = [part for kind, of in kinds.items() for part in _of_kind(kind, of, data, config)]
        path = _arrays(kinds, seen[name], data, folders)
        parts = [part.assign(path=path) if part["unit"].isna().all() else part for part in parts]
        geometry = Geometry.of(models[name], data, config.resize)
        for kind, unit in chosen[name]:
            parts += _of_unit(kind, unit, kinds[kind], seen[name], data, config)
            parts.append(_top(kind, unit, seen[name], data, geometry, folders))
        parts += _of_effects(effects[name], chosen[name], ablated[name], others[name])
        frames.append(pd.concat(parts).assign(model=name))
    frame = pd.concat(frames, ignore_index=True).reindex(columns=list(COLUMNS))
    numbers = ["value", "low", "high", "null"]
    frame[numbers] = (
        frame[numbers].astype(float).round(7)
    )  # float32 gives no more, and the file is half as long
    return frame.astype({"unit": "Int64", "step": "Int64", "rank": "Int64", "n": "Int64"})


def _rows(statistic: str, kind: str, unit: Any, step: Any, **columns: Any) -> pd.DataFrame:
    """Rows of a statistic; columns are numbers, lists or tensors."""
    listed = {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in columns.items()
    }
    rows = max(
        (len(each) for each in (unit, step, *listed.values()) if isinstance(each, (list, range))),
        default=1,
    )
    about = {"statistic": statistic, "kind": kind, "unit": unit, "step": step}
    return pd.DataFrame(about | listed, index=range(rows))


def _of_kind(kind: str, of: Lives, data: Samples, config: Config) -> Iterator[pd.DataFrame]:
    """Selectivity and ranked statistics of all units of a kind, and their means."""
    found, units = of.selectivity, range(of.alive.shape[1])
    low, high = found.interval()
    names = [data.classes[i] for i in of.classes.tolist()]
    for t, value in enumerate(found.value):
        most = [names[i] for i in of.means[:, t].argmax(0).tolist()]
        about = {
            "low": low[t],
            "high": high[t],
            "null": of.random.value[t],
            "n": found.images,
            "class": most,
        }
        yield _rows("selectivity", kind, units, t + 1, value=value, **about)
    alive, null = of.alive.double().mean(1), of.random.alive(config.threshold).double().mean(1)
    ends = np.array([wilson_interval(share * len(units), len(units)) for share in alive.tolist()])
    about = {"low": ends[:, 0], "high": ends[:, 1], "null": null, "n": len(units)}
    yield _rows("alive", kind, None, range(1, len(alive) + 1), value=alive, **about)
    for key, columns in of.statistics.items():
        part = _rows(key, kind, units, None, **columns, n=found.images)
        if key in LISTS:
            listed = of.order(key, LISTS[key], config.lifetime).tolist()
            part["rank"] = part["unit"].map(
                {unit: place for place, unit in enumerate(listed, start=1)}
            )
        yield part
        there = part[part["value"].notna()]
        below, above = interval(bootstrap_means(there[["value"]].to_numpy(float))[:, 0])
        about = {
            "low": below,
            "high": above,
            "null": there["null"].mean() if "null" in there else math.nan,
        }
        yield _rows(key, kind, None, None, value=there["value"].mean(), n=len(there), **about)


def _of_unit(
    kind: str, unit: int, of: Lives, seen: Biographies, data: Samples, config: Config
) -> Iterator[pd.DataFrame]:
    """Class means of a chosen unit, of the classes whose means vary most, and a neuron's firing."""
    means = of.means[:, :, unit]
    null, steps = means.mean(0), range(1, means.shape[1] + 1)
    spread = (means - null).square().sum(1).argsort(descending=True, stable=True)[: config.profile]
    for c in spread.sort().values.tolist():
        about = {"class": data.classes[int(of.classes[c])], "null": null}
        yield _rows("class_mean", kind, unit, steps, value=means[c], **about)
    if kind == "neuron":
        yield _rows(
            "firing",
            kind,
            unit,
            steps,
            **{key: x[:, unit] for key, x in seen.firing.compute().items()},
        )


def _arrays(
    kinds: Mapping[str, Lives], seen: Biographies, data: Samples, folders: tuple[Path, str] | None
) -> str | None:
    """The .npz of what the table has of chosen units only, written by the first process."""
    if folders is None:
        return None
    arrays = {f"{kind}_class_means": of.means.float().numpy() for kind, of in kinds.items()}
    arrays["neuron_firing"] = seen.firing.compute()["value"].float().numpy()
    arrays["classes"] = np.array([data.classes[i] for i in kinds["neuron"].classes.tolist()])
    path = folders[0] / f"selectivity_{folders[1]}.npz"
    if rank_and_world()[0] == 0:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    return str(path)


def _top(
    kind: str,
    unit: int,
    seen: Biographies,
    data: Samples,
    geometry: Geometry,
    folders: tuple[Path, str] | None,
) -> pd.DataFrame:
    """The images of a unit's largest answers at every step, and a PNG of them, a row a step."""
    found = {key: of[:, unit].cpu() for key, of in seen.top[kind].compute().items()}
    grid, images, patches, path = (
        seen.probe.grid,
        found["images"].tolist(),
        found["patches"].tolist(),
        None,
    )
    listed = [
        " ".join(f"{i}:{p // grid[1]},{p % grid[1]}" for i, p in zip(*step, strict=True) if i >= 0)
        for step in zip(images, patches, strict=True)
    ]
    if folders is not None:
        path = folders[0] / "selectivity" / f"{folders[1]}_{kind}{unit}.png"
        if rank_and_world()[0] == 0:
            with replacing(path) as temporary:
                Image.fromarray(sheet(images, patches, grid, data, geometry)).save(
                    temporary, format="PNG"
                )
    about = {"value": found["values"][:, 0], "top": listed, "path": path and str(path)}
    return _rows("top", kind, unit, range(1, len(images) + 1), **about)


def _of_effects(
    of: Effects,
    chosen: list[tuple[str, int]],
    ablated: list[tuple[str, int]],
    others: list[tuple[str, int]],
) -> Iterator[pd.DataFrame]:
    """What ablating each chosen unit does at each step and at all, beside the other units of its
    kind."""
    found, hits = of.change.compute(), of.hits.compute()
    steps = [*range(1, of.probe.num_steps + 1), None]
    for i, statistic in enumerate(("ablation_accuracy", "ablation_logit")):
        for kind, unit in chosen:
            null = [
                ablated.index(other)
                for other in others
                if other[0] == kind and other != (kind, unit)
            ]
            columns = {
                key: values[i, :, ablated.index((kind, unit))] for key, values in found.items()
            }
            yield _rows(
                statistic, kind, unit, steps, **columns, null=found["value"][i][:, null].mean(1)
            )
    n = int(hits["n"])
    low, high = wilson_interval(float(hits["value"]) * n, n)
    yield _rows(
        "accuracy", "model", None, None, value=float(hits["value"]), low=low, high=high, n=n
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over a model's neurons, and the first two of each ranked list."""
    means = frame["unit"].isna() & frame["step"].isna()
    listed = frame["statistic"].isin(LISTS) & (frame["rank"] <= 2)
    kept = frame[(means | listed) & (frame["kind"] == "neuron")]
    return kept[["model", "statistic", "unit", "value", "low", "high", "null", "n", "rank"]]
