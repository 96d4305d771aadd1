"""Options of activation maximisation, with the defaults of Ghiasi et al.

"What do Vision Transformers Learn?" (2022, https://arxiv.org/abs/2212.06727). Light to import: the
options of the command are made of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bvit_interp.errors import UserError, choices


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of activation maximisation.

    Raises
    ------
    UserError
        For a value out of range.
    """

    iterations: int = 400
    """Iterations of Adam (betas 0.5 and 0.99); the learning rate falls to 0 along a cosine."""
    lr: float = 0.1
    """Learning rate at the start, for pixels in 0..1."""
    n_copies: int = 8
    """Number of augmented copies of the image per iteration."""
    noise: Literal["channel", "pixel"] = "channel"
    """Noise of one number per copy and channel, as in the code of Ghiasi et al., or per pixel."""
    jitter: int | None = None
    """Largest shift of an image, pixels; by default 32 at 224 px and in proportion at other
    sizes."""
    activation_weight: float = 1 / 8
    """Weight of the activation in the loss. In the code of Ghiasi et al. it is 1/8 (a diagonal of 8
    numbers is averaged as an 8 x 8 matrix)."""
    tv_weight: float = 0.1
    """Weight of total variation in the loss, in units of 5e-4; Ghiasi et al. use 0.1 and 1."""
    site: Literal["mlp_post", "mlp_pre"] = "mlp_post"
    """Site to maximise: the neuron after GELU, as Ghiasi et al., or before it (ours). Below -0.75
    GELU falls and then is flat, so that an ascent of mlp_post that starts there stays there."""
    parametrisation: Literal["pixel", "fourier"] = "pixel"
    """Variables to optimise: the pixels, clamped to 0..1, or lucent's decorrelated spectrum behind
    a sigmoid (needs torch-lucent)."""
    seed: int = 0
    """Random seed for the start image, the augmentations and the permutations."""

    def __post_init__(self) -> None:
        lowest = {"iterations": 1, "n_copies": 1, "jitter": 0, "tv_weight": 0, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{_option(name)} must be >= {low}, got {value}")
        for name in ("lr", "activation_weight"):
            if not getattr(self, name) > 0:
                raise UserError(f"{_option(name)} must be > 0, got {getattr(self, name)}")
        words = {
            "noise": ("channel", "pixel"),
            "site": ("mlp_post", "mlp_pre"),
            "parametrisation": ("pixel", "fourier"),
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {choices(allowed)}, got {getattr(self, name)!r}"
                )


def _option(name: str) -> str:
    return name.replace("_", "-")
