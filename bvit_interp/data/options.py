"""How an analysis reads its images: the options every `Config` shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from timm.models.vision_transformer import VisionTransformer

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.data.loader import Loader
    from bvit_interp.data.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options of reading images."""

    limit: int | None = None
    """Use this many images, spread evenly over the data set; by default all."""
    batch_size: int = 64
    """Images at once; halved by itself where they do not fit on the GPU."""
    workers: int = 0
    """Processes that decode images beside this one."""
    resize: int | None = None
    """Shorter side before the centre crop, pixels; by default 256 for a 224-px model and in proportion for others
    (a checkpoint may say otherwise), and none for data sets drawn at the model's size."""
    skip_corrupt: bool = False
    """Report images that cannot be read and go on, instead of stopping."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {value}")
        for name in ("workers", "seed"):  # an analysis that draws has a seed
            if getattr(self, name, 0) < 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")

    def identity(self) -> dict[str, Any]:
        """The options that rows depend on: those a table must share to be continued."""
        return {key: value for key, value in asdict(self).items() if key not in ("batch_size", "workers")}

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """What of the table the command line prints; here all but the names of files."""
        return frame.drop(columns="path", errors="ignore")

    def loader(
        self, samples: Samples, models: Mapping[str, VisionTransformer], progress: str
    ) -> tuple[Loader, dict[str, Geometry]]:
        """One pass over the images for all models, and the geometry each model sees them in."""
        from bvit_interp.data.geometry import Geometry
        from bvit_interp.data.loader import Loader

        geometries = {name: Geometry.of(model, samples, self.resize) for name, model in models.items()}
        loader = Loader(
            samples, list(dict.fromkeys(geometries.values())), self.batch_size, limit=self.limit,
            workers=self.workers, skip_corrupt=self.skip_corrupt, progress=progress,
        )  # fmt: skip
        return loader, geometries
