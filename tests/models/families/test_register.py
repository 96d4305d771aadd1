"""Blocks that somebody registers, by class and by name."""

from __future__ import annotations

import importlib

import pytest
from torch import nn
from torch.nn import functional as F

from bvit_interp.errors import UserError
from bvit_interp.models import families
from bvit_interp.models.families import OF_MODULES, BlockMap, map_of, register_block
from bvit_interp.probes.probe import Probe

SITES = {
    "attn_out": "proj.out",
    "resid_mid": "norm2.in",
    "mlp_pre": "ffn.0.out",
    "mlp_post": "ffn.2.in",
    "mlp_out": "ffn.out",
}


class Own(nn.Module):
    """A block of nobody's library."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.ffn = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x):
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(*parts)
        x = x + self.proj(z.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class Sub(Own):
    """Is an Own in all but its name."""


class Grouped(Own):
    """Its kernel gets two heads of keys and values for four of queries."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 64)

    def forward(self, x):
        q, *kv = self.qkv(self.norm1(x)).split([32, 16, 16], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (q, *kv))
        z = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5, enable_gqa=True)
        x = x + self.proj(z.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class Model(nn.Module):
    """A prelude of one block, then another block three times."""

    image_size = 32

    def __init__(self, block=Own):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, stride=8)
        self.prelude, self.block = block(), block()
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        x = self.prelude(self.patches(images).flatten(2).transpose(1, 2))
        for _ in range(3):
            x = self.block(x)
        return self.head(x.mean(1))


def by_hand(model, images, loop):
    x = step(model.prelude, loop.patches(model.patches, images), type(loop)())
    for _ in range(3):
        x = loop.begin().at("resid_pre", x)
        x = loop.at("resid_post", step(model.block, x, loop))
    return loop.linear(model.head, x.mean(1))


def step(block, x, loop):
    groups = [32, 16, 16] if isinstance(block, Grouped) else [32, 32, 32]
    qkv = loop.linear(block.qkv, loop.norm(block.norm1, x)).split(groups, dim=-1)
    z = loop.attend(*(part.unflatten(-1, (-1, 8)) for part in qkv))
    mid = loop.at("resid_mid", x + loop.at("attn_out", loop.linear(block.proj, z)))
    pre = loop.at("mlp_pre", loop.linear(block.ffn[0], loop.norm(block.norm2, mid)))
    mlp = loop.linear(block.ffn[2], loop.at("mlp_post", loop.gelu(pre)))
    return mid + loop.at("mlp_out", mlp)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers ends with it; families of libraries stay known."""
    for family in families._FAMILIES:
        importlib.import_module(f"{families.__name__}.{family}")
    monkeypatch.setattr(families, "_mappers", dict(families._mappers))


def test_a_block_that_nobody_knows_has_its_state_and_its_attention(random_model, check):
    missing = dict.fromkeys(OF_MODULES, "no block map is registered for Own: see register_block")
    check(random_model(Model()), by_hand, missing)


@pytest.mark.parametrize("block", [Own, Sub])
def test_a_registered_block_has_every_site(random_model, check, block):
    register_block(Own, SITES)
    check(random_model(Model(block)), by_hand)


def test_fewer_heads_of_keys_than_of_queries(random_model, check):
    register_block(Grouped, SITES)
    check(random_model(Model(Grouped)), by_hand)


def test_a_block_is_registered_by_its_name(random_model, check):
    register_block(f"{Own.__module__}.Own", SITES)
    check(random_model(Model()), by_hand)


def test_blocks_of_one_class_may_differ():
    def sites(block):
        last = len(block.ffn) - 1
        return BlockMap({"mlp_post": f"ffn.{last}.in"}, {"mlp_pre": "nobody asks for it"})

    register_block(Own, sites)
    short, long = Own(), Own()
    long.ffn.append(nn.Linear(32, 32))
    assert map_of(short).sites == {"mlp_post": "ffn.2.in"}
    assert map_of(long).sites == {"mlp_post": "ffn.3.in"}
    assert map_of(long).missing["mlp_pre"] == "nobody asks for it"


def test_maps_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"no 'z'; its sites: attn_out"):
        register_block(Own, {"z": "proj.in"})
    with pytest.raises(UserError, match=r"mlp_out: 'ffn' does not end in \.in or \.out"):
        register_block(Own, {"mlp_out": "ffn"})


def test_a_site_that_is_left_out_and_one_whose_module_is_not_there(random_model, images):
    register_block(Own, {"mlp_post": "ffn.2.in", "mlp_out": "mlp.out"})
    probe = Probe(random_model(Model()))
    assert probe.record(images, "mlp_post")["mlp_post", 3].shape == (4, 16, 48)
    with pytest.raises(UserError, match="attn_out: the block map of Own does not name it"):
        probe.run(images, "attn_out")
    with pytest.raises(UserError, match="mlp_out: this Own has no 'mlp'"):
        probe.run(images, "mlp_out")
