"""Probe on the variants: sites of inner updates by hand, their edits, what is missing named; the
token `dist`."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import SITES

CLOSE = {"rtol": 1e-4, "atol": 5e-5}


@pytest.mark.parametrize("fixture", ["tiny_fl", "tiny_sc_block"])
def test_every_site_of_every_inner_update(request, images, by_hand, fixture):
    model, images = request.getfixturevalue(fixture).double(), images.double()
    hand = by_hand.run(model, images, list(unroll(model).blocks), model.blocks.step_embed)
    probe = Probe(model)
    for update in range(1, 1 + max(len(step["inner"]) for step in hand[1:])):
        sites = {f"inner{update}.{site}": site for site in SITES}
        logits, cache = probe.run(images, list(sites))
        assert torch.equal(logits, model(images))
        having = [t for t, step in enumerate(hand) if t and update <= len(step["inner"])]
        assert cache.steps(f"inner{update}.z") == having
        for t in having:
            expected = hand[t]["inner"][update - 1]
            here = {site: cache[name, t] for name, site in sites.items()}
            for site in ("resid_pre", "pattern", "resid_mid", "mlp_pre", "mlp_post", "resid_post"):
                torch.testing.assert_close(here[site], expected[site], **CLOSE)
            torch.testing.assert_close(
                here["attn_out"], expected["resid_mid"] - expected["resid_pre"], **CLOSE
            )
            torch.testing.assert_close(
                here["mlp_out"], expected["resid_post"] - expected["resid_mid"], **CLOSE
            )
            torch.testing.assert_close(here["scores"].softmax(-1), expected["pattern"], **CLOSE)
            weighted = torch.einsum("bhqk,bkhe->bqhe", expected["pattern"], here["v"])
            torch.testing.assert_close(here["z"], weighted, **CLOSE)


def test_inner_sites_in_every_form(tiny_fl, images):
    probe = Probe(tiny_fl)
    cache = probe.record(images, ["inner2.mlp_post", "mlp_post"], steps=[3])
    assert set(cache) == {("inner2.mlp_post", 3), ("mlp_post", 3)}
    assert not torch.equal(cache["inner2.mlp_post", 3], cache["mlp_post", 3])
    one = probe.record(images, "inner2.mlp_post[3]:12")
    assert torch.equal(one["inner2.mlp_post[3]:12"], cache["inner2.mlp_post", 3][..., 12])
    whole = probe.record(images, ["inner1.pattern", "inner1.z"])
    assert whole["inner1.pattern"].shape == (4, 4, 4, 17, 17)
    assert torch.equal(whole["inner1.pattern[2]:3"], whole["inner1.pattern", 2][:, 3])
    row = probe.record(images, ["inner1.pattern", "inner1.z"], tokens="cls")
    torch.testing.assert_close(row["inner1.pattern"], whole["inner1.pattern"][:, :, :, 0], **CLOSE)
    assert torch.equal(row["inner1.pattern[2]:3"], row["inner1.pattern", 2][:, 3])
    assert torch.equal(row["inner1.z[2]:3"], whole["inner1.z", 2][:, 0, 3])
    assert "inner1.z x 4 steps, inner1.pattern" not in repr(row)  # in the block's order
    assert repr(row).startswith("Cache(inner1.pattern 4x4x17 x 4 steps, inner1.z 4x4x8 x 4 steps;")


@pytest.mark.parametrize("site", list(SITES))
def test_an_identity_edit_of_an_inner_update_changes_nothing_and_another_does(
    tiny_fl, images, site
):
    probe = Probe(tiny_fl)
    plain = probe.record(images, ["resid_post", "inner1.resid_post"])
    with probe.edit({f"inner2.{site}[2]": lambda x, address: x.clone()}) as fired:
        torch.testing.assert_close(probe(images), tiny_fl(images), **CLOSE)
    assert fired == {f"inner2.{site}[2]": 1}
    with probe.edit({f"inner2.{site}[2]": lambda x, address: x * 1.5 + 0.1}):
        edited = probe.record(images, ["resid_post", "inner1.resid_post"])
    changed = {key: not torch.allclose(edited[key], plain[key]) for key in plain}
    assert [changed["resid_post", t] for t in (1, 2, 3, 4)] == [False, True, True, True]
    assert [changed["inner1.resid_post", t] for t in (1, 2, 3, 4)] == [False, False, True, True]


def test_edits_of_a_step_and_of_its_inner_updates_are_apart(tiny_fl, images):
    probe = Probe(tiny_fl)
    edits = {
        "z[2]": lambda x, a: x * 0.5,
        "inner1.z[2]": lambda x, a: x * 2,
        "inner2.pattern[2]": lambda x, a: x.flip(-1),
    }
    with probe.edit(edits) as fired:
        together = probe(images)
    assert fired == {"z[2]": 1, "inner1.z[2]": 1, "inner2.pattern[2]": 1}
    for left_out in edits:
        with probe.edit({key: fn for key, fn in edits.items() if key != left_out}):
            assert not torch.allclose(probe(images), together)
    assert not sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in probe.model.modules())


def test_zeroing_the_latent_at_its_source(tiny_fl, images, by_hand):
    """resid_post of the last inner update is y_t: without it z_t = F(z_{t-1} + e_t)."""
    probe = Probe(tiny_fl)
    with probe.edit({"inner2.resid_post[1]": lambda x, a: 0 * x}):
        z_1 = probe.record(images, "resid_post", steps=1)["resid_post", 1]
    read = by_hand.tokens(tiny_fl, images) + tiny_fl.blocks.step_embed[0]
    torch.testing.assert_close(z_1, by_hand.block(tiny_fl.blocks[0], read)["resid_post"], **CLOSE)


def test_resid_pre_is_the_state_not_what_the_block_reads(tiny_fl, images):
    """An edit of it is seen by the inner updates of its step too."""
    probe = Probe(tiny_fl)
    cache = probe.record(
        images, ["resid_pre", "resid_post", "resid_mid", "attn_out", "inner2.resid_post"]
    )
    assert torch.equal(cache["resid_pre", 3], cache["resid_post", 2])
    read = cache["resid_pre", 3] + cache["inner2.resid_post", 3] + tiny_fl.blocks.step_embed[2]
    torch.testing.assert_close(cache["resid_mid", 3] - cache["attn_out", 3], read, **CLOSE)
    with probe.edit({"resid_pre[3]": lambda x, a: x + 1}):
        edited = probe.record(images, "inner1.resid_pre", steps=3)
    plain = probe.record(images, "inner1.resid_pre", steps=3)
    torch.testing.assert_close(
        edited["inner1.resid_pre", 3], plain["inner1.resid_pre", 3] + 1, **CLOSE
    )


@pytest.mark.parametrize(
    ("fixture", "key", "steps", "message"),
    [
        ("tiny", "inner1.z", None, "inner1.z: this model has none; sites: resid_pre"),
        ("tiny_sc", "inner1.z", 1, "inner1.z: this model has none"),
        ("tiny_fl", "inner3.z", None, r"inner3.z: this model has inner1\.\.inner2 only"),
        ("tiny_fl", "inner3.z[2]", None, r"has inner1\.\.inner2 only"),
        ("tiny_fl", "inner0.z", None, "unknown site 'inner0.z'; sites: resid_pre"),
        ("tiny_fl", "inner1.mlp", None, "unknown site 'inner1.mlp'"),
        ("tiny_fl", "inner1.z[5]", None, r"no step 5; steps: 1\.\.4"),
        ("tiny_fl", "inner1.z[2]:4", None, r"no head 4; heads: 0\.\.3"),
        ("tiny_fl", "inner1.resid_post", 0, r"no step 0; steps: 1\.\.4"),
        (
            "tiny_sc_block",
            "inner1.z",
            2,
            r"inner1.z: step 2 has no inner update 1; steps that have it: 1, 4$",
        ),
        (
            "tiny_sc_block",
            "inner1.z[5]",
            None,
            "step 5 has no inner update 1; steps that have it: 1, 4$",
        ),
        ("tiny_sc_block", "inner2.z", None, r"this model has inner1\.\.inner1 only"),
    ],
)
def test_an_inner_update_that_is_not_there_is_named(request, images, fixture, key, steps, message):
    probe = Probe(request.getfixturevalue(fixture))
    with pytest.raises(UserError, match=message):
        probe.run(images, key, steps=steps)
    if "[" in key:
        with pytest.raises(UserError, match=message), probe.edit({key: lambda x, a: x}):
            pass


# ---- the distillation token ----------------------------------------------------------------------


def test_the_distillation_token_is_a_word(tiny_distilled, tiny, images):
    probe = Probe(tiny_distilled)
    whole = probe.record(images, ["z", "pattern"], steps=2)
    rows = {"cls": 0, "dist": 1, "reg": slice(2, 4), "patches": slice(4, 20)}
    for tokens, row in rows.items():
        part = probe.record(images, ["z", "pattern"], steps=2, tokens=tokens)
        assert torch.equal(part["z", 2], whole["z", 2][:, row])
        torch.testing.assert_close(part["pattern", 2], whole["pattern", 2][:, :, row], **CLOSE)
    with pytest.raises(UserError, match="'dist' selects none of the 17 tokens"):
        Probe(tiny).record(images, "z", tokens="dist")


def test_timms_own_distilled_model_has_the_same_words(make, images):
    probe = Probe(make(name="deit_tiny_distilled_patch16_224", depth=2))
    assert probe.record(images, "z", steps=1, tokens="dist")["z", 1].shape == (4, 4, 8)
    with pytest.raises(UserError, match="'reg' selects none of the 18 tokens"):
        probe.record(images, "z", tokens="reg")
