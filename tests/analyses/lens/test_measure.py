"""The lens against `step_accuracy`, against a reading by hand, and at both ends."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import STEPS, answer_by_hand, foreign, states_by_hand

from bvit_interp.analyses import step_accuracy
from bvit_interp.analyses.lens import COLUMNS, Config, measure, plot, summary
from bvit_interp.analyses.lens.measure import _images_at_once, _split
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import evenly_spaced
from bvit_interp.errors import DataError, UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.unroll import unroll, with_steps

FAST = Config(n_fit=10, iterations=2, limit=12, batch_size=8)
BOTH_ENDS = ("agreement", "kl", "accuracy")


def without_masks(squares):
    class Unmasked(squares):
        has_masks = False

        def read(self, i):
            return (*super().read(i)[:2], None)

    return Unmasked(27)


def change(**options):
    return dataclasses.replace(FAST, **options)


def steps_of(frame, of, tokens, metric):
    rows = frame[(frame["lens"] == of) & (frame["tokens"] == tokens) & (frame["metric"] == metric)]
    return rows.set_index("step")


def test_raw_on_cls_is_the_step_accuracy(any_model, digits):
    frame = measure({"m": any_model}, digits, FAST)
    depth = len(any_model.blocks)
    known = step_accuracy.measure(
        {"m": any_model}, digits, step_accuracy.Config(steps=depth, limit=12)
    ).set_index("step")
    for name in ("accuracy", "agreement", "entropy", "true_rank", "confidence", "flips"):
        rows = steps_of(frame, "raw", "cls", name)
        np.testing.assert_allclose(rows["value"], known[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(steps_of(frame, "raw", "cls", "flips")["null"], known["flips_null"])
    np.testing.assert_allclose(steps_of(frame, "raw", "cls", "accuracy")["null"], known["chance"])
    np.testing.assert_allclose(
        steps_of(frame, "raw", "cls", "accuracy")[["low", "high"]], known[["low", "high"]]
    )
    for name in ("agreement", "flips"):  # shares of 12 images, as the accuracy
        rows = steps_of(frame, "raw", "cls", name).dropna(subset=["value"])
        expected = [wilson_interval(12 * share, 12) for share in rows["value"]]
        np.testing.assert_allclose(rows[["low", "high"]], expected)
    assert steps_of(frame, "raw", "cls", "kl")["value"].iloc[-1] == pytest.approx(0, abs=1e-12)
    assert (frame["n"] <= 12).all()
    assert (frame["n_fit"] == 10).all()
    registers = any_model.num_prefix_tokens > (2 if hasattr(any_model, "head_dist") else 1)
    assert set(frame["tokens"]) == ({"cls", "reg", "patches"} if registers else {"cls", "patches"})
    for kind in set(frame["tokens"]):
        assert steps_of(frame, "tuned", kind, "kl")["value"].notna().all()


def test_patches_by_hand(tiny, digits, by_hand):
    frame = measure({"m": tiny}, digits, FAST)
    geometry = Geometry.of(tiny, digits)
    scenes = [digits.read(i) for i in evenly_spaced(60, 12)]
    images, labels = (
        torch.stack([geometry(s[0])[0] for s in scenes]),
        np.array([s[1] for s in scenes]),
    )
    with torch.no_grad():
        sites = by_hand.run(tiny, images, [tiny.blocks[0]] * 12)
        final = by_hand.logits(tiny, sites[12]["resid_post"]).double().softmax(-1).numpy()
        for t in (1, 6, 12):
            z = sites[t]["resid_post"]
            q = (
                torch.stack([by_hand.logits(tiny, z[:, 1 + p :]) for p in range(16)], 1)
                .double()
                .softmax(-1)
                .numpy()
            )
            found = {
                name: steps_of(frame, "raw", "patches", name)["value"][t] for name in BOTH_ENDS
            }
            assert found["accuracy"] == pytest.approx((q.argmax(-1) == labels[:, None]).mean())
            assert found["agreement"] == pytest.approx(
                (q.argmax(-1) == final.argmax(-1)[:, None]).mean()
            )
            kl = (final[:, None] * np.log(final[:, None] / q)).sum(-1).mean()
            assert found["kl"] == pytest.approx(kl, rel=1e-4)
            maps = np.log(np.stack([q[i, :, labels[i]] for i in range(12)]))
            hits, covered = [], []
            for i, (_, label, mask) in enumerate(scenes):
                on = np.array(
                    [mask[8 * r + 4, 8 * c + 4] == label + 1 for r in range(4) for c in range(4)]
                )
                if on.any():
                    hits.append(on[maps[i].argmax()])
                    covered.append(on.mean())
            row = steps_of(frame, "raw", "patches", "pointing").loc[t]
            assert row["value"] == pytest.approx(np.mean(hits))
            assert row["n"] == len(hits)
            assert steps_of(frame, "raw", "patches", "object_share")["value"][t] == pytest.approx(
                np.mean(covered)
            )


def test_a_map_whose_maximum_is_on_ignored_ground_does_not_point(make, squares, tmp_path):
    """By the maps that the analysis keeps; the uppermost row of patches is ignored."""
    data, options = squares(27, ignore=True), {"limit": 9, "n_fit": 4, "n_examples": 9}
    model = make(num_steps=3, num_classes=3)
    frame = measure({"m": model}, data, change(**options), folder=tmp_path)
    with np.load(tmp_path / "lens_m.npz") as kept:
        maps = kept["maps"][:, 0].reshape(9, 3, 16)
    masks = [data.read(i)[2][4::8, 4::8].ravel() for i in evenly_spaced(27, 9)]
    objects = np.stack([(mask > 0) & (mask < 1000) for mask in masks])
    points = maps.argmax(-1)
    counted = points >= 4
    hits = np.take_along_axis(objects, points, axis=1)
    rows = steps_of(frame, "raw", "patches", "pointing")
    assert rows["n"].tolist() == counted.sum(0).tolist()
    assert not counted.all()
    expected = [hits[counted[:, t], t].mean() for t in range(3)]
    np.testing.assert_allclose(rows["value"], expected)
    share = steps_of(frame, "raw", "patches", "object_share")["value"]
    np.testing.assert_allclose(share, objects.sum(1).mean() / 12)


def test_the_tuned_lens_reads_more_than_the_raw_and_than_its_null(make, digits):
    """A random model's answers are functions of the image; the map learns them from other
    images."""
    model = make(num_steps=3)
    frame = measure({"m": model}, digits, Config(n_fit=40, limit=20, iterations=20))
    raw, tuned, shuffled = (
        steps_of(frame, of, "cls", "kl")["value"] for of in ("raw", "tuned", "shuffled")
    )
    assert (tuned < shuffled).all()
    assert tuned[1] < raw[1]
    assert tuned[3] < 0.1 * steps_of(frame, "tuned", "cls", "kl")["null"][3]


@pytest.mark.parametrize("name", ["tiny_reg4", "stacked"])
def test_it_does_not_depend_on_the_batches(name, digits, request):
    model = request.getfixturevalue(name)
    whole, parts = (measure({"m": model}, digits, change(batch_size=size)) for size in (64, 5))
    pd.testing.assert_frame_equal(whole, parts, rtol=1e-5, atol=1e-5)


def test_memory_that_runs_short_changes_nothing(tiny, digits, monkeypatch):
    """Parts that fit a bound, and batches halved after an error as on a GPU."""
    module = importlib.import_module("bvit_interp.analyses.lens.measure")
    whole = measure({"m": tiny}, digits, FAST)
    monkeypatch.setattr(module, "_BYTES_OF_LOGITS", 1)
    pd.testing.assert_frame_equal(measure({"m": tiny}, digits, FAST), whole, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    head = type(tiny).forward_head

    def fail(self, x, pre_logits=False):
        if len(x) > 4 * 16 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError
        return head(self, x, pre_logits)

    monkeypatch.setattr(type(tiny), "forward_head", fail)
    pd.testing.assert_frame_equal(measure({"m": tiny}, digits, FAST), whole, rtol=1e-5, atol=1e-5)


def test_images_are_trained_on_or_scored_never_both(squares):
    for count, limit, n_fit, scored, fitted in (
        (27, 9, 18, 9, 18),
        (27, None, 10, 17, 10),
        (27, 20, 18, 10, 10),
    ):
        fit, score = _split(squares(count), Config(limit=limit, n_fit=n_fit))
        assert (len(score), len(fit)) == (scored, fitted)
        assert not set(fit.index) & set(score.index)
        assert score.name(2) == f"square-{score.index[2]}"
    with pytest.raises(UserError, match="at least 4 are needed, got 3"):
        _split(squares(3), Config())


def test_leaving_at_both_ends_of_the_threshold(tiny, digits):
    frame = measure({"m": tiny}, digits, FAST)
    exits = frame[frame["metric"] == "exit_accuracy"]
    own = steps_of(frame, "raw", "cls", "accuracy")["value"]
    for of in ("raw", "tuned"):
        curve = exits[exits["lens"] == of].set_index("threshold")
        assert curve.loc[1.0, "value"] == own[12] == curve.loc[1.0, "null"]
        assert curve.loc[1.0, "mean_step"] == 12
        assert curve.loc[0.0, "value"] == steps_of(frame, of, "cls", "accuracy")["value"][1]
        assert curve.loc[0.0, "mean_step"] == 1
        assert curve["mean_step"].is_monotonic_increasing


def test_early_exit_between_the_ends_by_hand(tiny, digits, by_hand):
    frame = measure({"m": tiny}, digits, FAST)
    scenes = [digits.read(i) for i in evenly_spaced(60, 12)]
    images = torch.stack([Geometry.of(tiny, digits)(scene[0])[0] for scene in scenes])
    labels = np.array([scene[1] for scene in scenes])
    with torch.no_grad():
        sites = by_hand.run(tiny, images, [tiny.blocks[0]] * 12)[1:]
        logits = torch.stack([by_hand.logits(tiny, site["resid_post"]) for site in sites], 1)
    p = logits.double().softmax(-1).numpy()
    exits = frame[(frame["metric"] == "exit_accuracy") & (frame["lens"] == "raw")]
    steps_seen = set()
    for tau in (0.3, 0.5, 0.7):
        steps = [next((t for t in range(11) if row[t].max() > tau), 11) for row in p]
        steps_seen |= set(steps)
        hits = sum(row[t].argmax() == label for row, t, label in zip(p, steps, labels, strict=True))
        found = exits.set_index("threshold").loc[tau]
        assert found["value"] == hits / 12
        assert found["mean_step"] == pytest.approx(np.mean(steps) + 1)
        assert (found["low"], found["high"]) == pytest.approx(wilson_interval(int(hits), 12))
        null = [(p[:, t].argmax(-1) == labels).mean() for t in steps]
        assert found["null"] == pytest.approx(np.mean(null))
    assert len(steps_seen) > 2  # or the comparison says little


def test_one_image_is_scored_and_has_no_other_to_compare_with(make, digits):
    frame = measure({"m": make(num_steps=1)}, digits, change(limit=1))
    assert (frame["n"] <= 1).all()
    assert frame[frame["metric"].isin(["kl", "agreement"])]["null"].isna().all()
    plot(frame)


def test_several_models_share_one_pass_and_come_back_as_they_were(tiny, stacked, digits):
    reads = []

    class Counted(type(digits)):
        def read(self, i):
            reads.append(i)
            return super().read(i)

    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    both = measure({"a": tiny, "b": stacked}, Counted("test", length=22), FAST)
    assert sorted(reads) == list(range(22))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.parameters())
    alone = measure({"b": stacked}, Counted("test", length=22), FAST)
    pd.testing.assert_frame_equal(both[both["model"] == "b"].reset_index(drop=True), alone)


def test_kept_maps_are_those_by_hand(tiny, digits, by_hand, tmp_path):
    frame = measure({"a/b@ema": tiny}, digits, change(n_examples=3), folder=tmp_path)
    assert set(frame["path"]) == {str(tmp_path / "lens_a_b_ema.npz")}
    with np.load(tmp_path / "lens_a_b_ema.npz") as found:
        assert found["maps"].shape == (3, 2, 12, 4, 4)
        assert found["mean_maps"].shape == (2, 12, 4, 4)
        assert (found["mean_maps"] < 0).all()
        assert list(found["lenses"]) == ["raw", "tuned"]
        for i, place in enumerate((0, 20, 40)):  # of 60 images the scored are 0, 5, ..., 55
            image, label, _ = digits.read(place)
            assert found["classes"][i] == str(label)
            assert np.abs(found["images"][i].astype(int) - image).max() <= 1
        reference = kept_maps_by_hand(tiny, digits, by_hand)
        np.testing.assert_allclose(found["maps"][:, 0], reference[[0, 4, 8]], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["mean_maps"][0], reference.mean(0), rtol=1e-3, atol=1e-4)
    without = measure({"a": tiny}, digits, change(n_examples=0), folder=tmp_path)
    assert len(plot(without).axes) == 6


def kept_maps_by_hand(model, data, by_hand):
    """Raw maps of the scored images ``(12, T, 4, 4)``: log probability of the true class."""
    scenes = [data.read(i) for i in evenly_spaced(60, 12)]
    images = torch.stack([Geometry.of(model, data)(scene[0])[0] for scene in scenes])
    with torch.no_grad():
        sites = by_hand.run(model, images, [model.blocks[0]] * 12)[1:]
        logits = torch.stack(
            [
                torch.stack([by_hand.logits(model, z["resid_post"][:, 1 + i :]) for i in range(16)])
                for z in sites
            ]
        )  # (T, P, B, C)
    log_p = logits.double().log_softmax(-1).numpy()
    maps = [log_p[:, :, i, scene[1]] for i, scene in enumerate(scenes)]
    return np.stack(maps).reshape(12, 12, 4, 4)


def test_columns_rows_and_summary(tiny, stacked, squares, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, FAST)
    assert list(frame) == list(COLUMNS)
    assert not frame.duplicated(["model", "lens", "tokens", "metric", "step", "threshold"]).any()
    short = summary(frame[frame["model"] == "a"])
    assert set(short["step"]) == {3, 6, 12}
    assert set(short["metric"]) == {"accuracy", "kl"}
    tiny.reset_classifier(3)
    unmasked = measure({"a": tiny}, without_masks(squares), FAST)
    assert not unmasked["metric"].isin(["pointing", "object_share"]).any()


def test_how_many_images_logits_fit(tiny, monkeypatch):
    """12 steps, 16 patches, 10 classes and two lenses of 8 bytes: 30,720 bytes per image."""
    module = importlib.import_module("bvit_interp.analyses.lens.measure")
    for total, images in ((30_719, 0), (30_720, 1), (5 * 30_720 + 1, 5)):
        monkeypatch.setattr(module, "_BYTES_OF_LOGITS", total)
        assert _images_at_once(unroll(tiny)) == images


@pytest.mark.parametrize("kind", ["encoder", "prelude", "two_state", "looped_timm", "dinov3"])
def test_models_that_are_not_ours_by_hand(kind, digits, tmp_path):
    """Answers at every step, by forwards written out; of CLS where timm's head reads it alone."""
    model = foreign(kind)
    frame = measure({"m": model}, digits, FAST, tmp_path)
    group = "cls" if kind == "looped_timm" else "answer"
    geometry, places = Geometry.of(with_steps(model), digits), evenly_spaced(60, 12)
    images = torch.stack([geometry(digits.read(i)[0])[0] for i in places])
    labels = torch.tensor([digits.read(i)[1] for i in places])
    with torch.no_grad():
        states = states_by_hand(model, images)[1:]
        answers = torch.stack([answer_by_hand(model, each) for each in states]).double()
    assert len(answers) == STEPS[kind]
    expected = {
        "accuracy": (answers.argmax(-1) == labels).double().mean(1),
        "confidence": answers.softmax(-1).amax(-1).mean(1),
        "kl": (answers[-1].softmax(-1) * (answers[-1:].log_softmax(-1) - answers.log_softmax(-1)))
        .sum(-1)
        .mean(1),
    }
    for metric, values in expected.items():
        rows = steps_of(frame, "raw", group, metric)
        assert rows.index.tolist() == list(range(1, STEPS[kind] + 1))
        np.testing.assert_allclose(rows["value"], values, rtol=1e-3, atol=1e-5, err_msg=metric)
    if group == "answer":
        assert set(zip(frame["lens"], frame["tokens"], strict=True)) == {("raw", "answer")}
        assert frame["path"].isna().all() and (frame["n_fit"] == 0).all()
    else:
        assert {"tuned", "shuffled"} < set(frame["lens"]) and (frame["n_fit"] == 10).all()
    assert set(summary(frame)["tokens"]) == {group}
    plot(frame)


def test_bad_input(tiny, make, digits):
    for options, message in (
        ({"n_fit": 1}, "n-fit must be >= 2, got 1"),
        ({"iterations": -1}, "iterations must be >= 0, got -1"),
        ({"n_examples": -2}, "n-examples must be >= 0, got -2"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**options)
    assert change(n_examples=5).resume_key() == FAST.resume_key()
    assert change(seed=5).resume_key() != FAST.resume_key()
    with torch.no_grad():
        tiny.cls_token[:] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        measure({"m": tiny}, digits, FAST)
    with pytest.raises(DataError, match="do not match the model's 0"):
        measure({"m": foreign("dinov3", num_classes=0)}, digits, FAST)
    tiny.reset_classifier(7)
    with pytest.raises(DataError, match="do not match the model's 7"):
        measure({"m": tiny}, digits, FAST)
