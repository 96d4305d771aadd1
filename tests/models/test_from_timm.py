"""A timm ViT of one block as a `BViT`: bit-equal to the loop written by hand, or refused."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.models.bvit import BViT
from bvit_interp.models.checkpoint import class_names, load, save
from bvit_interp.models.from_timm import from_timm

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "num_classes": 10}


def vit(depth=1, **kwargs):
    model = VisionTransformer(**{**SIZE, "depth": depth, **kwargs}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(model, images, steps):
    """The loop, without timm's forward of features."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for _ in range(steps):
        block = model.blocks[0]
        tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.forward_head(model.norm(tokens))


KINDS = {
    "plain": {},
    "RMSNorm": {"norm_layer": RmsNorm},
    "LayerNorm of torch": {"norm_layer": partial(nn.LayerNorm, eps=1e-6)},
    "LayerScale": {"init_values": 0.3},
    "norms of q and k": {"qk_norm": True},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "CLIP": {"pre_norm": True, "act_layer": "quick_gelu"},
    "tanh": {"act_layer": "gelu_tanh"},
    "mean of patches": {"global_pool": "avg"},
    "no final norm": {"final_norm": False},
    "registers": {"reg_tokens": 3},
    "registers without position": {"reg_tokens": 3, "no_embed_class": True},
    "CLS without position": {"no_embed_class": True},
    "oblong": {"img_size": (48, 32)},
    "narrow": {"mlp_ratio": 1.5, "in_chans": 1},
    "attention pooling": {"global_pool": "map"},
    "dropout": {"drop_path_rate": 0.2, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1},
    "features": {"num_classes": 0},
}


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_the_output_is_that_of_the_loop(kwargs, tmp_path):
    model = vit(**kwargs)
    made = from_timm(model, steps=5)
    images = torch.randn(3, model.in_chans, *model.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(made(images), by_hand(model, images, 5))
        assert not torch.equal(made(images), by_hand(model, images, 4))
        assert torch.equal(load(save(made, tmp_path / "made"))(images), made(images))
    assert isinstance(made, BViT)
    assert len(made.blocks) == 5


def test_blocks_that_share_their_parameters():
    model = vit()
    model.blocks = nn.Sequential(*[model.blocks[0]] * 4)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        made = from_timm(model)
        assert torch.equal(made(images), model(images))
        assert torch.equal(from_timm(model, steps=6)(images), by_hand(model, images, 6))


def test_weights_are_its_own_and_the_model_stays():
    model = vit(reg_tokens=2)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    made = from_timm(model.train(), steps=3)
    assert made.training
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_normalisation_and_class_names_are_kept():
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", **SIZE, depth=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list("abcdefghij")}
    made = from_timm(model, steps=2)
    assert tuple(made.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert class_names(made) == list("abcdefghij")


class Own(VisionTransformer):
    """A user's subclass, whose forward may be any."""


def with_hidden_change():
    """A block that looks like timm's and computes something else."""
    model = vit()
    plain = model.blocks[0].forward
    model.blocks[0].forward = lambda tokens: plain(tokens) + 1
    return model


def with_hook():
    model = vit()
    model.blocks[0].register_forward_hook(lambda module, given, output: output + 1)
    return model


REFUSED = {
    "several blocks": (lambda: vit(depth=3), "3 blocks with parameters of their own"),
    "subclass": (lambda: Own(**SIZE, depth=1), "it is a Own"),
    "post-norm": (lambda: vit(block_fn=ResPostBlock), "its block is a ResPostBlock"),
    "parallel": (lambda: vit(block_fn=ParallelScalingBlock), "is a ParallelScalingBlock"),
    "no CLS": (lambda: vit(class_token=False, global_pool="avg"), "lacks a CLS token"),
    "no positions": (lambda: vit(pos_embed="none"), "lacks a CLS token or position"),
    "other eps": (lambda: vit(norm_layer=partial(nn.LayerNorm, eps=1e-3)), "norm1 is .*eps=0.001"),
    "other norm": (lambda: vit(norm_layer=nn.RMSNorm), "its norm is RMSNorm; known are layernorm"),
    "other activation": (lambda: vit(act_layer=nn.Softplus), "its activation is Softplus"),
    "hook": (with_hook, "a hook on blocks.0 may change"),
    "hidden change": (with_hidden_change, "its output on two images is not that of the loop"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_bvit_has_not_is_refused_with_the_reason(kind):
    make, reason = REFUSED[kind]
    with pytest.raises(UserError, match=reason) as caught:
        from_timm(make(), steps=3)
    assert str(caught.value).startswith("the model has no BViT with the same output: ")


def test_numbers_of_steps():
    with pytest.raises(UserError, match="give steps"):
        from_timm(vit())
    with pytest.raises(UserError, match="steps must be >= 1, got 0"):
        from_timm(vit(), steps=0)
