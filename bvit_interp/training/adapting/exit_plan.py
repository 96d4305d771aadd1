"""Options of the training of early exits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Loss = Literal["ce", "ce-auroc"]


@dataclass(frozen=True, kw_only=True)
class Plan(LoaderOptions):
    """Options of the training of exits."""

    exits: tuple[int, ...] = (6, 8, 10)
    """Steps after which an exit reads CLS; the model's own head is after the last step."""
    loss: Loss = "ce-auroc"
    """ce for cross-entropy alone, or ce-auroc to add the pairwise AUROC loss, which separates the
    confidences of correct and wrong predictions (eq. 10)."""
    temperature: float = 1.0
    """Temperature tau of the pairwise AUROC loss; the paper has none, which is 1. A smaller value
    makes its gradient sharper."""
    epochs: int = 50
    """Number of passes over the states."""
    images_at_once: int = 256
    """Number of states per optimiser step."""
    lr: float = 1e-3
    """Learning rate of Adam, falling to zero along a cosine."""
    seed: int = 0
    """Random seed for the order of the states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in get_args(Loss):
            raise UserError(f"loss must be one of {', '.join(get_args(Loss))}, got {self.loss!r}")
        for name in ("epochs", "images_at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"{name} must be > 0 and below 1e6, got {getattr(self, name)}")
