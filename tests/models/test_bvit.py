"""The recurrent model against hand-written loops, the paper's parameter counts, and timm's
interface."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from bvit_interp.models.bvit import BViT, Steps

COUNTS = {  # SCIENCE 2.2, Tables 1-3 of the paper
    "bvit_small_patch16_224": 2_530_408,
    "bvit_base_patch16_224": 8_598_760,
    "bvit_large_patch16_224": 14_610_408,
    "bvit_base_te_patch16_224": 8_598_760 + 9_216,
    "bvit_base_reg4_patch16_224": 8_598_760 + 3_072,
    "vit_rms_small_patch16_224": 22_041_064,
    "vit_rms_base_patch16_224": 86_548_456,
    "vit_rms_large_patch16_224": 304_276_456,
}


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def forward_states(model, images):
    """z_0..z_T by calling the stored block in a loop, with the model's own modules."""
    states = [model._pos_embed(model.patch_embed(images))]
    for block in model.blocks:
        states.append(block(states[-1]))
    return states


# ---- parameter counts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert size_of(timm.create_model(name)) == count


@pytest.mark.parametrize(
    ("blocks", "count"),
    [(2, 4_304_104), (3, 6_077_800), (4, 7_851_496), (6, 11_398_888), (12, 22_041_064)],
)
def test_parameter_counts_of_hybrids(blocks, count):
    with torch.device("meta"):
        model = timm.create_model(
            "bvit_small_patch16_224", num_blocks=blocks, num_steps=12 // blocks
        )
    assert size_of(model) == count
    assert len(model.blocks) == 12


def test_block_and_backbone_counts():
    with torch.device("meta"):
        model = timm.create_model("bvit_base_patch16_224")
    assert size_of(model.blocks) == 7_086_336
    model.reset_classifier(0)
    assert size_of(model) == 7_829_760


@pytest.mark.parametrize("infix", ["", "te_", "reg4_"])
def test_models_are_born_on_the_asked_device_and_dtype(infix):
    model = timm.create_model(f"bvit_small_{infix}patch16_224", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


# ---- the recurrence ------------------------------------------------------------------------------


def test_forward_equals_the_equations_written_out(tiny, images, by_hand):
    sites = by_hand.run(tiny, images, [tiny.blocks[0]] * 12)
    torch.testing.assert_close(
        tiny(images), by_hand.logits(tiny, sites[-1]["resid_post"]), atol=1e-4, rtol=1e-4
    )


def test_a_loop_over_the_block_is_bit_equal(tiny, images):
    z = tiny._pos_embed(tiny.patch_embed(images))
    stored = tiny.get_submodule("blocks.0")
    for _ in range(12):
        z = stored(z)
    assert torch.equal(tiny(images), tiny.forward_head(tiny.norm(z)))


def test_time_embedding_follows_every_step_also_the_last(tiny_te, images, by_hand):
    stored = tiny_te.get_submodule("blocks.0")
    table = tiny_te.blocks.step_embed
    assert table.shape == (12, 32)
    sites = by_hand.run(tiny_te, images, [stored] * 12, table)
    z = tiny_te.norm(sites[-1]["resid_post"])
    torch.testing.assert_close(tiny_te.forward_features(images), z, atol=1e-4, rtol=1e-4)
    without_last = tiny_te.norm(sites[-1]["resid_post"] - table[11])
    assert (tiny_te.forward_features(images) - without_last).abs().max() > 0.01


def test_time_embedding_starts_at_zero_so_that_te_begins_as_the_baseline(tiny, images):
    fresh = timm.create_model(
        "bvit_small_te_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_heads=4,
        num_classes=10,
    ).eval()
    assert not fresh.blocks.step_embed.any()
    missing, unexpected = fresh.load_state_dict(tiny.state_dict(), strict=False)
    assert missing == ["blocks.step_embed"]
    assert not unexpected
    assert torch.equal(fresh(images), tiny(images))


def test_registers_follow_cls_have_no_position_and_are_dropped_at_read_out(
    tiny_reg4, images, by_hand
):
    assert tiny_reg4.pos_embed.shape == (1, 17, 32)
    z_0 = tiny_reg4._pos_embed(tiny_reg4.patch_embed(images))
    assert z_0.shape == (4, 1 + 4 + 16, 32)
    assert torch.equal(z_0[:, 1:5], tiny_reg4.reg_token.expand(4, -1, -1))
    torch.testing.assert_close(z_0, by_hand.tokens(tiny_reg4, images), atol=1e-5, rtol=1e-5)
    sites = by_hand.run(tiny_reg4, images, [tiny_reg4.blocks[0]] * 12)
    expected = by_hand.logits(tiny_reg4, sites[-1]["resid_post"])
    torch.testing.assert_close(tiny_reg4(images), expected, atol=1e-4, rtol=1e-4)
    mean = tiny_reg4.pool(tiny_reg4.forward_features(images), pool_type="avg")
    torch.testing.assert_close(mean, tiny_reg4.forward_features(images)[:, 5:].mean(1))


def test_registers_differ_from_timms_two_layouts():
    kwargs = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "num_heads": 12, "depth": 1}
    with torch.device("meta"):
        ours = size_of(timm.create_model("bvit_base_reg4_patch16_224"))
        timms = [
            timm.models.VisionTransformer(
                reg_tokens=4, norm_layer=timm.layers.RmsNorm, **kwargs, **layout
            )
            for layout in ({}, {"no_embed_class": True})
        ]
    assert [size_of(model) - ours for model in timms] == [4 * 768, -768]


@pytest.mark.parametrize(
    ("order", "indices"), [("cycle", [0, 1, 0, 1, 0, 1]), ("repeat", [0, 0, 0, 1, 1, 1])]
)
def test_order_of_hybrids(make, images, by_hand, order, indices):
    model = make(num_blocks=2, num_steps=3, order=order)
    stored = [model.get_submodule("blocks.0"), model.get_submodule("blocks.1")]
    sites = by_hand.run(model, images, [stored[i] for i in indices])
    torch.testing.assert_close(
        model(images), by_hand.logits(model, sites[-1]["resid_post"]), atol=1e-4, rtol=1e-4
    )
    assert [model.blocks[i] is stored[index] for i, index in enumerate(indices)] == [True] * 6


def test_the_two_orders_are_different_models(make, images):
    cycled, repeated = (
        make(num_blocks=2, num_steps=3, order=order) for order in ("cycle", "repeat")
    )
    repeated.load_state_dict(cycled.state_dict())
    assert (cycled(images) - repeated(images)).abs().max() > 0.01


def test_hybrid_with_time_embedding_has_a_row_for_each_application(make, images, by_hand):
    model = make(num_blocks=2, num_steps=3, step_embed=True)
    stored = [model.get_submodule("blocks.0"), model.get_submodule("blocks.1")]
    assert model.blocks.step_embed.shape == (6, 32)
    sites = by_hand.run(model, images, stored * 3, model.blocks.step_embed)
    torch.testing.assert_close(
        model(images), by_hand.logits(model, sites[-1]["resid_post"]), atol=1e-4, rtol=1e-4
    )


def stack_of_copies(model, depth):
    """A plain timm ViT (its own code path) whose blocks are copies of the recurrent model's
    block."""
    stack = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_heads=4,
        num_classes=10,
        depth=depth,
        norm_layer=timm.layers.RmsNorm,
    ).eval()
    weights = model.state_dict()
    for i in range(depth):
        weights |= {
            k.replace("blocks.0.", f"blocks.{i}."): v for k, v in model.state_dict().items()
        }
    stack.load_state_dict(weights)
    return stack


def test_one_step_equals_a_stack_of_one_block(make, images):
    model = make(num_steps=1)
    assert torch.equal(model(images), stack_of_copies(model, 1)(images))


def test_a_stack_of_copies_equals_the_recurrent_model(tiny, images):
    stack = stack_of_copies(tiny, 12)
    assert size_of(stack) > 5 * size_of(tiny)
    assert torch.equal(tiny(images), stack(images))


def test_gradient_of_the_shared_block_is_the_sum_over_steps(tiny, images):
    stack = stack_of_copies(tiny, 12)
    for model in (tiny, stack):
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    for name, parameter in tiny.get_submodule("blocks.0").named_parameters():
        each = torch.stack([stack.get_parameter(f"blocks.{i}.{name}").grad for i in range(12)])
        torch.testing.assert_close(parameter.grad, each.sum(0), atol=1e-5, rtol=1e-3)
        assert (parameter.grad - each[11]).abs().max() > 1e-4
    torch.testing.assert_close(tiny.pos_embed.grad, stack.pos_embed.grad)


def test_gradients_reach_every_parameter(any_model, images):
    any_model(images).square().sum().backward()
    assert [
        name for name, p in any_model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


# ---- Steps and errors ----------------------------------------------------------------------------


def test_steps_answer_by_application(tiny_hybrid):
    steps = tiny_hybrid.blocks
    first, second = steps.named_children()
    assert len(steps) == 6
    assert len(list(steps)) == 6
    assert [block is first[1] for block in steps] == [True, False] * 3
    assert steps[-1] is second[1]
    assert len(steps[:3]) == 3
    assert [block is first[1] for block in steps[:3]] == [True, False, True]
    assert len(dict(steps[:1].named_children())) == 1
    with pytest.raises(IndexError):
        steps[6]
    with pytest.raises(IndexError, match="cut at the end"):
        steps[2:]
    assert [steps.block_index(i) for i in (6, 7, 8)] == [0, 1, 0]


def test_time_embedding_beyond_the_last_row_stays(tiny_te):
    assert [tiny_te.blocks.embed_index(i) for i in (0, 11, 12, 23)] == [0, 11, 11, 11]


def test_a_timed_block_outside_its_model_says_what_it_needs(tiny_te):
    with pytest.raises(ValueError, match="needs step_embed"):
        tiny_te.blocks[0](torch.zeros(1, 17, 32))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "num_blocks and num_steps must be >= 1, got 1 and 0"),
        ({"num_blocks": -1}, "got -1 and 12"),
        ({"order": "random"}, "'cycle' or 'repeat', got 'random'"),
        ({"depth": 12}, "no depth: give num_blocks and num_steps"),
        ({"no_embed_class": True}, "CLS token with a position"),
        ({"pos_embed": "none"}, "CLS token with a position"),
        ({"class_token": False, "global_pool": "avg"}, "CLS token with a position"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BViT(embed_dim=32, num_heads=4, img_size=32, **kwargs)


def test_no_module_list_of_one_block_repeated(tiny):
    """`ModuleList([block] * T)` would show 12 names for one module; the container shows one."""
    assert isinstance(tiny.blocks, Steps)
    assert [n for n, _ in tiny.named_modules(remove_duplicate=False) if n.endswith("mlp.act")] == [
        "blocks.0.mlp.act"
    ]
