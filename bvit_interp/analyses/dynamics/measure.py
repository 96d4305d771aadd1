"""Does the recurrence come to rest, return or drift when it runs on, and which of its states are
alike?

Appendix E.1 of bViT (arXiv 2605.10661): "bViT is not a fixed-point method". The paper argues from
Fig. 8's accuracy and gives no number on the states; these measures are ours. A row is one value of
one `statistic`:

- of the tokens of a kind (all of an image's as one vector), mean over images: `norm`; `step_size`,
  the relative step ``||z_t - z_{t-1}|| / ||z_{t-1}||``; `cosine` of the update with the one before
  it; `to_trained` and `to_last`, the relative distance to the states of step T and of the last step
  S;
- `return`, ``||z_t - z_{t-p}|| / ||z_T||`` over the last w = (S - T) // 3 steps t for p = 1..w, and
  the verdict `period`: the smallest p <= w / 2 at whose every multiple up to w it is below
  `tolerance`. 1 is a fixed point, more a cycle, 0 neither: drift. In units of ||z_T||, since steps
  of constant length past growing states look ever smaller;
- the same of directions z / ||z||, all that the head's norm lets through: `direction`,
  `return_direction` and `period_direction`. A state that drifts straight on has a fixed point
  there;
- `participation_ratio` ``(sum l)^2 / sum l^2`` of the eigenvalues of the covariance over images;
- of two states, at every trained step of every model: linear `cka` (Kornblith et al., 2019),
  `cka_debiased` (Nguyen et al., 2021) and the orthogonal `procrustes` distance (Ding et al., 2021).

`null` is the same with the second state from another image, a permutation of the images; the
participation ratio's is an isotropic Gaussian's. Past T a time embedding stays at its last row; a
stacked ViT has only its own blocks.

Cost: `steps` / T forwards an image and the states of a batch; 300 images of 32 px, a bViT of width
128 and its ViT take 20 s on one core. Pairs keep a square float64 matrix of side (steps compared x
width) summed over models: 0.7 GB for bViT-B, 2.7 GB beside ViT-B, three times that while they are
computed, and an SVD of 768 x 768 a pair; `pair_steps` chooses fewer. Expected: for bViT no fixed
point: `period` 0 at 48 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.dynamics import COLUMNS, Config
from bvit_interp.analyses.dynamics.motion import Motion, period
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import participation_ratio, random_participation_ratio
from bvit_interp.metrics.streaming.similarity import StatePairs
from bvit_interp.metrics.streaming.statistics import Gram
from bvit_interp.models.unroll import run_on
from bvit_interp.probes.probe import Probe

_BYTES_OF_STATES = 2**28


_BYTES_OF_PAIRS = 2**34


_SIMILARITIES = ("cka", "cka_debiased", "procrustes")


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
                points = torch.cat(
                    [
                        _watch(probe, part, geometries[name], motions[name], config)
                        for part in _parts(probe, batch)
                    ]
                )
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
    """One a kind of token, on the model's device: a process without images takes part in the gather
    too."""
    device, count = (
        next(probe.model.parameters()).device,
        probe.num_prefix_tokens + math.prod(probe.grid),
    )
    return {
        kind: Motion(probe.num_steps, len(range(count)[rows]), probe.model.embed_dim, trained).to(
            device
        )
        for kind, rows in probe.kinds().items()
    }


def _gram(probe: Probe, config: Config) -> Any:
    probe.rows(
        config.state, probe.num_prefix_tokens + math.prod(probe.grid)
    )  # or say that it has none
    return Gram(probe.num_steps, probe.model.embed_dim).to(next(probe.model.parameters()).device)


def _compared(
    probes: Mapping[str, Probe], trained: Mapping[str, int], config: Config
) -> dict[str, list[int]]:
    """The steps of each model that are compared in pairs."""
    within = {
        name: range(1, min(trained[name], probe.num_steps) + 1) for name, probe in probes.items()
    }
    if config.pair_steps is None:
        return {name: list(steps) for name, steps in within.items()}
    unknown = [t for t in config.pair_steps if not any(t in steps for steps in within.values())]
    if unknown:
        most = max(steps[-1] for steps in within.values())
        raise UserError(f"pair-steps {unknown} are past the trained steps; steps: 1..{most}")
    return {name: [t for t in steps if t in config.pair_steps] for name, steps in within.items()}


def _pairs(
    probes: Mapping[str, Probe], compared: Mapping[str, list[int]], config: Config
) -> StatePairs:
    widths = [probe.model.embed_dim for name, probe in probes.items() for _ in compared[name]]
    if (size := 8 * sum(widths) ** 2) > _BYTES_OF_PAIRS:
        raise UserError(
            f"pairs of {len(widths)} states would take {size / 2**30:.0f} GiB: choose fewer by pair-steps"
        )
    return StatePairs(widths, config.seed).to(
        next(next(iter(probes.values())).model.parameters()).device
    )


def _parts(probe: Probe, batch: Batch) -> Iterator[Batch]:
    """The batch in parts whose states take at most 256 MiB."""
    numbers = (
        (probe.num_steps + 1)
        * (probe.num_prefix_tokens + math.prod(probe.grid))
        * probe.model.embed_dim
    )
    if len(batch) > 1 and 4 * numbers * len(batch) > _BYTES_OF_STATES:
        for half in batch.half():
            yield from _parts(probe, half)
    else:
        yield batch


def _watch(
    probe: Probe, batch: Batch, geometry: Any, motions: Mapping[str, Motion], config: Config
) -> Tensor:
    """Take the states of a batch in; returns what its images are at steps 1..S, ``(B, S, D)``."""
    device, kinds, points = next(probe.model.parameters()).device, probe.kinds(), []

    def states_of(part: Batch) -> Tensor:
        return probe.record(
            part.views[geometry][0].to(device), "resid_post", range(probe.num_steps + 1)
        )["resid_post"]

    for states in run_in_halves(states_of, batch):
        for kind, motion in motions.items():
            motion.update(states[:, :, kinds[kind]])
        points.append(states[:, 1:, kinds[config.state]].double().mean(2))
    return torch.cat(points)


def _motion_rows(name: str, kind: str, motion: Motion, config: Config) -> list[dict[str, Any]]:
    """Rows of one kind of token, with the verdicts if six steps past T were run."""
    rows = []
    measures = motion.compute()
    for statistic, columns in measures.items():
        for i, step in enumerate(columns["step"].tolist()):
            other = int(columns["other"][i])
            rows.append(
                {
                    "model": name,
                    "statistic": statistic,
                    "tokens": kind,
                    "step": step,
                    "other_step": other if other >= 0 else None,
                    "n": int(columns["n"][i]),
                    **{key: float(columns[key][i]) for key in ("value", "low", "high", "null")},
                }
            )
    if motion.window > 1:
        for suffix in ("", "_direction"):
            returns = measures[f"return{suffix}"]["value"].tolist()
            rows.append(
                {
                    "model": name,
                    "statistic": f"period{suffix}",
                    "tokens": kind,
                    "step": motion.shape[0] - 1,
                    "value": float(period(returns, config.tolerance)),
                    "n": int(measures["norm"]["n"][0]),
                }
            )
    return rows


def _spread_rows(name: str, moments: Mapping[str, Any], config: Config) -> list[dict[str, Any]]:
    images, width = int(moments["count"]), moments["centred"].shape[-1]
    return [
        {
            "model": name,
            "statistic": "participation_ratio",
            "tokens": config.state,
            "step": t,
            "value": value,
            "null": random_participation_ratio(images, width),
            "n": images,
        }
        for t, value in enumerate(participation_ratio(moments["centred"]).tolist(), start=1)
    ]


def _pair_rows(
    measures: Mapping[str, Any],
    images: int,
    compared: Mapping[str, list[int]],
    trained: Mapping[str, int],
    config: Config,
) -> list[dict[str, Any]]:
    """Rows of every unordered pair of states."""
    found = {key: values.tolist() for key, values in measures.items()}
    found["cka_debiased_null"] = [
        [0.0] * len(row) for row in found["cka"]
    ]  # of the numerator, exactly
    sets = [(name, t) for name, steps in compared.items() for t in steps]
    rows = []
    for statistic in _SIMILARITIES:
        for i, (name, step) in enumerate(sets):
            for j, (other, other_step) in enumerate(sets[i:], start=i):
                rows.append(
                    {
                        "model": name,
                        "statistic": statistic,
                        "tokens": config.state,
                        "step": step,
                        "other_model": other,
                        "other_step": other_step,
                        "trained_steps": trained[name],
                        "value": found[statistic][i][j],
                        "null": found[f"{statistic}_null"][i][j],
                        "n": images,
                    }
                )
    return rows


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Without pairs of steps."""
    return frame[frame["other_step"].isna()]
