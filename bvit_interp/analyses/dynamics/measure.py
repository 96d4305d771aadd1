"""Does the recurrence come to rest, return or drift when it runs on, and which of its states are alike?

Appendix E.1 of bViT (arXiv 2605.10661): "bViT is not a fixed-point method". The paper argues from Fig. 8's accuracy and
gives no number on the states; these measures are ours. A row is one value of one `statistic`:

- of the tokens of a kind (all of an image's as one vector), mean over images: `norm`; `step_size`, the relative step
  ``||z_t - z_{t-1}|| / ||z_{t-1}||``; `cosine` of the update with the one before it; `to_trained` and `to_last`, the
  relative distance to the states of step T and of the last step S;
- `return`, ``||z_t - z_{t-p}|| / ||z_T||`` over the last w = (S - T) // 3 steps t for p = 1..w, and the verdict
  `period`: the smallest p <= w / 2 at whose every multiple up to w it is below `tolerance`. 1 is a fixed point, more a
  cycle, 0 neither: drift. In units of ||z_T||, since steps of constant length past growing states look ever smaller;
- the same of directions z / ||z||, all that the head's norm lets through: `direction`, `return_direction` and
  `period_direction`. A state that drifts straight on has a fixed point there;
- `participation_ratio` ``(sum l)^2 / sum l^2`` of the eigenvalues of the covariance over images;
- of two states, at every trained step of every model: linear `cka` (Kornblith et al., 2019), `cka_debiased` (Nguyen et
  al., 2021) and the orthogonal `procrustes` distance (Ding et al., 2021).

`null` is the same with the second state from another image, a permutation of the images; the participation ratio's is
an isotropic Gaussian's. Past T a time embedding stays at its last row; a stacked ViT has only its own blocks.

Cost: `steps` / T forwards an image and the states of a batch; 300 images of 32 px, a bViT of width 128 and its ViT take
20 s on one core. Pairs keep a square float64 matrix of side (steps compared x width) summed over models: 0.7 GB for
bViT-B, 2.7 GB beside ViT-B, three times that while they are computed, and an SVD of 768 x 768 a pair; `pair_steps`
chooses fewer.
Expected: for bViT no fixed point: `period` 0 at 48 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.loader import Batch
    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.motion import Motion
    from bvit_interp.probes.pairs import StatePairs
    from bvit_interp.probes.probe import Probe

_BYTES_OF_STATES = 2**28
_BYTES_OF_PAIRS = 2**34
_SIMILARITIES = ("cka", "cka_debiased", "procrustes")


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the dynamics."""

    steps: int = 48
    """Steps S to run, from 1; a stacked ViT (one of timm, or a matched `vit_rms_*`) stops at its last block."""
    tolerance: float = 0.01
    """Distance below which a state counts as the same again, as a share of ||z_T||; of a direction, of length 1."""
    state: Literal["cls", "patches"] = "cls"
    """What an image is in the participation ratio and in pairs: its CLS token, or the mean of its patches."""
    pair_steps: tuple[int, ...] | None = None
    """Steps compared in pairs; by default all the trained ones. One that a model was not trained for is left out."""
    seed: int = 0
    """Of the Gaussian matrix in the null of the Procrustes distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance must be between 0 and 1, got {self.tolerance}")
        if self.state not in ("cls", "patches"):
            raise UserError(f"state must be cls or patches, got {self.state!r}")
        if self.pair_steps is not None and (not self.pair_steps or min(self.pair_steps) < 1):
            raise UserError(f"pair-steps must be >= 1, got {self.pair_steps}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Without pairs of steps."""
        return frame[frame["other_step"].isna()]


COLUMNS = {
    "model": "checkpoint",
    "statistic": "norm, step_size, direction, cosine, to_trained, to_last, return, return_direction, period,"
    " period_direction, participation_ratio, cka, cka_debiased or procrustes",
    "tokens": "cls, reg, dist or patches; of the participation ratio and of pairs, patches are their mean",
    "step": "step t, 0 the embedded tokens",
    "other_model": "of a pair, the model of the second state",
    "other_step": "step of the state compared with; none for norm, period and participation_ratio",
    "trained_steps": "steps T the model was made for; of a stack, its blocks",
    "value": "the value: a norm in units of the tokens, a ratio, a cosine -1..1, a period in steps, CKA 0..1 (debiased"
    " also just outside), a Procrustes distance 0..2; a mean over images up to return",
    "low": "lower end of the normal 95 % interval of that mean; none for the others",
    "high": "upper end of it",
    "null": "null: the value with the second state from another image; none for norm and period",
    "n": "images",
}


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """How the states of every model move, and which are alike.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : images; their labels are not used.

    Returns
    -------
    A table of `COLUMNS`; unordered pairs once.
    """
    import pandas as pd
    import torch

    from bvit_interp.models.unroll import run_on
    from bvit_interp.probes.probe import Probe

    probes = {name: Probe(run_on(model, config.steps)) for name, model in models.items()}
    trained = {name: len(model.blocks) for name, model in models.items()}
    motions = {name: _motions(probe, trained[name]) for name, probe in probes.items()}
    grams = {name: _gram(probe, config) for name, probe in probes.items()}
    compared = _compared(probes, trained, config)
    pairs = _pairs(probes, compared, config)
    loader, geometries = config.loader(data, models, "dynamics")
    for batch in loader:
        sets: list[Tensor] = []
        for name, probe in probes.items():
            with torch.inference_mode():
                points = torch.cat([
                    _watch(probe, part, geometries[name], motions[name], config) for part in _parts(probe, batch)
                ])  # fmt: skip
            grams[name].update(points)
            sets += [points[:, t - 1] for t in compared[name]]
        pairs.update(sets)
    rows: list[dict[str, Any]] = []
    for name in models:
        for kind, motion in motions[name].items():
            rows += _motion_rows(name, kind, motion, config)
        rows += _spread_rows(name, grams[name].compute(), config)
    for row in rows:
        row["trained_steps"] = trained[row["model"]]
    images = rows[-1]["n"]  # of all processes; `pairs` counts its own
    rows += _pair_rows(pairs.compute(), images, compared, trained, config)
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype({"other_step": "Int64"})


def _motions(probe: Probe, trained: int) -> dict[str, Motion]:
    """One a kind of token, on the model's device: a process without images takes part in the gather too."""
    from bvit_interp.probes.motion import Motion

    device, count = next(probe.model.parameters()).device, probe.num_prefix_tokens + math.prod(probe.grid)
    return {
        kind: Motion(probe.num_steps, len(range(count)[rows]), probe.model.embed_dim, trained).to(device)
        for kind, rows in probe.kinds().items()
    }


def _gram(probe: Probe, config: Config) -> Any:
    from bvit_interp.probes.reducers import Gram

    probe.rows(config.state, probe.num_prefix_tokens + math.prod(probe.grid))  # or say that it has none
    return Gram(probe.num_steps, probe.model.embed_dim).to(next(probe.model.parameters()).device)


def _compared(probes: Mapping[str, Probe], trained: Mapping[str, int], config: Config) -> dict[str, list[int]]:
    """The steps of each model that are compared in pairs."""
    within = {name: range(1, min(trained[name], probe.num_steps) + 1) for name, probe in probes.items()}
    if config.pair_steps is None:
        return {name: list(steps) for name, steps in within.items()}
    unknown = [t for t in config.pair_steps if not any(t in steps for steps in within.values())]
    if unknown:
        most = max(steps[-1] for steps in within.values())
        raise UserError(f"pair-steps {unknown} are past the trained steps; steps: 1..{most}")
    return {name: [t for t in steps if t in config.pair_steps] for name, steps in within.items()}


def _pairs(probes: Mapping[str, Probe], compared: Mapping[str, list[int]], config: Config) -> StatePairs:
    from bvit_interp.probes.pairs import StatePairs

    widths = [probe.model.embed_dim for name, probe in probes.items() for _ in compared[name]]
    if (size := 8 * sum(widths) ** 2) > _BYTES_OF_PAIRS:
        raise UserError(f"pairs of {len(widths)} states would take {size / 2**30:.0f} GiB: choose fewer by pair-steps")
    return StatePairs(widths, config.seed).to(next(next(iter(probes.values())).model.parameters()).device)


def _parts(probe: Probe, batch: Batch) -> Iterator[Batch]:
    """The batch in parts whose states take at most 256 MiB."""
    numbers = (probe.num_steps + 1) * (probe.num_prefix_tokens + math.prod(probe.grid)) * probe.model.embed_dim
    if len(batch) > 1 and 4 * numbers * len(batch) > _BYTES_OF_STATES:
        for half in batch.half():
            yield from _parts(probe, half)
    else:
        yield batch


def _watch(probe: Probe, batch: Batch, geometry: Any, motions: Mapping[str, Motion], config: Config) -> Tensor:
    """Take the states of a batch in; returns what its images are at steps 1..S, ``(B, S, D)``."""
    import torch

    from bvit_interp.data.loader import run_in_halves

    device, kinds, points = next(probe.model.parameters()).device, probe.kinds(), []

    def states_of(part: Batch) -> Tensor:
        return probe.record(part.views[geometry][0].to(device), "resid_post", range(probe.num_steps + 1))["resid_post"]

    for states in run_in_halves(states_of, batch):
        for kind, motion in motions.items():
            motion.update(states[:, :, kinds[kind]])
        points.append(states[:, 1:, kinds[config.state]].double().mean(2))
    return torch.cat(points)


def _motion_rows(name: str, kind: str, motion: Motion, config: Config) -> list[dict[str, Any]]:
    """Rows of one kind of token, with the verdicts if six steps past T were run."""
    from bvit_interp.probes.motion import period

    rows = []
    measures = motion.compute()
    for statistic, columns in measures.items():
        for i, step in enumerate(columns["step"].tolist()):
            other = int(columns["other"][i])
            rows.append({
                "model": name, "statistic": statistic, "tokens": kind, "step": step,
                "other_step": other if other >= 0 else None, "n": int(columns["n"][i]),
                **{key: float(columns[key][i]) for key in ("value", "low", "high", "null")},
            })  # fmt: skip
    if motion.window > 1:
        for suffix in ("", "_direction"):
            returns = measures[f"return{suffix}"]["value"].tolist()
            rows.append({
                "model": name, "statistic": f"period{suffix}", "tokens": kind, "step": motion.shape[0] - 1,
                "value": float(period(returns, config.tolerance)), "n": int(measures["norm"]["n"][0]),
            })  # fmt: skip
    return rows


def _spread_rows(name: str, moments: Mapping[str, Any], config: Config) -> list[dict[str, Any]]:
    from bvit_interp.metrics import participation_ratio, random_participation_ratio

    images, width = int(moments["count"]), moments["centred"].shape[-1]
    return [
        {
            "model": name, "statistic": "participation_ratio", "tokens": config.state, "step": t, "value": value,
            "null": random_participation_ratio(images, width), "n": images,
        }
        for t, value in enumerate(participation_ratio(moments["centred"]).tolist(), start=1)
    ]  # fmt: skip


def _pair_rows(
    measures: Mapping[str, Any], images: int, compared: Mapping[str, list[int]], trained: Mapping[str, int],
    config: Config,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every unordered pair of states."""
    found = {key: values.tolist() for key, values in measures.items()}
    found["cka_debiased_null"] = [[0.0] * len(row) for row in found["cka"]]  # of the numerator, exactly
    sets = [(name, t) for name, steps in compared.items() for t in steps]
    rows = []
    for statistic in _SIMILARITIES:
        for i, (name, step) in enumerate(sets):
            for j, (other, other_step) in enumerate(sets[i:], start=i):
                rows.append({
                    "model": name, "statistic": statistic, "tokens": config.state, "step": step, "other_model": other,
                    "other_step": other_step, "trained_steps": trained[name], "value": found[statistic][i][j],
                    "null": found[f"{statistic}_null"][i][j], "n": images,
                })  # fmt: skip
    return rows


_PANELS = {
    "norm": "norm of a token", "step_size": "relative step size", "cosine": "cosine of successive updates",
    "to_trained": "relative distance to $z_T$",
}  # fmt: skip
_NAMES = {"cls": "CLS", "reg": "registers", "dist": "distillation", "patches": "patches"}


def plot(frame: pd.DataFrame) -> Figure:
    """Movement of each kind of token, a row each; below, spread, direction, returns, and linear CKA of all states."""
    from matplotlib.ticker import LogLocator

    from bvit_interp import plotting

    names = list(dict.fromkeys(frame["model"]))
    kinds = [kind for kind in _NAMES if kind in set(frame["tokens"][frame["statistic"] == "norm"])]
    figure, axes = plotting.canvas(columns=4, rows=len(kinds) + 1, width=3.7, height=2.9)
    for row, kind in zip(axes, kinds, strict=False):
        for ax, (statistic, title) in zip(row, _PANELS.items(), strict=True):
            _lines(ax, frame[(frame["statistic"] == statistic) & (frame["tokens"] == kind)], names)
            ax.set_title(f"{_NAMES[kind]}: {title}", fontsize=10)
    _lines(axes[-1, 0], frame[frame["statistic"] == "participation_ratio"], names, "isotropic Gaussian")
    axes[-1, 0].set_title("participation ratio", fontsize=10)
    axes[-1, 0].set_ylim(bottom=0)
    _lines(axes[-1, 1], frame[(frame["statistic"] == "direction") & (frame["tokens"] == kinds[0])], names)
    axes[-1, 1].set_title(f"{_NAMES[kinds[0]]}: change of direction a step", fontsize=10)
    for ax in axes[:, 1]:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
    _returns(axes[-1, 2], frame)
    _similarities(figure, axes[-1, 3], frame[frame["statistic"] == "cka"])
    plotting.legend(axes[0, 0])
    plotting.legend(axes[0, 3])
    plotting.legend(axes[-1, 0])
    return figure


def _lines(ax: Axes, frame: pd.DataFrame, names: list[str], null: str = "another image") -> None:
    """A statistic against step, a line a model, its null thin and grey, and a stroke at every T."""
    from bvit_interp import plotting

    models = list(frame.groupby("model", sort=False))
    for name, part in models:
        style = plotting.line_style(names.index(name)) | {"markevery": 6}
        ax.plot(part["step"], part["value"], **style, label=name)
        ax.fill_between(part["step"], part["low"], part["high"], color=style["color"], alpha=0.2, linewidth=0)
    for i, (_, part) in enumerate(models):
        if part["null"].notna().any():
            ax.plot(part["step"], part["null"], **plotting.NULL, label=None if i else f"null: {null}")
    for trained in sorted(set(frame["trained_steps"])):
        ax.axvline(trained, **plotting.NULL, linestyle="--", label=f"trained for T = {trained}")
    plotting.step_axis(ax, frame["step"])


def _returns(ax: Axes, frame: pd.DataFrame) -> None:
    """Distance to the state p steps before, at the end of the run: of the state, and of its direction."""
    from bvit_interp import plotting

    for i, name in enumerate(dict.fromkeys(frame["model"])):
        of_model = frame[(frame["model"] == name) & frame["tokens"].isin(("cls", "patches"))]
        kind = of_model["tokens"].iloc[0] if len(of_model) else "cls"
        for statistic, filled in (("return", True), ("return_direction", False)):
            part = of_model[(of_model["statistic"] == statistic) & (of_model["tokens"] == kind)]
            style = plotting.line_style(i) | ({} if filled else {"markerfacecolor": "white"})
            label = f"{'state' if filled else 'direction'} of {_NAMES[kind]}" if i == 0 and len(part) else None
            ax.plot(part["step"] - part["other_step"].astype(float), part["value"], **style, label=label)
    if not ax.lines or not any(len(line.get_xdata()) for line in ax.lines):  # nothing was run past T
        ax.set_axis_off()
        return
    ax.set(xlabel="lag p, steps", ylim=(0, None))
    ax.set_title("distance to p steps before, at the end", fontsize=10)
    plotting.legend(ax)


def _similarities(figure: Figure, ax: Axes, frame: pd.DataFrame) -> None:
    """CKA of every pair of states as one matrix, models side by side."""
    import textwrap

    import numpy as np

    from bvit_interp import plotting

    pairs = list(zip(frame["model"], frame["step"], frame["other_model"], frame["other_step"], strict=True))
    sets = list(dict.fromkeys((model, int(step)) for model, step, _, _ in pairs))
    place = {each: i for i, each in enumerate(sets)}
    values = np.full((len(sets), len(sets)), np.nan)
    for (model, step, other, other_step), value in zip(pairs, frame["value"], strict=True):
        i, j = place[model, int(step)], place[other, int(other_step)]
        values[i, j] = values[j, i] = value
    every = 1 if len(sets) <= 14 else 3
    ticks = [str(step) if step % every == 0 else "" for _, step in sets]
    plotting.heat_map(figure, ax, values, ticks, ticks, "linear CKA", numbers=len(sets) <= 6)
    ax.set_aspect("equal")
    models = [model for model, _ in sets]
    for i in range(1, len(sets)):
        if models[i] != models[i - 1]:
            ax.axhline(i - 0.5, color="white", linewidth=2)
            ax.axvline(i - 0.5, color="white", linewidth=2)
    names = list(dict.fromkeys(models))
    low, high = frame["null"].min(), frame["null"].max()
    title = textwrap.fill(f"CKA of {', '.join(names)} (images shuffled: {low:.2f} to {high:.2f})", 48)
    ax.set_title(title, fontsize=8)
    ax.set(xlabel="step", ylabel="step")
    ax.tick_params(labelsize=7)
