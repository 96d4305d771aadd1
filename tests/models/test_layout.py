"""Layouts that a model tells by itself, or not."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bvit_interp import Probe
from bvit_interp.errors import UserError
from bvit_interp.models.layout import layout_of


def hybrid(channels):
    """A ViT whose patches are made by two convolutions, without a projection, as ViTamin's."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(channels, 16, 4, 4), nn.Conv2d(16, 32, 2, 2))
    return VisionTransformer(
        img_size=32,
        patch_size=1,
        in_chans=channels,
        embed_dim=32,
        num_heads=4,
        depth=2,
        num_classes=10,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
    ).eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_patch_embedding_of_several_convolutions(channels):
    model = hybrid(channels)
    layout = layout_of(model)
    assert (layout.channels, layout.grid, layout.image_size) == (channels, (4, 4), (32, 32))
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        logits, cache = Probe(model).run(images, "resid_post")
        assert torch.equal(logits, model(images))
        assert torch.equal(model.forward_head(model.norm(cache["resid_post", 2])), logits)


def test_a_model_of_any_image_size_is_asked_for_it():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=2
    )
    model.patch_embed.img_size = model.patch_embed.grid_size = None
    with pytest.raises(
        UserError, match="no img_size and no grid_size: give image_size="
    ) as refusal:
        layout_of(model)
    assert "\n" not in str(refusal.value)
    probe = Probe(model.eval(), image_size=32, grid=(4, 4), prefix=("cls",))
    assert layout_of(probe.model).num_tokens == 17
