"""The table against Probe, numpy and scipy; choice of units and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from bvit_interp.analyses.selectivity import (
    COLUMNS,
    RANKED,
    UNIT_NAMES,
    Config,
    measure,
    plot,
    summary,
)
from bvit_interp.analyses.selectivity.measure import _random_units, _response_statistics
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe

QUICK = {"limit": 30, "n_ablated": 4, "random_units": 2, "threshold": 0.0}
UNIT_METRICS = [
    "onset",
    "offset",
    "lifetime",
    "profile_change",
    "profile_change_ends",
    "profile_stability",
    "share_class",
    "share_step",
    "share_interaction",
    "reliability",
]


SEEN = np.arange(0, 60, 2)  # 30 of the 60 scenes, evenly spaced


def responses_of(model, data, places=SEEN):
    """Responses ``(n, T, U)`` of neurons and heads to the images of these numbers."""
    geometry, probe = Geometry.of(model, data), Probe(model)
    views = torch.stack([geometry(data.read(int(i))[0], None)[0] for i in places])
    with torch.no_grad():
        cache = probe.record(
            views, ["mlp_post", "z"], range(1, probe.num_steps + 1), tokens="patches"
        )
    heads = cache["z"].norm(dim=-1).double()
    return {"mlp_post": cache["mlp_post"].double().mean(2).numpy(), "z": heads.mean(2).numpy()}


def labels_of(data, places=SEEN):
    return np.array([data.read(int(i))[1] for i in places])


def rows(frame, metric, site="mlp_post"):
    return frame[(frame["metric"] == metric) & (frame["site"] == site)]


def test_every_model_has_its_table(any_model, digits):
    """Selectivity, its null and class against numpy; every statistic of every unit; chosen units in
    full."""
    frame = measure({"m": any_model}, digits, Config(**QUICK))
    assert list(frame) == list(COLUMNS)
    steps = len(any_model.blocks)
    responses, labels = responses_of(any_model, digits), labels_of(digits)
    lots = np.random.default_rng(0).permutation(30)
    for site, values in responses.items():
        found = rows(frame, "selectivity", site).set_index(["unit", "step"])
        assert len(found) == steps * values.shape[2]
        for t, u in ((0, 0), (steps - 1, 2), (1, values.shape[2] - 1)):
            x = values[:, t, u]
            for groups, column in ((labels, "value"), (lots // 2 % 10, "null")):
                means = [x[groups == g].mean() for g in np.unique(groups)]
                counts = np.bincount(groups)[np.unique(groups)]
                eta, null = (
                    (counts * (means - x.mean()) ** 2).sum() / (x.var() * 30),
                    (len(means) - 1) / 29,
                )
                assert found.loc[(u, t + 1), column] == pytest.approx(
                    (eta - null) / (1 - null), abs=1e-5
                )
            classes = np.unique(labels)
            largest = classes[np.argmax([x[labels == c].mean() for c in classes])]
            assert found.loc[(u, t + 1), "class"] == digits.classes[largest]
        assert (found["n"] == 30).all()
        assert (found["low"] < found["value"]).all()
        for metric in UNIT_METRICS:
            part = rows(frame, metric, site)
            assert part["unit"].nunique() == values.shape[2]
            assert part["step"].isna().all()
            whole, units = part[part["unit"].isna()], part[part["unit"].notna()]
            if metric == "profile_change_ends":  # windows of another length in every unit
                assert not len(whole)
                continue
            assert whole["value"].item() == pytest.approx(
                units["value"].mean(), abs=1e-6, nan_ok=True
            )
            assert whole["n"].item() == units["value"].notna().sum()
        share = rows(frame, "selective_share", site)
        assert list(share["step"]) == list(range(1, steps + 1))
        assert set(rows(frame, "ablation_logit", site)["step"].dropna()) == set(range(1, steps + 1))
        assert rows(frame, "ablation_logit", site)[["value", "null"]].notna().all(axis=None)
    shares = [
        rows(frame, f"share_{part}")["value"].to_numpy()
        for part in ("class", "step", "interaction")
    ]
    np.testing.assert_allclose(sum(shares), 1, atol=1e-6)
    keys = ["model", "site", "unit", "step", "window", "metric", "class"]
    assert not frame.duplicated(keys).any()
    windows = rows(frame, "window_r_corrected")
    assert sorted(set(windows["window"])) == sorted({1, steps // 2, steps - 1})
    for window, part in windows.groupby("window"):
        assert part["step"].dropna().tolist() == list(range(1, steps - window + 1))


class Shades:
    """Thirty-six noisy images, those of class c brighter than those of class c - 1."""

    classes = ("dark", "grey", "light")
    official = True
    native_size = 32
    has_masks = False

    def __len__(self):
        return 36

    def name(self, i):
        return f"shade-{i}"

    def read(self, i):
        noise = np.random.default_rng(i).integers(0, 100, (32, 32, 3))
        return (noise + 70 * (i % 3)).astype(np.uint8), i % 3, None


def test_neurons_that_are_selective_for_shades(make):
    """Onset and offset as the F test of scipy has them; the lists in order."""
    model, data = make(num_classes=3), Shades()
    frame = measure({"m": model}, data, Config(threshold=0.2, count=2, n_ablated=3, random_units=1))
    values, labels = responses_of(model, data, range(36))["mlp_post"], np.arange(36) % 3
    groups = [values[labels == c].transpose(1, 2, 0) for c in range(3)]
    p = np.array(
        [[stats.f_oneway(*(g[t, u] for g in groups)).pvalue for u in range(128)] for t in range(12)]
    )
    selectivity = (
        rows(frame, "selectivity").pivot(index="step", columns="unit", values="value").to_numpy()
    )
    selective = (selectivity >= 0.2) & (p < 0.05 / p.size)
    assert 0.02 < selective.mean() < 0.98  # or the test says little
    assert (selective[1:] & ~selective[:-1]).any()
    share = rows(frame, "selective_share")
    np.testing.assert_allclose(share["value"], selective.mean(1), atol=1e-6)
    assert (
        share["null"] <= 0.01
    ).all()  # Bonferroni's: less than one in twenty sets of groups has any
    units = {key: rows(frame, key).dropna(subset="unit").set_index("unit") for key in UNIT_METRICS}
    for u in range(128):
        there = np.flatnonzero(selective[:, u]) + 1
        assert units["lifetime"]["value"][u] == len(there)
        ends = [there[0], there[-1]] if len(there) else [np.nan, np.nan]
        np.testing.assert_array_equal([units[key]["value"][u] for key in ("onset", "offset")], ends)
    expected = []
    for key, largest in RANKED.items():
        listed = units[key].dropna(subset="rank").sort_values("rank")
        assert listed["rank"].tolist() == list(range(1, len(listed) + 1))
        assert (units["lifetime"]["value"][listed.index] >= 3).all()
        assert (
            listed["value"].is_monotonic_decreasing
            if largest
            else listed["value"].is_monotonic_increasing
        )
        expected += [unit for unit in listed.index if unit not in expected][:2]
    assert list(dict.fromkeys(rows(frame, "class_mean")["unit"])) == expected
    means = np.array([g.mean(2) for g in groups])  # (C, T, U)
    u = next(u for u in expected if selective[:, u].sum() > 1)
    first, last = np.flatnonzero(selective[:, u])[[0, -1]]
    r = np.corrcoef(means[:, first, u], means[:, last, u])[0, 1]
    assert units["profile_change_ends"]["value"][u] == pytest.approx(1 - r, abs=1e-4)


def test_profiles_firing_and_images_of_a_named_unit(tiny_reg4, digits, tmp_path):
    config = Config(**QUICK, units=("mlp_post:37", "z:1"), profile_classes=3, n_top=2)
    frame = measure({"a/m@ema": tiny_reg4}, digits, config, tmp_path)
    responses, labels = responses_of(tiny_reg4, digits), labels_of(digits)
    classes = np.unique(labels)
    described = frame[frame["metric"].isin(["class_mean", "max_response"])]
    units = set(zip(described["site"], described["unit"], strict=True))
    assert units == {("mlp_post", 37), ("z", 1)}
    for site, unit in (("mlp_post", 37), ("z", 1)):
        x = responses[site][:, :, unit]
        table = np.array([x[labels == c].mean(0) for c in classes])
        varying = np.argsort(-((table - table.mean(0)) ** 2).sum(1))[:3]
        means = rows(frame, "class_mean", site)
        assert set(means["class"]) == {digits.classes[classes[c]] for c in varying}
        for c in varying:
            part = means[means["class"] == digits.classes[classes[c]]]
            np.testing.assert_allclose(part["value"].astype(float), table[c], atol=1e-5)
            np.testing.assert_allclose(part["null"].astype(float), table.mean(0), atol=1e-5)
        top = rows(frame, "max_response", site)
        for row in top.itertuples():
            best = SEEN[np.argsort(-x[:, row.step - 1])[:2]]
            assert [
                int(entry.partition(":")[0]) for entry in row.top_images.split()
            ] == best.tolist()
            assert row.value == pytest.approx(x[:, row.step - 1].max(), abs=1e-5)
            assert (
                Path(row.path) == tmp_path / "selectivity" / f"a_m_ema_{UNIT_NAMES[site]}{unit}.png"
            )
        assert np.asarray(Image.open(top["path"].iloc[0])).shape == (12 * 32, 2 * 32, 3)
    firing = rows(frame, "firing")
    assert list(firing["step"]) == list(range(1, 13))
    assert firing["value"].between(0, 1).all()
    (path,) = set(frame.loc[frame["metric"] == "reliability", "path"].dropna())
    with np.load(path) as arrays:
        assert list(arrays["classes"]) == [digits.classes[c] for c in classes]
        expected = np.array([responses["mlp_post"][labels == c].mean(0) for c in classes])
        np.testing.assert_allclose(arrays["neuron_class_means"], expected, atol=1e-5)
        np.testing.assert_allclose(
            arrays["neuron_firing"][:, 37], firing["value"].astype(float), atol=1e-6
        )


def test_ablation_of_a_named_unit(tiny, digits):
    """Against runs with an edit written by hand; the null is the mean of the other units drawn."""
    frame = measure(
        {"m": tiny}, digits, Config(**{**QUICK, "random_units": 4}, units=("z:1",), zero=True)
    )
    geometry, probe = Geometry.of(tiny, digits), Probe(tiny)
    numbers = [0, 15, 30, 45]  # 4 of 60, evenly spaced
    views = torch.stack([geometry(digits.read(i)[0], None)[0] for i in numbers])
    labels = torch.tensor([digits.read(i)[1] for i in numbers])

    def true_logit(logits):
        return (logits - logits.mean(1, keepdim=True))[torch.arange(4), labels]

    effects = []
    with torch.no_grad():
        clean = true_logit(tiny(views))
        for head in range(4):
            with probe.edit({f"z[5]:{head}": lambda z, _: torch.zeros_like(z)}):
                effects.append((true_logit(probe(views)) - clean).mean().item())
    row = rows(frame, "ablation_logit", "z").set_index("step").loc[5]
    assert row["value"] == pytest.approx(effects[1], abs=1e-4)
    assert row["null"] == pytest.approx(
        np.mean([effects[h] for h in (0, 2, 3)]), abs=1e-4
    )  # all four were drawn
    assert row["n"] == 4
    accuracy = frame[frame["metric"] == "accuracy"]
    with torch.no_grad():
        assert accuracy["value"].item() == (tiny(views).argmax(1) == labels).double().mean().item()


def test_batches_change_nothing_and_an_unroll_is_the_model(tiny, digits):
    frames = [
        measure({"m": model}, digits, Config(**QUICK, batch_size=size))
        for model, size in ((tiny, 64), (tiny, 7), (unroll(tiny), 64))
    ]
    for other in frames[1:]:
        pd.testing.assert_frame_equal(other, frames[0], rtol=1e-5, atol=1e-5)
    assert not tiny.training


def test_models_share_a_pass(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(**QUICK))
    alone = measure({"b": stacked}, digits, Config(**QUICK))
    both = frame[frame["model"] == "b"].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, alone, rtol=1e-5, atol=1e-5)
    assert (
        rows(frame, "reliability")["null"].dropna().mean()
        < rows(frame, "reliability")["value"].mean()
    )


def test_few_images(tiny, stacked, digits):
    frame = measure({"m": tiny}, digits, Config(limit=3, n_ablated=2))
    assert rows(frame, "selectivity")["value"].isna().all()  # as many classes as images
    assert (rows(frame, "selective_share")["value"] == 0).all()
    plot(frame).draw_without_rendering()
    with pytest.raises(UserError, match="at least 2 are needed, got 1"):
        measure({"m": stacked}, digits, Config(limit=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("neuron 5",)}, r"units must look like mlp_post:374 .* got 'neuron 5'"),
        ({"units": ("z:1", "z:1")}, "a unit is given twice"),
        ({"units": ("z:01", "z:1")}, "a unit is given twice"),
        ({"threshold": 1.0}, "threshold must be 0 or more and below 1, got 1.0"),
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"n_ablated": 0}, "n-ablated must be >= 1, got 0"),
        ({"random_units": 0}, "random-units must be >= 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Config(**options)


def test_units_the_model_does_not_have_and_weights_that_are_not_numbers(tiny, digits):
    with pytest.raises(UserError, match=r"m: .*no head 4; heads: 0\.\.3"):
        measure({"m": tiny}, digits, Config(**QUICK, units=("z:4",)))
    with torch.no_grad():
        tiny.blocks[0].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        measure({"m": tiny}, digits, Config(**QUICK))


def test_halves_and_random_groups_are_drawn_from_the_seed(tiny, digits):
    config = Config(limit=20, seed=3, n_top=2)
    found = _response_statistics({"m": tiny}, {"m": Probe(tiny)}, digits, config)["m"]
    count = found.class_sums["z"].compute()["count"]
    draws = np.random.default_rng(3).permutation(20)
    labels = labels_of(digits, [3 * i for i in range(20)])
    for half in (0, 1):
        expected = np.bincount(labels[draws % 2 == half], minlength=10)
        np.testing.assert_array_equal(count[half], expected)
    np.testing.assert_array_equal(count[2], np.bincount(draws // 2 % 10, minlength=10))


def test_random_units_are_distinct_and_no_more_than_there_are(tiny):
    assert len(set(_random_units(Probe(tiny), Config()))) == 6
    units = _random_units(Probe(tiny), Config(random_units=9))
    assert [site for site, _ in units] == ["mlp_post"] * 9 + ["z"] * 4
    assert units != _random_units(Probe(tiny), Config(random_units=9, seed=1))


def test_out_of_memory_halves_the_batch_and_counts_no_image_twice(tiny, digits, monkeypatch):
    whole = measure({"m": tiny}, digits, Config(**QUICK))
    block, calls = type(tiny.blocks[0]).forward, []

    def fail_late(self, x, *args, **kwargs):
        calls.append(len(x))
        if len(x) > 20 and calls.count(len(x)) % 9 == 0:
            raise torch.OutOfMemoryError
        return block(self, x, *args, **kwargs)

    monkeypatch.setattr(type(tiny.blocks[0]), "forward", fail_late)
    halved = measure({"m": tiny}, digits, Config(**QUICK))
    assert 15 in calls
    pd.testing.assert_frame_equal(halved, whole, rtol=1e-4, atol=1e-5)


def test_the_summary_is_of_neurons(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(**QUICK))
    shown = summary(frame)
    assert 0 < len(shown) <= 26
    assert (shown["unit"].isna() | (shown["rank"] <= 2)).all()
    kept = shown[shown["metric"] == "reliability"]
    assert kept["value"].item() == rows(frame, "reliability")["value"].iloc[-1]
