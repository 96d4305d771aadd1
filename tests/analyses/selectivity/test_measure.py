"""Biographies against Probe, numpy and scipy; choice of units, files, and what is drawn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from bvit_interp.analyses.selectivity import COLUMNS, Config, measure, plot
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe

QUICK = {"limit": 30, "ablated": 4, "nulls": 2, "threshold": 0.0}
OF_UNITS = [
    "birth",
    "death",
    "lifetime",
    "role_change",
    "role_change_ends",
    "stability",
    "share_class",
    "share_step",
    "share_interaction",
    "reliability",
]


SEEN = np.arange(0, 60, 2)  # 30 of the 60 scenes, spread evenly


def answers_of(model, data, places=SEEN):
    """Answers ``(n, T, U)`` of neurons and heads to the images of these numbers."""
    geometry, probe = Geometry.of(model, data), Probe(model)
    views = torch.stack([geometry(data.read(int(i))[0], None)[0] for i in places])
    with torch.no_grad():
        cache = probe.record(
            views, ["mlp_post", "z"], range(1, probe.num_steps + 1), tokens="patches"
        )
    heads = cache["z"].norm(dim=-1).double()
    return {"neuron": cache["mlp_post"].double().mean(2).numpy(), "head": heads.mean(2).numpy()}


def labels_of(data, places=SEEN):
    return np.array([data.read(int(i))[1] for i in places])


def rows(frame, statistic, kind="neuron"):
    return frame[(frame["statistic"] == statistic) & (frame["kind"] == kind)]


def test_every_model_has_its_table(any_model, digits):
    """Selectivity, its null and class against numpy; every statistic of every unit; chosen units in
    full."""
    frame = measure({"m": any_model}, digits, Config(**QUICK))
    assert list(frame) == list(COLUMNS)
    steps = len(any_model.blocks)
    of, labels = answers_of(any_model, digits), labels_of(digits)
    lots = np.random.default_rng(0).permutation(30)
    for kind, values in of.items():
        found = rows(frame, "selectivity", kind).set_index(["unit", "step"])
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
        for statistic in OF_UNITS:
            part = rows(frame, statistic, kind)
            assert part["unit"].nunique() == values.shape[2]
            assert part["step"].isna().all()
            whole, units = part[part["unit"].isna()], part[part["unit"].notna()]
            assert whole["value"].item() == pytest.approx(
                units["value"].mean(), abs=1e-6, nan_ok=True
            )
            assert whole["n"].item() == units["value"].notna().sum()
        alive = rows(frame, "alive", kind)
        assert list(alive["step"]) == list(range(1, steps + 1))
        assert set(rows(frame, "ablation_logit", kind)["step"].dropna()) == set(range(1, steps + 1))
        assert rows(frame, "ablation_logit", kind)[["value", "null"]].notna().all(axis=None)
    shares = [
        rows(frame, f"share_{part}")["value"].to_numpy()
        for part in ("class", "step", "interaction")
    ]
    np.testing.assert_allclose(sum(shares), 1, atol=1e-6)
    assert not frame.duplicated(["model", "kind", "unit", "step", "statistic", "class"]).any()


class Shades:
    """Thirty-six noisy images, those of class c brighter than those of class c - 1."""

    classes = ("dark", "grey", "light")
    native_size = 32
    has_masks = False

    def __len__(self):
        return 36

    def name(self, i):
        return f"shade-{i}"

    def read(self, i):
        noise = np.random.default_rng(i).integers(0, 100, (32, 32, 3))
        return (noise + 70 * (i % 3)).astype(np.uint8), i % 3, None


def test_lives_of_neurons_that_tell_shades(make):
    """Alive, birth and death as scipy's F test has them; the lists in order."""
    model, data = make(num_classes=3), Shades()
    frame = measure({"m": model}, data, Config(threshold=0.2, count=2, ablated=3, nulls=1))
    values, labels = answers_of(model, data, range(36))["neuron"], np.arange(36) % 3
    groups = [values[labels == c].transpose(1, 2, 0) for c in range(3)]
    p = np.array(
        [[stats.f_oneway(*(g[t, u] for g in groups)).pvalue for u in range(128)] for t in range(12)]
    )
    selectivity = (
        rows(frame, "selectivity").pivot(index="step", columns="unit", values="value").to_numpy()
    )
    alive = (selectivity >= 0.2) & (p < 0.05 / p.size)
    assert 0.02 < alive.mean() < 0.98  # or the test says little
    assert (alive[1:] & ~alive[:-1]).any()
    share = rows(frame, "alive")
    np.testing.assert_allclose(share["value"], alive.mean(1), atol=1e-6)
    assert (
        share["null"] <= 0.01
    ).all()  # Bonferroni's: less than one in twenty sets of groups has any
    units = {key: rows(frame, key).dropna(subset="unit").set_index("unit") for key in OF_UNITS}
    for u in range(128):
        there = np.flatnonzero(alive[:, u]) + 1
        assert units["lifetime"]["value"][u] == len(there)
        ends = [there[0], there[-1]] if len(there) else [np.nan, np.nan]
        np.testing.assert_array_equal([units[key]["value"][u] for key in ("birth", "death")], ends)
    lists = {"birth": True, "death": False, "role_change": True, "stability": True}
    expected = []
    for key, largest in lists.items():
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
    u = next(u for u in expected if alive[:, u].sum() > 1)
    first, last = np.flatnonzero(alive[:, u])[[0, -1]]
    r = np.corrcoef(means[:, first, u], means[:, last, u])[0, 1]
    assert units["role_change_ends"]["value"][u] == pytest.approx(1 - r, abs=1e-4)


def test_profiles_firing_and_images_of_a_named_unit(tiny_reg4, digits, tmp_path):
    config = Config(**QUICK, units=("mlp_post:37", "z:1"), profile=3, top=2)
    frame = measure({"a/m@ema": tiny_reg4}, digits, config, tmp_path)
    of, labels = answers_of(tiny_reg4, digits), labels_of(digits)
    classes = np.unique(labels)
    told = frame[frame["statistic"].isin(["class_mean", "top"])]
    assert set(zip(told["kind"], told["unit"], strict=True)) == {("neuron", 37), ("head", 1)}
    for kind, unit in (("neuron", 37), ("head", 1)):
        x = of[kind][:, :, unit]
        table = np.array([x[labels == c].mean(0) for c in classes])
        varying = np.argsort(-((table - table.mean(0)) ** 2).sum(1))[:3]
        means = rows(frame, "class_mean", kind)
        assert set(means["class"]) == {digits.classes[classes[c]] for c in varying}
        for c in varying:
            part = means[means["class"] == digits.classes[classes[c]]]
            np.testing.assert_allclose(part["value"].astype(float), table[c], atol=1e-5)
            np.testing.assert_allclose(part["null"].astype(float), table.mean(0), atol=1e-5)
        top = rows(frame, "top", kind)
        for row in top.itertuples():
            best = SEEN[np.argsort(-x[:, row.step - 1])[:2]]
            assert [int(entry.partition(":")[0]) for entry in row.top.split()] == best.tolist()
            assert row.value == pytest.approx(x[:, row.step - 1].max(), abs=1e-5)
            assert Path(row.path) == tmp_path / "biography" / f"a_m_ema_{kind}{unit}.png"
        assert np.asarray(Image.open(top["path"].iloc[0])).shape == (12 * 32, 2 * 32, 3)
    firing = rows(frame, "firing")
    assert list(firing["step"]) == list(range(1, 13))
    assert firing["value"].between(0, 1).all()
    (path,) = set(frame.loc[frame["statistic"] == "reliability", "path"].dropna())
    with np.load(path) as arrays:
        assert list(arrays["classes"]) == [digits.classes[c] for c in classes]
        expected = np.array([of["neuron"][labels == c].mean(0) for c in classes])
        np.testing.assert_allclose(arrays["neuron_class_means"], expected, atol=1e-5)
        np.testing.assert_allclose(
            arrays["neuron_firing"][:, 37], firing["value"].astype(float), atol=1e-6
        )


def test_ablation_of_a_named_unit(tiny, digits):
    """Against runs with an edit written by hand; the null is the mean of the other units drawn."""
    frame = measure({"m": tiny}, digits, Config(**{**QUICK, "nulls": 4}, units=("z:1",), zero=True))
    geometry, probe = Geometry.of(tiny, digits), Probe(tiny)
    numbers = [0, 15, 30, 45]  # 4 of 60, spread evenly
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
    row = rows(frame, "ablation_logit", "head").set_index("step").loc[5]
    assert row["value"] == pytest.approx(effects[1], abs=1e-4)
    assert row["null"] == pytest.approx(
        np.mean([effects[h] for h in (0, 2, 3)]), abs=1e-4
    )  # all four were drawn
    assert row["n"] == 4
    accuracy = frame[frame["statistic"] == "accuracy"]
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
    frame = measure({"m": tiny}, digits, Config(limit=3, ablated=2))
    assert rows(frame, "selectivity")["value"].isna().all()  # as many classes as images
    assert (rows(frame, "alive")["value"] == 0).all()
    plot(frame)
    with pytest.raises(UserError, match="at least 2 are needed, got 1"):
        measure({"m": stacked}, digits, Config(limit=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("neuron 5",)}, r"units must be as mlp_post:374 .* got 'neuron 5'"),
        ({"units": ("z:1", "z:1")}, "a unit is given twice"),
        ({"units": ("z:01", "z:1")}, "a unit is given twice"),
        ({"threshold": 1.0}, "threshold must be 0 or more and below 1, got 1.0"),
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"ablated": 0}, "ablated must be >= 1, got 0"),
        ({"nulls": 0}, "nulls must be >= 1, got 0"),
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


def test_a_table_read_back_can_be_drawn(tiny, stacked, digits):
    frame = measure(
        {"a": tiny, "b": stacked}, digits, Config(**QUICK, units=("mlp_post:3", "mlp_post:9"))
    )
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert len(axes) == 6
    (image,) = axes[0].images
    shown = image.get_array().filled(np.nan)
    assert shown.shape == (128, 12 + 1 + 3)
    selectivity = rows(frame[frame["model"] == "a"], "selectivity")
    np.testing.assert_allclose(
        np.sort(shown[:, 4]), np.sort(selectivity[selectivity["step"] == 5]["value"])
    )
    assert {text.split(",")[0] for text in axes[4].get_legend_handles_labels()[1]} >= {
        "neuron 3",
        "neuron 9",
    }
    figure.draw_without_rendering()
    only_heads = measure({"b": stacked}, digits, Config(**QUICK, units=("z:0",)))
    plot(only_heads).draw_without_rendering()
    assert len(Config().headline(frame)) <= 40
