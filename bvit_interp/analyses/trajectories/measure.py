"""How does the CLS token move, and when do classes separate?

Fig. 9 and Appendix E.2 of bViT (arXiv 2605.10661) show the CLS token after every step of many
images, brought to two dimensions by PaCMAP (Wang et al., 2021), with one panel per class and the
step as the colour. The paper does not give the details. Here one fit holds all images and steps of
a model, with the package's defaults, and PCA stands beside it. A 2-D picture can invent structure,
so every point carries these checks, which are ours:

- `neighbours_kept`: the share of the point's k nearest neighbours in CLS space that are also among
  its k nearest in 2-D; chance is k / (n - 1);
- `adjacent_step_share`: the share of its k nearest neighbours among other images' points that are
  at most one step away, in 2-D and (`adjacent_step_share_cls`) in CLS space. Null: the steps of
  every other image permuted, which leaves the embedding as it is and gives 3 / T, or 2 / T at the
  first and the last step. A share in 2-D above that in CLS space is an artefact of the embedding. A
  high share is no sign of training: an untrained ViT has the highest (0.99), because its images
  hardly differ;
- `same_step_class_share` and `same_step_class_share_cls`: the share of its k nearest neighbours
  among other images' points of the same step that are of the point's class. They show at which step
  classes separate. Among the points of all steps the neighbours of a late point would be fewer
  images, several steps of each, so a share would not be comparable between steps; at one step they
  are k images of n - 1. Null: the expected share with labels permuted over images.

Cost: one forward pass per image. n images x T x D float32 numbers are kept (0.37 GB for 10,000
images of bViT-B). PaCMAP takes 3 s for 6000 points and 6.5 s for 12,000 on one core; the cost of
neighbours grows with the square (12,000: 8 s). All images of a large data set take hours: set
`limit`.

Expected: neighbouring steps lie together and classes separate over the steps, as in Fig. 9; the
paper gives no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np
import pandas as pd
from torch import Tensor

from bvit_interp.analyses.trajectories import COLUMNS, Config
from bvit_interp.analyses.trajectories.embeddings import pacmap_embedding, pca_embedding
from bvit_interp.analyses.trajectories.neighbours import (
    nearest_neighbours,
    same_step_neighbours,
    share_kept,
    share_of_class,
    share_of_class_null,
    share_within_one_step,
    share_within_one_step_null,
)
from bvit_interp.analyses.trajectories.states import StateTable
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import MissingExtra, UserError
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model, run_on
from bvit_interp.probes.probe import Probe

_EMBEDDINGS = {"pacmap": pacmap_embedding, "pca": pca_embedding}
_FEWEST_OTHERS = 8
"""Points of other images that PaCMAP needs."""


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """The points of every model, method, step and image.

    Parameters
    ----------
    models : name -> model. All see each image in one pass.
    data : labelled images.

    Returns
    -------
    A table of `COLUMNS`, one row per point.
    """
    if "pacmap" in config.methods and find_spec("pacmap") is None:
        raise MissingExtra("pacmap", "viz")
    probes = {
        name: Probe(run_on(model, config.steps or len(model.blocks)))
        for name, model in models.items()
    }
    tables = {
        name: StateTable(probe.num_steps, probe.model.embed_dim).to(device_of(probe.model))
        for name, probe in probes.items()
    }

    def cls_states(batch: ModelBatch) -> tuple[Tensor, Tensor, Tensor]:
        cache = probes[batch.model].record(batch.images, "resid_post", tokens="cls")
        return batch.index, batch.data_labels, cache["resid_post"]

    for name, (index, labels, states) in stream(
        models, data, config, cls_states, progress="trajectories"
    ):
        tables[name].update(index, labels, states)
    return pd.concat(
        [_points(name, table, data, config) for name, table in tables.items()], ignore_index=True
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over images."""
    by_step = frame.groupby(["model", "method", "step"], sort=False)
    return by_step.mean(numeric_only=True).reset_index()


def _points(name: str, table: StateTable, data: Samples, config: Config) -> pd.DataFrame:
    """Rows of one model, from the CLS tokens of all images."""
    index, labels, states = table.compute()
    images, steps, width = states.shape
    k = config.neighbours
    if (images - 1) * steps < max(k, _FEWEST_OTHERS):
        raise UserError(
            f"{k} neighbours and 2-D need more points than {images} images at {steps} steps:"
            " raise limit"
        )
    if images <= k:
        raise UserError(
            f"{k} neighbours at the same step need more than {k} images, got {images}: raise limit"
        )
    points = states.reshape(images * steps, width)
    image, step = np.divmod(np.arange(len(points)), steps)
    label = labels[image]
    in_cls = nearest_neighbours(points, k, steps)
    shared = {
        "model": name,
        "step": step + 1,
        "image": np.array([data.name(int(i)) for i in index], object)[image],
        "label": np.array(list(data.classes), object)[label],
        "neighbours_kept_null": k / (len(points) - 1),
        "adjacent_step_share_cls": share_within_one_step(in_cls.other_images, step),
        "adjacent_step_share_null": share_within_one_step_null(steps)[step],
        "same_step_class_share_cls": share_of_class(same_step_neighbours(points, k, steps), label),
        "same_step_class_share_null": share_of_class_null(labels)[image],
        "neighbours": k,
        "n": images,
    }
    frames = []
    for method in config.methods:
        embedded = _EMBEDDINGS[method](points, config.seed)
        in_2d = nearest_neighbours(embedded, k, steps)
        columns = shared | {
            "method": method,
            "x": embedded[:, 0].astype(float),
            "y": embedded[:, 1].astype(float),
            "neighbours_kept": share_kept(in_cls.any_image, in_2d.any_image),
            "adjacent_step_share": share_within_one_step(in_2d.other_images, step),
            "same_step_class_share": share_of_class(
                same_step_neighbours(embedded, k, steps), label
            ),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames)[list(COLUMNS)]
