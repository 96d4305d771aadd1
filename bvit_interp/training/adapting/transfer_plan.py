"""How a model is taken to another data set: the options of a transfer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError
from bvit_interp.training.loop.recipe import Recipe

Mode = Literal["probe", "te", "full", "lora-qv", "lora-ffn"]
"""What is trained; as in `models.adapters`, which is not light to import."""
LOW_RANK = ("lora-qv", "lora-ffn")
"""Modes with a low-rank update."""
DEFAULTS = {
    "probe": (1e-3, 0.0, 1e-4),
    "te": (1e-3, 1e-5, 0.01),
    "full": (1e-4, 1e-6, 0.05),
    "lora-qv": (1e-3, 1e-5, 0.01),
    "lora-ffn": (1e-3, 1e-5, 0.01),
}
"""Mode -> learning rate, the least one, weight decay."""


@dataclass(frozen=True, kw_only=True)
class Plan(LoaderOptions):
    """How a model is adapted; `limit` is of the test images."""

    mode: tuple[Mode, ...] = ("probe",)
    """probe (a new head), te (and a time embedding), full (all weights), lora-qv, lora-ffn; one or
    several."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each mode."""
    epochs: int = 40
    """Passes over the training images; the warm-up takes an eighth of them."""
    train_batch: int | None = None
    """Images an optimiser step; by default 128 for CIFAR and 64 for others."""
    lr: float | None = None
    """AdamW's; by default 1e-3, of full tuning 1e-4."""
    min_lr: float | None = None
    """At the end of the cosine; by default 1e-5, of full tuning 1e-6, of a probe 0."""
    weight_decay: float | None = None
    """By default 0.01, of full tuning 0.05, of a probe 1e-4; norms, biases and embeddings are free
    of it."""
    rank: int = 8
    """Rank of a low-rank update."""
    alpha: float = 16.0
    """A low-rank update is scaled by alpha / rank."""
    train_final_norm: bool = True
    """Low-rank modes train the final norm too, as the paper's counts tell."""
    steps: tuple[int, ...] = ()
    """A low-rank update is active at these steps only; by default at all."""
    sweep_steps: bool = False
    """Low-rank modes run with an update at all steps, at none (head and norm alone) and at every
    single one."""
    random_baseline: bool = False
    """A probe of the same architecture with random weights too: the null of a trained backbone."""
    limit_train: int | None = None
    """Train on this many images, spread evenly over the set; by default all."""
    autocast: Literal["off", "bf16"] = "off"
    """Forward passes of training in bf16, for GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mode", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{name} must be one or more different values, got {given}")
        for name in ("epochs", "train_batch", "limit_train"):
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
        """What all rows of a table share; what differs between rows is a column."""
        own = (
            "limit",
            "resize",
            "skip_corrupt",
            "train_batch",
            "lr",
            "min_lr",
            "weight_decay",
            "alpha",
        )
        return {
            key: value
            for key, value in asdict(self).items()
            if key in (*own, "train_final_norm", "autocast")
        }

    def recipe(self, mode: Mode, seed: int, data: str, images: int) -> Recipe:
        """The schedule and the feed of one run."""
        lr, min_lr, decay = (
            default if given is None else given
            for given, default in zip(
                (self.lr, self.min_lr, self.weight_decay), DEFAULTS[mode], strict=True
            )
        )
        batch = min(self.train_batch or (128 if data.startswith("cifar") else 64), images)
        return Recipe(
            model={"name": mode},
            data=data,
            epochs=self.epochs,
            batch_size=batch,
            lr=lr,
            min_lr=min_lr,
            warmup_epochs=self.epochs / 8,
            weight_decay=decay,
            clip=None,
            autocast=self.autocast,
            seed=seed,
            workers=self.workers,
            skip_corrupt=self.skip_corrupt,
        )
