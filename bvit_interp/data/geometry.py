"""A model's view of a picture: resize, crop, normalise; the mask likewise.

A model of one channel sees the picture in grey: the luma of ITU-R 601, as PIL's mode "L".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.models.bvit import BViT
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import Model

CROP = 224 / 256  # size / resize of the pointing game, and of most of the field's evaluation
_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue


@dataclass(frozen=True)
class Geometry:
    """How images are brought to a model's size; equal ones share their views of an image.

    Parameters
    ----------
    size : height and width of the centre crop, pixels.
    resize : length of the shorter side before the crop, pixels.
    mean, std : of the normalisation, per channel of an image in 0..1: three numbers each, or one
        for images in grey.
    interpolation : "bilinear", "bicubic", ... (antialiased); masks are always taken from the
        nearest pixel, by its centre (`NEAREST_EXACT`; torchvision's own for masks lies half a pixel
        off the image).
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __post_init__(self) -> None:
        if self.resize < max(self.size):
            raise UserError(
                f"resize must be at least the model's {max(self.size)} pixels, got {self.resize}"
            )

    @classmethod
    def of(cls, model: Model, samples: Samples, resize: int | None = None) -> Geometry:
        """The geometry a model sees a data set in.

        The size is the patch embedding's (timm's `resolve_model_data_config` says 224 for a 32 px
        model). The shorter side is brought to `resize`; by default it stays as it is for a set
        drawn at the model's size, else it is size / crop_pct, with the checkpoint's crop_pct for a
        `BViT` and 224/256 for other models: the pointing game's geometry, one for all stacked ViTs
        compared.

        Mean and std are the checkpoint's, else ImageNet's. Three of them are weighted as colours
        are for a model of one channel.

        Raises
        ------
        UserError
            If `resize` is smaller than the model's size, and for a model of neither one nor three
            channels.
        """
        layout = layout_of(model)
        if layout.channels not in (1, 3):
            raise UserError(
                f"the model takes images of {layout.channels} channels, those of data sets have 3,"
                " or 1 in grey; in Python, Probe takes tensors of any number"
            )
        height, width = layout.image_size
        cfg = getattr(model, "pretrained_cfg", None) or {}
        if resize is None and samples.native_size == height == width:
            resize = height  # a shorter side of that length already: nothing is resampled
        elif resize is None:
            crop = (cfg.get("crop_pct") or CROP) if isinstance(model, BViT) else CROP
            resize = round(max(height, width) / crop)
        return cls(
            size=(height, width),
            resize=resize,
            mean=_per_channel(cfg.get("mean") or IMAGENET_DEFAULT_MEAN, layout.channels),
            std=_per_channel(cfg.get("std") or IMAGENET_DEFAULT_STD, layout.channels),
            interpolation=cfg.get("interpolation") or "bilinear",
        )

    def __call__(
        self, image: np.ndarray, mask: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalised image ``(C, *size)`` of one ``(H, W, 3)`` uint8, and its class ids ``(*size)``
        int64; C is 3, or 1 in grey."""
        if len(self.mean) == 1:
            image = np.array(Image.fromarray(image).convert("L"))[..., None]
        pixels = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        mode = InterpolationMode(self.interpolation)
        pixels = F.to_dtype(self._crop(pixels, mode), torch.float32, scale=True)
        view = F.normalize(pixels, list(self.mean), list(self.std)).as_subclass(torch.Tensor)
        if mask is None:
            return view, None
        # no tv_tensors.Mask: it would get the legacy nearest
        ids = torch.from_numpy(mask).long()[None]
        return view, self._crop(ids, InterpolationMode.NEAREST_EXACT)[0]

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images ``(..., C, H, W)`` as the model sees them, ``(..., H, W, 3)`` uint8."""
        mean, std = (
            torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().movedim(-3, -1)
        return pixels.repeat_interleave(3 // len(self.mean), dim=-1)

    def _crop(self, pixels: torch.Tensor, mode: InterpolationMode) -> torch.Tensor:
        return F.center_crop(F.resize(pixels, [self.resize], mode, antialias=True), list(self.size))


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A number per channel, of one for all or of three colours."""
    if len(values) == 1:
        return tuple(values) * channels
    if channels == 1:
        return (sum(weight * value for weight, value in zip(_LUMA, values, strict=True)),)
    return tuple(values)
