"""Do states come to rest past T, and which are alike?

Appendix E.1 of bViT (arXiv 2605.10661) says "bViT is not a fixed-point method". The paper argues
from the accuracy in Fig. 8 and gives no number about the states, so these metrics are ours. A row
is one value of one `metric`.

Metrics of the tokens of one kind, with all tokens of that kind in an image as one vector, as a mean
over images:

- `norm`: root mean square over tokens of ||z_t||;
- `step_size`: the relative step ``||z_t - z_{t-1}|| / ||z_{t-1}||``;
- `update_cosine`: the cosine of the update of step t and the update before it;
- `distance_to_trained` and `distance_to_last`: relative distance to the state of step T and of the
  last step S;
- `return_distance`: ``||z_t - z_{t-p}|| / ||z_T||`` over the last w = (S - T) // 3 steps t, for p =
  1..w. It is in units of ||z_T||, because steps of constant length past growing states look ever
  smaller;
- `period`: the smallest p <= w / 2 such that the return distance is below `tolerance` at every
  multiple of p up to w. 1 is a fixed point, more is a cycle, 0 is neither: the state drifts;
- `direction_change`, `direction_return_distance` and `direction_period`: the same for directions
  z / ||z||, which is all that the norm before the head lets through. A state that drifts along a
  straight line has a fixed point there.

Metrics over images:

- `participation_ratio`: ``(sum l)^2 / sum l^2`` of the eigenvalues of the covariance over images;
- `cka` (linear; Kornblith et al., 2019), `cka_debiased` (Nguyen et al., 2021) and `procrustes` (the
  orthogonal distance; Ding et al., 2021) of two states, for every pair of trained steps of all
  models.

`null`: the same with the second state from another image, by a permutation of the images; for the
participation ratio, the value of an isotropic Gaussian. Past T a time embedding stays at its last
row. A stacked ViT has only its own blocks.

Cost: `steps` / T forward passes per image, and the states of a batch. 300 images of 32 px, a bViT
of width 128 and its stacked ViT take 20 s on one core. Pairs keep a square float64 matrix whose
side is (steps compared x width), summed over models: 0.7 GB for bViT-B, 2.7 GB with ViT-B beside
it, and three times that while the measures are computed; each pair needs an SVD of 768 x 768.
`pair_steps` chooses fewer.

Expected: bViT has no fixed point, so `period` is 0 at 48 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.dynamics import COLUMNS, Config
from bvit_interp.analyses.dynamics.motion import Motion, period
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import participation_ratio, random_participation_ratio
from bvit_interp.metrics.streaming.similarity import StatePairs
from bvit_interp.metrics.streaming.statistics import Gram
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of, states
from bvit_interp.models.unroll import for_any_model, run_on
from bvit_interp.probes.probe import Probe

_STATE_BYTES = 2**28
_PAIR_BYTES = 2**34
_SIMILARITIES = ("cka", "cka_debiased", "procrustes")


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """How the states of every model move, and which states are alike.

    Parameters
    ----------
    models : name -> model. All see each image in one pass.
    data : images; their labels are not used.

    Returns
    -------
    A table of `COLUMNS`, with every unordered pair of states once.
    """
    probes = {name: Probe(run_on(model, config.steps)) for name, model in models.items()}
    for probe in probes.values():
        probe.rows(config.state, _num_tokens(probe))  # raises if the model has no such token
    trained = {name: len(model.blocks) for name, model in models.items()}
    motions = {name: _motions(probe, trained[name]) for name, probe in probes.items()}
    grams = {
        name: Gram(probe.num_steps, probe.model.embed_dim).to(device_of(probe.model))
        for name, probe in probes.items()
    }
    compared = _compared_steps(probes, trained, config)
    pairs = _empty_pairs(probes, compared, config)
    kinds = {name: probe.kinds() for name, probe in probes.items()}

    def all_states(batch: ModelBatch) -> Tensor:
        run = states(probes[batch.model].model, batch.images)
        return torch.stack([state.tokens for state in run], dim=1)

    waiting: dict[str, list[Tensor]] = {name: [] for name in models}
    at_once = {name: _images_at_once(probe) for name, probe in probes.items()}
    for name, tokens in stream(
        models, data, config, all_states, progress="dynamics", images_at_once=at_once
    ):
        for kind, motion in motions[name].items():
            motion.update(tokens[:, :, kinds[name][kind]])
        points = tokens[:, 1:, kinds[name][config.state]].double().mean(2)
        grams[name].update(points)
        waiting[name].append(points)
        if len({sum(map(len, parts)) for parts in waiting.values()}) == 1:
            # every model has seen the same images: a batch may be halved for one of them alone
            pairs.update(_compared_states(waiting, compared))
            waiting = {name: [] for name in models}
    rows: list[dict[str, Any]] = []
    for name in models:
        for kind, motion in motions[name].items():
            rows += _motion_rows(motion, config, {"model": name, "tokens": kind})
        rows += _participation_rows(name, grams[name].compute(), config)
    rows = [row | {"trained_steps": trained[row["model"]]} for row in rows]
    images = rows[-1]["n"]  # those of all processes; `pairs` counts those of its own
    rows += _pair_rows(pairs.compute(), images, compared, trained, config)
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype({"other_step": "Int64"})


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that compare no two steps."""
    return frame[frame["other_step"].isna()]


def _num_tokens(probe: Probe) -> int:
    return probe.num_prefix_tokens + math.prod(probe.grid)


def _images_at_once(probe: Probe) -> int:
    """How many images' states, as float32, fit in the memory set aside."""
    numbers = (probe.num_steps + 1) * _num_tokens(probe) * probe.model.embed_dim
    return _STATE_BYTES // (4 * numbers)


def _motions(probe: Probe, trained: int) -> dict[str, Motion]:
    """One per kind of token, on the model's device: a process without images takes part in the
    gather too."""
    width, device = probe.model.embed_dim, device_of(probe.model)
    motions = {}
    for kind, tokens in probe.kinds().items():
        count = len(range(_num_tokens(probe))[tokens])
        motions[kind] = Motion(probe.num_steps, count, width, trained).to(device)
    return motions


def _compared_steps(
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


def _empty_pairs(
    probes: Mapping[str, Probe], compared: Mapping[str, list[int]], config: Config
) -> StatePairs:
    """Moments of all compared states, on the device of the first model."""
    widths = [probe.model.embed_dim for name, probe in probes.items() for _ in compared[name]]
    size = 8 * sum(widths) ** 2
    if size > _PAIR_BYTES:
        raise UserError(
            f"pairs of {len(widths)} states would take {size / 2**30:.0f} GiB:"
            " choose fewer by pair-steps"
        )
    first = next(iter(probes.values()))
    return StatePairs(widths, config.seed).to(device_of(first.model))


def _compared_states(
    points: Mapping[str, list[Tensor]], compared: Mapping[str, list[int]]
) -> list[Tensor]:
    """The states ``(B, D)`` of every compared step of every model, from points ``(b, S, D)``."""
    joined = {name: torch.cat(parts) for name, parts in points.items()}
    return [joined[name][:, t - 1] for name, steps in compared.items() for t in steps]


def _motion_rows(motion: Motion, config: Config, keys: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one kind of token; with periods if at least six steps past T were run."""
    metrics = motion.compute()
    for metric, columns in metrics.items():
        for i, step in enumerate(columns["step"].tolist()):
            other = int(columns["other_step"][i])
            numbers = {key: float(columns[key][i]) for key in ("value", "low", "high", "null")}
            yield (
                keys
                | numbers
                | {
                    "metric": metric,
                    "step": step,
                    "other_step": other if other >= 0 else None,
                    "n": int(columns["n"][i]),
                }
            )
    if motion.window > 1:
        for prefix in ("", "direction_"):
            distances = metrics[f"{prefix}return_distance"]["value"].tolist()
            yield keys | {
                "metric": f"{prefix}period",
                "step": motion.steps,
                "value": float(period(distances, config.tolerance)),
                "n": int(metrics["norm"]["n"][0]),
            }


def _participation_rows(
    name: str, moments: Mapping[str, Tensor], config: Config
) -> Iterator[dict[str, Any]]:
    images, width = int(moments["count"]), moments["centred"].shape[-1]
    for t, value in enumerate(participation_ratio(moments["centred"]).tolist(), start=1):
        yield {
            "model": name,
            "metric": "participation_ratio",
            "tokens": config.state,
            "step": t,
            "value": value,
            "null": random_participation_ratio(images, width),
            "n": images,
        }


def _pair_rows(
    measures: Mapping[str, np.ndarray],
    images: int,
    compared: Mapping[str, list[int]],
    trained: Mapping[str, int],
    config: Config,
) -> Iterator[dict[str, Any]]:
    """Rows of every unordered pair of states."""
    # over all permutations of the images the mean of the debiased numerator is exactly 0
    nulls = {"cka_debiased": np.zeros_like(measures["cka"])}
    nulls |= {metric: measures[f"{metric}_null"] for metric in ("cka", "procrustes")}
    compared_states = [(name, t) for name, steps in compared.items() for t in steps]
    for metric in _SIMILARITIES:
        for i, (name, step) in enumerate(compared_states):
            for j, (other, other_step) in enumerate(compared_states[i:], start=i):
                yield {
                    "model": name,
                    "metric": metric,
                    "tokens": config.state,
                    "step": step,
                    "other_model": other,
                    "other_step": other_step,
                    "trained_steps": trained[name],
                    "value": measures[metric][i, j].item(),
                    "null": nulls[metric][i, j].item(),
                    "n": images,
                }
