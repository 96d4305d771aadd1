"""Options of a transfer to another data set."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError
from bvit_interp.vocabulary import AdapterMode

LOW_RANK = ("lora-qv", "lora-ffn")
"""Modes with a low-rank update."""
DEFAULTS = {
    "probe": (1e-3, 0.0, 1e-4),
    "te": (1e-3, 1e-5, 0.01),
    "full": (1e-4, 1e-6, 0.05),
    "lora-qv": (1e-3, 1e-5, 0.01),
    "lora-ffn": (1e-3, 1e-5, 0.01),
}
"""Mode -> peak learning rate, learning rate at the end, weight decay."""

_SHARED = (
    "limit",
    "resize",
    "skip_corrupt",
    "train_batch",
    "lr",
    "min_lr",
    "weight_decay",
    "alpha",
    "train_final_norm",
    "autocast",
)


@dataclass(frozen=True, kw_only=True)
class Plan(LoaderOptions):
    """How to adapt a model; `limit` applies to the test images."""

    mode: tuple[AdapterMode, ...] = ("probe",)
    """What to train, one or several: probe (a new head), te (a head and a time embedding), full
    (all weights), lora-qv, lora-ffn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds; each mode is run once per seed."""
    epochs: int = 40
    """Number of training epochs; an eighth of them is warm-up."""
    train_batch: int | None = None
    """Images per optimiser step; by default 128 for CIFAR and 64 for others."""
    lr: float | None = None
    """Peak learning rate of AdamW; by default 1e-3, for full tuning 1e-4."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine; by default 1e-5, for full tuning 1e-6, for a probe
    0."""
    weight_decay: float | None = None
    """Weight decay; by default 0.01, for full tuning 0.05, for a probe 1e-4. Norms, biases and
    embeddings have none."""
    rank: int = 8
    """Rank of low-rank updates."""
    alpha: float = 16.0
    """Scale of low-rank updates: they are multiplied by alpha / rank."""
    train_final_norm: bool = True
    """Whether the low-rank modes train the final norm too, as the paper's counts imply."""
    steps: tuple[int, ...] = ()
    """Steps at which low-rank updates are active; by default all."""
    sweep_steps: bool = False
    """Run the low-rank modes with updates at all steps, at no step (head and norm alone), and at
    each single step."""
    random_baseline: bool = False
    """Add a probe of the same architecture with random weights: the null of a trained backbone."""
    n_train: int | None = None
    """Number of training images, evenly spaced over the data set; by default all."""
    autocast: Literal["off", "bf16"] = "off"
    """Precision of the forward passes in training: off (float32) or bf16, for GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mode", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{name} must be one or more different values, got {given}")
        for name in ("epochs", "train_batch", "n_train"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {value}")
        for name in ("lr", "min_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name.replace('_', '-')} must be >= 0, got {value}")
        if self.autocast not in get_args(Literal["off", "bf16"]):
            raise UserError(f"autocast must be off or bf16, got {self.autocast!r}")
        if (self.steps or self.sweep_steps) and not set(self.mode) & set(LOW_RANK):
            raise UserError(
                f"steps are chosen for {' and '.join(LOW_RANK)}, not for {', '.join(self.mode)}"
            )
        if self.steps and self.sweep_steps:
            raise UserError("give steps or sweep-steps, not both")
        if any(seed < 0 for seed in self.seeds):
            raise UserError(f"seeds must be >= 0, got {' '.join(map(str, self.seeds))}")

    def options(self) -> dict[str, Any]:
        """The options that all rows of a table share; those that differ are columns."""
        return {key: value for key, value in asdict(self).items() if key in _SHARED}
