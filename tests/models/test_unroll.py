"""The tied unroll: bit-equal, one module a step, no parameter of its own, nothing shared but
parameters."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models.checkpoint import save
from bvit_interp.models.unroll import is_unrolled, run_on, unroll


def stored_blocks(model):
    return [block for _, block in model.blocks.named_children()]


def test_output_is_bit_equal(any_model, images):
    view = unroll(any_model)
    assert torch.equal(view(images), any_model(images))
    assert len(view.blocks) == len(any_model.blocks)
    assert is_unrolled(view)
    assert not is_unrolled(any_model)


def test_output_is_bit_equal_in_training_mode_and_under_checkpointing(any_model, images):
    any_model.train().set_grad_checkpointing(True)
    view = unroll(any_model)
    assert view.training
    assert view.grad_checkpointing
    assert torch.equal(view(images), any_model(images))


def test_every_parameter_is_the_models_own(any_model):
    view = unroll(any_model)
    own = {id(parameter) for parameter in any_model.parameters()}
    assert {id(parameter) for parameter in view.parameters()} == own
    for name, parameter in view.named_parameters(remove_duplicate=False):
        assert id(parameter) in own, name


def test_every_step_has_the_parameters_of_its_block(tiny_hybrid):
    first, second = stored_blocks(tiny_hybrid)
    for i, block in enumerate(unroll(tiny_hybrid).blocks):
        assert block.mlp.fc1.weight is (first, second)[i % 2].mlp.fc1.weight


def test_no_memory_for_weights(any_model):
    view = unroll(any_model, steps=3)
    storages = {tensor.untyped_storage().data_ptr() for tensor in any_model.parameters()}
    assert {
        tensor.untyped_storage().data_ptr() for tensor in view.state_dict().values()
    } == storages


def test_every_module_is_a_clone_and_none_serves_two_steps(any_model):
    view = unroll(any_model)
    assert not {id(module) for module in view.modules()} & {
        id(module) for module in any_model.modules()
    }
    paths = [name for name, _ in view.named_modules(remove_duplicate=False)]
    assert len(paths) == len(list(view.modules()))


def test_hooks_left_on_the_view_do_not_reach_the_model(any_model, images):
    """The autouse fixture would see a hook on the model; here the clean output is checked as
    well."""
    expected = any_model(images)
    view = unroll(any_model)
    for module in view.modules():
        module.register_forward_hook(lambda module, args, output: output * 1.1)
    assert not torch.equal(view(images), expected)
    assert torch.equal(any_model(images), expected)


def test_edits_of_the_models_weights_are_seen(any_model, images):
    view = unroll(any_model)
    before = view(images)
    with torch.no_grad():
        stored_blocks(any_model)[0].mlp.fc1.weight.mul_(1.5)
        any_model.head.bias.add_(1.0)
    assert not torch.equal(view(images), before)
    assert torch.equal(view(images), any_model(images))


def test_an_optimiser_step_on_the_view_trains_the_model(tiny, images):
    view = unroll(tiny)
    before = tiny(images).detach()
    optimiser = torch.optim.SGD(view.parameters(), lr=0.1)
    view(images).square().mean().backward()
    optimiser.step()
    assert not torch.equal(tiny(images), before)
    assert torch.equal(view(images), tiny(images))


def test_gradients_flow_to_the_model(any_model, images):
    any_model(images).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in any_model.named_parameters()}
    any_model.zero_grad()
    unroll(any_model)(images).square().sum().backward()
    for name, parameter in any_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_each_step_is_the_block_applied_to_the_step_before(tiny, images, by_hand):
    sites = by_hand.run(tiny, images, stored_blocks(tiny) * 12)
    view = unroll(tiny)
    seen = {}
    for t, block in enumerate(view.blocks, start=1):
        block.mlp.act.register_forward_hook(lambda m, a, output, t=t: seen.__setitem__(t, output))
    view(images)
    for t in range(1, 13):
        torch.testing.assert_close(seen[t], sites[t]["mlp_post"], atol=1e-4, rtol=1e-4)
        assert t == 1 or (seen[t] - sites[t - 1]["mlp_post"]).abs().max() > 1e-2


def test_a_timed_step_returns_z_t(tiny_te, images, by_hand):
    table = tiny_te.blocks.step_embed
    sites = by_hand.run(tiny_te, images, stored_blocks(tiny_te) * 12, table)
    view = unroll(tiny_te)
    outputs = []
    for block in view.blocks:
        block.register_forward_hook(lambda m, a, output: outputs.append(output))
    view(images)
    for t in range(1, 13):
        torch.testing.assert_close(outputs[t - 1], sites[t]["resid_post"], atol=1e-4, rtol=1e-4)
        assert view.blocks[t - 1].step_embed is table


def test_a_timed_step_works_on_its_own(tiny_te):
    z = torch.randn(2, 17, 32)
    view = unroll(tiny_te)
    difference = view.blocks[4](z) - view.blocks[7](z)
    expected = tiny_te.blocks.step_embed[4] - tiny_te.blocks.step_embed[7]
    torch.testing.assert_close(difference, expected.expand_as(difference), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fixture", ["tiny", "tiny_te", "tiny_reg4"])
@pytest.mark.parametrize("steps", [1, 3, 24])
def test_fewer_and_more_steps_equal_a_loop(request, images, fixture, steps):
    model = request.getfixturevalue(fixture)
    (block,) = stored_blocks(model)
    z = model._pos_embed(model.patch_embed(images))
    table = model.blocks.step_embed
    for t in range(1, steps + 1):
        # beyond its last row the time embedding stays at e_T
        z = block(z) if table is None else block(z, step_embed=table[min(t, 12) - 1])
    view = unroll(model, steps=steps)
    assert len(view.blocks) == steps
    assert torch.equal(view(images), model.forward_head(model.norm(z)))


def test_as_many_steps_as_the_model_takes_is_the_default(tiny, images):
    assert torch.equal(unroll(tiny, steps=12)(images), unroll(tiny)(images))


@pytest.mark.parametrize(
    ("order", "indices"), [("cycle", [0, 1] * 4), ("repeat", [0] * 3 + [1] * 5)]
)
def test_hybrids_go_on_in_their_order(make, images, order, indices):
    model = make(num_blocks=2, num_steps=3, order=order)
    stored = stored_blocks(model)
    z = model._pos_embed(model.patch_embed(images))
    for i in indices:
        z = stored[i](z)
    assert torch.equal(unroll(model, steps=8)(images), model.forward_head(model.norm(z)))


def test_a_stack_can_be_cut(stacked, images):
    z = stacked._pos_embed(stacked.patch_embed(images))
    for block in stored_blocks(stacked)[:2]:
        z = block(z)
    assert torch.equal(unroll(stacked, steps=2)(images), stacked.forward_head(stacked.norm(z)))


def test_a_step_can_be_untied(tiny, images):
    """A step with weights of its own: its module is replaced, the others stay tied."""
    view = unroll(tiny)
    view.blocks[4] = copy.deepcopy(view.blocks[4])
    assert torch.equal(view(images), tiny(images))
    with torch.no_grad():
        view.blocks[4].mlp.fc1.weight.zero_()
    assert not torch.equal(view(images), tiny(images))
    assert view.blocks[5].mlp.fc1.weight is tiny.blocks[0].mlp.fc1.weight
    assert tiny.blocks[0].mlp.fc1.weight.any()


def test_deepcopy_keeps_the_ties_and_leaves_the_model(any_model, images):
    view = unroll(any_model)
    twin = copy.deepcopy(view)
    assert torch.equal(twin(images), view(images))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in any_model.parameters()}
    assert len(list(twin.parameters())) == len(list(view.parameters()))
    assert is_unrolled(twin)


def test_unrolling_a_view_gives_another_view_of_the_model(any_model, images):
    view = unroll(unroll(any_model))
    assert torch.equal(view(images), any_model(images))
    assert {id(p) for p in view.parameters()} == {id(p) for p in any_model.parameters()}


def test_a_pruned_model_unrolls_with_its_mask(tiny, images):
    """Pruning keeps `weight` as a computed tensor, which cannot be deep-copied."""
    fc1 = tiny.get_submodule("blocks.0.mlp.fc1")
    prune.l1_unstructured(fc1, "weight", amount=0.5)
    view = unroll(tiny)
    assert torch.equal(view(images), tiny(images))
    assert view.blocks[3].mlp.fc1.weight_orig is fc1.weight_orig
    view(images).square().sum().backward()
    assert fc1.weight_orig.grad.any()
    prune.remove(fc1, "weight")  # takes pruning's own hook off


def test_feature_info_names_every_step(tiny):
    view = unroll(tiny, steps=15)
    assert [info["module"] for info in view.feature_info] == [f"blocks.{i}" for i in range(15)]
    assert len(tiny.feature_info) == 12
    names = dict(view.named_modules())
    assert all(info["module"] in names for info in view.feature_info)


def test_the_models_own_attributes_are_not_shared(tiny):
    view = unroll(tiny)
    view.pretrained_cfg["mean"] = (9, 9, 9)
    assert tiny.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_a_view_is_not_saved(tiny, tmp_path):
    view = unroll(tiny)
    with pytest.raises(CheckpointError, match="save the recurrent model"):
        save(view, tmp_path / "view")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="share memory"):  # and safetensors refuses by itself
        safetensors.torch.save_file(view.state_dict(), tmp_path / "view.safetensors")


def test_other_models_are_refused():
    with pytest.raises(UserError, match="no block of ResNet takes and gives tokens"):
        unroll(timm.create_model("resnet10t"))
    with pytest.raises(UserError, match="Linear does not say the size of its images"):
        unroll(nn.Linear(2, 2))


@pytest.mark.parametrize("steps", [0, -1])
def test_a_step_is_needed(tiny, steps):
    with pytest.raises(UserError, match=f"steps must be >= 1, got {steps}"):
        unroll(tiny, steps=steps)


def test_a_stack_takes_no_more_steps_than_it_has(stacked):
    with pytest.raises(UserError, match="stack of 3 blocks and cannot take 4 steps"):
        unroll(stacked, steps=4)


def test_run_on_goes_past_the_trained_steps_where_there_are_any(tiny, tiny_hybrid, stacked, make):
    """A recurrent model as far as asked, one block alone too; a stack, of timm or ours, to its last
    block."""
    assert len(run_on(tiny, 20).blocks) == len(run_on(tiny_hybrid, 20).blocks) == 20
    assert len(run_on(make(num_blocks=1, num_steps=1), 5).blocks) == 5
    assert len(run_on(stacked, 20).blocks) == 3
    assert len(run_on(make(name="vit_rms_small_patch16_224"), 20).blocks) == 12
    assert len(run_on(stacked, 2).blocks) == len(run_on(tiny, 2).blocks) == 2
    assert len(run_on(unroll(tiny, steps=15), 20).blocks) == 15
