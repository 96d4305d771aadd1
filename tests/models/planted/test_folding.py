"""A stack in one block, against the stack."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from bvit_interp.models.planted.folding import fold
from bvit_interp.probes.probe import Probe

DEPTH, WIDTH, HEADS = 3, 16, 2


def make_stack(**kwargs):
    """A stack without norms whose every parameter is random."""
    stack = timm.create_model(
        "vit_tiny_patch16_224",
        **{
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": WIDTH,
            "num_heads": HEADS,
            "depth": DEPTH,
            "num_classes": 5,
            "norm_layer": nn.Identity,
            **kwargs,
        },
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in stack.parameters():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    return stack


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_every_step_is_a_block_of_the_stack(images):
    stack = make_stack()
    folded = fold(stack)
    assert folded.blocks[0] is folded.blocks[-1]
    with torch.no_grad():
        logits, states = Probe(stack).run(images, "resid_post")
        own_logits, own_states = Probe(folded).run(images, "resid_post")
    assert torch.allclose(own_logits, logits, atol=2e-6)
    first = 4 + DEPTH
    own = own_states["resid_post"][..., first : first + WIDTH]
    expected = states["resid_post"]
    assert torch.allclose(own[:, :, 0], expected[:, :, 0], atol=2e-6)  # CLS
    assert torch.allclose(own[:, :, 2:], expected[:, :, 1:], atol=2e-6)  # patches
    assert (own[:, :, 1].abs() < 1e-30).all()  # the dummy token


def test_the_error_falls_with_the_square_of_the_anchor(images):
    stack = make_stack()
    with torch.no_grad():
        answer = stack(images)
        errors = [(fold(stack, 2.0**k)(images) - answer).norm().item() for k in (6, 8, 10)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.25)


def test_sizes_are_those_of_the_appendix():
    """L heads h, L hidden units m and a counter; used channels d + L + O(1)."""
    folded = fold(make_stack())
    block = folded.blocks[0]
    assert block.attn.num_heads == DEPTH * HEADS
    used = block.mlp.fc1.weight.abs().sum(1) > 0
    assert used.sum() <= DEPTH * (4 * WIDTH + 1) + 2 * (DEPTH - 1)
    read = block.attn.qkv.weight.abs().sum(0) > 0
    assert read.sum() <= WIDTH + DEPTH + 4


@pytest.mark.parametrize(
    "kind",
    [
        {"norm_layer": nn.LayerNorm},
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"init_values": 0.1},
        {"act_layer": nn.ReLU},
        {"global_pool": "avg"},
        {"reg_tokens": 1},
    ],
)
def test_other_stacks_are_refused(kind):
    with pytest.raises(ValueError, match="is wanted"):
        fold(make_stack(**kind))
