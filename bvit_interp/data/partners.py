"""Another image for each image, to patch or resample from.

The partner of an image is the one half the chosen images further on, so in a set sorted by class
one of another class, and the same one however the images are batched or shared among processes.
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
    samples, limit : the set, and how many of its images are used, as the loader has them.
    skip_corrupt : take the next image in place of one that cannot be read, rather than raise.

    Raises
    ------
    UserError
        For fewer than two images.
    """

    def __init__(
        self, samples: Samples, limit: int | None = None, skip_corrupt: bool = False
    ) -> None:
        self.samples, self.skip_corrupt = samples, skip_corrupt
        self.places = evenly_spaced(len(samples), limit)
        self.order = {place: i for i, place in enumerate(self.places)}
        if len(self.places) < 2:
            raise UserError(
                f"images are paired with others: at least 2 are needed, got {len(self.places)}"
            )

    def __call__(self, index: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Images ``(B, 3, H, W)`` and labels ``(B,)`` of the partners of the images at places
        `index` ``(B,)``."""
        found = [self._read(int(place), geometry) for place in index]
        return torch.stack([image for image, _ in found]), torch.tensor(
            [label for _, label in found]
        )

    def _read(self, place: int, geometry: Geometry) -> tuple[Tensor, int]:
        count, own = len(self.places), self.order[place]
        for further in range(count // 2, count // 2 + count):
            candidate = self.places[(own + further) % count]
            if candidate == place:
                continue
            try:
                image, label, _ = self.samples.read(candidate)
            except DataError:
                if not self.skip_corrupt:
                    raise
                continue
            return geometry(image, None)[0], label
        raise DataError(f"no image can be read as the partner of {self.samples.name(place)}")
