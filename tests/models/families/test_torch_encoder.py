"""torch's `nn.TransformerEncoderLayer`, stacked and called again and again, and its attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe

COUNT = 17


def layer(**options):
    given = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "batch_first": True}
    return nn.TransformerEncoderLayer(**given | {"activation": "gelu", "dropout": 0.1} | options)


class Encoder(nn.Module):
    """CLS and patches through a stack, or three times through one layer."""

    image_size = 32

    def __init__(self, block, stacked=0, mask=None, is_causal=False):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, stride=8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.block = (
            nn.TransformerEncoder(block, stacked, enable_nested_tensor=False) if stacked else block
        )
        self.calls = 1 if stacked else 3
        self.register_buffer("mask", mask)
        self.is_causal = is_causal
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for _ in range(self.calls):
            given = {} if self.mask is None else {"is_causal": self.is_causal}
            x = self.block(x, self.mask, **given)
        return self.head(x.mean(1))


# ---- by hand ----------------------------------------------------------------


def read(model, images, loop):
    x = loop.patches(model.patch_embed, images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    layers = model.block.layers if model.calls == 1 else [model.block] * 3
    for one in layers:
        x = loop.begin().at("resid_pre", x)
        x = loop.at("resid_post", step(one, x, bias_of(model.mask), loop))
    return loop.linear(model.head, x.mean(1))


def bias_of(mask):
    """What a mask adds to the scores: torch's True means not to look."""
    if mask is None:
        return 0.0
    return (
        torch.zeros(mask.shape).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
    )


def step(block, x, bias, loop):
    attended = attention(block.self_attn, loop.norm(block.norm1, x) if block.norm_first else x)
    attn = loop.at("attn_out", attended(bias, loop))
    if block.norm_first:
        mid = loop.at("resid_mid", x + attn)
        return mid + fed(block, loop.norm(block.norm2, mid), loop)
    mid = loop.at("resid_mid", loop.norm(block.norm1, x + attn))
    return loop.norm(block.norm2, mid + fed(block, mid, loop))


def attention(attn, x):
    def attended(bias, loop):
        qkv = (x @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1)
        z = loop.attend(*(loop.heads(part, attn.num_heads) for part in qkv), bias)
        return loop.linear(attn.out_proj, z)

    return attended


def fed(block, x, loop):
    post = loop.at("mlp_post", loop.gelu(loop.at("mlp_pre", loop.linear(block.linear1, x))))
    return loop.at("mlp_out", loop.linear(block.linear2, post))


# ---- torch's layer ----------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("stacked", [0, 2], ids=["looped", "stacked"])
def test_layers(random_model, check, norm_first, stacked):
    model = random_model(Encoder(layer(norm_first=norm_first), stacked))
    assert check(model, read).num_steps == (stacked or 3)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
def test_the_answer_is_close_to_that_of_the_fused_layer(random_model, images, norm_first):
    model = random_model(Encoder(layer(norm_first=norm_first), 2))
    with torch.no_grad():
        torch.testing.assert_close(unroll(model)(images), model(images))


@pytest.mark.parametrize("kind", ["float", "bool", "causal"])
def test_masks_are_in_the_scores(random_model, check, kind):
    hidden = torch.ones(COUNT, COUNT, dtype=torch.bool).triu(1)
    mask = hidden
    if kind == "float":
        mask = torch.linspace(-2, 2, COUNT**2).reshape(COUNT, COUNT)
    model = random_model(Encoder(layer(), mask=mask, is_causal=kind == "causal"))
    check(model, read)


def test_tokens_before_the_batch_are_refused(images):
    class First(Encoder):
        def forward(self, images):
            x = self.patch_embed(images).flatten(2).permute(2, 0, 1)
            for _ in range(3):
                x = self.block(x)
            return self.head(x.mean(0))

    with pytest.raises(UserError, match="batch_first=True") as refusal:
        Probe(First(layer(batch_first=False)))
    assert "\n" not in str(refusal.value)


# ---- a block of somebody's own around torch's attention ---------------------


class Own(nn.Module):
    """Attention whose weights are asked for, which torch multiplies by hand."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)

    def forward(self, x, mask=None):
        h = self.norm(x)
        return x + self.attn(h, h, h, attn_mask=mask, need_weights=True)[0]


def own_by_hand(model, images, loop):
    x = loop.patches(model.patch_embed, images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    block = model.block
    for _ in range(3):
        x = loop.begin().at("resid_pre", x)
        attended = attention(block.attn, loop.norm(block.norm, x))
        x = loop.at("resid_post", x + attended(bias_of(model.mask), loop))
    return loop.linear(model.head, x.mean(1))


@pytest.mark.parametrize("masked", [False, True])
def test_weights_that_are_asked_for_are_multiplied_by_hand(random_model, check, masked):
    hidden = torch.ones(COUNT, COUNT, dtype=torch.bool).triu(1)

    class Model(Encoder):
        def forward(self, images):
            x = self.patch_embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            for _ in range(3):
                x = self.block(x, self.mask)
            return self.head(x.mean(1))

    names = ("attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out")
    missing = dict.fromkeys(names, "no block map is registered for Own: see register_block")
    missing |= dict.fromkeys("qk", "multiplies queries and keys by hand")
    check(random_model(Model(Own(), mask=hidden if masked else None)), own_by_hand, missing)
