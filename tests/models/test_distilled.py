"""The distilled model against DeiT written out and timm's own, its sizes and its place in timm's
interface."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import PatchDropout
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from bvit_interp.models.bvit import BViT, DistilledBViT, checkpoint_filter_fn
from bvit_interp.models.checkpoint import load, save
from bvit_interp.models.cost import flops, parameters
from bvit_interp.models.unroll import unroll

NAME = "bvit_small_distilled_patch16_224"
STACK = "vit_rms_small_distilled_patch16_224"


@pytest.fixture
def plain(make):
    """Distilled bViT without registers: 18 tokens, 12 steps."""
    return make(name=NAME)


def both_heads(model, images, by_hand):
    """Logits of the two heads, by hand."""
    z = by_hand.run(model, images, [model.blocks[t] for t in range(len(model.blocks))])[-1][
        "resid_post"
    ]
    rms = z / (z.pow(2).mean(-1, keepdim=True) + model.norm.eps).sqrt() * model.norm.weight
    heads = (model.head, model.head_dist)
    return tuple(rms[:, i] @ head.weight.T + head.bias for i, head in enumerate(heads))


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"name": NAME},
        {"name": NAME, "reg_tokens": 4},
        {"name": STACK, "num_blocks": 3},
        {"name": NAME, "num_blocks": 2, "num_steps": 2},
        {"name": NAME, "num_steps": 3, "memory": "latent"},
        {"name": NAME, "num_steps": 3, "memory": "block", "interval": 2},
    ],
    ids=["plain", "registers", "stack", "hybrid", "fast latent", "skip memory"],
)
def test_the_mean_of_two_heads_and_both_of_them_in_distilled_training(
    make, images, by_hand, kwargs
):
    model, images = make(**kwargs).double(), images.double()
    logits, logits_dist = both_heads(model, images, by_hand)
    assert (logits - logits_dist).abs().max() > 0.01
    for either in (model, unroll(model)):
        for distilled in (True, False):
            either.set_distilled_training(distilled)
            torch.testing.assert_close(either.eval()(images), (logits + logits_dist) / 2)
        torch.testing.assert_close(either.train()(images), (logits + logits_dist) / 2)
        either.set_distilled_training(True)
        torch.testing.assert_close(either(images), (logits, logits_dist))


def test_tokens_are_cls_dist_registers_patches(tiny_distilled, images, by_hand):
    assert tiny_distilled.pos_embed.shape == (1, 18, 32)
    z = tiny_distilled._pos_embed(tiny_distilled.patch_embed(images))
    assert z.shape == (4, 20, 32)
    assert torch.equal(z[0, 1], tiny_distilled.dist_token[0, 0] + tiny_distilled.pos_embed[0, 1])
    assert torch.equal(z[0, 2:4], tiny_distilled.reg_token[0])
    torch.testing.assert_close(z, by_hand.tokens(tiny_distilled, images), atol=1e-5, rtol=1e-5)


def test_equals_timms_own_distilled_model(make, images):
    ours = make(name=STACK, num_blocks=3)
    theirs = VisionTransformerDistilled(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_heads=4,
        num_classes=10,
        depth=3,
        norm_layer=timm.layers.RmsNorm,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images), theirs(images))


def test_it_starts_as_deit_does():
    """timm's init: normal tokens of std 0.02 (truncated), zero biases; CLS of 1e-6."""
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    for tensor in (
        model.dist_token,
        model.pos_embed,
        model.head_dist.weight,
        model.blocks[0].mlp.fc1.weight,
    ):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.head_dist.bias.any()
    assert isinstance(model, BViT)


def test_only_a_distilled_model_can_be_set_to_distilled_training(tiny, plain):
    """The trainer asks for the method to know one from the other."""
    assert not hasattr(tiny, "set_distilled_training")
    assert hasattr(plain, "set_distilled_training")


# ---- size and cost -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "plain_count"), [("bvit", 8_598_760), ("vit_rms", 86_548_456)])
def test_size_and_cost_of_the_base_model(name, plain_count):
    with torch.device("meta"):
        model = timm.create_model(f"{name}_base_distilled_patch16_224")
    assert parameters(model) == plain_count + 770_536
    assert flops(model, count_attention=False) / 1e9 == pytest.approx(33.87, abs=5e-3)
    block = 2 * 198 * 12 * 768**2
    assert (
        flops(model, count_attention=False)
        == 12 * block + 2 * 196 * 3 * 256 * 768 + 2 * 2 * 768 * 1000
    )
    assert type(model) is DistilledBViT
    assert model.default_cfg["classifier"] == ("head", "head_dist")


# ---- timm's interface ----------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 4])
def test_set_input_size_keeps_the_positions_of_both_tokens(make, registers):
    model = make(name=NAME, reg_tokens=registers)
    before = model.pos_embed.detach().clone()
    model.set_input_size(img_size=(64, 48))
    assert model.pos_embed.shape == (1, 2 + 8 * 6, 32)
    assert torch.equal(model.pos_embed[:, :2], before[:, :2])
    grid = before[:, 2:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(
        grid, size=(8, 6), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(model.pos_embed[:, 2:], expected.flatten(2).transpose(1, 2))
    assert model.num_prefix_tokens == 2 + registers
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 10)


@pytest.mark.parametrize("registers", [0, 4])
def test_dynamic_image_size(make, images, registers):
    kwargs = {"name": NAME, "reg_tokens": registers}
    fixed, dynamic = make(**kwargs), make(**kwargs, dynamic_img_size=True)
    torch.testing.assert_close(dynamic(images), fixed(images))
    larger = torch.randn(2, 3, 64, 48)
    fixed.set_input_size(img_size=(64, 48))
    torch.testing.assert_close(dynamic(larger), fixed(larger))


def test_pretrained_weights_of_another_size_are_resampled(tiny_distilled, make):
    larger = make(name=NAME, num_steps=6, reg_tokens=2, img_size=64, seed=1)
    larger.load_state_dict(checkpoint_filter_fn(tiny_distilled.state_dict(), larger))
    tiny_distilled.set_input_size(img_size=64)
    assert torch.equal(larger.pos_embed, tiny_distilled.pos_embed)


def test_reset_classifier_replaces_both_heads(plain, images):
    features = plain.forward_head(plain.forward_features(images), pre_logits=True)
    tokens = plain.forward_features(images)
    torch.testing.assert_close(features, (tokens[:, 0] + tokens[:, 1]) / 2)
    plain.reset_classifier(3)
    assert plain(images).shape == (4, 3)
    assert plain.get_classifier() == (plain.head, plain.head_dist)
    assert plain.head_dist.out_features == 3
    plain.reset_classifier(0)
    assert torch.equal(plain(images), features)
    with pytest.raises(AssertionError, match="class and distillation tokens"):
        plain.reset_classifier(3, "avg")


@pytest.mark.parametrize("kwargs", [{"global_pool": "avg"}, {"fc_norm": True}])
def test_another_pooling_is_refused(kwargs):
    with pytest.raises(ValueError, match="no fc_norm, no global_pool"):
        DistilledBViT(embed_dim=32, num_heads=4, img_size=32, **kwargs)


def test_patch_dropout_spares_the_prefix(make):
    for kwargs in ({"name": NAME}, {"name": NAME, "reg_tokens": 2}):
        model = make(**kwargs, patch_drop_rate=0.5)
        assert isinstance(model.patch_drop, PatchDropout)
        assert model.patch_drop.num_prefix_tokens == model.num_prefix_tokens
        kept = model.train().patch_drop(torch.arange(20.0).reshape(1, 20, 1).expand(1, 20, 32))
        assert kept[0, : model.num_prefix_tokens, 0].tolist() == list(
            range(model.num_prefix_tokens)
        )


def test_intermediates_leave_out_both_tokens(tiny_distilled, images):
    for either in (tiny_distilled, unroll(tiny_distilled)):
        tokens, maps = either.forward_intermediates(
            images, output_fmt="NLC", return_prefix_tokens=True
        )
        patches, prefix = maps[-1]
        assert patches.shape == (4, 16, 32)
        assert torch.equal(either.norm(torch.cat([prefix, patches], dim=1)), tokens)


def test_no_weight_decay_on_its_token(plain):
    assert {"dist_token", "cls_token", "pos_embed"} <= plain.no_weight_decay()


@pytest.mark.parametrize("change", [None, "head", "size"])
@pytest.mark.parametrize(
    "kwargs", [{"name": NAME, "reg_tokens": 2}, {"name": STACK, "num_blocks": 2}]
)
def test_checkpoints_open_as_the_same_model(make, tmp_path, kwargs, change):
    model = make(**kwargs)
    if change == "head":
        model.reset_classifier(3)
    if change == "size":
        model.set_input_size(img_size=(48, 32))
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    again = load(save(model, tmp_path / "model"))
    through_timm = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    assert torch.equal(through_timm(images), model(images))
    assert torch.equal(load(save(through_timm, tmp_path / "again"))(images), model(images))


def test_timm_gives_pretrained_weights_another_number_of_classes(plain, tmp_path):
    """Both heads are new then, the rest is the file's."""
    save(plain, tmp_path / "model")
    other = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=3)
    assert other.head.out_features == other.head_dist.out_features == 3
    assert torch.equal(other.dist_token, plain.dist_token)
