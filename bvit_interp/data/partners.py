"""Another image for each image, to patch or resample from.

The partner of an image is the image that comes half of the chosen images later. In a set sorted by
class it has another class. Batches and processes do not change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.errors import DataError, UserError


class Partners:
    """Partners of the images of a data set.

    Parameters
    ----------
    samples, limit : the set, and the number of images used, as given to the loader.
    skip_corrupt : use the next image instead of one that cannot be read, instead of raising an
        error.

    Attributes
    ----------
    index : positions in the data set of the images used.
    order : position in the data set -> position in `index`.

    Raises
    ------
    UserError
        If there are fewer than two images.
    """

    def __init__(
        self, samples: Samples, limit: int | None = None, skip_corrupt: bool = False
    ) -> None:
        self.samples, self.skip_corrupt = samples, skip_corrupt
        self.index = evenly_spaced(len(samples), limit)
        self.order = {image: i for i, image in enumerate(self.index)}
        if len(self.index) < 2:
            raise UserError(
                f"images are paired with others: at least 2 are needed, got {len(self.index)}"
            )

    def __call__(self, index: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, H, W)`` and labels ``(B,)`` of the partners of the images `index`
        ``(B,)``."""
        found = [self._read(int(image), geometry) for image in index]
        return torch.stack([image for image, _ in found]), torch.tensor(
            [label for _, label in found]
        )

    def _read(self, i: int, geometry: Geometry) -> tuple[Tensor, int]:
        count, own = len(self.index), self.order[i]
        for shift in range(count // 2, count // 2 + count):
            candidate = self.index[(own + shift) % count]
            if candidate == i:
                continue
            try:
                image, label, _ = self.samples.read(candidate)
            except DataError:
                if not self.skip_corrupt:
                    raise
                continue
            return geometry(image, None)[0], label
        raise DataError(f"no image can be read as the partner of {self.samples.name(i)}")
