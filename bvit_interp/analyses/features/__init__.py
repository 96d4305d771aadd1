"""Which images excite the same neuron at every step: textures first, structure later?

An image is optimised to excite a neuron at one step, for each neuron and step. The real images with
the largest activation are shown beside it. Texture to structure is tested as a falling spectral
centroid; the null shuffles the steps of each neuron. By default neurons are chosen by how much
their response to real images changes between steps. The images are stored beside the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bvit_interp.analyses import attach
from bvit_interp.analyses.features.recipe import Recipe
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(Recipe, LoaderOptions):
    """Options of `features`."""

    neurons: tuple[int, ...] | Literal["auto"] = "auto"
    """Neurons of the FFN, from 0; auto chooses from the least to the most changing."""
    n_neurons: int = 3
    """Number of neurons that auto chooses."""
    steps: tuple[int, ...] | None = None
    """Steps, from 1; by default all."""
    n_top: int = 3
    """Number of top-k real images to store per neuron and step."""
    chunk_size: int = 12
    """Images to optimise at once; halved automatically where they do not fit on the GPU."""

    def __post_init__(self) -> None:
        LoaderOptions.__post_init__(self)
        Recipe.__post_init__(self)
        for name in ("n_neurons", "n_top", "chunk_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if self.neurons != "auto" and not self.neurons:
            raise UserError("no neuron chosen; neurons: auto, or numbers from 0")

    def resume_key(self) -> dict[str, Any]:
        """The options that an image depends on: a table may be continued with more neurons and
        steps."""
        free = ("neurons", "n_neurons", "steps", "chunk_size")
        return {key: value for key, value in super().resume_key().items() if key not in free}


COLUMNS = {
    "model": "checkpoint",
    "neuron": "neuron of the FFN, from 0; in a stacked ViT another one in each block",
    "step": "step t, from 1",
    "activation": "activation for the optimised image: mean of mlp_post over the patches, without"
    " augmentation",
    "start_activation": "activation for the image that the optimisation starts from",
    "real_activation": "largest activation among the real images",
    "activation_ratio": "activation / real_activation; empty where no real image has a positive"
    " activation",
    "exceeds_real": "1 if activation > real_activation; if 0, the image is left out of the trend"
    " and of its null",
    "spectral_centroid": "spectral centroid of the optimised image, cycles per pixel",
    "start_spectral_centroid": "null: spectral centroid of the start image",
    "spearman": "Spearman's correlation of spectral centroid and step for this neuron, -1..1;"
    " negative if the centroid falls",
    "spearman_mean": "the trend: mean of spearman over the model's neurons",
    "spearman_null_low": "null: lower end of the 95 % interval of spearman_mean with the steps of"
    " each neuron shuffled",
    "spearman_null_high": "upper end of the interval",
    "centroid_null_low": "null: lower end of the 95 % interval of the neurons' mean centroid at the"
    " step, with the steps of each neuron shuffled",
    "centroid_null_high": "upper end of the interval",
    "correlation_distance": "change of the neuron between steps: 1 - mean correlation, over the"
    " real images, of its activations at successive steps, 0..2",
    "top_images": "real images of the largest activation, IMAGE:ROW,COLUMN: position in the data"
    " set, and the patch of the largest value",
    "patch_grid": "patches of an image, ROWSxCOLUMNS",
    "n": "number of real images",
    "iterations": "iterations of the optimisation",
    "path": "PNG of the optimised image and, right of it, the top_images; empty if not stored",
}

TREND_COLUMNS = (
    "spearman",
    "spearman_mean",
    "spearman_null_low",
    "spearman_null_high",
    "centroid_null_low",
    "centroid_null_high",
)
"""Columns that need all images of a model."""
QUICK: dict[str, Any] = {
    "neurons": (3, 5),
    "steps": (1, 3),
    "iterations": 3,
    "chunk_size": 2,
    "limit": 24,
}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
