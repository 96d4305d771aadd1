"""Probe: what is recorded is what a hand-written loop computes, what is edited takes effect,
nothing stays."""

from __future__ import annotations

import pytest
import torch
from timm.layers import SwiGLUPacked

from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import SITES, Address

CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # rounding, after twelve steps of random weights


def loop(by_hand, model, images):
    """Sites by hand for one block, with the time embedding if there is one."""
    blocks = [model.blocks[t] for t in range(len(model.blocks))]
    return by_hand.run(model, images, blocks, getattr(model.blocks, "step_embed", None))


def test_every_site_of_every_step(any_model, images, by_hand):
    any_model, images = any_model.double(), images.double()
    probe = Probe(any_model)
    logits, cache = probe.run(images, list(SITES))
    hand = loop(by_hand, any_model, images)
    assert torch.equal(logits, any_model(images))
    for t in range(1, probe.num_steps + 1):
        before, after, block = hand[t - 1]["resid_post"], hand[t], any_model.blocks[t - 1]
        read = after["resid_pre"]  # with a memory not z_{t-1}
        for site in ("pattern", "resid_mid", "mlp_pre", "mlp_post", "resid_post"):
            torch.testing.assert_close(cache[site, t], after[site], **CLOSE)
        torch.testing.assert_close(cache["resid_pre", t], before, **CLOSE)
        torch.testing.assert_close(cache["attn_out", t], after["resid_mid"] - read, **CLOSE)
        torch.testing.assert_close(cache["scores", t].softmax(-1), after["pattern"], **CLOSE)
        q, k, v = (cache[site, t].transpose(1, 2) for site in "qkv")
        torch.testing.assert_close(q @ k.mT / q.shape[-1] ** 0.5, cache["scores", t], **CLOSE)
        z = cache["z", t]
        torch.testing.assert_close((after["pattern"] @ v).transpose(1, 2), z, **CLOSE)
        torch.testing.assert_close(block.attn.proj(z.flatten(2)), cache["attn_out", t], **CLOSE)
        torch.testing.assert_close(
            block.mlp.fc2(cache["mlp_post", t]), cache["mlp_out", t], **CLOSE
        )


def test_shapes_are_those_of_the_table(tiny_reg4, images):
    sizes = {"B": 4, "N": 21, "Q": 21, "K": 21, "D": 32, "F": 128, "H": 4, "E": 8}
    _, cache = Probe(tiny_reg4).run(images, list(SITES), steps=[3])
    for site, (shape, _) in SITES.items():
        assert tuple(cache[site, 3].shape) == tuple(sizes[axis] for axis in shape.split()), site


def test_steps_stack_on_axis_one_and_step_zero_is_the_embedding(tiny, images, by_hand):
    _, cache = Probe(tiny).run(images, ["resid_post", "pattern"], steps=[5, 2], tokens="patches")
    assert cache["resid_post"].shape == (4, 2, 16, 32)
    assert torch.equal(cache["resid_post"][:, 0], cache["resid_post", 2])
    assert torch.equal(cache["resid_post", -1 - 7], cache["resid_post", 5])
    _, start = Probe(tiny).run(images, "resid_post", steps=range(3))
    torch.testing.assert_close(start["resid_post", 0], by_hand.tokens(tiny, images), **CLOSE)
    assert start.steps("resid_post") == [0, 1, 2]


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        ("cls", 0),
        ("reg", slice(1, 5)),
        ("patches", slice(5, 21)),
        ("all", slice(0, 21)),
        (7, 7),
        (-1, 20),
        (slice(2, 4), slice(2, 4)),
    ],
)
def test_tokens(tiny_reg4, images, tokens, rows):
    probe = Probe(tiny_reg4)
    whole = probe.record(images, ["pattern", "z", "mlp_post"], steps=4)
    part = probe.record(images, ["pattern", "z", "mlp_post"], steps=4, tokens=tokens)
    torch.testing.assert_close(part["pattern", 4], whole["pattern", 4][:, :, rows], **CLOSE)
    for site in ("z", "mlp_post"):
        assert torch.equal(part[site, 4], whole[site, 4][:, rows])


def test_cls_attention_equals_explicit_softmax(any_model, images):
    probe = Probe(any_model)
    for t in range(1, probe.num_steps + 1):
        cache = probe.record(images, ["pattern", "q", "k"], steps=t)
        row = (
            torch.einsum("bhe,bnhe->bhn", cache["q", t][:, 0], cache["k", t])
            / cache["q", t].shape[-1] ** 0.5
        )
        expected = row.exp() / row.exp().sum(-1, keepdim=True)
        recorded = probe.record(images, "pattern", steps=t, tokens="cls")["pattern", t]
        assert (recorded - expected).abs().max() < 1e-5


def test_fused_attention_stays_on_and_recording_is_bit_equal(tiny, images):
    probe = Probe(tiny)
    assert all(block.attn.fused_attn for block in probe.model.blocks)
    plain = tiny(images)
    assert torch.equal(probe.run(images, list(SITES))[0], plain)
    assert torch.equal(probe.run(images, "pattern", tokens="cls")[0], plain)
    assert all(block.attn.fused_attn for block in probe.model.blocks)


def test_record_stops_the_forward_early(tiny, images):
    probe, ran = Probe(tiny), []
    probe.model.blocks[3].attn.proj.register_forward_hook(lambda *_: ran.append("proj of step 4"))
    cache = probe.record(images, "pattern", steps=[2, 4], tokens="cls")
    assert not ran
    assert cache.steps("pattern") == [2, 4]
    probe.run(images, "pattern", steps=[2, 4], tokens="cls")
    assert ran == ["proj of step 4"]


def test_recorded_slices_keep_no_larger_tensor_alive(tiny, images):
    cache = Probe(tiny).record(images, ["z", "mlp_post", "pattern"], tokens="cls")
    assert cache.nbytes == 12 * 4 * 4 * (32 + 128 + 4 * 17)


def test_gradients_flow_when_asked_for(tiny, images):
    _, cache = Probe(tiny).run(images, "mlp_post", steps=5, grad=True)
    cache["mlp_post", 5].sum().backward()
    assert tiny.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    _, cache = Probe(tiny).run(images, "mlp_post", steps=5)
    assert not cache["mlp_post", 5].requires_grad


def test_more_steps(tiny, images):
    probe = Probe(unroll(tiny, steps=24))
    assert probe.record(images, "resid_post", steps=24)["resid_post", -1].shape == (4, 17, 32)


def test_dynamic_image_size(make):
    probe = Probe(make(dynamic_img_size=True))
    cache = probe.record(torch.randn(2, 3, 48, 16), "pattern", steps=1, tokens="patches")
    assert cache.grid == (6, 2)
    assert cache["pattern", 1].shape == (2, 4, 12, 13)


# ---- addresses -----------------------------------------------------------------------------------


def test_addresses_bring_their_step_and_pick_a_unit(tiny, images):
    cache = Probe(tiny).record(images, ["mlp_post[5]:12", "z[-1]"])
    assert set(cache) == {("mlp_post", 5), ("z", 12)}
    assert torch.equal(cache["mlp_post[5]:12"], cache["mlp_post", 5][..., 12])
    assert torch.equal(cache["z[12]:3"], cache["z", 12][:, :, 3])
    with pytest.raises(UserError, match="no such unit"):
        cache["z[12]:4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": "mlp_act"}, "unknown site 'mlp_act'; sites: resid_pre"),
        ({"sites": []}, "no site chosen"),
        ({"sites": "z", "steps": 13}, r"no step 13; steps: 1\.\.12"),
        ({"sites": "z", "steps": 0}, r"no step 0; steps: 1\.\.12"),
        ({"sites": "z", "steps": []}, "no step chosen"),
        ({"sites": "z", "steps": [3, -10]}, "chosen twice"),
        ({"sites": "z[5]:4"}, r"no head 4; heads: 0\.\.3"),
        ({"sites": "mlp_post[5]:128"}, r"no neuron 128; neurons: 0\.\.127"),
        ({"sites": "z[five]"}, "not an address"),
        ({"sites": "z", "tokens": "reg"}, "selects none of the 17 tokens"),
        (
            {"sites": "z", "tokens": "class"},
            "unknown tokens 'class'; tokens: cls, dist, reg, patches, all",
        ),
        ({"sites": "z", "tokens": 17}, "selects none"),
        ({"sites": "z", "tokens": slice(4, 4)}, "selects none"),
    ],
)
def test_what_is_not_there_is_named(tiny, images, arguments, message):
    with pytest.raises(UserError, match=message):
        Probe(tiny).run(images, **arguments)


def test_what_was_not_recorded_is_named(tiny, images):
    cache = Probe(tiny).record(images, "z", steps=5)
    with pytest.raises(UserError, match=r"z\[6\] was not recorded; recorded: z\[5\]"):
        cache["z", 6]
    with pytest.raises(UserError, match="q was not recorded; recorded: z"):
        cache["q"]


# ---- edits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", list(SITES))
def test_an_identity_edit_changes_nothing(any_model, images, site):
    probe = Probe(any_model)
    plain = any_model(images)
    with probe.edit({(site, 2): lambda x, address: x.clone()}) as fired:
        logits = probe(images)
    assert fired == {f"{site}[2]": 1}
    if site in ("scores", "pattern"):  # the explicit pattern stands in for the fused kernel
        torch.testing.assert_close(logits, plain, **CLOSE)
    else:
        assert torch.equal(logits, plain)
    with probe.edit({(site, 2): lambda x, address: None}):
        assert torch.equal(probe(images), plain)


@pytest.mark.parametrize("site", list(SITES))
def test_an_edit_changes_its_step_only(tiny, images, site):
    probe = Probe(tiny)
    plain = probe.record(images, "resid_post")
    with probe.edit({(site, 5): lambda x, address: x * 1.5 + 0.1}):
        edited = probe.record(images, "resid_post")
    for t in range(1, 5):
        assert torch.equal(edited["resid_post", t], plain["resid_post", t])
    for t in range(5, 13):
        assert not torch.allclose(edited["resid_post", t], plain["resid_post", t])


def test_neuron_edit_against_the_loop(tiny, images, by_hand):
    def silence(x):
        x = x.clone()
        x[..., 7] = 0
        return x

    hand = by_hand.run(tiny, images, [tiny.blocks[0]] * 12, changes={5: silence})
    probe = Probe(tiny)
    with probe.edit({"mlp_post[5]:7": lambda x, address: torch.zeros_like(x)}):
        torch.testing.assert_close(
            probe(images), by_hand.logits(tiny, hand[-1]["resid_post"]), **CLOSE
        )


def test_head_ablation_equals_removing_its_part_of_the_projection(tiny, images):
    probe = Probe(tiny)
    with probe.edit({"z[3]:2": lambda x, address: x * 0}):
        ablated = probe.record(images, ["attn_out", "z"], steps=3)
    whole = probe.record(images, ["attn_out", "z"], steps=3)
    part = whole["z", 3][:, :, 2] @ tiny.blocks[0].attn.proj.weight[:, 16:24].T
    torch.testing.assert_close(ablated["attn_out", 3], whole["attn_out", 3] - part, **CLOSE)
    assert ablated["z[3]:2"].abs().max() == 0


def test_uniform_pattern_averages_the_values(tiny, images):
    probe = Probe(tiny)
    with probe.edit({("pattern", 4): lambda x, address: torch.full_like(x, 1 / x.shape[-1])}):
        cache = probe.record(images, ["z", "v"], steps=4)
    torch.testing.assert_close(
        cache["z", 4], cache["v", 4].mean(1, keepdim=True).expand(-1, 17, -1, -1), **CLOSE
    )


def test_resid_mid_edit_reaches_the_skip_path(tiny, images):
    probe = Probe(tiny)
    with probe.edit({("resid_mid", 12): lambda x, address: torch.ones_like(x)}):
        cache = probe.record(images, ["mlp_out", "resid_post"], steps=12)
    torch.testing.assert_close(cache["resid_post", 12], 1 + cache["mlp_out", 12], **CLOSE)


def test_an_edit_that_never_fires_is_an_error(tiny, images):
    probe = Probe(tiny)
    with (
        pytest.raises(UserError, match=r"never fired: z\[9\]"),
        probe.edit({("z", 9): lambda x, a: None}),
    ):
        probe.record(images, "z", steps=2)


def test_an_edit_of_another_shape_is_an_error(tiny, images):
    probe = Probe(tiny)
    edits = {("z", 2): lambda x, a: x[..., 0]}
    expected = r"returned shape \(4, 17, 4\), expected \(4, 17, 4, 8\)"
    with pytest.raises(UserError, match=expected), probe.edit(edits):
        probe(images)


def test_an_edited_pattern_is_recorded_as_edited(tiny, images):
    probe = Probe(tiny)
    plain = probe.record(images, ["scores", "pattern"], steps=[2, 3])
    with probe.edit({("pattern", 2): lambda x, a: x.flip(-1)}):
        edited = probe.record(images, ["scores", "pattern"], steps=[2, 3])
        row = probe.record(images, "pattern", steps=2, tokens="cls")["pattern", 2]
    assert torch.equal(edited["pattern", 2], plain["pattern", 2].flip(-1))
    assert torch.equal(row, edited["pattern", 2][:, :, 0])
    assert torch.equal(edited["scores", 2], plain["scores", 2])
    assert not torch.equal(edited["pattern", 3], plain["pattern", 3])
    torch.testing.assert_close(
        probe.record(images, "pattern", steps=2)["pattern", 2], plain["pattern", 2]
    )


def test_edits_of_two_heads_chain_also_when_nested(tiny, images):
    probe = Probe(tiny)

    def both(x, address):
        x = x.clone()
        x[:, :2] = 1 / x.shape[-1]
        return x

    def one(x, address):
        return torch.full_like(x, 1 / x.shape[-1])

    with probe.edit({("pattern", 5): both}):
        expected = probe(images)
    with probe.edit({"pattern[5]:0": one, "pattern[5]:1": one}) as fired:
        assert torch.equal(probe(images), expected)
    assert fired == {"pattern[5]:0": 1, "pattern[5]:1": 1}
    with probe.edit({"pattern[5]:0": one}), probe.edit({"pattern[5]:1": one}):
        assert torch.equal(probe(images), expected)
    assert hooks_left(probe) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("v", "pattern"),
        ("q", "scores"),
        ("scores", "pattern"),
        ("pattern", "z"),
        ("resid_mid", "resid_post"),
        ("mlp_pre", "mlp_post"),
        ("resid_pre", "attn_out"),
    ],
)
def test_edits_of_a_step_apply_in_block_order_however_listed(tiny, images, first, second):
    probe = Probe(tiny)
    edits = {(first, 5): lambda x, a: x * 1.3 + 0.1, (second, 5): lambda x, a: x * 0.5}
    with probe.edit(edits):
        listed = probe(images)
    with probe.edit(dict(reversed(edits.items()))):
        assert torch.equal(probe(images), listed)
    alone = []
    for key, fn in edits.items():
        with probe.edit({key: fn}):
            alone.append(probe(images))
    assert not any(torch.equal(listed, logits) for logits in alone)


def test_zeroing_resid_post_wins_over_an_edit_before_it(tiny, images):
    probe = Probe(tiny)
    with probe.edit({"resid_post[5]": lambda x, a: 0 * x, "resid_mid[5]": lambda x, a: x + 1}):
        assert probe.record(images, "resid_post", steps=5)["resid_post", 5].abs().max() == 0


def test_addresses_in_every_form(tiny, images):
    probe = Probe(tiny)
    recorded = [
        probe.record(images, key)["z", 5]
        for key in ("z[5]", ("z", 5), Address("z", 5), [("z", -8)])
    ]
    assert all(torch.equal(tensor, recorded[0]) for tensor in recorded)
    cache = probe.record(images, "z", steps=12)
    assert ("z", -1) in cache
    assert ("z", 5) not in cache
    twice = {"z[5]": lambda x, a: x, ("z", 5): lambda x, a: x}
    with pytest.raises(UserError, match="two edits of"), probe.edit(twice):
        pass


def hooks_left(probe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in probe.model.modules())


def test_hooks_are_removed_also_after_an_exception(tiny, images):
    probe = Probe(tiny)

    def fail(x, address):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), probe.edit({("z", 2): fail}):
        probe.run(images, "pattern")
    with pytest.raises(UserError, match=r"images must be \(B, C, H, W\), got shape \(1, 1\)"):
        probe.run(torch.randn(1, 1), "pattern")
    with pytest.raises(UserError), probe.edit({("z", 2): fail, ("z", 99): fail}):
        pass
    with pytest.raises(AssertionError, match="Input height"):  # timm's own word
        probe.run(torch.randn(1, 3, 31, 32), "pattern")
    assert hooks_left(probe) == 0


# ---- refusals ------------------------------------------------------------------------------------


def test_a_compiled_model_is_refused(tiny, images):
    with pytest.raises(UserError, match=r"torch\.compile"):
        Probe(torch.compile(tiny))
    probe = Probe(tiny)
    probe.model.blocks[4].compile()
    with pytest.raises(UserError, match=r"blocks\.4 is compiled"):
        probe.run(images, "z")


def test_a_block_compiled_before_is_probed_uncompiled(tiny, images):
    plain = tiny(images)
    tiny.blocks[0].compile()
    assert torch.equal(Probe(tiny).run(images, "z")[0], plain)


def test_a_cache_beyond_the_limit_is_refused_before_it_is_built(tiny, images):
    probe = Probe(tiny, max_bytes=10_000)
    ran = []
    probe.model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(UserError, match="would take .* GiB"):
        probe.run(images, "mlp_post")
    assert not ran
    probe.run(images[:1], "mlp_post", steps=1, tokens="cls")


def test_a_large_cache_is_announced(tiny, images, monkeypatch):
    import bvit_interp.probes.probe as module

    monkeypatch.setattr(module, "ANNOUNCED_BYTES", 1000)
    with pytest.warns(UserWarning, match="a cache of"):
        Probe(tiny).run(images, "mlp_post")


def test_a_gated_ffn_has_neurons_but_no_single_input(make, images):
    probe = Probe(make(name="vit_tiny_patch16_224", depth=2, mlp_layer=SwiGLUPacked))
    cache = probe.record(images, ["mlp_post", "mlp_out"], steps=2)
    block = probe.model.blocks[1]
    assert cache["mlp_post", 2].shape[-1] == probe.num_neurons == block.mlp.fc2.in_features
    torch.testing.assert_close(block.mlp.fc2(cache["mlp_post", 2]), cache["mlp_out", 2])
    with pytest.raises(UserError, match="a gated FFN has no mlp_pre"):
        probe.record(images, "mlp_pre")


def test_kinds_of_token(tiny, tiny_reg4, tiny_distilled, make):
    assert Probe(tiny).kinds() == {"cls": slice(0, 1), "patches": slice(1, 17)}
    assert Probe(tiny_reg4).kinds() == {
        "cls": slice(0, 1),
        "reg": slice(1, 5),
        "patches": slice(5, 21),
    }
    assert list(Probe(tiny_distilled).kinds()) == ["cls", "reg", "dist", "patches"]
    pooled = make(name="vit_tiny_patch16_224", depth=2, global_pool="avg", class_token=False)
    assert list(Probe(pooled).kinds()) == ["patches"]
