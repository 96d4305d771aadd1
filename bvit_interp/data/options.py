"""Options for reading images, shared by every `Config`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Options for reading images."""

    limit: int | None = None
    """Number of images to use, evenly spaced over the data set; by default all."""
    batch_size: int = 64
    """Images per batch; halved automatically if they do not fit on the GPU."""
    workers: int = 0
    """Number of additional processes that decode images."""
    resize: int | None = None
    """Shorter side in pixels before the centre crop. By default the checkpoint's value, or 256 for
    a 224-pixel model and in proportion for others; images of a data set whose size is the
    model's are not resized."""
    skip_corrupt: bool = False
    """Report images that cannot be read and continue, instead of stopping."""
    classes: Literal["auto", "index", "position"] = "auto"
    """How the data's classes are matched with the model's: `auto` compares names, wnids or numbers;
    `index` takes the data's class names as the model's class indices; `position` takes class i of
    the data as class i of the model."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {value}")
        for name in ("workers", "seed"):  # analyses with random numbers have a seed
            if getattr(self, name, 0) < 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")

    def resume_key(self) -> dict[str, Any]:
        """The options that change the rows; a table is continued only if they are the same."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("batch_size", "workers") and (key, value) != ("classes", "auto")
        }
