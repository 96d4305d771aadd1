"""Effects of ablation against whole runs with a hook, image by image; any batches, any model."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bvit_interp.analyses.ablation import COLUMNS, Config, measure, summary
from bvit_interp.analyses.ablation.effects import Ablator
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import evenly_spaced
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe

SHORT = {"groups": 2, "n_ablated": 6}


def batch_of(model, data, places):
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in places]
    return torch.stack([geometry(image, None)[0] for image, _, _ in scenes]), torch.tensor(
        [s[1] for s in scenes]
    )


def log_prob(logits, labels):
    return logits.double().log_softmax(-1)[range(len(labels)), labels].numpy()


def with_head(model, images, head, steps, fill):
    """Logits with one head of each step of `steps` replaced by fill(step), ``(B, N, E)`` or of less
    axes."""
    view = unroll(model)
    width = model.embed_dim // model.blocks[0].attn.num_heads
    for t in steps:

        def replace(_, args, t=t):
            new = args[0].clone()
            new[..., head * width : (head + 1) * width] = fill(t)
            return (new,)

        view.blocks[t - 1].attn.proj.register_forward_pre_hook(replace)
    return view(images)


def rows(frame, **keys):
    for key, value in keys.items():
        frame = frame[frame[key] == value]
    return frame


@pytest.fixture
def three(make):
    """A bViT of three steps and two heads."""
    return make(num_steps=3, num_heads=2)


def test_every_scope_and_method_against_runs_with_a_hook(three, digits):
    frame = measure({"m": three}, digits, Config(limit=12, n_ablated=6, groups=0))
    images, labels = batch_of(three, digits, evenly_spaced(60, 6))
    others, _ = batch_of(
        three, digits, np.roll(evenly_spaced(60, 6), -3)
    )  # the partner is half the images on
    many, _ = batch_of(three, digits, evenly_spaced(60, 12))
    with torch.inference_mode():
        clean = log_prob(three(images), labels)
        means = {
            t: z.mean(0)
            for t, z in enumerate(Probe(three).record(many, "z")["z"].unbind(1), start=1)
        }
        given = dict(enumerate(Probe(three).record(others, "z")["z"].unbind(1), start=1))
        for method, head in (("zero", 0), ("mean", 1), ("resample", 1)):
            fill = {
                "zero": lambda t: 0.0,
                "mean": lambda t, head=head: means[t][:, head],
                "resample": lambda t, head=head: given[t][:, :, head],
            }[method]
            of_head = rows(frame, method=method, unit=head, metric="log_prob", site="z")
            single = []
            for scope, step, steps in [
                ("each", 1, [1]),
                ("each", 2, [2]),
                ("each", 3, [3]),
                ("from", 2, [2, 3]),
                ("from", 1, [1, 2, 3]),
                ("all", None, [1, 2, 3]),
            ]:
                change = log_prob(with_head(three, images, head, steps, fill), labels) - clean
                found = rows(of_head, scope=scope)
                found = found[found["step"].isna()] if step is None else rows(found, step=step)
                assert found["value"].item() == pytest.approx(change.mean(), rel=1e-4, abs=1e-6)
                half = 1.959963984540054 * change.std(ddof=1) / 6**0.5
                assert found["high"].item() - found["value"].item() == pytest.approx(half, rel=1e-3)
                assert found["n"].item() == 6
                single += [change] if scope == "each" else []
            total, excess = (rows(of_head, scope=name).iloc[0] for name in ("sum", "excess"))
            assert total["value"] == pytest.approx(sum(single).mean(), rel=1e-4, abs=1e-6)
            difference = change - sum(single)
            assert excess["value"] == pytest.approx(difference.mean(), rel=1e-3, abs=1e-6)
            half = 1.959963984540054 * difference.std(ddof=1) / 6**0.5
            assert excess["high"] - excess["low"] == pytest.approx(2 * half, rel=1e-3)


def test_the_null_of_a_head_is_random_channels_and_of_a_group_the_mean_group(three, digits):
    config = Config(**SHORT, methods=("zero",), scopes=("each",), seed=3)
    frame = measure({"m": three}, digits, config)
    images, labels = batch_of(three, digits, evenly_spaced(60, 6))
    chosen = torch.randperm(32, generator=torch.Generator().manual_seed(3))[:16]
    view = unroll(three)
    view.blocks[1].attn.proj.register_forward_pre_hook(
        lambda _, args: (args[0].index_fill(-1, chosen, 0.0),)
    )
    with torch.inference_mode():
        change = log_prob(view(images), labels) - log_prob(three(images), labels)
    at_two = rows(frame, metric="log_prob", scope="each", step=2)
    assert rows(at_two, site="z")["null"].tolist() == pytest.approx([change.mean()] * 2, rel=1e-4)
    groups = rows(at_two, site="mlp_post")
    assert groups["null"].tolist() == pytest.approx([groups["value"].mean()] * 2)
    assert groups["unit"].tolist() == [0, 1]


def test_the_table_of_single_steps_parts_as_written_down(three, digits):
    frame = measure(
        {"m": three}, digits, Config(n_ablated=20, groups=0, methods=("zero",), scopes=("each",))
    )
    each = (
        rows(frame, metric="kl", scope="each")
        .pivot(index="step", columns="unit", values="value")
        .to_numpy()
    )
    images, _ = batch_of(three, digits, evenly_spaced(60, 20))
    with torch.inference_mode():
        clean = three(images).double().log_softmax(-1)
        ablated = [
            [with_head(three, images, head, [t], lambda t: 0.0) for head in range(2)]
            for t in (1, 2, 3)
        ]
        away = [
            [clean - logits.double().log_softmax(-1) for logits in of_step] for of_step in ablated
        ]
        changes = np.array(
            [[(clean.exp() * each).sum(-1).numpy() for each in of_step] for of_step in away]
        )  # (T, U, n)
    np.testing.assert_allclose(each, changes.mean(-1), rtol=1e-3, atol=1e-6)
    within = changes - changes.mean(1, keepdims=True)
    even, odd = (
        np.concatenate([within[..., k::10] for k in range(first, 10, 2)], -1).mean(-1)
        for first in (0, 1)
    )
    found = frame[frame["metric"] == "kl"].set_index("scope")
    expected = np.corrcoef(even.ravel(), odd.ravel())[0, 1]
    assert found.loc["reliability", "value"] == pytest.approx(expected, rel=1e-3)
    of_units, total = 0.0, 0.0  # products of images of different folds alone
    for i in range(20):
        for j in range(20):
            if i % 10 != j % 10:
                a, b = (changes[..., k] - changes[..., k].mean() for k in (i, j))
                of_units += 3 * (a.mean(0) * b.mean(0)).sum()
                total += (a * b).sum()
    assert found.loc["variance_units", "value"] == pytest.approx(of_units / total, rel=1e-3)
    shares = found.loc[["variance_steps", "variance_units", "variance_interaction"]]
    assert shares["value"].sum() == pytest.approx(1)
    assert (shares["low"] < shares["high"]).all()
    assert found.loc["variance_units", "null"] == pytest.approx(
        (1 - found.loc["variance_steps", "value"]) / 3
    )


def test_log_kl_is_the_logarithm_of_the_means_of_the_folds(three, digits):
    frame = measure(
        {"m": three}, digits, Config(n_ablated=20, groups=0, methods=("zero",), scopes=("each",))
    )
    images, _ = batch_of(three, digits, evenly_spaced(60, 20))
    with torch.inference_mode():
        clean = three(images).double().log_softmax(-1)
        away = [
            [
                clean - with_head(three, images, head, [t], lambda t: 0.0).double().log_softmax(-1)
                for head in range(2)
            ]
            for t in (1, 2, 3)
        ]
    kl = np.array([[(clean.exp() * each).sum(-1).numpy() for each in row] for row in away])
    logs = np.log((kl[..., :10] + kl[..., 10:]) / 2)  # images i and i + 10 are fold i
    squares, total = np.zeros(3), 0.0
    for i in range(10):
        for j in range(10):
            if i != j:
                a, b = (logs[..., k] - logs[..., k].mean() for k in (i, j))
                squares[0] += 2 * (a.mean(1) * b.mean(1)).sum()
                squares[1] += 3 * (a.mean(0) * b.mean(0)).sum()
                total += (a * b).sum()
    squares[2] = total - squares[:2].sum()
    found = frame[frame["metric"] == "log_kl"].set_index("scope")
    names = ["variance_steps", "variance_units", "variance_interaction"]
    assert found.loc[names, "value"].tolist() == pytest.approx((squares / total).tolist(), rel=1e-3)
    within = logs - logs.mean(1, keepdims=True)
    changing = within - within.mean(0, keepdims=True)
    for name, part in (("reliability", within), ("reliability_interaction", changing)):
        halves = (part[..., k::2].mean(-1).ravel() for k in range(2))
        assert found.loc[name, "value"] == pytest.approx(np.corrcoef(*halves)[0, 1], rel=1e-3)
    assert (found["n"] == 20).all() and len(found) == 5


def test_p_values_of_a_model_are_corrected_together(three, stacked, digits):
    config = Config(n_ablated=12, limit=12, groups=2, methods=("zero", "mean"))
    frame = measure({"a": three, "b": stacked}, digits, config)
    tests = frame["scope"].str.startswith("reliability")
    assert frame.loc[~tests, "p_holm"].isna().all()
    for _, part in frame[tests].groupby("model"):
        assert len(part) == 2 * 2 * 5 * 2  # methods, sites, metrics, tests
        given = part.dropna(subset="p_value").sort_values("p_value", kind="stable")
        least, expected = 0.0, []
        for rank, p_value in enumerate(given["p_value"]):
            least = max(least, p_value * (len(given) - rank))
            expected.append(min(least, 1.0))
        assert given["p_holm"].tolist() == pytest.approx(expected)


def test_any_model(any_model, digits):
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    config = Config(n_ablated=4, groups=1, methods=("mean", "resample"), scopes=("from", "all"))
    frame = measure({"m": any_model}, digits, config)
    steps, heads = Probe(any_model).num_steps, any_model.blocks[0].attn.num_heads
    assert len(frame) == 2 * 4 * (heads + 1) * (steps + 1)
    assert frame["value"].notna().all() and frame["null"].notna().all()
    changes = frame[frame["metric"] == "kl"]
    assert (changes["value"] > 0).all()
    first = rows(frame, scope="from", step=1)["value"].to_numpy()
    np.testing.assert_array_equal(first, rows(frame, scope="all")["value"].to_numpy())
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())


def test_batches_of_any_size_give_the_same_table(three, stacked, digits):
    config = {"limit": 9, "n_ablated": 7, "groups": 2}
    models = {"a": three, "b": stacked}
    whole = measure(models, digits, Config(**config))
    pd.testing.assert_frame_equal(
        measure(models, digits, Config(**config, batch_size=3)), whole, rtol=1e-6, atol=3e-6
    )
    assert whole.groupby("model", sort=False).size().index.tolist() == ["a", "b"]
    alone = measure({"b": stacked}, digits, Config(**config))
    pd.testing.assert_frame_equal(
        whole[whole["model"] == "b"].reset_index(drop=True), alone, atol=1e-5
    )


def test_out_of_memory_halves_the_batch_and_counts_no_image_twice(three, digits, monkeypatch):
    config = Config(limit=8, n_ablated=8, groups=2)
    whole = measure({"m": three}, digits, config)
    head, calls = type(three).forward_head, []

    def fail_late(self, x, pre_logits=False):
        calls.append(len(x))
        if len(x) > 12 or (
            len(x) == 8 and calls.count(8) in (1, 3)
        ):  # the first is in the pass for the means
            raise torch.OutOfMemoryError
        return head(self, x, pre_logits)

    monkeypatch.setattr(type(three), "forward_head", fail_late)
    halved = measure({"m": three}, digits, config)
    assert {16, 8, 4, 2} <= set(calls)
    assert (halved["n"] == 8).all()
    pd.testing.assert_frame_equal(halved, whole, atol=1e-5)


def test_donors_that_do_not_fit_at_once_come_in_parts(three, digits, monkeypatch):
    config = Config(limit=6, groups=0, methods=("resample",), scopes=("all",))
    whole = measure({"m": three}, digits, config)
    effects, sizes = Ablator.effects, []

    def counted(self, images, *args):
        sizes.append(len(images))
        return effects(self, images, *args)

    monkeypatch.setattr(Ablator, "effects", counted)
    module = sys.modules[measure.__module__]
    for images, expected in ((6, [6]), (3, [3, 3]), (2, [1, 2, 1, 2]), (0.5, [1] * 6)):
        limit = int(images * 4 * 3 * 17 * 32)  # 3 steps, 17 tokens, 2 heads of 16, floats
        monkeypatch.setattr(module, "_BYTES_OF_DONORS", limit)
        pd.testing.assert_frame_equal(measure({"m": three}, digits, config), whole, atol=1e-5)
        assert sizes == expected
        sizes.clear()


def test_columns_and_summary(three, stacked, digits):
    config = Config(**SHORT)
    frame = measure({"a": three, "b": stacked}, digits, config)
    assert list(frame) == list(COLUMNS)
    shown = summary(frame)
    assert len(shown) == 2 * 3 * 5 + 2 + stacked.blocks[0].attn.num_heads
    least = shown[(shown["scope"] == "each") & (shown["model"] == "a")].set_index("unit")["value"]
    mean = rows(frame, model="a", method="mean", site="z", metric="log_prob", scope="each")
    assert least.to_dict() == mean.groupby("unit")["value"].min().to_dict()


def test_partners_are_resampled_from_and_share_a_fold(three, digits):
    """Sixteen images: image i is resampled from image i + 8, and both are in fold i modulo 8."""
    config = Config(n_ablated=16, groups=0, methods=("resample",), scopes=("each",))
    frame = measure({"m": three}, digits, config)
    images, _ = batch_of(three, digits, evenly_spaced(60, 16))
    donors = images.roll(-8, 0)
    with torch.inference_mode():
        given = Probe(three).record(donors, "z")["z"]
        clean = three(images).double().log_softmax(-1)
        changes = np.zeros((3, 2, 16))
        for t in range(3):
            for head in range(2):
                logits = with_head(
                    three, images, head, [t + 1], lambda s, head=head: given[:, s - 1, :, head]
                )
                kl = (clean.exp() * (clean - logits.double().log_softmax(-1))).sum(-1)
                changes[t, head] = kl.numpy()
    squares, total = 0.0, 0.0
    for i in range(16):
        for j in range(16):
            if i % 8 != j % 8:
                a, b = (changes[..., k] - changes[..., k].mean() for k in (i, j))
                squares += 2 * (a.mean(1) * b.mean(1)).sum()
                total += (a * b).sum()
    shares = rows(frame, metric="kl", scope="variance_steps")
    assert shares["value"].item() == pytest.approx(squares / total, rel=1e-3)
    assert shares["n"].item() == 16
    assert shares["low"].isna().all()  # eight of ten folds


@pytest.mark.parametrize("scopes", [("all",), ("from",), ("each",), ("each", "all")])
def test_scopes_alone(three, digits, scopes):
    config = Config(n_ablated=3, groups=0, methods=("zero",), scopes=scopes)
    frame = measure({"m": three}, digits, config)
    assert ("sum" in set(frame["scope"])) == (len(scopes) == 2)
    assert ("reliability" in set(frame["scope"])) == ("each" in scopes)
    assert len(summary(frame)) >= 2


def test_images_are_at_most_the_limit(three, digits):
    config = {"groups": 0, "methods": ("zero",), "scopes": ("all",)}
    assert (measure({"m": three}, digits, Config(**config, limit=5))["n"] == 5).all()
    assert (measure({"m": three}, digits, Config(**config, n_ablated=None))["n"] == 60).all()
    one = measure({"m": three}, digits, Config(**config, limit=1))
    assert one["value"].notna().all() and one["low"].isna().all()


def test_bad_input(three, digits):
    with pytest.raises(UserError, match="n-ablated must be >= 1, got 0"):
        Config(n_ablated=0)
    with pytest.raises(
        UserError,
        match="methods must be one or more of zero, mean, resample, each once, got 'median'",
    ):
        Config(methods=("median",))
    with pytest.raises(UserError, match="scopes must be one or more of each, from, all"):
        Config(scopes=())
    with pytest.raises(UserError, match="groups must be >= 0, got -1"):
        Config(groups=-1)
    with pytest.raises(UserError, match="norm-draws must be >= 0, got -1"):
        Config(norm_draws=-1)
    with pytest.raises(UserError, match="groups: 0..128"):
        measure({"m": three}, digits, Config(groups=500))
    with pytest.raises(UserError, match="at least 2 are needed, got 1"):
        measure({"m": three}, digits, Config(limit=1))
    nn.init.constant_(three.blocks[0].attn.proj.weight, torch.nan)
    with pytest.raises(UserError, match="NaN"):
        measure({"m": three}, DigitScenes("test", length=4), Config())
