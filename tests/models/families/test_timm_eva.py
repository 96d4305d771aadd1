"""timm's `Eva`: rotary embeddings, gated FFNs, registers, post-norm and grouped queries."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.layers.config import use_fused_attn
from timm.models.eva import EvaBlockPostNorm

SIZE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "num_heads": 4,
    "num_classes": 10,
    "depth": 2,
}
GATED = {"mlp_pre": "gated FFN"}


@pytest.fixture
def eva(random_model):
    return lambda name, **options: random_model(timm.create_model(name, **SIZE | options))


@pytest.fixture
def unfused():
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(before)


# ---- by hand ----------------------------------------------------------------


def read(model, images, loop):
    x = loop.patches(model.patch_embed.proj, images)
    prefix = [model.cls_token] if model.cls_token is not None else []
    prefix += [model.reg_token] if model.reg_token is not None else []
    prefix = torch.cat(prefix, dim=1).expand(len(x), -1, -1)
    pos = model.pos_embed
    if pos is not None and pos.shape[1] == x.shape[1]:
        x = torch.cat([prefix, x + pos], dim=1)
    else:
        x = torch.cat([prefix, x], dim=1)
        x = x if pos is None else x + pos
    grid = model.patch_embed.grid_size
    rope = None if model.rope is None else model.rope.get_embed(grid)
    for i, block in enumerate(model.blocks):
        one = rope[i] if rope is not None and model.rope_mixed else rope
        x = loop.begin().at("resid_pre", x)
        x = loop.at("resid_post", step(block, x, one, loop))
    x = normed(model.norm, x, loop)
    count = prefix.shape[1]
    x = x[:, 0] if model.global_pool == "token" else x[:, count:].mean(1)
    return loop.linear(model.head, normed(model.fc_norm, x, loop))


def normed(norm, x, loop):
    return x if isinstance(norm, torch.nn.Identity) else loop.norm(norm, x)


def step(block, x, rope, loop):
    if isinstance(block, EvaBlockPostNorm):
        attn = loop.norm(block.norm1, attended(block.attn, x, rope, loop))
        mid = loop.at("resid_mid", x + loop.at("attn_out", attn))
        return mid + loop.at("mlp_out", loop.norm(block.norm2, fed(block.mlp, mid, loop)))
    attn = attended(block.attn, loop.norm(block.norm1, x), rope, loop)
    attn = attn if block.gamma_1 is None else block.gamma_1 * attn
    mid = loop.at("resid_mid", x + loop.at("attn_out", attn))
    mlp = fed(block.mlp, loop.norm(block.norm2, mid), loop)
    return mid + loop.at("mlp_out", mlp if block.gamma_2 is None else block.gamma_2 * mlp)


def attended(attn, x, rope, loop):
    if attn.qkv is None:
        q, k, v = (loop.linear(one, x) for one in (attn.q_proj, attn.k_proj, attn.v_proj))
    else:
        q, k, v = loop.linear(attn.qkv, x).chunk(3, -1)
        if getattr(attn, "q_bias", None) is not None:
            q, v = q + attn.q_bias, v + attn.v_bias
    width = attn.head_dim
    q, k, v = (part.unflatten(-1, (-1, width)) for part in (q, k, v))
    q, k = normed(attn.q_norm, q, loop), normed(attn.k_norm, k, loop)
    if rope is not None:
        q, k = (rotated(part, rope, attn) for part in (q, k))
    groups = attn.num_heads // k.shape[2]
    k, v = (part.repeat_interleave(groups, dim=2) for part in (k, v))
    z = normed(attn.norm, loop.attend(q, k, v), loop)
    return loop.linear(attn.proj, z)


def rotated(x, rope, attn):
    """Pairs of channels turned by the angle of their patch; prefix tokens stay."""
    count = attn.num_prefix_tokens
    sin, cos = rope.chunk(2, -1)
    if sin.ndim == 2:
        sin, cos = sin[:, None], cos[:, None]
    else:  # an angle per head
        sin, cos = sin.transpose(0, 1), cos.transpose(0, 1)
    patches = x[:, count:]
    turned = torch.empty_like(patches)
    half = patches.shape[-1] // 2
    first, second = (
        (slice(0, half), slice(half, None)) if attn.rotate_half else (slice(0, None, 2),) * 2
    )
    if not attn.rotate_half:
        second = slice(1, None, 2)
    turned[..., first] = -patches[..., second]
    turned[..., second] = patches[..., first]
    return torch.cat([x[:, :count], patches * cos + turned * sin], dim=1)


def fed(mlp, x, loop):
    if hasattr(mlp, "fc1_g"):
        post = loop.silu(loop.linear(mlp.fc1_g, x)) * loop.linear(mlp.fc1_x, x)
    elif mlp.fc1.out_features == mlp.fc2.in_features:
        post = loop.gelu(loop.at("mlp_pre", loop.linear(mlp.fc1, x)))
    else:
        gate, value = loop.linear(mlp.fc1, x).chunk(2, -1)
        post = loop.silu(gate) * value
    return loop.linear(mlp.fc2, loop.at("mlp_post", normed(mlp.norm, post, loop)))


# ---- models -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("eva02_tiny_patch14_224", {}, GATED),  # packed gate, rotary and learned positions
        ("eva02_base_patch14_224", {}, GATED),  # q, k and v apart, a norm inside the FFN
        ("eva02_base_patch16_clip_224", {}, GATED),  # a norm inside attention
        ("eva_giant_patch14_224", {}, {}),
        ("eva02_enormous_patch14_clip_224", {}, {}),  # post-norm
        ("vit_small_patch16_dinov3", {}, {}),
        ("vit_small_plus_patch16_dinov3_qkvb", {}, GATED),
        ("vit_small_patch16_rope_224", {}, {}),
        ("vit_small_patch16_rope_mixed_224", {}, {}),
        ("vit_small_patch16_rope_ape_224", {}, {}),
        ("vit_medium_patch16_rope_reg1_gap_256", {}, {}),
        (
            "vit_small_patch16_rope_224",
            {"num_kv_heads": 2, "qkv_fused": False, "qk_norm": True},
            {},
        ),
    ],
)
def test_models_of_the_family(eva, check, name, options, missing):
    check(eva(name, **options), read, missing)


def test_prefix_tokens_are_told_apart(eva, check):
    probe = check(eva("vit_small_patch16_dinov3"), read)
    assert probe.layout.prefix == ("cls", "reg", "reg", "reg", "reg")
    assert probe.grid == (4, 4)


def test_unfused_rotary_attention(unfused, eva, check):
    by_hand = "multiplies queries and keys by hand"
    model = eva("vit_small_patch16_dinov3")
    assert not model.blocks[0].attn.fused_attn
    check(model, read, {"q": by_hand, "k": by_hand})
