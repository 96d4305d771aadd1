"""The analytic counter against the paper's numbers and against torch's FlopCounterMode."""

from __future__ import annotations

import pytest
import timm
import torch
from foreign import foreign
from torch.utils.flop_counter import FlopCounterMode

from bvit_interp.errors import UserError
from bvit_interp.models.cost import flops, flops_per_step, parameters, parameters_by_part
from bvit_interp.models.looped import CalledSteps
from bvit_interp.models.unroll import unroll


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "linear", "with_attention"),
    [
        ("bvit_small_patch16_224", 8.482, 9.20),
        ("bvit_base_patch16_224", 33.697, 35.13),
        ("bvit_large_patch16_224", 119.294, 123.1),
        ("vit_rms_base_patch16_224", 33.697, 35.13),
        ("bvit_base_te_patch16_224", 33.697, 35.13),
    ],
)
def test_giga_flops_of_the_paper(name, linear, with_attention):
    model = on_meta(name)
    assert flops(model, count_attention=False) / 1e9 == pytest.approx(linear, abs=5e-4)
    assert flops(model, count_attention=True) / 1e9 == pytest.approx(with_attention, abs=0.05)


def test_base_written_out_on_paper():
    width, tokens, patches = 768, 197, 196
    block = 2 * tokens * (3 * width * width + width * width + 2 * 4 * width * width)
    rest = 2 * patches * 16 * 16 * 3 * width + 2 * width * 1000
    model = on_meta("bvit_base_patch16_224")
    assert flops_per_step(model, count_attention=False) == block == 2_788_687_872
    assert flops(model, count_attention=False) == rest + 12 * block
    assert flops_per_step(model, count_attention=True) == block + 4 * tokens**2 * width


def test_registers_are_tokens():
    model = on_meta("bvit_base_reg4_patch16_224")
    assert flops(model, count_attention=False) / 1e9 == pytest.approx(34.38, abs=5e-3)


def test_the_distilled_model_has_a_token_and_a_head_more():
    model = on_meta("deit_base_distilled_patch16_224")
    assert flops(model, count_attention=False) / 1e9 == pytest.approx(33.87, abs=5e-3)


def test_cost_of_early_steps():
    model = on_meta("bvit_base_patch16_224")
    printed = {6: 16.965, 7: 19.754, 8: 22.542, 9: 25.331, 10: 28.120, 11: 30.908, 12: 33.697}
    for t, expected in printed.items():
        assert flops(model, count_attention=False, steps=t) / 1e9 == pytest.approx(
            expected, abs=5.01e-4
        )
        assert flops(model, count_attention=False, steps=t) / 1e9 == pytest.approx(
            0.232747 + 2.788688 * t, abs=1e-5
        )
    assert flops(model, count_attention=False, steps=24) / 1e9 == pytest.approx(
        0.232747 + 2.788688 * 24, abs=1e-4
    )


@pytest.mark.parametrize("fused", [True, False])
def test_equal_to_what_torch_counts_in_a_forward_pass(any_model, images, fused):
    for module in any_model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    with FlopCounterMode(display=False) as counter:
        any_model(images[:1])
    counted = {
        str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()
    }
    matrix = sum(
        counted.pop(operation, 0) for operation in ("aten.addmm", "aten.mm", "aten.convolution")
    )
    assert flops(any_model, count_attention=False) == matrix
    if counted:  # a fused kernel that this torch does not count leaves nothing to compare with
        assert flops(any_model, count_attention=True) == matrix + sum(counted.values())
    else:
        assert fused


def test_other_numbers_of_steps_equal_what_torch_counts(tiny_hybrid, images):
    unrolled = unroll(tiny_hybrid, steps=9)
    with FlopCounterMode(display=False) as counter:
        unrolled(images[:1])
    counted = {
        str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()
    }
    assert (
        flops(tiny_hybrid, count_attention=False, steps=9)
        == counted["aten.addmm"] + counted["aten.convolution"]
    )


def test_a_loop_that_is_not_ours_written_out_on_paper():
    """16 patches of 8 x 8 px, width 32, an FFN of 64, five steps; the head reads one row."""
    view = unroll(foreign("encoder"))
    step, rest = 2 * 16 * (4 * 32 * 32 + 2 * 32 * 64), 2 * 16 * 3 * 8 * 8 * 32 + 2 * 32 * 10
    products = 2 * 2 * 16 * 16 * 32
    for steps, count in ((None, 5), (5, 5), (2, 2)):
        assert flops(view, count_attention=False, steps=steps) == rest + count * step
        assert flops(view, count_attention=True, steps=steps) == rest + count * (step + products)


def test_every_step_costs_what_its_own_block_costs(make):
    """Three blocks in turn, of which the second gets an FFN of 8 neurons."""
    model = make(num_blocks=3, num_steps=2)
    narrow = list(model.blocks.children())[1]
    narrow.mlp.fc1, narrow.mlp.fc2 = torch.nn.Linear(32, 8), torch.nn.Linear(8, 32)
    costs = [flops_per_step(model, count_attention=False, step=t) for t in range(1, 7)]
    wide = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 128)
    assert costs == [wide, wide - 2 * 17 * 2 * 32 * 120, wide] * 2


def test_the_unroll_costs_what_the_model_costs(any_model):
    view = unroll(any_model)
    assert flops(view, count_attention=True) == flops(any_model, count_attention=True)
    assert parameters(view) == parameters(any_model)
    assert flops(view, count_attention=True, steps=2) == flops(
        any_model, count_attention=True, steps=2
    )


def test_shared_parameters_count_once():
    assert parameters(on_meta("bvit_base_patch16_224")) == 8_598_760


def test_what_cannot_be_counted_is_refused(tiny, stacked):
    with pytest.raises(UserError, match="steps must be >= 1"):
        flops(tiny, count_attention=False, steps=0)
    with pytest.raises(UserError, match=r"step 4 .* 1\.\.3"):
        flops(stacked, count_attention=False, steps=4)
    with pytest.raises(UserError, match="step 0"):
        flops_per_step(tiny, count_attention=False, step=0)
    with pytest.raises(UserError, match="attention-pooling"):
        flops(on_meta("vit_base_patch16_siglip_224"), count_attention=False)
    tiny.patch_embed = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity"):
        flops(tiny, count_attention=False)


def test_parts_of_a_model_with_every_part(make):
    """Registers, a distillation token and its head, a time embedding; LayerNorm and attention
    pooling."""
    width = 32
    parts = parameters_by_part(make(name="bvit_small_distilled_patch16_224", reg_tokens=2))
    assert parts["embedding"] == (3 * 8 * 8 + 1) * width + (16 + 2 + 1 + 1 + 2) * width
    assert parts["head"] == 2 * (width * 10 + 10)
    assert parts["norm"] == width
    timed = parameters_by_part(make(name="bvit_small_te_patch16_224", num_steps=5))
    plain = parameters_by_part(make(num_steps=5))
    assert timed["blocks"] - plain["blocks"] == 5 * width
    pooled = make(name="vit_tiny_patch16_224", depth=2, global_pool="map", class_token=False)
    found = parameters_by_part(pooled)
    assert found["head"] == sum(
        p.numel() for part in (pooled.attn_pool, pooled.head) for p in part.parameters()
    )
    assert sum(found.values()) == parameters(pooled)
    averaged = parameters_by_part(make(name="vit_tiny_patch16_224", depth=2, global_pool="avg"))
    assert averaged["norm"] == 2 * width  # fc_norm's weight and bias


@pytest.mark.parametrize("count_attention", [False, True])
def test_weights_without_a_bias_count_in_a_model_unrolled_by_call(count_attention):
    """torch multiplies them with another operation."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 3}
    stack = timm.create_model("vit_tiny_patch16_224", **size, qkv_bias=False).eval()
    by_call = unroll(stack, loop="blocks")
    assert isinstance(by_call, CalledSteps)
    assert flops(by_call, count_attention=count_attention) == flops(
        stack, count_attention=count_attention
    )
