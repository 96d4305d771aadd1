"""Does the maximum of a head's CLS attention lie on the object, step by step?

Fig. 4 and 10-13, section 4.2.2 and Appendix F of bViT (arXiv 2605.10661); the game is Zhang et
al.'s (ECCV 2016). Point = centre of the arg-max patch of the CLS row at a step; a hit lies on the
image's own class; the score is the share of hits. Ties count by expectation, ignored pixels (id
1000) are left out, images without a positive pixel after the crop are skipped and counted. Nulls in
the same table: `chance` (share of the image the object covers; with --point majority of the patches
that are mostly object), `centre` (the image's centre pixel), and for the best head the head chosen
on one half of the images and scored on the other. Ties, crop and ignored pixels are our choices;
the paper prints none.

Cost: 0.9 forwards an image; 300 images of 224 px on bViT-B about 3 minutes on 2 cores.
Expected: in the paper hits rise to middle or late steps and drop at the last, most with registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bvit_interp import metrics
from bvit_interp.analyses.pointing_game import COLUMNS, Config
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import IGNORE, Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.probes.probe import Probe
from bvit_interp.probes.saliency import METHODS
from bvit_interp.results import rank_and_world, replacing


def measure(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    folder: Path | None = None,
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
    if not data.has_masks:
        raise UserError(
            "the pointing game needs masks: use digits-s or a folder in ImageNet-S layout"
        )
    probes = {name: Probe(model) for name, model in models.items()}
    rows = {name: PerImage() for name in models}
    kept: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in models}
    loader, geometries = config.loader(data, models, "pointing-game")
    for batch in loader:
        for name, probe in probes.items():
            keep = config.examples - len(kept[name]) if folder else 0
            for index, row, examples in run_in_halves(
                lambda part, probe=probe, name=name, keep=keep: _play(
                    probe, part, geometries[name], config, keep
                ),
                batch,
            ):
                rows[name].update(index, row)
                kept[name] = (kept[name] + examples)[: config.examples]
    tables = []
    for name, probe in probes.items():
        path = _keep_examples(kept[name], name, config, folder)
        tables.append(
            _score(name, probe, rows[name].compute()[1].numpy(), config).assign(path=path)
        )
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)]


_FACTS = 4  # label, has an object, share covered, centre hit: the columns before the hits


def _play(
    probe: Any, batch: Any, geometry: Any, config: Config, keep: int
) -> tuple[Tensor, Tensor, list[dict[str, np.ndarray]]]:
    """Positions ``(B,)``, rows ``(B, _FACTS + T * H)`` and up to `keep` examples of one batch."""
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
        {
            "image": _pixels(images[i], geometry),
            "mask": positive[i].cpu().numpy(),
            "maps": maps[i].unflatten(-1, probe.grid).float().cpu().numpy(),
        }
        for i in seen.nonzero().flatten().tolist()[:keep]
    ]
    return batch.index, torch.cat([facts, hits], dim=1).cpu(), examples


def _ground_truth(ids: Tensor, labels: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Bool masks ``(B, height, width)`` of the object's pixels and of the ignored ones."""
    ignored = ids == IGNORE
    own = ids == labels[:, None, None] + 1
    return (own if config.target == "own" else (ids > 0) & ~ignored), ignored


def _majority(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches more than half of whose pixels are set: ``(B, height, width)`` -> ``(B, P)``."""
    return adaptive_avg_pool2d(mask[:, None].float(), grid).flatten(1) > 0.5


def _share(mask: Tensor, ignored: Tensor) -> Tensor:
    """Share ``(B,)`` of what is not ignored that is set."""
    return (mask & ~ignored).flatten(1).sum(1) / (~ignored).flatten(1).sum(1).clamp(min=1)


def _pixels(image: Tensor, geometry: Any) -> np.ndarray:
    """The image as seen ``(height, width, 3)``, uint8."""
    mean, std = (
        torch.tensor(v, device=image.device).view(3, 1, 1) for v in (geometry.mean, geometry.std)
    )
    return ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _score(name: str, probe: Any, rows: np.ndarray, config: Config) -> pd.DataFrame:
    """The table of one model from its rows ``(n, _FACTS + T * H)``."""
    scored = rows[rows[:, 1] > 0]
    if not len(scored):
        raise UserError(
            "no image shows its object after the crop: are these masks of these images?"
        )
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
        "model": name,
        "saliency": config.saliency,
        "skipped": int(len(rows) - len(scored)),
        "chance": float(chance),
        "centre": float(centre),
    }
    split = metrics.mean_over_images(honest, classes)
    table: list[dict[str, Any]] = []
    for t, ratios in enumerate(metrics.mean_over_images(hits, classes)):
        sample, best = draws[:, t], int(_best(ratios))
        # head, ratio, bootstrap draws, nan where the point of an image is ignored, the head chosen
        entries: list[tuple[str, Any, Any, Any, int | None]] = [
            (str(head), ratio, sample[:, head], hits[:, t, head], None)
            for head, ratio in enumerate(ratios)
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
                {
                    **shared,
                    "step": t + 1,
                    "head": head,
                    "hit_ratio": float(ratio),
                    "low": low,
                    "high": high,
                    "n": len(scored) - lost,
                    "ignored": lost,
                    "chosen": chosen,
                }
            )
    return pd.DataFrame(table).astype({"chosen": "Int64"})


def _best(ratios: np.ndarray) -> np.ndarray:
    """Index of the highest ratio along the last axis; 0 if none is a number."""
    return np.argmax(np.where(np.isnan(ratios), -1.0, ratios), axis=-1)


def _keep_examples(
    examples: list[dict[str, np.ndarray]], name: str, config: Config, folder: Path | None
) -> str | None:
    if not examples or folder is None:
        return None

    path = (
        folder / f"pointing_game_{config.saliency}_{name.replace('/', '_').replace('@', '_')}.npz"
    )
    if rank_and_world()[0] == 0:
        arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    return str(path)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the heads their mean and the best."""
    return frame[frame["head"].isin(["mean", "best", "best-split"])]
