"""Models with a memory against their equations written out, with autograd on the written-out loop
for gradients."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.models.vision_transformer import Block
from torch import nn

from bvit_interp.models.bvit import BViT
from bvit_interp.models.checkpoint import load, save
from bvit_interp.models.cost import flops, flops_per_step, parameters
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.unroll import unroll

FL, SC = "bvit_small_fl_patch16_224", "bvit_small_sc_patch16_224"
VARIANTS = {
    "fl": {"name": FL, "num_steps": 4},
    "fl n=1": {"name": FL, "num_steps": 4, "inner_updates": 1, "step_embed": True},
    "fl n=6": {"name": FL, "num_steps": 3, "inner_updates": 6},
    "fl registers": {
        "name": FL,
        "num_steps": 3,
        "inner_updates": 2,
        "reg_tokens": 4,
        "step_embed": True,
    },
    "sc": {"name": SC, "num_steps": 9},
    "sc k=1": {"name": SC, "num_steps": 4, "interval": 1, "step_embed": True},
    "sc k=3": {"name": SC, "num_steps": 7, "interval": 3, "step_embed": True},
    "block": {"name": SC, "memory": "block", "num_steps": 9, "step_embed": True},
    "block k=2": {"name": SC, "memory": "block", "num_steps": 5, "interval": 2},
}
TINY = ["tiny_fl", "tiny_sc", "tiny_sc_block"]


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def variant(request, make):
    """A model in double precision, its arguments beside it."""
    given = VARIANTS[request.param]
    return make(**given).double(), given


def states_of(model, images, by_hand, given, steps, gradient="full"):
    """z_0..z_T by the equations of appendix D as SCIENCE 2.5 has them; n = 3 and k = 4 unless
    given."""
    table, block = model.blocks.step_embed, model.get_submodule("blocks.0")
    z = by_hand.tokens(model, images)
    memory, states = torch.zeros_like(z), [z]
    for t in range(1, steps + 1):
        e = 0 if table is None else table[min(t, len(table)) - 1]
        if gradient == "truncated":
            memory = memory.detach()
        if given["name"] == FL:
            for _ in range(given.get("inner_updates", 3)):
                memory = by_hand.block(block, memory + z + e)["resid_post"]
        elif (t - 1) % given.get("interval", 4) == 0:
            memory = (
                by_hand.block(block, memory + z)["resid_post"]
                if given.get("memory") == "block"
                else z
            )
        added = memory.detach() if gradient == "frozen" else memory
        z = by_hand.block(block, z + added + e)["resid_post"]
        states.append(z)
    return states


def gradients(model, loss):
    """Gradient of every parameter, zeros where there is none."""
    found = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def loss_of(logits):
    return nn.functional.cross_entropy(logits, torch.arange(4))


# ---- equations -----------------------------------------------------------------------------------


def test_states_equal_the_equations(variant, images, by_hand):
    model, given = variant
    images = images.double()
    expected = states_of(model, images, by_hand, given, given["num_steps"])
    torch.testing.assert_close(model(images), by_hand.logits(model, expected[-1]))
    z = expected[0]
    for t, block in enumerate(model.blocks, start=1):
        z = block(z)
        torch.testing.assert_close(z, expected[t])


@pytest.mark.parametrize("steps", [2, 24])
def test_unroll_of_other_lengths_equals_the_equations(variant, images, by_hand, steps):
    model, given = variant
    images = images.double()
    expected = states_of(model, images, by_hand, given, steps)
    view = unroll(model, steps=steps)
    assert len(view.blocks) == steps
    torch.testing.assert_close(view(images), by_hand.logits(model, expected[-1]))


def test_more_steps_are_bit_equal_to_a_model_of_as_many(make, images):
    for given in VARIANTS.values():
        if not given.get("step_embed"):
            model, longer = make(**given), make(**{**given, "num_steps": 24})
            assert torch.equal(unroll(model, steps=24)(images), longer(images))


def test_two_blocks_take_turns_in_their_updates_too(make, images, by_hand):
    model = make(name=FL, num_blocks=2, num_steps=2, inner_updates=2).double()
    first, second = (model.get_submodule(f"blocks.{i}") for i in range(2))
    z = by_hand.tokens(model, images.double())
    y = torch.zeros_like(z)
    for block in (first, second, first, second):
        for _ in range(2):
            y = by_hand.block(block, y + z)["resid_post"]
        z = by_hand.block(block, z + y)["resid_post"]
    torch.testing.assert_close(model(images.double()), by_hand.logits(model, z))
    assert torch.equal(unroll(model)(images.double()), model(images.double()))


def test_every_run_starts_afresh(tiny_fl, images):
    z = tiny_fl._pos_embed(tiny_fl.patch_embed(images))
    interleaved = zip(tiny_fl.blocks, tiny_fl.blocks, strict=True)
    a, b = z, 2 * z
    for one, other in interleaved:
        a, b = one(a), other(b)
    assert torch.equal(tiny_fl.forward_head(tiny_fl.norm(a)), tiny_fl(images))
    assert not torch.equal(a, b)
    for model in (tiny_fl, unroll(tiny_fl)):
        assert torch.equal(model(images), model(images))
        assert torch.equal(model.blocks(z), a)


@pytest.mark.parametrize("fixture", TINY)
def test_masks_reach_the_inner_updates(request, images, fixture):
    model = request.getfixturevalue(fixture)
    mask = torch.zeros(17, 17)
    mask[:, 9:] = float("-inf")  # the last patches are never attended to, so they cannot matter
    changed = images.clone()
    changed[:, :, 24:] += 1.0  # last row of patches: tokens 13..16
    for either in (model, unroll(model)):
        masked = either(images, attn_mask=mask)
        torch.testing.assert_close(masked, either(changed, attn_mask=mask))
        assert (either(images) - masked).abs().max() > 1e-3


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["full", "truncated", "frozen"])
def test_gradient_modes_equal_autograd_on_the_written_out_loop(make, images, by_hand, gradient):
    images = images.double()
    for given in VARIANTS.values():
        model = make(**given, memory_gradient=gradient).double()
        expected = {
            mode: gradients(model, loss_of(by_hand.logits(model, states[-1])))
            for mode in ("full", "truncated", "frozen")
            for states in [states_of(model, images, by_hand, given, given["num_steps"], mode)]
        }
        for either in (model, unroll(model)):
            found = gradients(model, loss_of(either(images)))
            for name, value in found.items():
                torch.testing.assert_close(value, expected[gradient][name], msg=f"{given}: {name}")
        weight = "blocks.0.mlp.fc1.weight"
        for mode in {"full", "truncated", "frozen"} - {gradient}:
            # a memory that is refreshed from the state at every step crosses none, so nothing is
            # truncated
            same = given.get("interval") == 1 and {mode, gradient} == {"full", "truncated"}
            difference = (found[weight] - expected[mode][weight]).abs().max()
            assert (difference < 1e-9) if same else (difference > 1e-5), (given, mode)


@pytest.mark.parametrize("gradient", ["full", "truncated", "frozen"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_gradient(variant, images, gradient, reentrant, make):
    """Two passes before the backward, so that a memory kept on the module would be the other
    pass's."""
    given = variant[1]
    model = make(**given, memory_gradient=gradient).double().train()
    images = images.double()
    expected = gradients(model, loss_of(model(images)) + 2 * loss_of(model(images.flip(-1))))
    set_reentrant_ckpt(reentrant)
    try:
        for either in (model, unroll(model)):
            either.set_grad_checkpointing(True)
            loss = loss_of(either(images)) + 2 * loss_of(either(images.flip(-1)))
            loss.backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name], msg=name)
            model.zero_grad()
    finally:
        set_reentrant_ckpt(False)


@pytest.mark.parametrize("fixture", TINY)
def test_intermediates_of_model_and_unroll_with_gradients_through_checkpoints(
    request, images, fixture
):
    model = request.getfixturevalue(fixture).double().train()
    images = images.double()
    expected = gradients(model, loss_of(model(images)))
    model.set_grad_checkpointing(True)
    for either in (model, unroll(model)):
        tokens, maps = either.forward_intermediates(
            images, output_fmt="NLC", return_prefix_tokens=True
        )
        assert len(maps) == len(model.blocks)
        loss_of(either.forward_head(tokens)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        model.zero_grad()


# dynamo looks
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_model_is_compiled_block_by_block(variant, images):
    """As the trainer does it."""
    model, _ = variant
    expected = model(images.double())
    for block in model.blocks.children():
        block.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.testing.assert_close(model(images.double()), expected)
    torch._dynamo.reset()


# ---- the unroll's modules ------------------------------------------------------------------------


def test_inner_updates_are_ordinary_blocks_that_see_the_latent(make, images, by_hand):
    model = make(name=FL, num_steps=5).double()
    view, seen = unroll(model), {}
    for t, step in enumerate(view.blocks, start=1):
        assert isinstance(step, MemoryBlock)
        assert [type(update) for update in step.inner] == [Block] * 3
        assert [name for name, _ in step.inner[0].named_children()] == [
            name for name, _ in Block(32, 4).named_children()
        ]
        step.register_forward_hook(
            lambda m, args, output, t=t: seen.__setitem__((t, 0), (args, output))
        )
        for i, update in enumerate(step.inner, start=1):
            update.register_forward_hook(
                lambda m, args, output, t=t, i=i: seen.__setitem__((t, i), (args, output))
            )
    view(images.double())
    z = by_hand.tokens(model, images.double())
    y = torch.zeros_like(z)
    for t in range(1, 6):
        for i in range(1, 4):
            torch.testing.assert_close(seen[t, i][0], (y + z,))
            y = by_hand.block(model.blocks[0], y + z)["resid_post"]
            torch.testing.assert_close(seen[t, i][1], y)
        torch.testing.assert_close(seen[t, 0][0], (z,))
        z = by_hand.block(model.blocks[0], z + y)["resid_post"]
        torch.testing.assert_close(seen[t, 0][1], z)


def test_only_steps_that_refresh_a_block_memory_have_an_inner_update(tiny_sc, tiny_sc_block, make):
    assert [len(step.inner) for step in unroll(tiny_sc_block, steps=8).blocks] == [
        1,
        0,
        0,
        1,
        0,
        0,
        1,
        0,
    ]
    assert [len(step.inner) for step in unroll(tiny_sc).blocks] == [0] * 5
    hybrid = make(name=SC, memory="block", num_blocks=2, num_steps=3, interval=3)
    view = unroll(hybrid)
    assert view.blocks[3].inner[0].mlp.fc1.weight is hybrid.get_submodule("blocks.1").mlp.fc1.weight


def test_one_inner_update_can_be_untied(tiny_fl, images):
    view = unroll(tiny_fl)
    fc1 = view.blocks[2].inner[1].mlp.fc1
    assert fc1.weight is tiny_fl.blocks[0].mlp.fc1.weight
    fc1.weight = nn.Parameter(torch.zeros_like(fc1.weight))
    assert not torch.equal(view(images), tiny_fl(images))
    plain = tiny_fl.forward_intermediates(images, intermediates_only=True)
    edited = view.forward_intermediates(images, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(plain, edited, strict=True)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("fixture", TINY)
def test_views_can_be_cut_by_timm(request, images, fixture):
    model = request.getfixturevalue(fixture)
    view, cut = unroll(model), unroll(model, steps=2)
    view.prune_intermediate_layers([1], prune_head=False)
    assert torch.equal(view(images), cut(images))
    by_index = unroll(model).forward_intermediates(
        images, [1], stop_early=True, intermediates_only=True
    )
    assert torch.equal(
        by_index[0], model.forward_intermediates(images, [1], intermediates_only=True)[0]
    )


def test_looking_at_a_view_gives_modules(tiny_fl):
    view = unroll(tiny_fl)
    assert list(view.blocks) == [view.blocks[i] for i in range(4)] == list(view.blocks.children())
    assert not any(module.training for module in view.modules())
    assert all(module.training for module in unroll(tiny_fl.train()).modules())


def test_a_step_alone_says_what_it_needs(tiny_fl):
    for step in (tiny_fl.blocks[0], unroll(tiny_fl).blocks[2]):
        with pytest.raises(ValueError, match="needs that of the step before"):
            step(torch.zeros(1, 17, 32))


# ---- names, arguments, checkpoints, cost ---------------------------------------------------------


def test_registered_defaults():
    with torch.device("meta"):
        fl, sc = (timm.create_model(f"bvit_base_{word}_patch16_224") for word in ("fl", "sc"))
    assert fl.blocks[0].memory.kind == "latent"
    assert fl.blocks[0].memory.inner_updates == 3
    assert sc.blocks[0].memory.kind == "state"
    assert sc.blocks[0].memory.interval == 4
    assert {model.blocks[0].memory.gradient for model in (fl, sc)} == {"full"}
    assert fl.blocks.step_embed is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"memory": "long"}, "memory must be one of latent, state, block, got 'long'"),
        ({"memory": "latent", "inner_updates": 0}, "inner_updates must be >= 1, got 0"),
        ({"memory": "state", "interval": 0}, "interval must be >= 1, got 0"),
        ({"memory": "latent", "interval": 2}, "memory='latent' has inner_updates, not interval"),
        ({"memory": "block", "inner_updates": 2}, "memory='block' has interval, not inner_updates"),
        (
            {"memory": "latent", "memory_gradient": "half"},
            "one of full, truncated, frozen, got 'half'",
        ),
        ({"interval": 2}, "give memory too"),
        ({"memory_gradient": "full"}, "give memory too"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BViT(embed_dim=32, num_heads=4, img_size=32, **kwargs)


@pytest.mark.parametrize("gradient", [None, "truncated"])
def test_checkpoints_open_as_the_same_model(variant, tmp_path, images, gradient, make):
    model = make(**variant[1], memory_gradient=gradient)
    again = load(save(model, tmp_path / "model"))
    through_timm = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    for opened in (again, through_timm):
        assert torch.equal(opened(images), model(images))
        assert opened.blocks[0].memory == model.blocks[0].memory
    assert torch.equal(load(save(through_timm, tmp_path / "again"))(images), model(images))


def test_the_block_is_saved_once_under_the_plain_models_keys(tiny, tiny_fl, tiny_sc):
    assert set(tiny_sc.state_dict()) == set(tiny.state_dict())
    assert set(tiny_fl.state_dict()) == {*tiny.state_dict(), "blocks.step_embed"}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def giga(model):
    return flops(model, count_attention=False) / 1e9


@pytest.mark.parametrize(("n", "expected"), [(1, 67.161), (2, 100.626), (3, 134.090), (6, 234.483)])
def test_flops_of_the_fast_latent(n, expected):
    """12 (1 + n) applications; n = 3 is the paper's 134.1."""
    model = on_meta("bvit_base_fl_patch16_224", inner_updates=n)
    assert giga(model) == pytest.approx(0.232747 + 12 * (1 + n) * 2.788688, abs=1e-4)
    assert giga(model) == pytest.approx(expected, abs=5.1e-4)
    assert parameters(model) == 8_598_760
    assert parameters(on_meta("bvit_base_fl_patch16_224", step_embed=True)) == 8_598_760 + 9_216


@pytest.mark.parametrize(
    ("k", "expected"), [(2, 50.4), (3, 44.9), (4, 42.1), (6, 39.3), (12, 36.5)]
)
def test_flops_of_a_block_memory(k, expected):
    model = on_meta("bvit_base_sc_patch16_224", memory="block", interval=k)
    assert giga(model) == pytest.approx(expected, abs=0.05)
    assert giga(unroll(model)) == giga(model)
    once = flops_per_step(on_meta("bvit_base_patch16_224"), count_attention=True)
    for either in (model, unroll(model)):
        each = [flops_per_step(either, count_attention=True, step=t) for t in range(1, 13)]
        assert each == [once * (2 if (t - 1) % k == 0 else 1) for t in range(1, 13)]
    assert parameters(model) == 8_598_760


def test_a_state_memory_is_free():
    model = on_meta("bvit_base_sc_patch16_224")
    assert giga(model) == giga(on_meta("bvit_base_patch16_224")) == pytest.approx(33.697, abs=5e-4)
    assert parameters(model) == 8_598_760
