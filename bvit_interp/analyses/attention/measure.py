"""How wide and at what does every head look, step by step, and does a head keep looking at the same?

Beside Fig. 10-13, section 4.2.2 and Appendix F of bViT (arXiv 2605.10661), which show where heads point; these numbers
are ours. Per step and head: entropy of the CLS row, attention distance between patches (Dosovitskiy et al., 2021;
Raghu et al., 2021), attention of CLS on itself, registers and patches and of patches on CLS, and attention rollout
(Abnar & Zuidema, 2020). `agreement` is Pearson's correlation over patches of a head's CLS map at step s with its own
at step t. A head of a bViT is the same weights at every step, in a stack head h of two blocks shares its number alone.

Nulls: `null` is what uniform attention gives (for agreement, different heads at those two steps), `shuffled` the same
maps of different images (what is due to the place of a patch alone), `p_value` the share of pairings of the heads at
s with those at t that agree as well as equal numbers do. Without a CLS token only the distance is measured; with a
memory, the step's own block.

Cost: a forward with the full pattern of one step at a time, B x H x N x N numbers (0.1 GB for bViT-B and 64 images,
about four times that in use); 300 images of 32 px and two models of width 128 take 8 s on one core.
Expected: no number is printed; in words, fixed heads localise at middle or late steps and change their role.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.attending import Attended
    from bvit_interp.probes.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the attention statistics."""

    examples: int = 3
    """Images whose CLS maps are kept for the strips of Fig. 13, spread over the data set; 0 for none."""
    images: tuple[int, ...] | None = None
    """Keep the maps of these images instead, by their place in the data set, from 0."""
    seed: int = 0
    """Of the random pairings of heads, for more than 7."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples < 0:
            raise UserError(f"examples must be >= 0, got {self.examples}")
        if self.images is not None and min(self.images, default=0) < 0:
            raise UserError(f"images are places in the data set, from 0, got {self.images}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Means over heads, without agreements of two steps."""
        return super().headline(frame[(frame["head"] == "mean") & frame["other_step"].isna()])


COLUMNS = {
    "model": "checkpoint",
    "statistic": "entropy (CLS row, nats) and distance (among patches, patches), each also as _share of log N or of the"
    " grid's diagonal; cls_on_KIND, patches_on_cls (shares of attention, 0..1); rollout_entropy (nats),"
    " rollout_agreement (correlation of rollout and heads' mean CLS map, at step 1 the same), agreement (of a head with"
    " itself at other_step)",
    "step": "step t, from 1",
    "other_step": "the later step of an agreement; else none",
    "head": "head from 0; mean: over the heads of each image (rollout: of the heads' mean attention)",
    "value": "mean over images",
    "low": "lower end of its normal 95 % interval over images",
    "high": "upper end of it",
    "null": "what uniform attention gives; agreement: different heads at the two steps; rollout_agreement: none",
    "shuffled": "null of the agreements: between maps of different images",
    "p_value": "agreement, head mean: share of pairings of the heads that agree at least as well, 0..1",
    "n": "images that count",
    "path": "file of the example maps, if kept",
}


def measure(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, folder: Path | None = None
) -> pd.DataFrame:
    """Attention statistics of every model, step and head.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : images; their labels are not used.
    folder : where the example maps go; without it none are kept.

    Returns
    -------
    A table of `COLUMNS`.
    """
    import pandas as pd

    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.attending import attend
    from bvit_interp.probes.probe import Probe

    places = _places(data, config) if folder else []
    probes = {name: Probe(model) for name, model in models.items()}
    tallies = {name: _Tally(probe) for name, probe in probes.items()}
    loader, geometries = config.loader(data, models, "attention")
    for batch in loader:
        for name, probe in probes.items():
            for attended in run_in_halves(
                lambda part, p=probe, g=geometries[name]: attend(p, part.views[g][0].to(_device(p))), batch
            ):
                tallies[name].update(attended)
    tables = []
    for name, probe in probes.items():
        table = pd.DataFrame(tallies[name].rows(config.seed)).assign(model=name)
        path = _keep_examples(name, probe, data, places, geometries[name], config, folder)
        tables.append(table.reindex(columns=list(COLUMNS)).assign(path=path))
    return pd.concat(tables, ignore_index=True).astype({"other_step": "Int64"})


def _device(probe: Probe) -> Any:
    return next(probe.model.parameters()).device


class _Tally:
    """What is kept of one model while images stream by."""

    def __init__(self, probe: Probe) -> None:
        import torch

        from bvit_interp.probes.attending import statistics
        from bvit_interp.probes.moments import MapPairs, Moments

        self.probe, steps, heads = probe, probe.num_steps, probe.num_heads
        self.pairs = torch.triu_indices(steps, steps, 1)
        self.moments = {name: Moments(steps, heads + 1) for name in statistics(probe)}
        self.maps: dict[str, MapPairs] = {}
        if probe.model.has_class_token:
            self.moments |= {"rollout_entropy": Moments(steps, 1), "rollout_agreement": Moments(steps, 1)}
            self.moments["agreement"] = Moments(self.pairs.shape[1], heads + 1)
            for name, maps in (("agreement", heads), ("rollout_agreement", 2)):
                self.maps[name] = MapPairs(steps, maps, math.prod(probe.grid))
        for metric in (*self.moments.values(), *self.maps.values()):
            metric.to(_device(probe))

    def update(self, attended: Attended) -> None:
        """Add a batch."""
        import torch

        from bvit_interp import metrics

        for name, values in attended.statistics.items():
            self.moments[name].update(_with_mean(values))
        if attended.maps is None or attended.rollout is None:
            return
        maps = metrics.unit_maps(attended.maps)
        own = metrics.correlations(maps.transpose(1, 2)).movedim(1, -1)  # (B, T, T, H)
        self.moments["agreement"].update(_with_mean(own[:, self.pairs[0], self.pairs[1]]))
        self.maps["agreement"].update(maps)
        both = torch.stack([attended.maps.mean(2), attended.rollout[..., -maps.shape[-1] :]], dim=2)
        both = metrics.unit_maps(both)
        self.moments["rollout_agreement"].update(metrics.correlations(both)[..., :1, 1])
        self.moments["rollout_entropy"].update(metrics.entropy(attended.rollout)[..., None])
        self.maps["rollout_agreement"].update(both)

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """The table, without the model's name."""
        from bvit_interp.probes.attending import uniform

        found = {name: {k: v.numpy() for k, v in moments.compute().items()} for name, moments in self.moments.items()}
        correlations = {name: {k: v.numpy() for k, v in maps.compute().items()} for name, maps in self.maps.items()}
        scales = {"entropy": uniform(self.probe, "entropy"), "distance": math.hypot(*self.probe.grid)}
        for name, of_name in found.items():
            for i, values in enumerate(of_name["value"]):
                for head in range(len(values)):
                    key = {"statistic": name, "step": i + 1, "head": "mean" if head == len(values) - 1 else str(head)}
                    numbers = {k: v[i, head].item() for k, v in of_name.items() if k != "n"}
                    row = {**key, **numbers, "n": of_name["n"][i, head].item()}
                    if name == "agreement":
                        row |= self._agreement_nulls(correlations[name], i, row["head"], seed)
                    elif name == "rollout_agreement":
                        row["shuffled"] = correlations[name]["other_images"][i, 0, i, 1]
                    else:
                        row["null"] = numbers["null"] = uniform(self.probe, name, i + 1)
                    yield row
                    if name in scales:
                        yield {**row, "statistic": f"{name}_share", **{k: v / scales[name] for k, v in numbers.items()}}

    def _agreement_nulls(self, maps: Mapping[str, np.ndarray], pair: int, head: str, seed: int) -> dict[str, Any]:
        """Steps and nulls of one pair of steps, from the correlations ``(T, H, T, H)`` of all maps."""
        import numpy as np

        from bvit_interp import metrics

        first, second = self.pairs[:, pair].tolist()
        table, between = maps["same_image"][first, :, second], maps["other_images"][first, :, second]
        different = ~np.eye(len(table), dtype=bool)
        nulls: dict[str, Any] = {"step": first + 1, "other_step": second + 1}
        if head == "mean":
            nulls["shuffled"] = _mean(np.diag(between))
            nulls["p_value"] = metrics.pairing_p_value(table, seed)
        else:  # this head at one step with the others at the other
            different[np.arange(len(table)) != int(head)] = False
            different |= different.T
            nulls["shuffled"] = between[int(head), int(head)]
        return {**nulls, "null": _mean(table[different])}


def _with_mean(values: Tensor) -> Tensor:
    """Values ``(..., H)`` and their mean over the heads behind them; nan is left out."""
    import torch

    return torch.cat([values, values.nanmean(-1, keepdim=True)], dim=-1)


def _mean(values: np.ndarray) -> float:
    """Mean of the numbers among `values`; nan if there are none."""
    import numpy as np

    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


# ---- example maps --------------------------------------------------------------------------------------


def _places(data: Samples, config: Config) -> list[int]:
    """Positions of the example images in the data set."""
    from bvit_interp.data.samples import spread

    if config.images is None:
        return spread(len(data), config.examples) if config.examples else []
    if max(config.images, default=0) >= len(data):
        raise UserError(f"no image {max(config.images)}; images: 0..{len(data) - 1}")
    return list(dict.fromkeys(config.images))


def _keep_examples(
    name: str, probe: Probe, data: Samples, places: list[int], geometry: Geometry, config: Config, folder: Path | None
) -> str | None:
    """A file with the CLS maps ``(n, T, H, rows, columns)`` of the example images, and the images as seen."""
    import numpy as np

    from bvit_interp.probes.attending import example_maps
    from bvit_interp.results import rank_and_world, replacing

    if not places or folder is None or not probe.model.has_class_token:
        return None
    path = folder / f"attention_{name.replace('/', '_').replace('@', '_')}.npz"
    if rank_and_world()[0] == 0:
        arrays = example_maps(probe, data, places, geometry, config.skip_corrupt)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    return str(path)


# ---- figure --------------------------------------------------------------------------------------------


def plot(frame: pd.DataFrame) -> Figure:
    """Entropy and distance by step, where CLS looks, agreement of heads, and three models' maps of Fig. 13."""
    import numpy as np
    from matplotlib.figure import Figure

    frame = frame.assign(head=frame["head"].astype(str))
    models = list(frame.groupby("model", sort=False))
    of_cls = [(name, part) for name, part in models if (part["statistic"] == "entropy").any()]
    across = [of_cls[i : i + 3] for i in range(0, len(of_cls), 3)]
    paths = {name: Path(part["path"].iloc[0]) for name, part in of_cls[:3] if part["path"].notna().all()}
    strips = [(name, np.load(path)) for name, path in paths.items() if path.exists()]
    drawn = [(3.5 + 0.2 * (len(models) // 4), _plot_lines, models), *((2.7, _plot_masses, some) for some in across)]
    drawn += [(3.9, _plot_agreement, some) for some in across if frame["other_step"].notna().any()]
    drawn += [(0.5 + 0.93 * len(arrays["image"]), _plot_strip, (name, arrays)) for name, arrays in strips]
    figure = Figure(figsize=(12, sum(height for height, *_ in drawn)), layout="constrained")
    panels = figure.subfigures(len(drawn), 1, height_ratios=[height for height, *_ in drawn], squeeze=False)[:, 0]
    for panel, (_, draw, what) in zip(panels, drawn, strict=True):
        draw(panel, *what) if draw is _plot_strip else draw(panel, what)
    return figure


def _over_steps(part: pd.DataFrame, statistic: str, head: str = "mean") -> pd.DataFrame:
    return part[(part["statistic"] == statistic) & (part["head"] == head)].set_index("step")


def _plot_lines(panel: SubFigure, models: list[tuple[str, pd.DataFrame]]) -> None:
    """Mean over heads, with the band between the lowest and the highest head."""
    from bvit_interp import plotting

    titles = {"entropy_share": "entropy of CLS attention / log N", "distance_share": "attention distance / diagonal"}
    handles: dict[str, Any] = {}
    for ax, (statistic, title) in zip(panel.subplots(1, 2), titles.items(), strict=True):
        nulls = set()
        for i, (name, part) in enumerate(models):
            mean = _over_steps(part, statistic)
            if not len(mean):  # a model without CLS
                continue
            style = plotting.line_style(i)
            heads = part[(part["statistic"] == statistic) & (part["head"] != "mean")].groupby("step")["value"]
            ax.plot(mean.index, mean["value"], **style, label=name)
            ax.fill_between(mean.index, heads.min(), heads.max(), color=style["color"], alpha=0.12, linewidth=0)
            nulls |= set(mean["null"].round(6))
            if statistic == "entropy_share":
                rollout = _over_steps(part, "rollout_entropy")["value"] / _over_steps(part, "entropy")["null"]
                ax.plot(rollout.index, rollout, color=style["color"], linewidth=1, linestyle=":",
                        label=None if i else "of attention rollout")  # fmt: skip
        for i, null in enumerate(sorted(nulls)):
            ax.axhline(null, **plotting.NULL, label=None if i else "uniform attention")
        ax.set_ylim(0, 1.04 if statistic == "entropy_share" else None)
        _finish(ax, [step for _, part in models for step in part["step"]], title)
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    panel.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _plot_masses(panel: SubFigure, models: list[tuple[str, pd.DataFrame]]) -> None:
    """Attention of CLS stacked by the kind of token it falls on; patches, on top, are cut where nothing else is."""
    looks = {
        "cls": ("itself", {"color": "0.25"}), "dist": ("distillation token", {"color": "#CC79A7"}),
        "reg": ("registers", {"color": "#E69F00", "hatch": "//", "edgecolor": "white"}),
        "patches": ("patches: the rest, cut", {"color": "#D6E4EE"}),
    }  # fmt: skip
    axes, top, handles = _row(panel, len(models), sharey=True), 0.0, dict[str, Any]()
    for ax, (name, part) in zip(axes, models, strict=True):
        patches = _over_steps(part, "patches_on_cls")["value"]
        below, cut = 0 * patches, 0.0
        for kind, (label, look) in looks.items():
            share = _over_steps(part, f"cls_on_{kind}")
            if not len(share):
                continue
            ax.bar(share.index, share["value"], bottom=below, width=0.9, linewidth=0, label=f"CLS on {label}", **look)
            if kind != "patches":
                below, cut = below + share["value"], cut + share["null"].iloc[0]
                ax.axhline(cut, color="black", linewidth=0.8, linestyle=":", label="uniform attention")
        ax.plot(
            patches.index, patches, color="#D55E00", marker="o", markersize=3, linewidth=1.2, label="patches on CLS"
        )
        top = max(top, 1.3 * cut, 1.3 * patches.max(), 1.3 * below.max())
        _finish(ax, part["step"], name)
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    axes[0].set(ylim=(0, min(top, 1.0)), ylabel="share of attention")
    panel.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def _plot_agreement(panel: SubFigure, models: list[tuple[str, pd.DataFrame]]) -> None:
    """Above the diagonal a head with itself, below it different heads of the two steps."""
    import numpy as np

    from bvit_interp import plotting

    for ax, (name, part) in zip(_row(panel, len(models)), models, strict=True):
        pairs = part[(part["statistic"] == "agreement") & (part["head"] == "mean")]
        steps = sorted({int(step) for step in part["step"]})
        values = np.eye(len(steps))
        for s, t, same, different in pairs[["step", "other_step", "value", "null"]].to_numpy(float):
            values[steps.index(int(s)), steps.index(int(t))] = same
            values[steps.index(int(t)), steps.index(int(s))] = different
        plotting.heat_map(panel, ax, values, steps, steps, "")
        ax.set(xlabel="step", ylabel="step")
        ax.set_title(name, fontsize=10)
    panel.suptitle("head with itself (above the diagonal), different heads (below): mean correlation", fontsize=10)


def _plot_strip(panel: SubFigure, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Each example image and the heads' mean CLS map of every step."""
    from bvit_interp import plotting

    images, maps = arrays["image"] / 255.0, arrays["maps"].mean(2)
    axes = panel.subplots(len(images), maps.shape[1] + 1, squeeze=False)
    for row, image, steps in zip(axes, images, maps, strict=True):
        for ax, seen in zip(row, [None, *steps], strict=True):
            plotting.overlay(ax, image, seen)
    for t, ax in enumerate(axes[0]):
        ax.set_title(f"step {t}" if t else "image", fontsize=8)
    panel.suptitle(f"{name}: CLS attention, mean over heads", fontsize=10)


def _row(panel: SubFigure, count: int, **options: Any) -> list[Axes]:
    """`count` axes side by side, at least half a page wide."""
    axes = panel.subplots(1, max(count, 2), **options)
    for ax in axes[count:]:
        ax.set_axis_off()
    return list(axes[:count])


def _finish(ax: Axes, steps: Any, title: str) -> None:
    from bvit_interp import plotting

    plotting.step_axis(ax, steps)
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
