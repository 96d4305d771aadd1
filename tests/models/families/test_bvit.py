"""The blocks of this package: those with a time embedding and with a memory."""

from __future__ import annotations

import torch

from bvit_interp.models.families import map_of
from bvit_interp.models.unroll import unroll


def read(model, images, loop, embed=None):
    x = loop.patches(model.patch_embed.proj, images) + model.pos_embed[:, 1:]
    cls = model.cls_token + model.pos_embed[:, :1]
    x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    block = model.get_submodule("blocks.0")
    for t in range(len(model.blocks)):
        x = loop.begin().at("resid_pre", x)
        qkv = loop.linear(block.attn.qkv, rms(block.norm1, x)).chunk(3, -1)
        z = loop.attend(*(loop.heads(part, block.attn.num_heads) for part in qkv))
        mid = loop.at("resid_mid", x + loop.at("attn_out", loop.linear(block.attn.proj, z)))
        pre = loop.at("mlp_pre", loop.linear(block.mlp.fc1, rms(block.norm2, mid)))
        mlp = loop.linear(block.mlp.fc2, loop.at("mlp_post", loop.gelu(pre)))
        x = mid + loop.at("mlp_out", mlp)
        x = loop.at("resid_post", x if embed is None else x + embed[t])
    return loop.linear(model.head, rms(model.norm, x)[:, 0])


def rms(norm, x):
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def test_one_block(make, check):
    check(make(num_steps=3), read)


def test_a_block_with_a_time_embedding(make, check):
    model = make(name="bvit_small_te_patch16_224", num_steps=3)
    check(model, lambda *args: read(*args, embed=model.blocks.step_embed))


def test_a_block_with_a_memory_has_the_map_of_its_base(tiny_fl):
    block = unroll(tiny_fl).blocks[0]
    assert map_of(block).sites == map_of(block.inner[0]).sites
    assert not map_of(block).missing
