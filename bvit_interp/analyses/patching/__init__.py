"""How far can a state be moved in time: what is kept when step t of a run is given the state of
step s?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError, choices
from bvit_interp.vocabulary import TOKEN_WORDS, check_site

Mode = Literal["same", "other", "corrupted"]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the patching."""

    mode: tuple[Mode, ...] = ("same", "other")
    """same (the image's own state, moved in time), other (another image's) and corrupted (into a
    corrupted image)."""
    site: str = "resid_post"
    """What is moved: resid_post is the state after the step, z a head's output, attn_out and
    mlp_out what is added."""
    unit: int | None = None
    """One head (of q, k, v, z, scores, pattern), neuron or channel of the site, from 0; by default
    all of it."""
    tokens: tuple[str, ...] = ("all",)
    """Of which tokens: all, cls, patches, reg, dist; several are separate cells. The others stay
    the patched run's."""
    steps: tuple[int, ...] | None = None
    """Steps s and t, from 1; by default all. Half of them cost a quarter."""
    corruption: Literal["shuffle", "noise"] = "shuffle"
    """Of the mode corrupted: patches of pixels in random order, or Gaussian noise added, one
    standard deviation."""
    seed: int = 0
    """Of the corruption."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_site(self.site)
        for name, allowed in (("mode", get_args(Mode)), ("tokens", TOKEN_WORDS)):
            given = getattr(self, name)
            unknown = [word for word in given if word not in allowed]
            if unknown or not given or len(set(given)) < len(given):
                raise UserError(
                    f"{name} must be one or more of {', '.join(allowed)}, each once, got {choices(given)}"
                )
        if self.corruption not in ("shuffle", "noise"):
            raise UserError(f"corruption must be shuffle or noise, got {self.corruption!r}")
        if self.steps is not None and (not self.steps or min(self.steps) < 1):
            raise UserError(f"steps must be >= 1, got {self.steps}")

    def resume_key(self) -> dict[str, Any]:
        """Without the corruption where nothing is corrupted."""
        unused = () if "corrupted" in self.mode else ("corruption", "seed")
        return {key: value for key, value in super().resume_key().items() if key not in unused}


COLUMNS = {
    "model": "checkpoint",
    "mode": "same, other or corrupted: whose states are moved",
    "site": "site that is moved",
    "unit": "head, neuron or channel of it; none for all",
    "tokens": "tokens that are moved",
    "statistic": "recovered (logit difference) or answer (share of images with the clean run's answer)",
    "step_from": "step s the state is taken from, from 1; none for a mean over cells",
    "step_to": "step t it is put into; none for a mean over cells",
    "shift": "t - s, steps: positive where a state is put later than it belongs; without s and t, mean of its cells",
    "value": "recovered: share of clean - baseline, 1 = the clean run, 0 = the baseline; answer: share of images, 0..1",
    "low": "lower end of the 95 % interval over images",
    "high": "upper end of it",
    "null": "null: the value with the patch from one more image",
    "null_low": "lower end of its interval",
    "null_high": "upper end of it",
    "clean": "mean logit difference of the clean run, logits; none for answer",
    "baseline": "mean logit difference of the baseline, logits; none for answer",
    "n": "images (pairs) that count",
    "skipped": "pairs left out because both images are of one class",
    "trained_steps": "steps T of the model; of a stack, its blocks",
}


__getattr__, __dir__, __all__ = attach(__name__)
