"""Does a step stretch or damp a small change of its state, and does a run recover from a
perturbation?

Ours; not in bViT (arXiv 2605.10661), which says in words that the model is not a fixed-point
method. Of the step map F_t: z_{t-1} -> z_t on all tokens of an image (with a memory, on z and m),
at real states and by products with its Jacobian J_t alone; a row is one value of one `statistic`, a
mean over images with its 95 % interval:

- `singular`, the largest singular values of J_t; `input_share` and `output_share`, where the energy
  of the first one's right and left vectors lies; `radius`, the spectral radius, and `rotates`, how
  often its eigenvalue is one of a complex pair. Eigenvalues mean something as the block has one
  space for input and output: iterating the linearised step; no run does so, and in a stack no block
  comes twice. Golub & Kahan's (1965) bidiagonalisation in `iterations` products with J and with
  J^T, Arnoldi's (1951) in twice as many with J. `residual`: of J^T u = s v, or of J y = l y, as a
  share of s or |l|; singular values are estimated from below;
- `gain`: ``||P_b J_t P_a v|| / ||P_a v||``, a random change of tokens of kind a (`source`) alone
  read in kind b;
- `exponent`: ``(1/t) sum_{s<=t} log |R_ii|`` of tangents from random ones at z_0, orthonormalised
  by QR at every step (Benettin et al., 1980); `tangent_share`, where the energy of the first lies;
  `ftle`: ``(1/T) log s_i(J_T ... J_1)``, that of the worst directions. `_relative` of both: less
  ``(1/t) log(||z_t|| / ||z_0||)``. States grow along the run (`state_growth`), so stretching alone
  is no instability: what the norms let through is the direction;
- z_s of every image (`start`) is moved by `eps` ||z_s||, in a `random` direction or towards the
  state of another image (`partner`), and run on past T: `distance` ||z'_t - z_t|| / ||z_t||;
  `direction`, the root mean square over tokens of the distance between unit vectors; `same_answer`,
  the share of images whose answer is the clean run's.

`null`: for what comes of Jacobians the same model, on its own run from the same z_0, with the
entries of every weight matrix of its blocks in random order (one draw); for the curves the clean
run of the other image. `token_share` is the share that an isotropic vector has in a kind of token.
Jacobians are taken of `jacobian_images` of the images.

Cost: a bViT of width 128, 32 px: 4.4 s an image for Jacobians and 0.13 s for curves of a busy core,
so 1000 images 270 s. Computed: 50 000 ImageNet images through bViT-B, 18 forwards each, half an
hour on a GPU of 20 TFLOP/s. Expected: exponents above 0, so no contraction to a fixed point; open
how much is left beside the growth of the states.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.stability import COLUMNS, Config
from bvit_interp.analyses.stability.jacobian import differentiable, of_run
from bvit_interp.analyses.stability.perturbations import perturbed_runs
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.partners import Partners
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.stepping import embed
from bvit_interp.models.unroll import run_on
from bvit_interp.probes.probe import Probe

Axis = tuple[str, Sequence[Any]]


Found = dict[str, dict[str, Tensor]]


_CURVES = ("distance", "direction", "same_answer")


_BYTES_OF_GRAPHS = {"cpu": 2**28, "cuda": 2**32}


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Jacobians of some of the images, and perturbed runs of all.

    Parameters
    ----------
    models : name -> model; all see each image in one pass for Jacobians and one for runs.
    data : images; their labels are not used.

    Returns
    -------
    A table of `COLUMNS`.
    """
    plans = {name: _Plan(name, model, config) for name, model in models.items()}
    partners = Partners(data, config.limit, config.skip_corrupt)
    few = replace(config, limit=min(config.jacobian_images, len(partners.places)))
    spectra, curves = (
        _spectra(models, data, few, plans),
        _curves(models, data, config, plans, partners),
    )
    rows = [
        row
        for name, plan in plans.items()
        for row in _rows(name, plan, spectra[name] | curves[name])
    ]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "index", "start", "n"), "Int64"))


class _Plan:
    """What is measured of one model, and where its kinds of token are."""

    def __init__(self, name: str, model: VisionTransformer, config: Config) -> None:
        self.config, self.trained, self.view = (
            config,
            len(model.blocks),
            run_on(model, config.steps),
        )
        self.device = next(model.parameters()).device
        self.steps = range(1, len(self.view.blocks) + 1)
        self.horizon = min(self.trained, self.steps[-1])
        self.at = [t for t in self.steps if t in (*config.spectra, self.horizon)]
        starts = [s for s in range(self.steps[-1]) if s in config.starts]
        if not starts:
            raise UserError(
                f"{name} runs on past none of the starts {config.starts}; its own: 0..{self.steps[-1] - 1}"
            )
        self.variants = list(
            itertools.product(("random", "partner"), starts, dict.fromkeys(config.eps))
        )
        probe = Probe(self.view)
        self.count = probe.num_prefix_tokens + math.prod(probe.grid)
        self.kinds = probe.kinds()
        self.packed = dict(self.kinds)
        if isinstance(self.view.blocks[0], MemoryBlock):
            self.packed["memory"] = slice(self.count, 2 * self.count)

    def axes(self) -> dict[str, list[Axis]]:
        """The columns that tell the numbers of each statistic apart."""
        at, steps, trained = ("step", self.at), ("step", self.steps), ("step", [self.horizon])
        index, kinds = ("index", range(1, self.config.leading + 1)), ("tokens", list(self.packed))
        curve, read = (
            [("variant", self.variants), ("step", [0, *self.steps])],
            ("tokens", list(self.kinds)),
        )
        return {
            "singular": [at, index],
            "radius": [at],
            "rotates": [at],
            "input_share": [at, kinds],
            "output_share": [at, kinds],
            "gain": [at, ("source", list(self.packed)), kinds],
            "state_growth": [steps],
            "exponent": [steps, index],
            "exponent_relative": [steps, index],
            "tangent_share": [steps, kinds],
            "ftle": [trained, index],
            "ftle_relative": [trained, index],
            "distance": [*curve, read],
            "direction": [*curve, read],
            "same_answer": [*curve],
        }

    def moments(self, curves: bool) -> dict[str, MeanCI]:
        """Means of the statistics, on the model's device: a process without images takes part in
        the gather too."""
        named = {name: axes for name, axes in self.axes().items() if (name in _CURVES) == curves}
        shapes = {name: [len(values) for _, values in axes] for name, axes in named.items()}
        more = (
            {f"{name}_null": shapes[name][1:] for name in _CURVES}
            if curves
            else {f"{name}_residual": shapes[name] for name in ("singular", "radius", "ftle")}
        )
        return {name: MeanCI(*shape).to(self.device) for name, shape in (shapes | more).items()}

    def graph_bytes(self) -> int:
        """About what the graphs of a run of one image, and of its gradient, take."""
        of_token = (
            60 * self.view.embed_dim + 12 * int(self.view.blocks[0].attn.num_heads) * self.count
        )
        return 8 * self.horizon * self.count * of_token


def _spectra(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    plans: Mapping[str, _Plan],
) -> dict[str, Found]:
    """What comes of Jacobians, with that of permuted weights as `<statistic>_null`."""
    runs = {
        (name, suffix): (
            differentiable(models[name], config.steps, seed),
            plan.moments(curves=False),
        )
        for name, plan in plans.items()
        for suffix, seed in (("", None), ("_null", config.seed))
    }
    at_once = min(
        _BYTES_OF_GRAPHS[plan.device.type] // plan.graph_bytes() for plan in plans.values()
    )
    few = replace(config, batch_size=max(1, min(config.batch_size, at_once)))
    loader, geometries = few.loader(data, models, "stability: Jacobians")
    for batch in loader:
        for (name, _), (view, moments) in runs.items():
            _take_in(partial(_linearised, plans[name], view, geometries[name]), batch, moments)
    found: dict[str, Found] = {name: {} for name in models}
    for (name, suffix), (_, moments) in runs.items():
        found[name] |= {
            f"{statistic}{suffix}": means for statistic, means in _means(moments).items()
        }
    return found


def _linearised(
    plan: _Plan, view: VisionTransformer, geometry: Geometry, batch: Batch
) -> dict[str, Tensor]:
    """The statistics of Jacobians of images, each ``(B, ...)`` in the shape of its axes."""
    state = embed(view, batch.views[geometry][0].to(plan.device).double())
    config, kinds = plan.config, list(plan.packed.values())
    return of_run(
        view,
        state,
        batch.index,
        kinds,
        plan.at,
        plan.horizon,
        config.leading,
        config.iterations,
        config.seed,
    )


def _curves(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    plans: Mapping[str, _Plan],
    partners: Partners,
) -> dict[str, Found]:
    """Distances and answers of perturbed runs, with those of the partners' clean runs as
    `<statistic>_null`."""
    moments = {name: plan.moments(curves=True) for name, plan in plans.items()}
    loader, geometries = config.loader(data, models, "stability: perturbed runs")
    for batch in loader:
        pairs = {
            shown: torch.stack([own, partners(batch.index, shown)[0]], 1)
            for shown, (own, _) in batch.views.items()
        }
        paired = replace(
            batch, views={geometry: (images, None) for geometry, images in pairs.items()}
        )
        for name, plan in plans.items():
            _take_in(partial(_perturbed, plan, geometries[name]), paired, moments[name])
    return {name: _means(of) for name, of in moments.items()}


def _perturbed(plan: _Plan, geometry: Geometry, batch: Batch) -> dict[str, Tensor]:
    """The same of perturbed runs; a view holds the images and their partners, ``(B, 2, 3, H,
    W)``."""
    kinds = list(plan.kinds.values())
    with torch.inference_mode():
        clean, other = (
            embed(plan.view, images.to(plan.device))
            for images in batch.views[geometry][0].unbind(1)
        )
        return perturbed_runs(
            plan.view, clean, other, batch.index, plan.variants, kinds, plan.config.seed
        )


def _take_in(
    run: Callable[[Batch], dict[str, Tensor]], batch: Batch, moments: Mapping[str, MeanCI]
) -> None:
    for found in run_in_halves(run, batch):
        for statistic, values in found.items():
            moments[statistic].update(values)


def _means(moments: Mapping[str, MeanCI]) -> Found:
    """What the moments come to, in their shape: torchmetrics takes the axes off a single number."""
    found = ((name, metric.count.shape, metric.compute()) for name, metric in moments.items())
    return {
        name: {key: values.reshape(shape) for key, values in means.items()}
        for name, shape, means in found
    }


def _rows(name: str, plan: _Plan, found: Found) -> Iterator[dict[str, Any]]:
    """A row for every number that is there."""
    of_model = {"model": name, "trained_steps": plan.trained}
    for statistic, axes in plan.axes().items():
        measured, null = found[statistic], found[f"{statistic}_null"]
        for place in map(
            tuple, measured["n"].nonzero().tolist()
        ):  # none before the start of a curve
            row = {key: values[i] for (key, values), i in zip(axes, place, strict=True)}
            row |= {key: values[place].item() for key, values in measured.items()}
            of_null = place[1:] if "variant" in row else place
            row |= {
                f"null_{key}".removesuffix("_value"): null[key][of_null].item()
                for key in ("value", "low", "high")
            }
            if "variant" in row:
                row |= dict(zip(("source", "start", "eps"), row.pop("variant"), strict=True))
            if f"{statistic}_residual" in found:
                row["residual"] = found[f"{statistic}_residual"]["value"][place].item()
            if statistic == "same_answer":
                row["low"], row["high"] = wilson_interval(row["value"] * row["n"], row["n"])
            yield of_model | {"statistic": statistic} | row
    tokens = {kind: len(range(2 * plan.count)[rows]) for kind, rows in plan.packed.items()}
    for kind, count in tokens.items():
        yield of_model | {
            "statistic": "token_share",
            "tokens": kind,
            "value": count / sum(tokens.values()),
        }


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the trained and the last step: first singular value, radius, first exponents, and how far
    CLS got."""
    shown = (
        "singular",
        "radius",
        "exponent",
        "exponent_relative",
        "ftle",
        "ftle_relative",
        "direction",
    )
    rows = frame["statistic"].isin(shown) & (
        frame["step"].eq(frame["trained_steps"])
        | frame["step"].eq(frame.groupby("model")["step"].transform("max"))
    )
    for column, one in (("index", 1), ("tokens", "cls"), ("eps", frame["eps"].max())):
        rows &= frame[column].isna() | frame[column].eq(one)
    return frame[rows].drop(columns=["null_low", "null_high"]).dropna(axis=1, how="all")
