"""Where does each head look, how widely, and does that persist?

Attention entropy and attention distance show how wide a head looks, and shares of attention show
at which kinds of token. The attention map of CLS is correlated between steps, and with attention
rollout. The null is uniform attention; for correlations between steps it is two different heads. A
second null correlates maps of different images. A permutation test compares each head with the
other heads. The CLS attention maps of some images are stored beside the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `attention`."""

    n_examples: int = 3
    """Number of images whose CLS attention maps are stored and drawn (Fig. 13), evenly spaced over
    the data set; 0 for none."""
    example_images: tuple[int, ...] | None = None
    """Positions of these images in the data set, from 0; replaces --n-examples."""
    seed: int = 0
    """Random seed for the permutation test of more than 7 heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_examples < 0:
            raise UserError(f"n-examples must be >= 0, got {self.n_examples}")
        if self.example_images is not None and min(self.example_images, default=0) < 0:
            raise UserError(
                "example-images are positions in the data set, from 0, got"
                f" {' '.join(map(str, self.example_images))}"
            )


COLUMNS = {
    "model": "checkpoint",
    "metric": "attention_entropy (of the CLS row, nats) and attention_distance (between patches, in"
    " patches); normalised_entropy and normalised_distance are the same divided by log N and by the"
    " diagonal of the grid; cls_to_KIND and patches_to_cls (shares of attention, 0..1);"
    " rollout_entropy (nats); rollout_correlation (of attention rollout and the CLS map of the"
    " heads' mean); step_correlation (of a head's CLS map with its own at other_step)",
    "step": "step t, from 1",
    "other_step": "the later step of a step_correlation; empty for other metrics",
    "head": "head, from 0; mean: mean over the heads of each image (rollout: of the heads' mean"
    " attention)",
    "value": "mean over images",
    "low": "lower end of its normal 95 % confidence interval over images",
    "high": "upper end of the interval",
    "null": "null: value for uniform attention; step_correlation: mean correlation of different"
    " heads at the two steps; rollout_correlation: empty",
    "null_other_images": "second null of the two correlations: the maps of different images",
    "p_value": "step_correlation, head mean: p-value of a permutation test that pairs the heads of"
    " the two steps at random, 0..1",
    "n": "number of images",
    "path": "file of the example maps; empty if none are stored",
}
QUICK: dict[str, Any] = {}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
