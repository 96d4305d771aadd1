"""The options of reading images that every `Config` shares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Options of reading images."""

    limit: int | None = None
    """Number of images to use, evenly spaced over the data set; by default all."""
    batch_size: int = 64
    """Images per batch; halved automatically where they do not fit on the GPU."""
    workers: int = 0
    """Processes that decode images beside the main one."""
    resize: int | None = None
    """Shorter side before the centre crop, in pixels. Default: 256 for a 224-pixel model, in
    proportion for others, unless the checkpoint says otherwise; none for data sets drawn at the
    model's size."""
    skip_corrupt: bool = False
    """Report images that cannot be read and continue, instead of stopping."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {value}")
        for name in ("workers", "seed"):  # an analysis that draws has a seed
            if getattr(self, name, 0) < 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")

    def resume_key(self) -> dict[str, Any]:
        """The options that rows depend on: a table is continued only with the same ones."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("batch_size", "workers")
        }
