"""timm's `Beit`: scores with a relative position bias, per block or shared."""

from __future__ import annotations

import pytest
import timm
import torch

SIZE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "num_heads": 4,
    "num_classes": 10,
    "depth": 2,
}


def read(model, images, loop):
    x = loop.patches(model.patch_embed.proj, images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = x if model.pos_embed is None else x + model.pos_embed
    shared = 0 if model.rel_pos_bias is None else bias_of(model.rel_pos_bias)
    for block in model.blocks:
        x = loop.begin().at("resid_pre", x)
        attn, h = block.attn, loop.norm(block.norm1, x)
        q, k, v = (h @ weight.T for weight in attn.qkv.weight.chunk(3))
        qkv = (loop.heads(part, 4) for part in (q + attn.q_bias, k, v + attn.v_bias))
        own = 0 if attn.relative_position_bias_table is None else bias_of(attn)
        z = loop.attend(*qkv, own + shared)
        gamma_1, gamma_2 = (1 if g is None else g for g in (block.gamma_1, block.gamma_2))
        mid = loop.at("resid_mid", x + loop.at("attn_out", gamma_1 * loop.linear(attn.proj, z)))
        h = loop.norm(block.norm2, mid)
        if hasattr(block.mlp, "fc1"):
            post = loop.gelu(loop.at("mlp_pre", loop.linear(block.mlp.fc1, h)))
        else:
            post = loop.silu(loop.linear(block.mlp.fc1_g, h)) * loop.linear(block.mlp.fc1_x, h)
        mlp = loop.linear(block.mlp.fc2, loop.at("mlp_post", post))
        x = loop.at("resid_post", mid + loop.at("mlp_out", gamma_2 * mlp))
    return loop.linear(model.head, loop.norm(model.fc_norm, x[:, 1:].mean(1)))


def bias_of(owner):
    """``(H, N, N)``: a table entry per offset of patches, and three that involve CLS."""
    table, side = owner.relative_position_bias_table, 4
    offsets = (2 * side - 1) ** 2
    index = torch.zeros(1 + side**2, 1 + side**2, dtype=torch.long)
    index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    for a in range(side**2):
        for b in range(side**2):
            rows, columns = a // side - b // side, a % side - b % side
            index[1 + a, 1 + b] = (rows + side - 1) * (2 * side - 1) + columns + side - 1
    return table[index].permute(2, 0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.1, "use_rel_pos_bias": True, "use_abs_pos_emb": False},
        {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
        {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True},
        {"use_rel_pos_bias": False},
    ],
    ids=["of_blocks", "shared", "both", "none"],
)
def test_relative_position_bias(random_model, check, options):
    model = timm.create_model("beit_base_patch16_224", **SIZE | options)
    check(random_model(model), read)


def test_gated(random_model, check):
    model = timm.create_model("beit_base_patch16_224", **SIZE, swiglu_mlp=True)
    check(random_model(model), read, {"mlp_pre": "gated FFN"})
