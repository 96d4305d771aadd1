"""How far can a state be moved in time?

Activation patching across steps: a site of step s of one run replaces the same site of step t of
another run, for all s and t. The patch comes from the same image or from another image, or it goes
into a corrupted image. The table has the share of the logit difference that is recovered: 1 for the
clean run, 0 for the baseline. It also has the share of images that get the clean run's answer. The
null is the same patch from one more image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError, choices
from bvit_interp.vocabulary import TOKEN_WORDS, check_site

Mode = Literal["same", "other", "corrupted"]
Corruption = Literal["shuffle", "noise"]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `patching`."""

    limit: int | None = None
    """Number of images to use, evenly spaced over the data set. By default all where one run per
    image gives every cell (whole states of one shared block), else 300."""
    mode: tuple[Mode, ...] = ("same", "other")
    """Source of the patch: same (the image's own state, moved in time), other (another image's
    state), corrupted (the image's own state, moved into the run of its corrupted version)."""
    site: str = "resid_post"
    """Site that is patched, such as resid_post (the state after the step), z (head outputs),
    attn_out or mlp_out (what is added to the state)."""
    unit: int | None = None
    """Head (of q, k, v, z, scores, pattern), neuron or channel of the site, from 0; by default the
    whole site."""
    tokens: tuple[str, ...] = ("all",)
    """Tokens that are patched: all, cls, patches, reg, dist. Several are patched one after the
    other, in rows of their own."""
    steps: tuple[int, ...] | None = None
    """Steps s and t, from 1; by default all. Half of them cost a quarter."""
    corruption: Corruption = "shuffle"
    """Corruption of mode corrupted: shuffle (patches of pixels in random order) or noise (Gaussian
    noise is added, with one standard deviation)."""
    seed: int = 0
    """Random seed for the corruption."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_site(self.site)
        for name, allowed in (("mode", get_args(Mode)), ("tokens", TOKEN_WORDS)):
            given = getattr(self, name)
            unknown = [word for word in given if word not in allowed]
            if unknown or not given or len(set(given)) < len(given):
                words = f"{', '.join(allowed)}, each once, got {choices(given)}"
                raise UserError(f"{name} must be one or more of {words}")
        if self.corruption not in get_args(Corruption):
            raise UserError(f"corruption must be shuffle or noise, got {self.corruption!r}")
        if self.steps is not None and (not self.steps or min(self.steps) < 1):
            raise UserError(f"steps must be >= 1, got {self.steps}")

    def resume_key(self) -> dict[str, Any]:
        """The options that rows depend on: the corruption only where images are corrupted."""
        unused = () if "corrupted" in self.mode else ("corruption", "seed")
        return {key: value for key, value in super().resume_key().items() if key not in unused}


COLUMNS = {
    "model": "checkpoint",
    "mode": "source of the patch: same, other or corrupted",
    "site": "patched site",
    "unit": "head, neuron or channel of the site; none for all",
    "tokens": "patched tokens",
    "metric": "recovered (share of the logit difference) or agreement (share of images with the"
    " clean run's answer)",
    "step_from": "step s the patch is taken from, from 1; none for a mean over cells",
    "step_to": "step t the patch is put into; none for a mean over cells",
    "shift": "t - s, steps: positive if the patch is put into a later step; a row without s and t"
    " is the mean over the cells of this shift",
    "value": "recovered: share of clean - baseline, 1 = the clean run, 0 = the baseline; agreement:"
    " share of images, 0..1",
    "low": "lower end of the 95 % interval over images",
    "high": "upper end of the interval",
    "null": "null: the value with a patch from one more image",
    "null_low": "lower end of the interval of the null",
    "null_high": "upper end of the interval of the null",
    "clean": "mean logit difference of the clean run, logits; none for agreement",
    "baseline": "mean logit difference of the baseline, logits; none for agreement",
    "n": "number of images (pairs) in the mean",
    "skipped": "number of pairs left out because both images have one class",
    "trained_steps": "steps T of the model; for a stack, its blocks",
}
QUICK: dict[str, Any] = {
    "mode": ("same", "other", "corrupted"),
    "tokens": ("all", "cls"),
    "limit": 12,
}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
