"""A BViT behind timm's interface: names, sizes, checkpointing, intermediates, pruning, loading."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from bvit_interp.models.bvit import checkpoint_filter_fn
from bvit_interp.models.cost import parameters


def forward_states(model, images):
    """z_0..z_T by calling the stored block in a loop, with the model's own modules."""
    states = [model._pos_embed(model.patch_embed(images))]
    for block in model.blocks:
        states.append(block(states[-1]))
    return states


def test_names_are_registered():
    sizes, variants = ("small", "base", "large"), ("", "te_", "reg4_", "fl_", "sc_", "distilled_")
    assert set(timm.list_models("bvit_*")) == {
        f"bvit_{s}_{v}patch16_224" for s in sizes for v in variants
    }
    stacks = {f"vit_rms_{s}_{v}patch16_224" for s in sizes for v in ("", "distilled_")}
    assert set(timm.list_models("vit_rms_*")) == stacks


@pytest.mark.parametrize(
    ("size", "width", "heads", "steps"),
    [("small", 384, 6, 12), ("base", 768, 12, 12), ("large", 1024, 16, 24)],
)
def test_registered_shapes(size, width, heads, steps):
    with torch.device("meta"):
        model = timm.create_model(f"bvit_{size}_patch16_224")
        stack = timm.create_model(f"vit_rms_{size}_patch16_224")
    assert (model.embed_dim, model.blocks[0].attn.num_heads, len(model.blocks)) == (
        width,
        heads,
        steps,
    )
    assert len(stack.blocks) == len(dict(stack.blocks.named_children())) == steps
    assert len(dict(model.blocks.named_children())) == 1


def test_the_choices_of_the_paper_are_the_defaults(tiny):
    block = tiny.get_submodule("blocks.0")
    biases = sorted(name for name, _ in block.named_parameters() if name.endswith("bias"))
    # none on the norms
    assert biases == [
        "attn.proj.bias",
        "attn.qkv.bias",
        "mlp.fc1.bias",
        "mlp.fc2.bias",
    ]
    assert isinstance(block.mlp.act, nn.GELU)
    assert block.mlp.act.approximate == "none"
    assert isinstance(block.drop_path1, nn.Identity)
    assert isinstance(block.ls1, nn.Identity)
    assert isinstance(block.attn.q_norm, nn.Identity)


@pytest.mark.parametrize(
    "name", ["bvit_small_patch16_224", "bvit_small_te_patch16_224", "bvit_small_reg4_patch16_224"]
)
def test_size_options(make, name):
    model = make(name=name, img_size=(48, 32), patch_size=16, in_chans=1, num_classes=3)
    assert model.pos_embed.shape == (1, 1 + 3 * 2, 32)
    assert model(torch.randn(2, 1, 48, 32)).shape == (2, 3)
    with pytest.raises(AssertionError):
        model(torch.randn(2, 1, 32, 48))


@pytest.mark.parametrize("name", ["bvit_small_patch16_224", "bvit_small_reg4_patch16_224"])
def test_dynamic_image_size(make, images, name):
    fixed, dynamic = make(name=name), make(name=name, dynamic_img_size=True)
    torch.testing.assert_close(dynamic(images), fixed(images))
    assert dynamic.forward_features(torch.randn(2, 3, 48, 64)).shape[1] == model_tokens(
        dynamic, 6 * 8
    )


def model_tokens(model, patches):
    return 1 + model.num_reg_tokens + patches


def test_gradient_checkpointing_changes_nothing(any_model, images):
    """timm's own `checkpoint_seq(self.blocks, x)` would run every stored block once: one step."""
    model = any_model.train()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        results.append((output.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, msg=name)


def test_gradient_checkpointing_recomputes_every_step(tiny, images):
    calls = []
    # first in the block: torch stops recomputing when it has enough
    norm = tiny.get_submodule("blocks.0.norm1")
    handle = norm.register_forward_hook(lambda *_: calls.append(1))
    tiny.train().set_grad_checkpointing(True)
    tiny(images).sum().backward()
    handle.remove()
    assert len(calls) == 24


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_masks_reach_every_step(tiny, images, checkpointing):
    tiny.set_grad_checkpointing(checkpointing)
    mask = torch.zeros(17, 17)
    mask[:, 9:] = float("-inf")  # the last patches are never attended to, so they cannot matter
    changed = images.clone()
    changed[:, :, 24:] += 1.0  # last row of patches: tokens 13..16
    masked = tiny(images, attn_mask=mask)
    torch.testing.assert_close(masked, tiny(changed, attn_mask=mask))
    assert (tiny(images) - tiny(changed)).abs().max() > 1e-3
    assert (tiny(images) - masked).abs().max() > 1e-3


@pytest.mark.parametrize("fixture", ["tiny", "tiny_reg4"])
def test_set_input_size_resamples_the_grid_only(request, fixture):
    model = request.getfixturevalue(fixture)
    before = model.pos_embed.detach().clone()
    prefix = model.num_prefix_tokens
    model.set_input_size(img_size=(64, 48))
    assert model.pos_embed.shape == (1, 1 + 8 * 6, 32)
    assert torch.equal(model.pos_embed[:, :1], before[:, :1])
    assert model.num_prefix_tokens == prefix
    grid = before[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(
        grid, size=(8, 6), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(model.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 10)


def test_set_input_size_that_fails_leaves_the_registers_counted(tiny_reg4):
    with pytest.raises(TypeError):
        tiny_reg4.set_input_size(img_size="large")
    assert tiny_reg4.num_prefix_tokens == 5


@pytest.mark.parametrize(
    "fixture", ["tiny", "tiny_te", "tiny_hybrid", "tiny_fl", "tiny_sc", "tiny_sc_block"]
)
def test_forward_intermediates_are_the_states_after_each_step(request, images, fixture):
    model = request.getfixturevalue(fixture)
    states = forward_states(model, images)
    features, maps = model.forward_intermediates(
        images, output_fmt="NLC", return_prefix_tokens=True
    )
    assert len(maps) == len(model.blocks)
    for state, (patches, cls) in zip(states[1:], maps, strict=True):
        assert torch.equal(state, torch.cat([cls, patches], dim=1))
    assert torch.equal(features, model.forward_features(images))


def test_forward_intermediates_by_index_stop_early(tiny_te, images):
    states = forward_states(tiny_te, images)
    maps = tiny_te.forward_intermediates(
        images, indices=[1, 5], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    assert torch.equal(maps[0], states[2][:, 1:])
    assert torch.equal(maps[1], states[6][:, 1:])


def test_features_only_gives_maps_of_the_asked_steps(tiny, images):
    features = timm.create_model(
        "bvit_small_patch16_224",
        features_only=True,
        out_indices=(1, 5, 11),
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_heads=4,
    ).eval()
    features.model.load_state_dict(tiny.state_dict(), strict=False)
    assert features.feature_info.channels() == [32, 32, 32]
    states = forward_states(tiny, images)
    maps = features(images)
    for feature_map, step in zip(maps, (2, 6, 12), strict=True):
        expected = states[step][:, 1:].transpose(1, 2).reshape(4, 32, 4, 4)
        assert torch.equal(feature_map, expected)


@pytest.mark.parametrize("fixture", ["tiny", "tiny_te", "tiny_hybrid", "tiny_fl", "tiny_sc"])
def test_prune_intermediate_layers_keeps_the_first_steps(request, images, fixture):
    model = request.getfixturevalue(fixture)
    state = forward_states(model, images)[4]
    assert model.prune_intermediate_layers([3], prune_head=False) == [3]
    assert len(model.blocks) == 4
    assert torch.equal(model(images), model.forward_head(model.norm(state)))


def test_reset_classifier(tiny, images):
    features = tiny.forward_head(tiny.forward_features(images), pre_logits=True)
    tiny.reset_classifier(3)
    assert tiny(images).shape == (4, 3)
    tiny.reset_classifier(0)
    assert torch.equal(tiny(images), features)


def test_deepcopy_and_pickle(any_model, images):
    for twin in (copy.deepcopy(any_model), pickle.loads(pickle.dumps(any_model))):
        assert torch.equal(twin(images), any_model(images))
        own = {id(p) for p in any_model.parameters()}
        assert not own & {id(p) for p in twin.parameters()}
        assert parameters(twin) == parameters(any_model)


def test_state_dict_holds_the_block_once(tiny, tiny_te, tiny_hybrid):
    keys = list(tiny.state_dict())
    assert len(keys) == 17
    assert {key.split(".")[1] for key in keys if key.startswith("blocks")} == {"0"}
    assert set(tiny_te.state_dict()) == {*keys, "blocks.step_embed"}
    assert {key.split(".")[1] for key in tiny_hybrid.state_dict() if key.startswith("blocks")} == {
        "0",
        "1",
    }


@pytest.mark.parametrize("fixture", ["tiny", "tiny_reg4"])
def test_pretrained_weights_of_another_size_are_resampled(request, make, fixture):
    model = request.getfixturevalue(fixture)
    name = model.pretrained_cfg["architecture"]
    larger = make(name=name, img_size=64, seed=1)
    fitted = checkpoint_filter_fn(model.state_dict(), larger)
    larger.load_state_dict(fitted)
    grid = model.pos_embed[:, 1:].detach().reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(
        grid, size=(8, 8), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(larger.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(larger.pos_embed[:, :1], model.pos_embed[:, :1])
    assert larger.num_prefix_tokens == model.num_prefix_tokens


@pytest.mark.parametrize("infix", ["", "reg4_"])
def test_timm_loads_pretrained_files_of_another_size(make, tmp_path, infix):
    model = make(name=f"bvit_small_{infix}patch16_224")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    larger = timm.create_model(
        f"bvit_small_{infix}patch16_224",
        pretrained=True,
        img_size=64,
        patch_size=8,
        embed_dim=32,
        num_heads=4,
        num_classes=10,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "num_classes": 10},
    )
    assert larger.pos_embed.shape == (1, 65, 32)
    assert torch.equal(larger.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_no_weight_decay_on_tokens_and_embeddings(tiny_te):
    assert {"pos_embed", "cls_token", "reg_token", "blocks.step_embed"} <= tiny_te.no_weight_decay()
