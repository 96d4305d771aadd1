"""Does a step stretch or damp a small change of its state, and does a run recover from a perturbation?

Ours; not in bViT (arXiv 2605.10661), which says in words that the model is not a fixed-point method. Of the step map
F_t: z_{t-1} -> z_t on all tokens of an image (with a memory, on z and m), at real states and by products with its
Jacobian J_t alone; a row is one value of one `statistic`, a mean over images with its 95 % interval:

- `singular`, the largest singular values of J_t; `input_share` and `output_share`, where the energy of the first one's
  right and left vectors lies; `radius`, the spectral radius, and `rotates`, how often its eigenvalue is one of a
  complex pair. Eigenvalues mean something as the block has one space for input and output: iterating the linearised
  step; no run does so, and in a stack no block comes twice. Golub & Kahan's (1965) bidiagonalisation in `iterations`
  products with J and with J^T, Arnoldi's (1951) in twice as many with J. `residual`: of J^T u = s v, or of
  J y = l y, as a share of s or |l|; singular values are estimated from below;
- `gain`: ``||P_b J_t P_a v|| / ||P_a v||``, a random change of tokens of kind a (`source`) alone read in kind b;
- `exponent`: ``(1/t) sum_{s<=t} log |R_ii|`` of tangents from random ones at z_0, orthonormalised by QR at every step
  (Benettin et al., 1980); `tangent_share`, where the energy of the first lies; `ftle`: ``(1/T) log s_i(J_T ... J_1)``,
  that of the worst directions. `_relative` of both: less ``(1/t) log(||z_t|| / ||z_0||)``. States grow along the run
  (`state_growth`), so stretching alone is no instability: what the norms let through is the direction;
- z_s of every image (`start`) is moved by `eps` ||z_s||, in a `random` direction or towards the state of another image
  (`partner`), and run on past T: `distance` ||z'_t - z_t|| / ||z_t||; `direction`, the root mean square over tokens of
  the distance between unit vectors; `same_answer`, the share of images whose answer is the clean run's.

`null`: for what comes of Jacobians the same model, on its own run from the same z_0, with the entries of every weight
matrix of its blocks in random order (one draw); for the curves the clean run of the other image. `token_share` is the
share that an isotropic vector has in a kind of token. Jacobians are taken of `jacobian_images` of the images.

Cost: a bViT of width 128, 32 px: 4.4 s an image for Jacobians and 0.13 s for curves of a busy core, so 1000 images
270 s. Computed: 50 000 ImageNet images through bViT-B, 18 forwards each, half an hour on a GPU of 20 TFLOP/s.
Expected: exponents above 0, so no contraction to a fixed point; open how much is left beside the growth of the states.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.data.loader import Batch
    from bvit_interp.data.partners import Partners
    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.moments import Moments

    Axis = tuple[str, Sequence[Any]]
    Found = dict[str, dict[str, Tensor]]

_CURVES = ("distance", "direction", "same_answer")
_NAMES = {"cls": "CLS", "patches": "patches"}
_BYTES_OF_GRAPHS = {"cpu": 2**28, "cuda": 2**32}


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the stability."""

    steps: int = 24
    """Steps S to run, from 1; a stacked ViT (one of timm, or a matched `vit_rms_*`) stops at its last block."""
    jacobian_images: int = 32
    """Images whose Jacobians are looked at, spread evenly over the data set; at most as many as are used."""
    spectra: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 18, 24)
    """Steps whose own Jacobian is looked at, beside T; one that a model does not take is left out."""
    leading: int = 3
    """Singular values and exponents given."""
    iterations: int = 12
    """Products with a Jacobian, and as many with its transpose, for its singular values."""
    starts: tuple[int, ...] = (1, 6)
    """Steps s after which the state is perturbed, 0 the embedded tokens; one not below a model's last is left out."""
    eps: tuple[float, ...] = (0.01, 0.1)
    """Size of the perturbation, as a share of ||z_s||."""
    seed: int = 0
    """Of random directions and of the null's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "jacobian_images", "leading"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if self.iterations < self.leading:
            raise UserError(f"iterations must be >= leading ({self.leading}), got {self.iterations}")
        if min(self.spectra, default=1) < 1:
            raise UserError(f"spectra must be steps >= 1, got {self.spectra}")
        if min(self.starts, default=-1) < 0:
            raise UserError(f"starts must be steps >= 0, got {self.starts}")
        if not self.eps or not all(0 < share < math.inf for share in self.eps):
            raise UserError(f"eps must be > 0 and finite, got {self.eps}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Of the trained and the last step: first singular value, radius, first exponents, and how far CLS got."""
        shown = ("singular", "radius", "exponent", "exponent_relative", "ftle", "ftle_relative", "direction")
        rows = frame["statistic"].isin(shown) & (frame["step"].eq(frame["trained_steps"]) | frame["step"].eq(
            frame.groupby("model")["step"].transform("max")))  # fmt: skip
        for column, one in (("index", 1), ("tokens", "cls"), ("eps", max(self.eps))):
            rows &= frame[column].isna() | frame[column].eq(one)
        return frame[rows].drop(columns=["null_low", "null_high"]).dropna(axis=1, how="all")


COLUMNS = {
    "model": "checkpoint",
    "statistic": "singular, radius, rotates, input_share, output_share, token_share, gain, state_growth, exponent,"
    " exponent_relative, tangent_share, ftle, ftle_relative, distance, direction or same_answer",
    "step": "step t: of a Jacobian J_t, of an exponent over steps 1..t, of a curve after step t; none for token_share",
    "index": "which singular value or exponent, 1 the largest; none for the others",
    "tokens": "kind of token that is read: cls, reg, dist, patches or memory; none for what is of all",
    "source": "what is perturbed: of gain a kind of token, of a curve the direction: random or partner",
    "start": "step s after which the state of a curve is perturbed",
    "eps": "size of that perturbation, a share of ||z_s||",
    "trained_steps": "steps T the model was made for; of a stack, its blocks",
    "value": "mean over images: a ratio of norms (singular, radius, gain, state_growth ||z_t|| / ||z_{t-1}||), nats a"
    " step (exponents), a share 0..1, or a distance as a share of ||z_t|| (of direction: 0..2)",
    "low": "lower end of the normal 95 % interval of that mean, of same_answer Wilson's; none for one image",
    "high": "upper end of it",
    "residual": "mean relative residual of an iterative estimate; none for the others",
    "null": "null: the value with permuted weights; of a curve, of another image's clean run; none for token_share",
    "null_low": "lower end of the normal 95 % interval of the null; of curves up to sqrt 2 too narrow, as pairs of"
    " images come both ways round",
    "null_high": "upper end of it",
    "n": "images",
}


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
    import pandas as pd

    from bvit_interp.data.partners import Partners

    plans = {name: _Plan(name, model, config) for name, model in models.items()}
    partners = Partners(data, config.limit, config.skip_corrupt)
    few = replace(config, limit=min(config.jacobian_images, len(partners.places)))
    spectra, curves = _spectra(models, data, few, plans), _curves(models, data, config, plans, partners)
    rows = [row for name, plan in plans.items() for row in _rows(name, plan, spectra[name] | curves[name])]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "index", "start", "n"), "Int64"))


class _Plan:
    """What is measured of one model, and where its kinds of token are."""

    def __init__(self, name: str, model: VisionTransformer, config: Config) -> None:
        from bvit_interp.models.memory import MemoryBlock
        from bvit_interp.models.unroll import run_on
        from bvit_interp.probes.probe import Probe

        self.config, self.trained, self.view = config, len(model.blocks), run_on(model, config.steps)
        self.device = next(model.parameters()).device
        self.steps = range(1, len(self.view.blocks) + 1)
        self.horizon = min(self.trained, self.steps[-1])
        self.at = [t for t in self.steps if t in (*config.spectra, self.horizon)]
        starts = [s for s in range(self.steps[-1]) if s in config.starts]
        if not starts:
            raise UserError(f"{name} runs on past none of the starts {config.starts}; its own: 0..{self.steps[-1] - 1}")
        self.variants = list(itertools.product(("random", "partner"), starts, dict.fromkeys(config.eps)))
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
        curve, read = [("variant", self.variants), ("step", [0, *self.steps])], ("tokens", list(self.kinds))
        return {
            "singular": [at, index], "radius": [at], "rotates": [at],
            "input_share": [at, kinds], "output_share": [at, kinds],
            "gain": [at, ("source", list(self.packed)), kinds], "state_growth": [steps],
            "exponent": [steps, index], "exponent_relative": [steps, index], "tangent_share": [steps, kinds],
            "ftle": [trained, index], "ftle_relative": [trained, index],
            "distance": [*curve, read], "direction": [*curve, read], "same_answer": [*curve],
        }  # fmt: skip

    def moments(self, curves: bool) -> dict[str, Moments]:
        """Means of the statistics, on the model's device: a process without images takes part in the gather too."""
        from bvit_interp.probes.moments import Moments

        named = {name: axes for name, axes in self.axes().items() if (name in _CURVES) == curves}
        shapes = {name: [len(values) for _, values in axes] for name, axes in named.items()}
        more = {f"{name}_null": shapes[name][1:] for name in _CURVES} if curves else {
            f"{name}_residual": shapes[name] for name in ("singular", "radius", "ftle")
        }  # fmt: skip
        return {name: Moments(*shape).to(self.device) for name, shape in (shapes | more).items()}

    def graph_bytes(self) -> int:
        """About what the graphs of a run of one image, and of its gradient, take."""
        of_token = 60 * self.view.embed_dim + 12 * int(self.view.blocks[0].attn.num_heads) * self.count
        return 8 * self.horizon * self.count * of_token


def _spectra(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, plans: Mapping[str, _Plan]
) -> dict[str, Found]:
    """What comes of Jacobians, with that of permuted weights as `<statistic>_null`."""
    from bvit_interp.probes.jacobian import differentiable

    runs = {
        (name, suffix): (differentiable(models[name], config.steps, seed), plan.moments(curves=False))
        for name, plan in plans.items() for suffix, seed in (("", None), ("_null", config.seed))
    }  # fmt: skip
    at_once = min(_BYTES_OF_GRAPHS[plan.device.type] // plan.graph_bytes() for plan in plans.values())
    few = replace(config, batch_size=max(1, min(config.batch_size, at_once)))
    loader, geometries = few.loader(data, models, "stability: Jacobians")
    for batch in loader:
        for (name, _), (view, moments) in runs.items():
            _take_in(partial(_linearised, plans[name], view, geometries[name]), batch, moments)
    found: dict[str, Found] = {name: {} for name in models}
    for (name, suffix), (_, moments) in runs.items():
        found[name] |= {f"{statistic}{suffix}": means for statistic, means in _means(moments).items()}
    return found


def _linearised(plan: _Plan, view: VisionTransformer, geometry: Geometry, batch: Batch) -> dict[str, Tensor]:
    """The statistics of Jacobians of images, each ``(B, ...)`` in the shape of its axes."""
    from bvit_interp.models.stepping import embed
    from bvit_interp.probes.jacobian import of_run

    state = embed(view, batch.views[geometry][0].to(plan.device).double())
    config, kinds = plan.config, list(plan.packed.values())
    return of_run(
        view, state, batch.index, kinds, plan.at, plan.horizon, config.leading, config.iterations, config.seed
    )


def _curves(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, plans: Mapping[str, _Plan],
    partners: Partners,
) -> dict[str, Found]:  # fmt: skip
    """Distances and answers of perturbed runs, with those of the partners' clean runs as `<statistic>_null`."""
    import torch

    moments = {name: plan.moments(curves=True) for name, plan in plans.items()}
    loader, geometries = config.loader(data, models, "stability: perturbed runs")
    for batch in loader:
        pairs = {
            shown: torch.stack([own, partners(batch.index, shown)[0]], 1) for shown, (own, _) in batch.views.items()
        }
        paired = replace(batch, views={geometry: (images, None) for geometry, images in pairs.items()})
        for name, plan in plans.items():
            _take_in(partial(_perturbed, plan, geometries[name]), paired, moments[name])
    return {name: _means(of) for name, of in moments.items()}


def _perturbed(plan: _Plan, geometry: Geometry, batch: Batch) -> dict[str, Tensor]:
    """The same of perturbed runs; a view holds the images and their partners, ``(B, 2, 3, H, W)``."""
    import torch

    from bvit_interp.models.stepping import embed
    from bvit_interp.probes.perturbing import perturbed_runs

    kinds = list(plan.kinds.values())
    with torch.inference_mode():
        clean, other = (embed(plan.view, images.to(plan.device)) for images in batch.views[geometry][0].unbind(1))
        return perturbed_runs(plan.view, clean, other, batch.index, plan.variants, kinds, plan.config.seed)


def _take_in(run: Callable[[Batch], dict[str, Tensor]], batch: Batch, moments: Mapping[str, Moments]) -> None:
    from bvit_interp.data.loader import run_in_halves

    for found in run_in_halves(run, batch):
        for statistic, values in found.items():
            moments[statistic].update(values)


def _means(moments: Mapping[str, Moments]) -> Found:
    """What the moments come to, in their shape: torchmetrics takes the axes off a single number."""
    found = ((name, metric.count.shape, metric.compute()) for name, metric in moments.items())
    return {name: {key: values.reshape(shape) for key, values in means.items()} for name, shape, means in found}


def _rows(name: str, plan: _Plan, found: Found) -> Iterator[dict[str, Any]]:
    """A row for every number that is there."""
    from bvit_interp.metrics import wilson_interval

    of_model = {"model": name, "trained_steps": plan.trained}
    for statistic, axes in plan.axes().items():
        measured, null = found[statistic], found[f"{statistic}_null"]
        for place in map(tuple, measured["n"].nonzero().tolist()):  # none before the start of a curve
            row = {key: values[i] for (key, values), i in zip(axes, place, strict=True)}
            row |= {key: values[place].item() for key, values in measured.items()}
            of_null = place[1:] if "variant" in row else place
            row |= {f"null_{key}".removesuffix("_value"): null[key][of_null].item() for key in ("value", "low", "high")}
            if "variant" in row:
                row |= dict(zip(("source", "start", "eps"), row.pop("variant"), strict=True))
            if f"{statistic}_residual" in found:
                row["residual"] = found[f"{statistic}_residual"]["value"][place].item()
            if statistic == "same_answer":
                row["low"], row["high"] = wilson_interval(row["value"] * row["n"], row["n"])
            yield of_model | {"statistic": statistic} | row
    tokens = {kind: len(range(2 * plan.count)[rows]) for kind, rows in plan.packed.items()}
    for kind, count in tokens.items():
        yield of_model | {"statistic": "token_share", "tokens": kind, "value": count / sum(tokens.values())}


def plot(frame: pd.DataFrame) -> Figure:
    """Stretching by step and along the run, and by kind of token; how far runs perturbed at the first start get."""
    from bvit_interp import plotting

    figure, axes = plotting.canvas(columns=3, rows=2, width=4.8, height=3.7)
    of: dict[Any, pd.DataFrame] = dict(list(frame.groupby("statistic")))
    horizon = frame["model"].map(of["ftle"].groupby("model")["step"].max())
    first = {key: part[part["index"] == 1] for key, part in of.items()}
    trained = {key: part[part["step"] == horizon[part.index]] for key, part in of.items()}
    moved = frame[(frame["start"] == frame["start"].min()) & (frame["eps"] == frame["eps"].max())]
    kind = "cls" if "cls" in set(moved["tokens"]) else "patches"
    moved = moved[moved["tokens"].isna() | (moved["tokens"] == kind)]
    far, same = ({label: part[part["statistic"] == key] for label, part in (
        ("random direction", moved[moved["source"] == "random"]),
        ("towards another image", moved[moved["source"] == "partner"]),
    )} for key in ("direction", "same_answer"))  # fmt: skip
    after = f"moved by {moved['eps'].max():.2g} after step {int(moved['start'].min())}"
    local = {"largest singular value": first["singular"], "spectral radius": of["radius"]}
    spectrum = {"worst directions": of["ftle"], "random ones (QR)": trained["exponent"]}
    run = {"of the state": first["exponent"], "less growth of ||z||": first["exponent_relative"]}
    panels: tuple[tuple[str, str, dict[str, pd.DataFrame], str, int | None], ...] = (
        ("Jacobian of each step", "ratio of norms", local, "step", 1),
        ("largest exponents over steps 1..T", "nats a step", spectrum, "index", 0),
        ("first exponent over steps 1..t (QR)", "nats a step", run, "step", 0),
        (f"direction of {_NAMES[kind]}, {after}", "distance of unit vectors", far, "step", None),
        (f"answer, {after}", "share as in the clean run", same, "step", None),
    )
    for ax, (title, label, parts, x, neutral) in zip(axes.flat, panels, strict=False):
        _lines(ax, parts, x, "permuted weights" if neutral is not None else "clean run of another image")
        if neutral is not None:
            ax.axhline(neutral, **plotting.NULL, linestyle=":")
        ax.set_title(title, fontsize=10)
        ax.set_ylabel(label)
    for ax in (*axes[:, 0], axes[1, 2]):
        ax.set_yscale("log")
    axes[0, 1].set_xlabel("exponent")
    axes[0, 1].set_ylim(top=1.7 * axes[0, 1].get_ylim()[1])  # room for the legend
    _pairs(axes[1, 2], trained["gain"])
    return figure


def _lines(ax: Axes, parts: Mapping[str, pd.DataFrame], x: str, null: str) -> None:
    """A colour a model, full and hollow markers for the two parts; their nulls in grey."""
    from bvit_interp import plotting

    names = list(dict.fromkeys(name for part in parts.values() for name in part["model"]))
    for j, (label, part) in enumerate(parts.items()):
        look = {"markerfacecolor": "white", "linestyle": "--"} if j else {"linestyle": "-"}
        ax.plot([], [], color="0.1", marker="o", markersize=4, **look, label=label)
        for i, name in enumerate(names):
            rows, style = part[part["model"] == name].sort_values(x), {**plotting.line_style(i), **look}
            ax.plot(rows[x], rows["value"], **style)
            ax.fill_between(rows[x], rows["low"], rows["high"], color=style["color"], alpha=0.15, linewidth=0)
            ax.plot(rows[x], rows["null"], **plotting.NULL, **look, marker=style["marker"], markersize=2.5)
    for i, name in enumerate(names):
        ax.plot([], [], color=plotting.line_style(i)["color"], linewidth=4, label=name)
    ax.plot([], [], **plotting.NULL, label=null)
    plotting.step_axis(ax, [step for part in parts.values() for step in part[x]])
    plotting.legend(ax)


def _pairs(ax: Axes, gain: pd.DataFrame) -> None:
    """The gain between CLS and patches at one step."""
    from bvit_interp import plotting

    gain = gain[gain["source"].isin(_NAMES) & gain["tokens"].isin(_NAMES)]
    pairs = list(dict.fromkeys(zip(gain["source"], gain["tokens"], strict=True)))
    names = list(dict.fromkeys(gain["model"]))
    for i, name in enumerate(names):
        rows = gain[gain["model"] == name].set_index(["source", "tokens"]).reindex(pairs)
        at = [place + 0.16 * (i - (len(names) - 1) / 2) for place in range(len(pairs))]
        around = [rows["value"] - rows["low"].clip(lower=1e-6), rows["high"] - rows["value"]]
        ax.errorbar(at, rows["value"], around, label=name, **plotting.line_style(i) | {"linestyle": "none"})
        ax.plot(at, rows["null"], "_", markersize=9, color="0.45", label=None if i else "permuted weights")
    ax.set_xticks(range(len(pairs)), [f"{_NAMES[source]}\nto {_NAMES[read]}" for source, read in pairs], fontsize=8)
    ax.set_ylabel("ratio of norms")
    ax.set_title("gain from kind to kind of token, step T", fontsize=10)
    plotting.legend(ax)
