"""torchvision's `VisionTransformer`."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import VisionTransformer


@pytest.fixture
def vit(random_model):
    return random_model(
        VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=4,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=10,
        )
    )


def read(model, images, loop):
    x = loop.patches(model.conv_proj, images)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1)
    x = x + model.encoder.pos_embedding
    for block in model.encoder.layers:
        x = loop.begin().at("resid_pre", x)
        attn = block.self_attention
        qkv = loop.norm(block.ln_1, x) @ attn.in_proj_weight.T + attn.in_proj_bias
        z = loop.attend(*(loop.heads(part, 4) for part in qkv.chunk(3, -1)))
        mid = loop.at("resid_mid", x + loop.at("attn_out", loop.linear(attn.out_proj, z)))
        first, last = block.mlp[0], block.mlp[3]
        pre = loop.at("mlp_pre", loop.linear(first, loop.norm(block.ln_2, mid)))
        mlp = loop.at("mlp_out", loop.linear(last, loop.at("mlp_post", loop.gelu(pre))))
        x = loop.at("resid_post", mid + mlp)
    features = loop.norm(model.encoder.ln, x)[:, 0]
    head = getattr(model.heads, "head", None)
    return features if head is None else loop.linear(head, features)


def test_every_site(vit, check):
    probe = check(vit, read)
    assert probe.layout.prefix == ("cls",)
    assert probe.layout.num_classes == 10


def test_without_a_head(vit, check):
    vit.heads = torch.nn.Identity()
    check(vit, read)
