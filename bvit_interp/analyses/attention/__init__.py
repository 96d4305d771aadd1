"""How wide and at what does every head look, step by step, and does a head keep looking at the
same?"""

from __future__ import annotations

from dataclasses import dataclass

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the attention statistics."""

    examples: int = 3
    """Images whose CLS maps are kept for the strips of Fig. 13, spread over the data set; 0 for
    none."""
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


__getattr__, __dir__, __all__ = attach(__name__)
