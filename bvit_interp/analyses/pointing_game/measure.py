"""Hit ratios of the pointing game per step and head.

Fig. 4 and 10-13, section 4.2.2 and Appendix F of bViT (arXiv 2605.10661); the game is that of Zhang
et al. (ECCV 2016). The point is the centre of the patch with the largest attention in the CLS row
of a step. A hit lies on the object of the image's own class, and the hit ratio is the share of
hits. Of several equal maxima each counts with its share. Ignored pixels (id 1000) are left out.
Images without an object pixel inside the crop are skipped and counted.

Nulls in the same table: `chance`, the share of the image that the object covers (with --point
majority, the share of the patches that are mostly object); `centre_hit_ratio`, that of the image's
centre pixel; and for the best head, the head that is best on one half of the images, scored on the
other (`best-split`). The rules for ties, crop and ignored pixels are ours; the paper gives none.

Cost: 0.9 forwards per image; 300 images of 224 px on bViT-B take about 3 minutes on 2 cores.
Integrated gradients: 16 forwards and backwards per image and step, 3 s per image of 32 px on one
core, so by default 100 images.
Expected: in the paper the hit ratio rises to middle or late steps and falls at the last step; it is
highest with registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.analyses.pointing_game import COLUMNS, Config
from bvit_interp.analyses.pointing_game.game import Hits, play
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, at_most, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.looped import Model
from bvit_interp.models.unroll import for_any_model
from bvit_interp.probes import saliency
from bvit_interp.probes.probe import Probe
from bvit_interp.results import file_stem, write_arrays

Example = dict[str, np.ndarray]
"""`image` ``(height, width, 3)`` uint8, `mask` ``(height, width)`` bool, `maps` ``(T, H, rows,
columns)`` float32."""

_MOST_IMAGES = 100
"""Images by default for integrated gradients: minutes on two cores at 32 px."""
_AT_ONCE = 8
"""Images at once for integrated gradients, so that the progress bar moves every few seconds."""
_LABEL, _HAS_OBJECT, _CHANCE, _CENTRE, _HITS = range(5)  # columns of a row; hits to the end


@for_any_model
def measure(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Hit ratios of every model, step and head.

    Parameters
    ----------
    models : name -> model; all models see each image in one pass.
    data : images with masks.
    folder : folder for the example maps; without it none are stored.

    Returns
    -------
    A table of `COLUMNS`.
    """
    if not data.has_masks:
        raise UserError(
            "the pointing game needs masks: use digits-s or a folder in ImageNet-S layout"
        )
    integrates = config.saliency == "integrated-gradients"
    if integrates:
        config = at_most(config, data, _MOST_IMAGES, config.saliency)
    probes = {name: Probe(model) for name, model in models.items()}
    per_image = {name: PerImage() for name in models}
    examples: dict[str, list[Example]] = {name: [] for name in models}
    n_examples = config.n_examples if folder is not None else 0
    make_maps = saliency.METHODS[config.saliency]

    def score(batch: ModelBatch) -> tuple[Tensor, Tensor, list[Example]]:
        probe = probes[batch.model]
        with _counted(probe, batch) if integrates else nullcontext():
            maps = check_finite(make_maps(probe, batch.images), f"{config.saliency} maps")
        game = _play(batch, maps, probe, config)
        return batch.index, _rows(batch, game), _examples(batch, maps, game, probe)[:n_examples]

    for name, (index, rows, candidates) in stream(
        models,
        data,
        config,
        score,
        progress="pointing-game",
        images_at_once=dict.fromkeys(models, _AT_ONCE) if integrates else None,
        grad=config.saliency in saliency.USE_GRADIENTS,
    ):
        per_image[name].update(index, rows)
        examples[name] = (examples[name] + candidates)[:n_examples]
    tables = []
    for name, probe in probes.items():
        path = _write_examples(examples[name], name, config, folder)
        _, in_order = per_image[name].compute()
        tables.append(_table(name, in_order.numpy(), probe.num_steps, config).assign(path=path))
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over heads and the best head."""
    return frame[frame["head"].isin(["mean", "best", "best-split"])]


@contextmanager
def _counted(probe: Probe, batch: ModelBatch) -> Iterator[None]:
    """Move the progress bar with every forward of integrated gradients."""
    # one for the classes; then for every step those of the path, of its end and of captum's check
    forwards, done = 1 + probe.num_steps * (saliency.INTEGRATION_STEPS + 2), 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        batch.advance(min(done / forwards, 1.0))

    hook = probe.model.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _play(batch: ModelBatch, maps: Tensor, probe: Probe, config: Config) -> Hits:
    if batch.masks is None:
        raise UserError(f"{batch.names[0]}: the image has no mask")
    return play(
        maps,
        batch.masks,
        batch.data_labels,
        probe.grid,
        target=config.target,
        point=config.point,
        tolerance=config.tolerance,
    )


def _rows(batch: ModelBatch, game: Hits) -> Float[Tensor, "batch columns"]:
    """Label, has object, chance, hit of the centre, then the hits of every step and head."""
    facts = [batch.data_labels, game.has_object, game.chance, game.centre]
    columns = torch.stack([fact.double() for fact in facts], dim=1)
    return torch.cat([columns, game.hits.flatten(1)], dim=1).cpu()


def _examples(batch: ModelBatch, maps: Tensor, game: Hits, probe: Probe) -> list[Example]:
    """The images of the batch that show an object, and their maps."""
    pixels = batch.geometry.to_pixels(batch.images)
    return [
        {
            "image": pixels[i].cpu().numpy(),
            "mask": game.objects[i].cpu().numpy(),
            "maps": maps[i].unflatten(-1, probe.grid).float().cpu().numpy(),
        }
        for i in game.has_object.nonzero().flatten().tolist()
    ]


def _write_examples(
    examples: list[Example], name: str, config: Config, folder: Path | None
) -> str | None:
    """Write the examples of a model, stacked; the file's path."""
    if not examples or folder is None:
        return None
    path = folder / f"pointing_game_{config.saliency}_{file_stem(name)}.npz"
    write_arrays(
        path, **{key: np.stack([example[key] for example in examples]) for key in examples[0]}
    )
    return str(path)


@dataclass(frozen=True)
class _Entry:
    """A line of the table: one head of one step, or a summary over its heads."""

    head: str
    hit_ratio: float
    draws: Float[np.ndarray, " draws"]
    """Bootstrap draws of the hit ratio."""
    per_image: Float[np.ndarray, " images"]
    """nan where the point of the image is ignored."""
    chosen_head: int | None = None


def _table(
    name: str, rows: Float[np.ndarray, "images columns"], steps: int, config: Config
) -> pd.DataFrame:
    """The table of one model."""
    scored = rows[rows[:, _HAS_OBJECT] > 0]
    if not len(scored):
        raise UserError(
            "no image shows its object after the crop: are these masks of these images?"
        )
    hits = scored[:, _HITS:].reshape(len(scored), steps, -1)
    classes = scored[:, _LABEL] if config.average == "class" else None
    nulls = metrics.mean_over_images(scored[:, [_CHANCE, _CENTRE]], classes)
    shared = {
        "model": name,
        "saliency": config.saliency,
        "n_skipped": len(rows) - len(scored),
        "chance": float(nulls[0]),
        "centre_hit_ratio": float(nulls[1]),
    }
    table = []
    for t, entries in enumerate(_entries_by_step(hits, classes, config.seed)):
        for entry in entries:
            low, high = metrics.interval(entry.draws)
            n_ignored = int(np.isnan(entry.per_image).sum())
            table.append(
                {
                    **shared,
                    "step": t + 1,
                    "head": entry.head,
                    "hit_ratio": entry.hit_ratio,
                    "low": low,
                    "high": high,
                    "n": len(scored) - n_ignored,
                    "n_ignored": n_ignored,
                    "chosen_head": entry.chosen_head,
                }
            )
    return pd.DataFrame(table).astype({"chosen_head": "Int64"})


def _entries_by_step(
    hits: Float[np.ndarray, "images steps heads"],
    classes: Float[np.ndarray, " images"] | None,
    seed: int,
) -> Iterator[list[_Entry]]:
    """Every head, their mean, the best head, and the best head chosen and scored on two halves."""
    images, steps, heads = hits.shape
    first_half = np.random.default_rng(seed).permutation(images) % 2 == 0
    best_of_first, best_of_second = (
        _best(metrics.mean_over_images(hits[half], None if classes is None else classes[half]))
        for half in (first_half, ~first_half)
    )
    # each image is scored by the head that is best on the half without it
    every_step = np.arange(steps)
    split = np.where(
        first_half[:, None], hits[:, every_step, best_of_second], hits[:, every_step, best_of_first]
    )
    columns = np.concatenate([hits, split[..., None]], axis=-1).reshape(images, -1)
    draws = metrics.bootstrap_means(columns, classes, seed)
    draws = draws.reshape(len(draws), steps, heads + 1)
    split_ratios = metrics.mean_over_images(split, classes)
    for t, ratios in enumerate(metrics.mean_over_images(hits, classes)):
        head_draws, split_draws = draws[:, t, :-1], draws[:, t, -1]
        if heads == 1:
            yield [_Entry("all", float(ratios[0]), head_draws[:, 0], hits[:, t, 0])]
            continue
        entries = [
            _Entry(str(head), float(ratio), head_draws[:, head], hits[:, t, head])
            for head, ratio in enumerate(ratios)
        ]
        # an image is ignored if it is by every head
        any_head = np.where(np.isnan(hits[:, t]).all(1), np.nan, 0.0)
        # over the heads in place of the images
        mean, mean_draws = (metrics.mean_over_images(each) for each in (ratios, head_draws.T))
        best = int(_best(ratios))
        yield [
            *entries,
            _Entry("mean", float(mean), mean_draws, any_head),
            _Entry("best", float(ratios[best]), head_draws[:, best], hits[:, t, best], best),
            _Entry(
                "best-split",
                float(split_ratios[t]),
                split_draws,
                split[:, t],
                int(best_of_first[t]),
            ),
        ]


def _best(ratios: Float[np.ndarray, "*steps heads"]) -> Any:
    """Index of the highest ratio along the last axis; 0 if none is a number."""
    return np.argmax(np.where(np.isnan(ratios), -1.0, ratios), axis=-1)
