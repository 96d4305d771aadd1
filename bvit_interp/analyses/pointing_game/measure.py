"""Hit ratios of the pointing game per step and head.

Fig. 4 and 10-13, section 4.2.2 and Appendix F of bViT (arXiv 2605.10661); the game is that of Zhang
et al. (ECCV 2016). The point is the centre of the patch with the largest attention in the CLS row
of a step. A hit lies on the object of the image's own class, and the hit ratio is the share of
hits. Of several equal maxima each counts with its share. Ignored pixels (id 1000) are left out.
Images without an object pixel inside the crop are skipped and counted.

A hit ratio alone says little: an object is often large, bright, of high contrast and in the middle.
Nulls in the same table:

- `other_masks`: the same points with the masks of the other images, the mean over all of them. A
  head that prefers the middle hits those too. `gain` is `hit_ratio` less this null; a point that is
  the same in all images has a gain of 0. Its interval is over images, each both as a map and as a
  mask (the linear part of a two-sample U-statistic; Hoeffding, 1948).
- `untrained_hit_ratio` and `untrained_gain`: the same model with random weights (`untrained.py`).
  Heads have no meaning there, so both are means over heads. It is one draw of the weights.
- `luminance_hit_ratio` and `contrast_hit_ratio`: the patch with the highest mean luminance, and
  that with its highest variance, of the pixels as the model sees them.
- `centre_hit_ratio`: the image's centre pixel. `chance`: the share of the image that the object
  covers (with --point majority, the share of the patches that are mostly object).
- for the best head, the head that is best on one half of the images, scored on the other
  (`best-split`).

The rules for ties, crop and ignored pixels are ours; the paper gives none.

Cost: 0.9 forwards per image, and as much for the untrained model; 300 images of 224 px on bViT-B
take about 6 minutes on 2 cores. Integrated gradients: 16 forwards and backwards per image, step and
model, 6 s per image of 32 px on one core, so by default 100 images.
Expected: in the paper the hit ratio rises to middle or late steps and falls at the last step; it is
highest with registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from bvit_interp.analyses.pointing_game import COLUMNS, Config
from bvit_interp.analyses.pointing_game.game import Hits, brightness, on_other_masks, play
from bvit_interp.analyses.pointing_game.table import Heads, Scored, table
from bvit_interp.analyses.pointing_game.untrained import untrained
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
_SHOWN = [
    "model",
    "step",
    "head",
    "hit_ratio",
    "low",
    "high",
    "gain",
    "gain_low",
    "gain_high",
    "untrained_gain",
    "luminance_hit_ratio",
    "centre_hit_ratio",
    "chance",
    "n",
]
"""Columns of the summary."""
_AT_ONCE = 8
"""Images at once for integrated gradients, so that the progress bar moves every few seconds."""
_NULLS = ("chance", "centre_hit_ratio", "luminance_hit_ratio", "contrast_hit_ratio")
_LABEL, _HAS_OBJECT, _FIRST_NULL = range(3)
_FACTS = _FIRST_NULL + len(_NULLS)  # columns of a row before the patches, then hits to the end


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
    probes = {name: [Probe(model)] for name, model in models.items()}
    if config.untrained:
        for name, model in models.items():
            probes[name].append(Probe(untrained(model, config.seed)))
    per_image, points = ({name: PerImage() for name in models} for _ in range(2))
    examples: dict[str, list[Example]] = {name: [] for name in models}
    n_examples = config.n_examples if folder is not None else 0
    make_maps = saliency.METHODS[config.saliency]

    def score(batch: ModelBatch) -> tuple[Tensor, Tensor, Tensor, list[Example]]:
        of_model = probes[batch.model]
        with _counted(of_model, batch) if integrates else nullcontext():
            maps = torch.stack([make_maps(probe, batch.images) for probe in of_model], dim=1)
        check_finite(maps[:, 0], f"{config.saliency} maps")
        grid = of_model[0].grid
        game = _play(batch, maps, grid, config)
        plain = _play(batch, brightness(batch.geometry.to_pixels(batch.images), grid), grid, config)
        shown = _examples(batch, maps[:, 0], game, grid)[:n_examples]
        return batch.index, _rows(batch, game, plain), game.points.cpu(), shown

    for name, (index, rows, found, candidates) in stream(
        models,
        data,
        config,
        score,
        progress="pointing-game",
        images_at_once=dict.fromkeys(models, _AT_ONCE) if integrates else None,
        grad=config.saliency in saliency.USE_GRADIENTS,
    ):
        per_image[name].update(index, rows)
        points[name].update(index[found[:, 0]], found[:, 1:])
        examples[name] = (examples[name] + candidates)[:n_examples]
    tables = []
    for name, (probe, *_) in probes.items():
        path = _write_examples(examples[name], name, config, folder)
        scored, n_skipped = _scored(per_image[name], points[name], probe, config)
        shared = {"model": name, "saliency": config.saliency, "n_skipped": n_skipped, "path": path}
        by_class = config.average == "class"
        tables.append(table(scored, by_class=by_class, seed=config.seed, **shared))
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over heads and the best head."""
    return frame.loc[frame["head"].isin(["mean", "best", "best-split"]), _SHOWN]


@contextmanager
def _counted(probes: Sequence[Probe], batch: ModelBatch) -> Iterator[None]:
    """Move the progress bar with every forward of integrated gradients."""
    # one for the classes; then for every step those of the path, of its end and of captum's check
    forwards = len(probes) * (1 + probes[0].num_steps * (saliency.INTEGRATION_STEPS + 2))
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        batch.advance(min(done / forwards, 1.0))

    with ExitStack() as hooks:
        for probe in probes:
            hooks.callback(probe.model.register_forward_hook(count).remove)
        yield


def _play(batch: ModelBatch, maps: Tensor, grid: tuple[int, int], config: Config) -> Hits:
    if batch.masks is None:
        raise UserError(f"{batch.names[0]}: the image has no mask")
    return play(
        maps,
        batch.masks,
        batch.data_labels,
        grid,
        target=config.target,
        point=config.point,
        tolerance=config.tolerance,
    )


def _rows(batch: ModelBatch, game: Hits, plain: Hits) -> Float[Tensor, "batch columns"]:
    """Label, has object, `_NULLS`; then the object on the patches; then the hits of every map."""
    facts = [batch.data_labels, game.has_object, game.chance, game.centre]
    columns = torch.stack([fact.double() for fact in facts], dim=1)
    return torch.cat([columns, plain.hits, game.patches, game.hits.flatten(1)], dim=1).cpu()


def _scored(
    per_image: PerImage, points: PerImage, probe: Probe, config: Config
) -> tuple[Scored, int]:
    """The images that show their object, and how many do not."""
    index, rows = (each.numpy() for each in per_image.compute())
    index, rows = index.reshape(-1), rows.reshape(index.size, -1)  # torchmetrics squeezes one image
    shown = rows[:, _HAS_OBJECT] > 0
    n_skipped = len(rows) - int(shown.sum())
    if n_skipped == len(rows):
        raise UserError(
            "no image shows its object after the crop: are these masks of these images?"
        )
    index, rows = index[shown], rows[shown]
    size = math.prod(probe.grid)
    patches, hits = rows[:, _FACTS : _FACTS + size], rows[:, _FACTS + size :]
    of_image, found = (each.numpy().astype(np.int64) for each in points.compute())
    of_image, found = of_image.reshape(-1), found.reshape(-1, 2)
    known = np.isin(of_image, index)
    found = np.column_stack([np.searchsorted(index, of_image[known]), found[known]])
    found = found[np.lexsort(found.T[::-1])]  # sums of the same order whatever the batches
    others, moved = on_other_masks(found, patches, hits.shape[1])
    shape = (len(rows), 1 + config.untrained, probe.num_steps, -1)
    each_model = [each.reshape(shape).swapaxes(0, 1) for each in (hits, others, moved)]
    trained, *random = (Heads(*parts) for parts in zip(*each_model, strict=True))
    nulls = dict(zip(_NULLS, rows[:, _FIRST_NULL:_FACTS].T, strict=True))
    scored = Scored(
        labels=rows[:, _LABEL],
        nulls=nulls,
        trained=trained,
        untrained=random[0] if random else None,
    )
    return scored, n_skipped


def _examples(batch: ModelBatch, maps: Tensor, game: Hits, grid: tuple[int, int]) -> list[Example]:
    """The images of the batch that show an object, and their maps."""
    pixels = batch.geometry.to_pixels(batch.images)
    return [
        {
            "image": pixels[i].cpu().numpy(),
            "mask": game.objects[i].cpu().numpy(),
            "maps": maps[i].unflatten(-1, grid).float().cpu().numpy(),
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
