"""timm's `VisionTransformer` with blocks of each of its kinds."""

from __future__ import annotations

import pytest
import torch
from timm.layers import set_fused_attn
from timm.layers.config import use_fused_attn
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe

VIT = "vit_tiny_patch16_224"
DIFFERENTIAL = "differential attention has no"
BY_HAND = "multiplies queries and keys by hand"
PARALLEL = {"resid_mid": "no state between", "attn_out": "together", "mlp_out": "together"}


@pytest.fixture
def unfused():
    """Blocks made in this test multiply by hand."""
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(before)


# ---- by hand ----------------------------------------------------------------


def read(model, images, loop, step):
    """The forward of a VisionTransformer with CLS and learned positions."""
    x = loop.patches(model.patch_embed.proj, images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.pos_embed
    for block in model.blocks:
        x = loop.begin().at("resid_pre", x)
        x = loop.at("resid_post", step(block, x, loop))
    return loop.linear(model.head, loop.norm(model.norm, x)[:, 0])


def scaled(scale, x):
    return x if isinstance(scale, nn.Identity) else x * scale.gamma


def attended(attn, x, loop):
    q, k, v = (loop.heads(part, attn.num_heads) for part in loop.linear(attn.qkv, x).chunk(3, -1))
    if not isinstance(attn.q_norm, nn.Identity):
        q, k = loop.norm(attn.q_norm, q), loop.norm(attn.k_norm, k)
    return loop.linear(attn.proj, loop.attend(q, k, v))


def fed(mlp, x, loop):
    pre = loop.at("mlp_pre", loop.linear(mlp.fc1, x))
    return loop.linear(mlp.fc2, loop.at("mlp_post", loop.gelu(pre)))


def pre_norm(block, x, loop, attended=attended):
    attn = attended(block.attn, loop.norm(block.norm1, x), loop)
    mid = loop.at("resid_mid", x + loop.at("attn_out", scaled(block.ls1, attn)))
    mlp = fed(block.mlp, loop.norm(block.norm2, mid), loop)
    return mid + loop.at("mlp_out", scaled(block.ls2, mlp))


def post_norm(block, x, loop):
    attn = loop.norm(block.norm1, attended(block.attn, x, loop))
    mid = loop.at("resid_mid", x + loop.at("attn_out", attn))
    return mid + loop.at("mlp_out", loop.norm(block.norm2, fed(block.mlp, mid, loop)))


def lambda_of(attn):
    first, second = (
        (q * k).sum().exp()
        for q, k in ((attn.lambda_q1, attn.lambda_k1), (attn.lambda_q2, attn.lambda_k2))
    )
    return first - second + attn.lambda_init


def difference(attn, q, k, v, loop):
    """Two softmaxes of a head, one less lambda times the other, on values of both."""
    q, k = (loop.heads(part, 2 * attn.num_heads) for part in (q, k))
    v = loop.at("v", loop.heads(v, attn.num_heads))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
    first, second = scores.softmax(-1).unflatten(1, (-1, 2)).unbind(2)
    pattern = loop.at("pattern", first - lambda_of(attn) * second)
    z = loop.at("z", torch.einsum("bhqk,bkhe->bqhe", pattern, v))
    root = (z.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return (z / root * attn.sub_norm.weight * (1 - attn.lambda_init)).flatten(2)


def attended_twice(attn, x, loop):
    return loop.linear(attn.proj, difference(attn, *loop.linear(attn.qkv, x).chunk(3, -1), loop))


def differential(block, x, loop):
    return pre_norm(block, x, loop, attended_twice)


def parallel(block, x, loop):
    width = x.shape[-1]
    y = loop.linear(block.in_proj, loop.norm(block.in_norm, x))
    pre, *qkv = y.split([y.shape[-1] - 3 * width, width, width, width], dim=-1)
    if block.mlp_bias is not None:
        pre = pre + block.mlp_bias
    if isinstance(block, DiffParallelScalingBlock):
        z = difference(block, *qkv, loop)
    else:
        z = loop.attend(*(loop.heads(part, block.num_heads) for part in qkv))
    post = loop.at("mlp_post", loop.gelu(loop.at("mlp_pre", pre)))
    if block.out_proj is not None:
        return x + scaled(block.ls, loop.linear(block.out_proj, torch.cat([z, post], -1)))
    attn = loop.at("attn_out", loop.linear(block.attn_out_proj, z))
    mlp = loop.at("mlp_out", loop.linear(block.mlp_out_proj, post))
    return x + scaled(block.ls, attn + mlp)


def side_by_side(block, x, loop):
    """Several attentions, then several FFNs: the heads of the attentions one after the other."""
    given = [
        [loop.heads(part, one.attn.num_heads) for part in each.chunk(3, -1)]
        for one in block.attns
        for each in [loop.linear(one.attn.qkv, loop.norm(one.norm, x))]
    ]
    z = loop.attend(*(torch.cat(parts, dim=2) for parts in zip(*given, strict=True)))
    parts = z.chunk(len(block.attns), -1)
    x = x + sum(loop.linear(a.attn.proj, part) for a, part in zip(block.attns, parts, strict=True))
    for ffn in [(ffn, loop.norm(ffn.norm, x)) for ffn in block.ffns]:
        x = x + loop.linear(ffn[0].mlp.fc2, loop.gelu(loop.linear(ffn[0].mlp.fc1, ffn[1])))
    return x


def hand(step):
    return lambda model, images, loop: read(model, images, loop, step)


# ---- kinds of blocks --------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (pre_norm, {}),
        (pre_norm, {"init_values": 0.5}),
        (pre_norm, {"qk_norm": True, "init_values": 0.5}),
        (post_norm, {"block_fn": ResPostBlock}),
        (post_norm, {"block_fn": ResPostBlock, "init_values": 0.5}),
    ],
    ids=["block", "layer_scale", "qk_norm", "res_post", "res_post_scaled"],
)
def test_blocks_with_every_site(make, check, step, options):
    check(make(name=VIT, depth=3, **options), hand(step))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}], ids=["bias", "no_bias"])
def test_parallel_block(make, check, options):
    model = make(name=VIT, depth=3, block_fn=ParallelScalingBlock, **options)
    check(model, hand(parallel), {"resid_mid": "no state between"})


def test_parallel_block_with_layer_scale_adds_both_at_once(make, check):
    model = make(name=VIT, depth=2, block_fn=ParallelScalingBlock, init_values=0.5)
    check(model, lambda *args: read(*args, parallel), PARALLEL)


def test_differential_attention(make, check):
    model = make(name=VIT, depth=2, attn_layer="diff")
    missing = dict.fromkeys(("q", "k", "scores"), DIFFERENTIAL)
    check(model, hand(differential), missing, recorded_only="recorded, but not edited")


def test_differential_attention_beside_the_ffn(make, check):
    model = make(name=VIT, depth=2, block_fn=DiffParallelScalingBlock)
    missing = PARALLEL | dict.fromkeys(("q", "k", "scores"), DIFFERENTIAL)
    check(model, hand(parallel), missing, recorded_only="recorded, but not edited")


def test_several_attentions_side_by_side(make, check):
    model = make(name=VIT, depth=2, block_fn=ParallelThingsBlock)
    names = ("attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out")
    missing = dict.fromkeys(names, "2 attentions and FFNs .* side by side")
    check(model, hand(side_by_side), missing, recorded_only="recorded, but not edited")


def test_differential_attentions_side_by_side(make, images, loop):
    """The heads of each are those that it has alone."""
    model = make(name=VIT, depth=2, block_fn=ParallelThingsBlock, attn_layer="diff")
    cache = Probe(model).record(images, ["pattern", "resid_pre"], steps=1)
    found = []
    for one in model.blocks[0].attns:
        x = loop.norm(one.norm, cache["resid_pre", 1])
        attended_twice(one.attn, x, loop)
        found.append(loop.sites["pattern", 1])
    torch.testing.assert_close(cache["pattern", 1], torch.cat(found, dim=1))


# ---- attention multiplied by hand -------------------------------------------


@pytest.mark.parametrize(
    ("step", "options"),
    [(pre_norm, {"qk_norm": True}), (post_norm, {"block_fn": ResPostBlock})],
    ids=["block", "res_post"],
)
def test_unfused_attention(unfused, make, check, step, options):
    model = make(name=VIT, depth=2, **options)
    assert not model.blocks[0].attn.fused_attn
    check(model, hand(step), {"q": BY_HAND, "k": BY_HAND})


def test_unfused_parallel_block(unfused, make, check):
    model = make(name=VIT, depth=2, block_fn=ParallelScalingBlock)
    missing = {"q": BY_HAND, "k": BY_HAND, "resid_mid": "no state between"}
    check(model, hand(parallel), missing)


def test_unfused_attentions_side_by_side(unfused, make, check):
    model = make(name=VIT, depth=2, block_fn=ParallelThingsBlock)
    names = ("attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out")
    missing = dict.fromkeys(names, "side by side") | {"q": BY_HAND, "k": BY_HAND}
    check(model, hand(side_by_side), missing, recorded_only="recorded, but not edited")


def test_unfused_attention_under_dropout(unfused, make, images):
    """Its values meet the pattern that dropout leaves."""
    model = make(name=VIT, depth=2, attn_drop_rate=0.5)
    probe = Probe(model.train())
    torch.manual_seed(0)
    plain = probe(images)
    torch.manual_seed(0)
    logits, cache = probe.run(images, ["pattern", "v", "z"])
    assert torch.equal(logits, plain)
    whole = cache["pattern", 1] @ cache["v", 1].transpose(1, 2)
    assert not torch.allclose(cache["z", 1], whole.transpose(1, 2))
    torch.testing.assert_close(cache["pattern", 1].sum(-1), torch.ones(4, 4, 17))


@pytest.mark.parametrize("block", [Block, DiffParallelScalingBlock])
def test_unfused_differential_attention_is_refused(unfused, make, images, block):
    """Its softmax is of both halves at once; the values meet their difference."""
    options = {"attn_layer": "diff"} if block is Block else {"block_fn": block}
    model = make(name=VIT, depth=2, **options)
    for site in ("q", "v", "scores", "pattern", "z"):
        with pytest.raises(UserError, match=r"fused|by hand|differential"):
            Probe(model).run(images, site)
    _, cache = Probe(model).run(images, ["resid_post", "mlp_post"])
    assert cache["resid_post", 2].shape == (4, 17, 32)


# ---- a block of somebody's own ----------------------------------------------


class Doubled(Block):
    """Overrides forward: its attention counts twice."""

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + 2 * self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return x + self.mlp(self.norm2(x))


class Renamed(Block):
    """Is a Block in all but its name."""


def test_a_subclass_with_a_forward_of_its_own_has_no_modules_as_sites(make, check, images):
    model = make(name=VIT, depth=2, block_fn=Doubled)

    def step(block, x, loop):
        mid = x + 2 * attended(block.attn, loop.norm(block.norm1, x), loop)
        norm, mlp = loop.norm(block.norm2, mid), block.mlp
        return mid + loop.linear(mlp.fc2, loop.gelu(loop.linear(mlp.fc1, norm)))

    names = ("attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out")
    missing = dict.fromkeys(names, "Doubled computes its forward otherwise than Block")
    probe = check(model, hand(step), missing)
    with pytest.raises(UserError, match="Doubled"):
        _ = probe.num_neurons


def test_a_subclass_without_a_forward_of_its_own_is_its_base(make, check):
    check(make(name=VIT, depth=2, block_fn=Renamed), hand(pre_norm))


def test_a_forward_set_on_the_object_is_no_longer_the_class(make, images):
    model = make(name=VIT, depth=2)
    block = model.blocks[1]
    block.forward = lambda x, **_: Block.forward(block, x) * 1
    with pytest.raises(UserError, match="otherwise than Block"):
        Probe(model).run(images, "mlp_post", steps=2)


# ---- one block again and again ----------------------------------------------


class Loops(nn.Module):
    """Three calls of one block, and no class of timm's around it."""

    image_size = 32

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, stride=8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.block = Block(32, 4, qkv_bias=True, init_values=0.5)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        x = self.proj(images).flatten(2).transpose(1, 2)
        first = x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for _ in range(3):
            x = self.block(x) + 0.5 * first
        return self.head(x[:, 0])


def test_a_block_called_three_times_in_a_loop(random_model, check):
    def by_hand(model, images, loop):
        x = loop.patches(model.proj, images)
        first = x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        for _ in range(3):
            x = loop.begin().at("resid_pre", x)
            x = loop.at("resid_post", pre_norm(model.block, x, loop)) + 0.5 * first
        return loop.linear(model.head, x[:, 0])

    probe = check(random_model(Loops()), by_hand)
    assert probe.num_steps == 3
    assert probe.layout.prefix == ("cls",)
