"""Which pictures excite the same neuron at every step, and do they turn from texture to
structure?"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from bvit_interp.analyses import attach
from bvit_interp.analyses.features.maximise import Recipe
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the feature pictures; those of the optimisation are Ghiasi's by default."""

    neurons: tuple[int, ...] | Literal["auto"] = "auto"
    """Neurons of the FFN, from 0; auto chooses from the steadiest to the most changing."""
    count: int = 3
    """How many neurons auto chooses."""
    steps: tuple[int, ...] | None = None
    """Steps, from 1; by default all."""
    iterations: int = 400
    """Iterations of Adam; the learning rate falls to 0 along a cosine."""
    lr: float = 0.1
    """Learning rate at the start, in units of an image in 0..1."""
    copies: int = 8
    """Augmented copies an iteration."""
    noise: Literal["channel", "pixel"] = "channel"
    """Noise of one number a copy and channel, as in Ghiasi's code, or one a pixel."""
    jitter: int | None = None
    """Largest shift, pixels; by default 32 at 224 px and in proportion."""
    weight: float = 1 / 8
    """Weight of the activation; Ghiasi's code amounts to 1/8."""
    tv: float = 0.1
    """Weight v of total variation, in units of 5e-4; Ghiasi use 0.1 and 1."""
    site: Literal["mlp_post", "mlp_pre"] = "mlp_post"
    """What is maximised: the neuron, as Ghiasi, or the same before GELU."""
    image: Literal["pixel", "fourier"] = "pixel"
    """Optimise pixels, or lucent's decorrelated spectrum (needs torch-lucent)."""
    top: int = 3
    """Real images kept a neuron and step."""
    chunk: int = 12
    """Images optimised at once; halved by itself where they do not fit on the GPU."""
    seed: int = 0
    """Of the start image, the augmentations and the shuffles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("count", "top", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        self._recipe()  # refuses what is out of range
        if self.neurons != "auto" and not self.neurons:
            raise UserError("no neuron chosen; neurons: auto, or numbers from 0")

    def _recipe(self) -> Recipe:
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})

    def resume_key(self) -> dict[str, Any]:
        """Without what pictures do not depend on: a table may be continued with more neurons and
        steps."""
        free = ("neurons", "count", "steps", "chunk")
        return {key: value for key, value in super().resume_key().items() if key not in free}


COLUMNS = {
    "model": "checkpoint",
    "neuron": "neuron f of the FFN, from 0; of a stacked ViT another one in each block",
    "step": "step t, from 1",
    "activation": "of the optimised image: mean of mlp_post over the patches, without augmentation",
    "start": "the same of the image the optimisation starts from",
    "real": "the same of the real image where it is largest",
    "ratio": "activation / real; none where no real image has a positive one",
    "found": "1 if activation > real; else 0, and the centroid is left out of rho, trend and band",
    "centroid": "spectral centroid of the optimised image, cycles a pixel",
    "centroid_start": "null: that of the start image",
    "rho": "Spearman's correlation of centroid and step of this neuron, -1..1; below 0 the centroid falls",
    "trend": "mean of it over the model's neurons",
    "trend_low": "null: lower end of the 95 % interval of the trend, the steps of each neuron shuffled",
    "trend_high": "upper end of it",
    "band_low": "null: the same of the neurons' mean centroid at the step",
    "band_high": "upper end of it",
    "change": "1 - mean correlation over the real images of the neuron's answers at successive steps, 0..2",
    "top": "real images of the largest means, IMAGE:ROW,COLUMN: number in the data set, patch of the largest value",
    "grid": "patches of an image, ROWSxCOLUMNS",
    "n": "real images",
    "iterations": "iterations of the optimisation",
    "path": "PNG: the optimised image and, right of it, those of `top`",
}


__getattr__, __dir__, __all__ = attach(__name__)
