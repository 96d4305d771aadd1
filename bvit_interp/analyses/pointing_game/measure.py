"""Does the maximum of a head's CLS attention lie on the object, step by step?

Fig. 4 and 10-13, section 4.2.2 and Appendix F of bViT (arXiv 2605.10661); the game is Zhang et al.'s (ECCV
2016). Point = centre of the arg-max patch of the CLS row at a step; a hit lies on the image's own class; the
score is the share of hits. Ties count by expectation, ignored pixels (id 1000) are left out, images without a
positive pixel after the crop are skipped and counted. Nulls in the same table: `chance` (share of the image the
object covers; with --point majority of the patches that are mostly object), `centre` (the image's centre pixel),
and for the best head the head chosen on one half of the images and scored on the other. Ties, crop and ignored
pixels are our choices; the paper prints none.

Cost: 0.9 forwards an image; 300 images of 224 px on bViT-B about 3 minutes on 2 cores.
Expected: in the paper hits rise to middle or late steps and drop at the last, most with registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the pointing game."""

    saliency: Literal["attention", "rollout", "gradient-x-activation", "integrated-gradients"] = "attention"
    """Whose maximum points: CLS attention of each head, attention rollout up to the step, or an attribution of
    the predicted class to the tokens entering the step (one map a step; needs captum)."""
    target: Literal["own", "any"] = "own"
    """What is an object: the image's own class, or every annotated class."""
    point: Literal["centre", "majority"] = "centre"
    """What decides a hit: the patch's centre pixel, or whether most of the patch is object."""
    tolerance: float = 0.0
    """Radius around the point within which an object pixel counts, pixels of the input (15 in TorchRay)."""
    average: Literal["image", "class"] = "image"
    """Mean over images, or over the means of the classes."""
    examples: int = 3
    """Images whose maps are kept for the strip of Fig. 13; 0 for none."""
    seed: int = 0
    """Of the bootstrap and of the halves on which the best head is chosen and scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance < 0 or self.examples < 0:
            raise UserError("tolerance and examples must be >= 0")
        if self.point == "majority" and self.tolerance:
            raise UserError("tolerance goes with --point centre: a majority has no radius")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Of the heads their mean and the best."""
        return super().headline(frame[frame["head"].isin(["mean", "best", "best-split"])])


COLUMNS = {
    "model": "checkpoint",
    "saliency": "whose maximum points",
    "step": "step t, from 1",
    "head": "head from 0; all (one map a step); mean, best, best-split: over the heads of the step",
    "hit_ratio": "share of images whose point is a hit, 0..1",
    "low": "lower end of the bootstrap 95 % interval over images; best: for the head already chosen",
    "high": "upper end of it",
    "n": "images that count",
    "ignored": "images left out because the point (for the mean: of every head) is on ignored ground",
    "skipped": "images left out because the crop shows no object",
    "chance": "null: mean share of the image the object covers (--point majority: of patches mostly object), 0..1",
    "centre": "null: hit ratio of the image's centre pixel, 0..1",
    "chosen": "the head that is best at the step (best; best-split: on the first half)",
    "path": "file of the example maps, if kept",
}


def measure(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, folder: Path | None = None
) -> pd.DataFrame:
    """Hit ratios of every model, step and head.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : images with masks.
    folder : where the example maps go; without it none are kept.

    Returns
    -------
    A table of `COLUMNS`.
    """
    import pandas as pd

    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.probe import Probe
    from bvit_interp.probes.reducers import Rows

    if not data.has_masks:
        raise UserError("the pointing game needs masks: use digits-s or a folder in ImageNet-S layout")
    probes = {name: Probe(model) for name, model in models.items()}
    rows = {name: Rows() for name in models}
    kept: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in models}
    loader, geometries = config.loader(data, models, "pointing-game")
    for batch in loader:
        for name, probe in probes.items():
            keep = config.examples - len(kept[name]) if folder else 0
            for index, row, examples in run_in_halves(
                lambda part, probe=probe, name=name, keep=keep: _play(probe, part, geometries[name], config, keep),
                batch,
            ):
                rows[name].update(index, row)
                kept[name] = (kept[name] + examples)[: config.examples]
    tables = []
    for name, probe in probes.items():
        path = _keep_examples(kept[name], name, config, folder)
        tables.append(_score(name, probe, rows[name].compute()[1].numpy(), config).assign(path=path))
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)]


_MOST_MAPS = 3  # models whose heads and strips are drawn; the lines are of all
_HONEST = "best head chosen on one half, scored on the other"
_FACTS = 4  # label, has an object, share covered, centre hit: the columns before the hits


def _play(
    probe: Any, batch: Any, geometry: Any, config: Config, keep: int
) -> tuple[Tensor, Tensor, list[dict[str, np.ndarray]]]:
    """Positions ``(B,)``, rows ``(B, _FACTS + T * H)`` and up to `keep` examples of one batch."""
    import torch

    from bvit_interp import metrics
    from bvit_interp.probes.saliency import METHODS

    device = next(probe.model.parameters()).device
    images, ids = (tensor.to(device) for tensor in batch.views[geometry])
    maps = METHODS[config.saliency](probe, images)
    if not torch.isfinite(maps).all():
        raise UserError(f"the {config.saliency} maps hold NaN: the model's activations overflow")
    positive, ignored = _ground_truth(ids, batch.labels.to(device), config)
    on_patches = _majority if config.point == "majority" else metrics.at_patch_centres
    near = metrics.near(positive, config.tolerance)
    on_object, on_ignored = on_patches(near, probe.grid), on_patches(ignored, probe.grid)
    hits = metrics.point_hits(maps, on_object, on_ignored)
    middle = (..., ids.shape[-2] // 2, ids.shape[-1] // 2)
    seen = positive.flatten(1).any(1)
    covered = _share(on_object, on_ignored) if config.point == "majority" else _share(near, ignored)
    centre = torch.where(ignored[middle], torch.nan, near[middle].double())
    facts = torch.stack([batch.labels.to(device), seen, covered, centre], dim=1).double()
    hits = torch.where(seen[:, None], hits.flatten(1), torch.nan)
    examples = [
        {"image": _pixels(images[i], geometry), "mask": positive[i].cpu().numpy(),
         "maps": maps[i].unflatten(-1, probe.grid).float().cpu().numpy()}
        for i in seen.nonzero().flatten().tolist()[:keep]
    ]  # fmt: skip
    return batch.index, torch.cat([facts, hits], dim=1).cpu(), examples


def _ground_truth(ids: Tensor, labels: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Bool masks ``(B, height, width)`` of the object's pixels and of the ignored ones."""
    from bvit_interp.data.samples import IGNORE

    ignored = ids == IGNORE
    own = ids == labels[:, None, None] + 1
    return (own if config.target == "own" else (ids > 0) & ~ignored), ignored


def _majority(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches more than half of whose pixels are set: ``(B, height, width)`` -> ``(B, P)``."""
    from torch.nn.functional import adaptive_avg_pool2d

    return adaptive_avg_pool2d(mask[:, None].float(), grid).flatten(1) > 0.5


def _share(mask: Tensor, ignored: Tensor) -> Tensor:
    """Share ``(B,)`` of what is not ignored that is set."""
    return (mask & ~ignored).flatten(1).sum(1) / (~ignored).flatten(1).sum(1).clamp(min=1)


def _pixels(image: Tensor, geometry: Any) -> np.ndarray:
    """The image as seen ``(height, width, 3)``, uint8."""
    import torch

    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (geometry.mean, geometry.std))
    return ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _score(name: str, probe: Any, rows: np.ndarray, config: Config) -> pd.DataFrame:
    """The table of one model from its rows ``(n, _FACTS + T * H)``."""
    import numpy as np
    import pandas as pd

    from bvit_interp import metrics

    scored = rows[rows[:, 1] > 0]
    if not len(scored):
        raise UserError("no image shows its object after the crop: are these masks of these images?")
    hits = scored[:, _FACTS:].reshape(len(scored), probe.num_steps, -1)
    classes = scored[:, 0] if config.average == "class" else None
    half = np.random.default_rng(config.seed).permutation(len(scored)) % 2 == 0
    first, second = (
        _best(metrics.mean_over_images(hits[side], None if classes is None else classes[side]))
        for side in (half, ~half)
    )
    steps = np.arange(probe.num_steps)
    # each image is scored by the head that was best on the half it is not in
    honest = np.where(half[:, None], hits[:, steps, second], hits[:, steps, first])
    draws = metrics.bootstrap_means(
        np.concatenate([hits, honest[..., None]], -1).reshape(len(scored), -1), classes, config.seed
    )
    draws = draws.reshape(len(draws), probe.num_steps, -1)
    chance, centre = metrics.mean_over_images(scored[:, 2:_FACTS], classes)
    shared = {
        "model": name, "saliency": config.saliency, "skipped": int(len(rows) - len(scored)),
        "chance": float(chance), "centre": float(centre),
    }  # fmt: skip
    split = metrics.mean_over_images(honest, classes)
    table: list[dict[str, Any]] = []
    for t, ratios in enumerate(metrics.mean_over_images(hits, classes)):
        sample, best = draws[:, t], int(_best(ratios))
        # head, ratio, bootstrap draws, nan where the point of an image is ignored, the head chosen
        entries: list[tuple[str, Any, Any, Any, int | None]] = [
            (str(head), ratio, sample[:, head], hits[:, t, head], None) for head, ratio in enumerate(ratios)
        ]
        if len(ratios) == 1:
            entries = [("all", *entries[0][1:])]
        else:
            every = np.where(np.isnan(hits[:, t]).all(1), np.nan, 0)
            over_heads = metrics.mean_over_images  # with the heads in place of the images
            entries += [
                ("mean", over_heads(ratios), over_heads(sample[:, :-1].T), every, None),
                ("best", ratios[best], sample[:, best], hits[:, t, best], best),
                ("best-split", split[t], sample[:, -1], honest[:, t], int(first[t])),
            ]
        for head, ratio, of_draws, per_image, chosen in entries:
            low, high = metrics.interval(of_draws)
            lost = int(np.isnan(per_image).sum())
            table.append(
                {**shared, "step": t + 1, "head": head, "hit_ratio": float(ratio), "low": low, "high": high,
                 "n": len(scored) - lost, "ignored": lost, "chosen": chosen}
            )  # fmt: skip
    return pd.DataFrame(table).astype({"chosen": "Int64"})


def _best(ratios: np.ndarray) -> np.ndarray:
    """Index of the highest ratio along the last axis; 0 if none is a number."""
    import numpy as np

    return np.argmax(np.where(np.isnan(ratios), -1.0, ratios), axis=-1)


def _keep_examples(examples: list[dict[str, np.ndarray]], name: str, config: Config, folder: Path | None) -> str | None:
    if not examples or folder is None:
        return None
    import numpy as np

    from bvit_interp.results import rank_and_world, replacing

    path = folder / f"pointing_game_{config.saliency}_{name.replace('/', '_').replace('@', '_')}.npz"
    if rank_and_world()[0] == 0:
        arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    return str(path)


# ---- figure --------------------------------------------------------------------------------------------


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 4a and 4b over the models; of the first three the head maps of Fig. 10 and the strips of Fig. 13."""
    from matplotlib.figure import Figure

    frame = frame.assign(head=frame["head"].astype(str))
    models = list(frame.groupby(["model", "saliency"], sort=False))
    drawn = models[:_MOST_MAPS]
    with_heads = [(key, part) for key, part in drawn if (part["head"] == "mean").any()]
    strips = [(key, part) for key, part in drawn if part["path"].notna().all() and Path(part["path"].iloc[0]).exists()]
    rows = [_examples(part)["image"].shape[0] for _, part in strips]
    heights = [3.5 + 0.2 * (len(models) // 3)] + [2.6] * len(with_heads) + [0.5 + 0.85 * count for count in rows]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    panels = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    _plot_lines(next(panels), models)
    for key, part in with_heads:
        _plot_heads(next(panels), key, part)
    for key, part in strips:
        _plot_strip(next(panels), key, part)
    return figure


def _plot_lines(panel: SubFigure, models: list[tuple[Any, pd.DataFrame]]) -> None:
    from bvit_interp import plotting

    left, right = panel.subplots(1, 2, sharey=True)
    for i, ((name, saliency), part) in enumerate(models):
        style = plotting.line_style(i)
        heads = set(part["head"])
        label = name if saliency == "attention" else f"{name}, {saliency}"
        _line(left, part[part["head"] == ("mean" if "mean" in heads else "all")], style, label)
        if "best" in heads:
            _line(right, part[part["head"] == "best"], style, label)
            honest = part[part["head"] == "best-split"]
            right.plot(honest["step"], honest["hit_ratio"], color=style["color"], linewidth=1, alpha=0.8, linestyle=":",
                       label=None if i else _HONEST)  # fmt: skip
    nulls = {(part["chance"].iloc[0], part["centre"].iloc[0]) for _, part in models}
    for ax, title in ((left, "mean over heads"), (right, "best head")):
        for i, (chance, centre) in enumerate(sorted(nulls)):
            ax.axhline(chance, **plotting.NULL, label=None if i else "chance: mask area")
            ax.axhline(centre, **plotting.NULL, linestyle="--", label=None if i else "image centre")
        ax.set_title(title, fontsize=10)
        plotting.step_axis(ax, [step for _, part in models for step in part["step"]])
        ax.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("hit ratio")
    handles: dict[str, Any] = {}
    for ax in (left, right):
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    order = sorted(handles, key=lambda label: label in ("chance: mask area", "image centre", _HONEST))
    lines = [handles[label] for label in order]  # the models first, then the nulls
    panel.legend(lines, order, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _line(ax: Axes, part: pd.DataFrame, style: dict[str, Any], label: str) -> None:
    ax.plot(part["step"], part["hit_ratio"], **style, label=label)
    ax.fill_between(part["step"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)


def _plot_heads(panel: SubFigure, key: tuple[str, str], part: pd.DataFrame) -> None:
    from bvit_interp import plotting

    heads = part[part["head"].str.isdigit()].assign(head=lambda f: f["head"].astype(int))
    grid = heads.pivot(index="head", columns="step", values="hit_ratio")
    ax = panel.subplots()
    plotting.heat_map(panel, ax, grid.to_numpy(), list(grid.columns), list(grid.index), "hit ratio")
    ax.set(xlabel="step", ylabel="head", title=key[0])


def _examples(part: pd.DataFrame) -> dict[str, np.ndarray]:
    """The arrays `_keep_examples` wrote for a model."""
    import numpy as np

    with np.load(part["path"].iloc[0]) as arrays:
        return dict(arrays)


def _plot_strip(panel: SubFigure, key: tuple[str, str], part: pd.DataFrame) -> None:
    """Image, mask outline and the map of the head with the highest score at every step."""
    from bvit_interp import plotting

    single = part[part["head"].str.isdigit() | (part["head"] == "all")]
    best = str(single["head"].iloc[int(single["hit_ratio"].argmax())])
    head = int(best) if best.isdigit() else 0
    arrays = _examples(part)
    images, masks, maps = arrays["image"] / 255.0, arrays["mask"], arrays["maps"][:, :, head]
    axes = panel.subplots(len(images), maps.shape[1] + 1, squeeze=False)
    for row, image, mask, steps in zip(axes, images, masks, maps, strict=True):
        plotting.overlay(row[0], image, outline=mask)
        for ax, saliency in zip(row[1:], steps, strict=True):
            plotting.overlay(ax, image, saliency, mask)
    for t, ax in enumerate(axes[0]):
        ax.set_title("image" if t == 0 else f"step {t}", fontsize=8)
    which = f"head {head}" if best.isdigit() else key[1]
    panel.suptitle(f"{key[0]}: {which}", fontsize=10)
