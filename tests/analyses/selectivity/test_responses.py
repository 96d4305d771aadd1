"""What is watched and ablated, against recordings and edits written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.analyses.selectivity.responses import (
    Biographies,
    Profiles,
    ablate_all,
    ablations,
    drawn,
    named,
    sheet,
    watch,
    watch_all,
)
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe


@pytest.fixture
def digits():
    """Sixty scenes of digits-s."""
    return DigitScenes("test", length=60)


SITES = {"neuron": "mlp_post", "head": "z"}


def test_watched_is_what_the_probe_records(any_model, images):
    probe = Probe(any_model)
    _, cache = probe.run(images, ["mlp_post", "z"], range(1, probe.num_steps + 1))
    seen = watch(probe, images)
    for kind, site in SITES.items():
        whole = cache[site].detach()
        strength = whole if kind == "neuron" else whole.square().sum(-1).sqrt()
        patches = strength[:, :, probe.num_prefix_tokens :]
        assert torch.allclose(seen[kind].values, patches.mean(2), atol=1e-5)
        assert torch.equal(seen[kind].patches, patches.argmax(2))
        assert torch.allclose(seen[kind].totals, whole.double().sum(0), atol=1e-5)
    neurons = cache["mlp_post"][:, :, probe.num_prefix_tokens :]
    assert torch.allclose(seen["neuron"].firing, (neurons > 0).float().mean(2))
    assert seen["head"].firing is None


def test_profiles_against_a_loop():
    values = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    labels, halves, groups = torch.arange(9) % 4, torch.arange(9) % 2, torch.arange(9) % 3
    metric = Profiles(5, 2, 3)
    for part in (slice(0, 4), slice(4, 9)):
        metric.update(values[part], labels[part], halves[part], groups[part])
    found = metric.compute()
    for half in (0, 1):
        for c in range(5):
            chosen = (labels == c) & (halves == half)
            assert torch.allclose(found["total"][half, c], values[chosen].double().sum(0))
            assert found["count"][half, c] == chosen.sum()
    for group in range(5):
        assert torch.allclose(found["total"][2, group], values[groups == group].double().sum(0))
        assert found["count"][2, group] == (groups == group).sum()
    assert torch.allclose(found["squares"], values.double().square().sum(0))
    with pytest.raises(UserError, match="NaN"):
        metric.update(values * torch.nan, labels, halves, groups)


def test_one_pass_whatever_the_batches(tiny, digits):
    whole, parts = (
        watch_all({"m": tiny}, digits, LoaderOptions(limit=20, batch_size=size), 2, seed=3)["m"]
        for size in (20, 7)
    )
    found = {kind: of.compute() for kind, of in whole.profiles.items()}
    for kind in SITES:
        for key, value in parts.profiles[kind].compute().items():
            assert torch.allclose(value, found[kind][key], rtol=1e-6, atol=1e-6)
        assert torch.equal(whole.top[kind].compute()["images"], parts.top[kind].compute()["images"])
        assert torch.allclose(whole.fill[kind].compute(), parts.fill[kind].compute(), atol=1e-6)
    lots = np.random.default_rng(3).permutation(20)
    labels = np.array([digits.read(3 * i)[1] for i in range(20)])
    for half in (0, 1):
        expected = np.bincount(labels[lots % 2 == half], minlength=10)
        np.testing.assert_array_equal(found["head"]["count"][half], expected)
    np.testing.assert_array_equal(
        found["head"]["count"][2], np.bincount(lots // 2 % 10, minlength=10)
    )


@pytest.mark.parametrize("zero", [False, True])
def test_ablations_are_runs_of_their_own(any_model, images, zero):
    probe = Probe(any_model)
    keep = {
        "neuron": torch.ones(3, probe.num_neurons, dtype=torch.bool),
        "head": torch.ones(3, probe.num_heads, dtype=torch.bool),
    }
    keep["neuron"][0, 5] = keep["head"][1, 2] = False  # the third variant keeps all
    seen = watch(probe, images)
    fill = None if zero else {kind: (of.totals / len(images)).float() for kind, of in seen.items()}
    with torch.inference_mode():
        found = list(ablations(probe, images, keep, fill))
        assert torch.allclose(found[0][0], probe(images), atol=1e-6)
        for i, steps in ((1, [1]), (3, [3]), (-1, range(1, probe.num_steps + 1))):
            for variant, (site, unit) in enumerate((("mlp_post", 5), ("z", 2))):

                def by_hand(unit_values, address, variant=variant, unit=unit):
                    if zero:
                        return torch.zeros_like(unit_values)
                    return fill[("neuron", "head")[variant]][address.step - 1][:, unit].expand_as(
                        unit_values
                    )

                with probe.edit({f"{site}[{t}]:{unit}": by_hand for t in steps}):
                    expected = probe(images)
                assert torch.allclose(found[i][variant], expected, atol=1e-4)
                assert not torch.allclose(found[i][variant], found[0][0], atol=1e-4)
            assert torch.allclose(found[i][2], found[0][0], atol=1e-4)


def test_effects_are_means_of_differences(stacked, digits):
    reading, units = LoaderOptions(limit=12, batch_size=5), [("neuron", 7), ("head", 1)]
    seen = watch_all({"m": stacked}, digits, reading, 1)
    effects = ablate_all(seen, {"m": units}, {"m": stacked}, digits, reading, zero=True)["m"]
    found, hits = effects.change.compute(), effects.hits.compute()
    geometry = Geometry.of(stacked, digits)
    views = torch.stack([geometry(digits.read(5 * i)[0], None)[0] for i in range(12)])
    labels = torch.tensor([digits.read(5 * i)[1] for i in range(12)])
    with torch.no_grad():
        clean = stacked(views)
        probe = Probe(stacked)
        with probe.edit({"z[2]:1": lambda z, _: torch.zeros_like(z)}):
            ablated = probe(views)
    true = [(x - x.mean(1, keepdim=True))[torch.arange(12), labels] for x in (clean, ablated)]
    right = [(x.argmax(1) == labels).double() for x in (clean, ablated)]
    assert found["value"][1, 1, 1] == pytest.approx((true[1] - true[0]).mean().item(), abs=1e-5)
    assert found["value"][0, 1, 1] == pytest.approx((right[1] - right[0]).mean().item())
    half = 1.96 * (true[1] - true[0]).std().item() / 12**0.5
    assert (found["high"] - found["low"])[1, 1, 1] == pytest.approx(2 * half, rel=1e-3)
    assert hits["value"] == pytest.approx(right[0].mean().item())
    assert found["value"].shape == (
        2,
        4,
        2,
    )  # accuracy and logit; three steps and all of them; two units


def test_units_by_name_and_by_lot(tiny, digits):
    assert named("m", tiny, ["z:2", "mlp_post:37"]) == [("head", 2), ("neuron", 37)]
    with pytest.raises(UserError, match=r"m: .*no neuron 128; neurons: 0\.\.127"):
        named("m", tiny, ["mlp_post:128"])
    assert len(set(drawn(Probe(tiny), 3, 0))) == 6
    assert len(drawn(Probe(tiny), 9, 0)) == 9 + 4  # it has four heads
    assert Biographies(Probe(tiny), 3, 2).top["head"].best.shape == (12, 4, 2, 3)
    with pytest.raises(UserError, match="at least 2 are needed, got 1"):
        watch_all({"m": tiny}, digits, LoaderOptions(limit=1), 1)


def test_a_sheet_of_images_with_a_frame_around_a_patch_of_each(tiny, digits):
    picture = sheet([[3, 5], [5, 7]], [[0, 6], [15, 1]], (4, 4), digits, Geometry.of(tiny, digits))
    assert picture.shape == (64, 64, 3)
    for (row, column), number, (r, c) in (
        ((0, 0), 3, (0, 0)),
        ((0, 1), 5, (1, 2)),
        ((1, 0), 5, (3, 3)),
    ):
        expected = digits.read(number)[0].copy()
        framed = np.zeros((34, 34), bool)  # a pixel of margin all around
        framed[8 * r : 8 * r + 10, 8 * c : 8 * c + 10] = True
        framed[8 * r + 1 : 8 * r + 9, 8 * c + 1 : 8 * c + 9] = False
        expected[framed[1:-1, 1:-1]] = (255, 0, 255)
        np.testing.assert_array_equal(
            picture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32], expected
        )
    left_out = sheet([[3, -1]], [[0, -1]], (4, 4), digits, Geometry.of(tiny, digits))
    assert left_out.shape == (32, 32, 3)
