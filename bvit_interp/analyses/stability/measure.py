"""Does a step amplify small changes, and does a run recover?

This analysis is ours. bViT (arXiv 2605.10661) says only in words that the model is not a
fixed-point method. The step map F_t: z_{t-1} -> z_t acts on all tokens of an image (in a model with
a memory, on z and m; input that is injected at every step stays the image's). Its Jacobian J_t is
used at real states, by products alone. A row is one
value of one `metric`, a mean over images with its 95 % confidence interval.

Metrics of one step, at `jacobian_steps` and at step T:

- `singular_value`: the largest singular values of J_t, estimated from below by Golub & Kahan's
  (1965) bidiagonalisation with `iterations` products with J and with J^T;
- `input_share` and `output_share`: where the energy of the first right and left singular vector
  lies;
- `spectral_radius`, and `complex_eigenvalue`, how often the leading eigenvalue is one of a complex
  pair; by Arnoldi's (1951) iteration in twice as many products with J. Eigenvalues have a meaning
  because the block has one space for input and output: they describe the iterated linearised step.
  No run iterates it, and in a stacked ViT no block is applied twice;
- `gain`: ``||P_b J_t P_a v|| / ||P_a v||`` of a random change of tokens of kind a alone (`source`),
  read in tokens of kind b.

`residual` is that of J^T u = s v, or of J y = l y, as a share of s or |l|.

Metrics along the run:

- `lyapunov_exponent`: ``(1/t) sum_{s<=t} log |R_ii|`` of tangents that start in random directions
  at z_0 and are made orthonormal by QR after every step (Benettin et al., 1980); `tangent_share` is
  where the energy of the first tangent lies;
- `ftle`: the finite-time Lyapunov exponents ``(1/T) log s_i(J_T ... J_1)``, those of the worst
  directions;
- `lyapunov_exponent_relative` and `ftle_relative`: the same minus ``(1/t) log(||z_t|| / ||z_0||)``.
  States grow along the run (`state_growth`), so stretching alone is not an instability: the norms
  let only the direction through.

Metrics of perturbed runs: z_s of every image (`start`) is moved by `eps` ||z_s||, in a `random`
direction or towards the state of another image (`partner`), and the run goes on past T.

- `distance`: ||z'_t - z_t|| / ||z_t||;
- `direction_distance`: the root mean square over tokens of the distance between unit vectors;
- `same_prediction`: the share of images with the same predicted class as in the clean run.

`null`: for all that comes from Jacobians, the same model on its own run from the same z_0, with the
entries of every weight matrix of its blocks in random order (one draw); for perturbed runs, the
clean run of the other image. `token_share` is the share of energy that an isotropic vector has in a
kind of token.

Cost: a bViT of width 128 at 32 px takes 4.4 s of a busy core per image for Jacobians and 0.13 s per
image for perturbed runs, so 1000 images take 270 s. By calculation, 50 000 ImageNet images through
bViT-B (18 forward passes each) take half an hour on a GPU of 20 TFLOP/s.

Expected: exponents above 0, so no contraction to a fixed point. How much is left beside the growth
of the states is open.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import Tensor

from bvit_interp.analyses.stability import COLUMNS, Config
from bvit_interp.analyses.stability.jacobian import differentiable
from bvit_interp.analyses.stability.perturbations import Perturbation, perturbed_runs
from bvit_interp.analyses.stability.run_metrics import run_metrics
from bvit_interp.data.partners import Partners
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.stepping import device_of, embed
from bvit_interp.models.unroll import for_any_model, run_on
from bvit_interp.probes.probe import Probe, refuse_checkpointing

Axis = Sequence[dict[str, Any]]
"""For each entry along an axis of a tensor, its cells in the table."""
Means = dict[str, dict[str, Tensor]]
"""Metric -> `value`, `low`, `high` and `n`, each in the shape of the metric's axes."""

_PERTURBED = ("distance", "direction_distance", "same_prediction")
_WITH_RESIDUAL = ("singular_value", "spectral_radius", "ftle")
_GRAPH_BYTES = {"cpu": 2**28, "cuda": 2**32}


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Jacobians of some of the images, and perturbed runs of all.

    Parameters
    ----------
    models : name -> model. All see each image in one pass for Jacobians and one for runs.
    data : images; their labels are not used.

    Returns
    -------
    A table of `COLUMNS`.
    """
    plans = {name: _Plan(name, model, config) for name, model in models.items()}
    partners = Partners(data, config.limit, config.skip_corrupt)
    jacobians = _measure_jacobians(models, data, config, plans)
    perturbed = _measure_perturbed_runs(models, data, config, plans, partners)
    rows = [
        row
        for name, plan in plans.items()
        for row in _rows(name, plan, jacobians[name] | perturbed[name])
    ]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "index", "start", "n"), "Int64"))


class _Plan:
    """What is measured of one model, and which tokens are of which kind."""

    def __init__(self, name: str, model: Model, config: Config) -> None:
        self.config = config
        self.trained_steps = len(model.blocks)
        if isinstance(model, CalledSteps) and model.needs_history:
            raise UserError(
                f"{name}: its steps read the output of more than one earlier step, so none is a map"
                " of the state before it: stability is not defined"
            )
        if isinstance(model, CalledSteps):  # its own forward runs around each step
            refuse_checkpointing(model)
        self.view = run_on(model, config.steps)
        self.device = device_of(model)
        last = len(self.view.blocks)
        self.steps = range(1, last + 1)
        self.horizon = min(self.trained_steps, last)
        self.jacobian_steps = [t for t in self.steps if t in (*config.jacobian_steps, self.horizon)]
        starts = [s for s in range(last) if s in config.starts]
        if not starts:
            raise UserError(
                f"{name} has no step after any of the starts {config.starts};"
                f" its starts: 0..{last - 1}"
            )
        self.perturbations: list[Perturbation] = list(
            itertools.product(("random", "partner"), starts, dict.fromkeys(config.eps))
        )
        probe = Probe(self.view)
        self.num_heads = _heads(probe)
        self.num_tokens = probe.layout.num_tokens
        self.kinds = probe.kinds()
        self.packed_kinds = dict(self.kinds)
        if isinstance(self.view.blocks[0], MemoryBlock):
            self.packed_kinds["memory"] = slice(self.num_tokens, 2 * self.num_tokens)

    def axes(self) -> dict[str, list[Axis]]:
        """The axes of every metric."""
        jacobian_steps = [{"step": t} for t in self.jacobian_steps]
        steps = [{"step": t} for t in self.steps]
        horizon = [{"step": self.horizon}]
        index = [{"index": i} for i in range(1, self.config.leading + 1)]
        source = [{"source": kind} for kind in self.packed_kinds]
        tokens = [{"tokens": kind} for kind in self.packed_kinds]
        keys = ("source", "start", "eps")
        runs = [dict(zip(keys, perturbation, strict=True)) for perturbation in self.perturbations]
        run_steps = [{"step": 0}, *steps]
        run_tokens = [{"tokens": kind} for kind in self.kinds]
        return {
            "singular_value": [jacobian_steps, index],
            "spectral_radius": [jacobian_steps],
            "complex_eigenvalue": [jacobian_steps],
            "input_share": [jacobian_steps, tokens],
            "output_share": [jacobian_steps, tokens],
            "gain": [jacobian_steps, source, tokens],
            "state_growth": [steps],
            "lyapunov_exponent": [steps, index],
            "lyapunov_exponent_relative": [steps, index],
            "tangent_share": [steps, tokens],
            "ftle": [horizon, index],
            "ftle_relative": [horizon, index],
            "distance": [runs, run_steps, run_tokens],
            "direction_distance": [runs, run_steps, run_tokens],
            "same_prediction": [runs, run_steps],
        }

    def jacobian_means(self) -> dict[str, MeanCI]:
        """Empty means of what Jacobians give and of its null. They are on the model's device,
        because a process without images takes part in the gather too."""
        shapes = {name: shape for name, shape in self._shapes().items() if name not in _PERTURBED}
        shapes |= {f"{name}_residual": shapes[name] for name in _WITH_RESIDUAL}
        shapes |= {f"{name}_null": shape for name, shape in shapes.items()}
        return {name: MeanCI(*shape).to(self.device) for name, shape in shapes.items()}

    def perturbed_means(self) -> dict[str, MeanCI]:
        """Empty means of perturbed runs, and of their null, which has no axis of perturbations."""
        shapes = {name: shape for name, shape in self._shapes().items() if name in _PERTURBED}
        shapes |= {f"{name}_null": shape[1:] for name, shape in shapes.items()}
        return {name: MeanCI(*shape).to(self.device) for name, shape in shapes.items()}

    def _shapes(self) -> dict[str, list[int]]:
        return {metric: [len(axis) for axis in axes] for metric, axes in self.axes().items()}

    def images_at_once(self) -> int:
        """How many images' graphs of a run, and of its gradient, fit in the memory set aside."""
        per_token = 60 * self.view.embed_dim + 12 * self.num_heads * self.num_tokens
        return _GRAPH_BYTES[self.device.type] // (8 * self.horizon * self.num_tokens * per_token)


def _heads(probe: Probe) -> int:
    """Heads of a step; 0 where it has none that can be seen."""
    try:
        return probe.num_heads
    except UserError:
        return 0


def _measure_jacobians(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    plans: Mapping[str, _Plan],
) -> dict[str, Means]:
    """What Jacobians give, and with permuted weights as `<metric>_null`."""
    views = {
        name: {
            "": differentiable(model, config.steps),
            "_null": differentiable(model, config.steps, permuted=config.seed),
        }
        for name, model in models.items()
    }

    def compute(batch: ModelBatch) -> dict[str, Tensor]:
        plan = plans[batch.model]
        images = batch.images.double()
        results: dict[str, Tensor] = {}
        for suffix, view in views[batch.model].items():
            metrics = run_metrics(
                view,
                embed(view, images),
                batch.index,
                list(plan.packed_kinds.values()),
                jacobian_steps=plan.jacobian_steps,
                horizon=plan.horizon,
                leading=config.leading,
                iterations=config.iterations,
                seed=config.seed,
            )
            results |= {f"{metric}{suffix}": values for metric, values in metrics.items()}
        return results

    means = {name: plan.jacobian_means() for name, plan in plans.items()}
    few = replace(config, limit=min(config.n_jacobian, config.limit or len(data)))
    at_once = {name: plan.images_at_once() for name, plan in plans.items()}
    for name, results in stream(
        models,
        data,
        few,
        compute,
        progress="stability: Jacobians",
        images_at_once=at_once,
        grad=True,
    ):
        for metric, values in results.items():
            means[name][metric].update(values)
    return {name: _computed(metrics) for name, metrics in means.items()}


def _measure_perturbed_runs(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    plans: Mapping[str, _Plan],
    partners: Partners,
) -> dict[str, Means]:
    """Perturbed runs, and the clean runs of the partners as `<metric>_null`."""

    def compute(batch: ModelBatch) -> dict[str, Tensor]:
        plan = plans[batch.model]
        return perturbed_runs(
            plan.view,
            embed(plan.view, batch.images),
            embed(plan.view, batch.partner_images),
            batch.index,
            plan.perturbations,
            list(plan.kinds.values()),
            config.seed,
        )

    means = {name: plan.perturbed_means() for name, plan in plans.items()}
    for name, results in stream(
        models, data, config, compute, progress="stability: perturbed runs", partners=partners
    ):
        for metric, values in results.items():
            means[name][metric].update(values)
    return {name: _computed(metrics) for name, metrics in means.items()}


def _computed(metrics: Mapping[str, MeanCI]) -> Means:
    """The means, in the shape of their axes: torchmetrics drops the axes of a single number."""
    return {
        name: {key: values.reshape(metric.count.shape) for key, values in metric.compute().items()}
        for name, metric in metrics.items()
    }


def _rows(name: str, plan: _Plan, means: Means) -> Iterator[dict[str, Any]]:
    """One row per number; perturbed runs have none before their start."""
    model_keys = {"model": name, "trained_steps": plan.trained_steps}
    for metric, axes in plan.axes().items():
        null = means[f"{metric}_null"]
        for position in map(tuple, means[metric]["n"].nonzero().tolist()):
            row: dict[str, Any] = model_keys | {"metric": metric}
            for axis, i in zip(axes, position, strict=True):
                row |= axis[i]
            row |= {key: values[position].item() for key, values in means[metric].items()}
            if metric == "same_prediction":
                row["low"], row["high"] = wilson_interval(row["value"] * row["n"], row["n"])
            if metric in _WITH_RESIDUAL:
                row["residual"] = means[f"{metric}_residual"]["value"][position].item()
            null_position = position[1:] if metric in _PERTURBED else position
            row["null"] = null["value"][null_position].item()
            row["null_low"] = null["low"][null_position].item()
            row["null_high"] = null["high"][null_position].item()
            yield row
    counts = {
        kind: len(range(2 * plan.num_tokens)[tokens]) for kind, tokens in plan.packed_kinds.items()
    }
    for kind, count in counts.items():
        share = count / sum(counts.values())
        yield model_keys | {"metric": "token_share", "tokens": kind, "value": share}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """At the trained and the last step: first singular value, spectral radius, first exponents, and
    how far the CLS token of perturbed runs is."""
    shown = (
        "singular_value",
        "spectral_radius",
        "lyapunov_exponent",
        "lyapunov_exponent_relative",
        "ftle",
        "ftle_relative",
        "direction_distance",
    )
    last = frame.groupby("model")["step"].transform("max")
    rows = frame["metric"].isin(shown)
    rows &= frame["step"].eq(frame["trained_steps"]) | frame["step"].eq(last)
    for column, wanted in (("index", 1), ("tokens", "cls"), ("eps", frame["eps"].max())):
        rows &= frame[column].isna() | frame[column].eq(wanted)
    return frame[rows].drop(columns=["null_low", "null_high"]).dropna(axis=1, how="all")
