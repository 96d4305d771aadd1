"""Shares recovered against cells computed one by one, image by image."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import STEPS, answer_by_hand, foreign, states_by_hand

from bvit_interp.analyses.patching import COLUMNS, Config, measure, summary
from bvit_interp.analyses.patching.corruption import corrupt
from bvit_interp.analyses.patching.patches import StepPatcher
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.stream import stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.unroll import unroll, with_steps
from bvit_interp.probes.probe import Probe

VALUES = ["value", "low", "high", "null", "null_low", "null_high", "clean", "baseline"]


def batch_of(model, data, places):
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in places]
    return torch.stack([geometry(image, None)[0] for image, _, _ in scenes]), [s[1] for s in scenes]


def cell(frame, metric, s, t, **keys):
    for key, value in {"metric": metric, "step_from": s, "step_to": t, **keys}.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def patched(model, receiver, donor, s, t):
    """Logits of `receiver` with the CLS state of step s of `donor` at step t, by one edit."""
    probe = Probe(model)
    state = probe.record(donor, "resid_post", s, "all")["resid_post", s]
    with (
        torch.inference_mode(),
        probe.edit({("resid_post", t): lambda old, _: torch.cat([state[:, :1], old[:, 1:]], 1)}),
    ):
        return probe(receiver).double()


def ratio(gained, whole):
    """Ratio of means and its delta-method interval, with numpy."""
    gained, whole = np.array(gained), np.array(whole)
    value = gained.mean() / whole.mean()
    half = 1.959964 * (gained - value * whole).std(ddof=1) / np.sqrt(len(whole)) / abs(whole.mean())
    return value, value - half, value + half


def margin(logits, label):
    return (logits[label] - np.delete(logits, label).mean()).item()


def test_the_own_state_against_a_loop_over_images(tiny, digits):
    """Moved CLS states, seven images; the partner of an image, whose state is the null's, is three
    further on."""
    frame = measure(
        {"m": tiny}, digits, Config(limit=7, mode=("same",), tokens=("cls",), steps=(2, 5, 12))
    )
    places = [i * 60 // 7 for i in range(7)]
    images, labels = batch_of(tiny, digits, places)
    partners = images[[(i + 3) % 7 for i in range(7)]]
    with torch.inference_mode():
        clean = tiny(images).double().numpy()
    whole = [margin(row, label) for row, label in zip(clean, labels, strict=True)]
    by_shift = {}
    for s in (2, 5, 12):
        for t in (2, 5, 12):
            own, null = (patched(tiny, images, donor, s, t).numpy() for donor in (images, partners))
            gained, of_null = (
                [margin(x, y) for x, y in zip(rows, labels, strict=True)] for rows in (own, null)
            )
            by_shift.setdefault(t - s, []).append(gained)
            row = cell(frame, "recovered", s, t)
            np.testing.assert_allclose(
                row[["value", "low", "high"]].astype(float), ratio(gained, whole), rtol=1e-3
            )
            np.testing.assert_allclose(
                row[["null", "null_low", "null_high"]].astype(float),
                ratio(of_null, whole),
                rtol=1e-3,
            )
            assert row["clean"] == pytest.approx(np.mean(whole), rel=1e-4)
            assert (row["baseline"], row["n"], row["skipped"], row["shift"]) == (0, 7, 0, t - s)
            answers = cell(frame, "agreement", s, t)
            hits = int((own.argmax(-1) == clean.argmax(-1)).sum())
            assert answers["value"] == pytest.approx(hits / 7)
            assert (answers["low"], answers["high"]) == pytest.approx(wilson_interval(hits, 7))
            assert answers["null"] == pytest.approx((null.argmax(-1) == clean.argmax(-1)).mean())
    of_shifts = frame[(frame["metric"] == "recovered") & frame["step_from"].isna()].set_index(
        "shift"
    )
    assert list(of_shifts.index) == [-10, -7, -3, 0, 3, 7, 10]
    for shift, gained in by_shift.items():
        np.testing.assert_allclose(
            of_shifts.loc[shift, ["value", "low", "high"]].astype(float),
            ratio(np.mean(gained, axis=0), whole),
            rtol=1e-3,
            atol=1e-6,
        )


def test_another_images_state_against_a_loop_over_pairs(tiny, digits):
    """Nine images: pairs four apart, the null's image six further on; pairs of one class are left
    out and counted."""
    labels_of = [digits.read(i * 60 // 9)[1] for i in range(9)]
    frame = measure(
        {"m": tiny}, digits, Config(limit=9, mode=("other",), tokens=("cls",), steps=(3, 9))
    )
    images, labels = batch_of(tiny, digits, [i * 60 // 9 for i in range(9)])
    pairs = [(i, (i + 4) % 9, (i + 6) % 9) for i in range(9)]
    counted = [(i, a, c) for i, a, c in pairs if labels_of[i] != labels_of[a]]
    assert len(counted) >= 5
    with torch.inference_mode():
        clean = tiny(images).double().numpy()
    whole = [
        (clean[a, labels[a]] - clean[a, labels[i]]) - (clean[i, labels[a]] - clean[i, labels[i]])
        for i, a, _ in counted
    ]
    for s in (3, 9):
        for t in (3, 9):
            gained, of_null, hits = [], [], []
            for i, a, c in counted:
                baseline = clean[i, labels[a]] - clean[i, labels[i]]
                by_donor, by_third = (
                    patched(tiny, images[i : i + 1], images[k : k + 1], s, t)[0] for k in (a, c)
                )
                gained.append((by_donor[labels[a]] - by_donor[labels[i]]).item() - baseline)
                of_null.append((by_third[labels[a]] - by_third[labels[i]]).item() - baseline)
                hits.append(by_donor.argmax().item() == clean[a].argmax())
            row = cell(frame, "recovered", s, t)
            np.testing.assert_allclose(
                row[["value", "low", "high"]].astype(float), ratio(gained, whole), rtol=1e-3
            )
            assert row["null"] == pytest.approx(ratio(of_null, whole)[0], rel=1e-3)
            assert (row["n"], row["skipped"]) == (len(counted), 9 - len(counted))
            assert cell(frame, "agreement", s, t)["value"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("corruption", ["shuffle", "noise"])
def test_a_clean_state_in_a_corrupted_image(stacked, digits, corruption):
    config = Config(
        limit=6, mode=("corrupted",), tokens=("all", "cls"), corruption=corruption, seed=3
    )
    frame = measure({"m": stacked}, digits, config)
    places = torch.arange(6) * 10
    images, labels = batch_of(stacked, digits, places.tolist())
    broken = corrupt(images, places, (4, 4), corruption, seed=3)
    with torch.inference_mode():
        clean, baseline = (
            [margin(row.double().numpy(), y) for row, y in zip(stacked(x), labels, strict=True)]
            for x in (images, broken)
        )
    logits = patched(stacked, broken, images, 1, 2).numpy()
    gained = np.array([margin(row, y) for row, y in zip(logits, labels, strict=True)]) - baseline
    row = cell(frame, "recovered", 1, 2, tokens="cls")
    assert row["value"] == pytest.approx(ratio(gained, np.subtract(clean, baseline))[0], rel=1e-3)
    assert row["clean"] == pytest.approx(np.mean(clean), rel=1e-4)
    assert row["baseline"] == pytest.approx(np.mean(baseline), rel=1e-4)
    for t in (1, 2, 3):  # the whole clean state where it belongs: the clean run
        assert cell(frame, "recovered", t, t, tokens="all")["value"] == pytest.approx(1)
        assert cell(frame, "agreement", t, t, tokens="all")["value"] == 1


def test_cells_of_one_shared_block_are_equal_along_shifts_and_those_of_a_stack_are_not(
    tiny, stacked, digits
):
    config = Config(limit=8, steps=(1, 2, 3), mode=("same",))
    frame = measure({"bvit": tiny, "restarts": unroll(tiny), "stack": stacked}, digits, config)
    cells = frame[frame["step_from"].notna() & (frame["metric"] == "recovered")]
    spread = cells.groupby(["model", "shift"])["value"].agg(np.ptp).unstack("shift")
    assert (spread.loc["bvit"] == 0).all()
    assert (spread.loc["restarts"] < 1e-4).all()
    assert spread.loc["stack", [-1, 1]].gt(1e-3).all()
    values = {
        name: part[VALUES].reset_index(drop=True).astype(float)
        for name, part in frame.groupby("model")
    }
    pd.testing.assert_frame_equal(values["bvit"], values["restarts"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "prelude", "two_state", "dinov3"])
def test_another_images_state_in_models_that_are_not_ours(kind, digits):
    """The share of images with the donor's answer, by forwards written out; its own images' steps
    in the table."""
    model = foreign(kind)
    frame = measure({"m": model}, digits, Config(limit=6, mode=("other",), batch_size=4))
    assert frame["step_to"].max() == frame["trained_steps"].max() == STEPS[kind]
    places = [10 * i for i in range(6)]
    images, labels = batch_of(with_steps(model), digits, places)
    order = [(i + 3) % 6 for i in range(6)]  # the partner of each
    with torch.no_grad():
        receiver, donor = states_by_hand(model, images), states_by_hand(model, images[order])
        run = states_by_hand(model, images, put={3: donor[1]})
        clean, moved = (answer_by_hand(model, each[-1]).argmax(-1) for each in (donor, run))
    counts = [i for i in range(6) if labels[i] != labels[order[i]]]
    expected = (clean == moved)[counts].double().mean().item()
    row = cell(frame, "agreement", 1, 3, mode="other")
    assert row["value"] == pytest.approx(expected) and row["n"] == len(counts)
    assert not torch.equal(receiver[3], donor[1])


@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_batches_do_not_matter(any_model, digits, tokens):
    options = {
        "limit": 8,
        "steps": (1, 3),
        "mode": ("same", "other", "corrupted"),
        "tokens": (tokens,),
    }
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    one, two = (
        measure({"m": any_model}, digits, Config(**options, batch_size=size)) for size in (3, 64)
    )
    pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-5)
    diagonal = one[(one["step_from"] == one["step_to"]) & (one["mode"] == "same")]
    np.testing.assert_allclose(diagonal["value"], 1, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())


def test_a_large_batch_runs_in_parts(tiny, digits, monkeypatch):
    config = Config(limit=5, steps=(2, 12), mode=("same",), tokens=("cls",))
    whole = measure({"m": tiny}, digits, config)
    two_images = 2 * 4 * 2 * 17 * 32  # floats of 2 steps, 17 tokens and 32 channels
    monkeypatch.setattr(sys.modules[measure.__module__], "_BYTES_OF_STATES", two_images)
    logits, sizes = StepPatcher.logits, []

    def counted(self, receiver, donor, *further):
        sizes.append(len(receiver))
        return logits(self, receiver, donor, *further)

    monkeypatch.setattr(StepPatcher, "logits", counted)
    pd.testing.assert_frame_equal(measure({"m": tiny}, digits, config), whole, rtol=1e-5, atol=1e-6)
    assert sizes == [2, 2, 1, 1, 2, 2]  # each for the donor and for the null's


def test_runs_that_modes_share_are_made_once(tiny, stacked, digits, monkeypatch):
    """A whole state does not depend on the receiver: three donors serve three modes."""
    logits, calls = StepPatcher.logits, []

    def counted(self, receiver, donor, *further):
        calls.append(self.whole)
        return logits(self, receiver, donor, *further)

    monkeypatch.setattr(StepPatcher, "logits", counted)
    config = Config(limit=4, steps=(1, 2), mode=("same", "other", "corrupted"))
    measure({"m": stacked}, digits, config)
    assert calls == [True] * 3


def test_one_head_of_several_models(tiny, stacked, digits):
    config = Config(limit=4, mode=("same",), site="z", unit=2, tokens=("all",), steps=(1, 3))
    frame = measure({"a": tiny, "b": stacked}, digits, config)
    assert set(frame["unit"]) == {2}
    assert frame.groupby("model")["trained_steps"].first().to_dict() == {"a": 12, "b": 3}
    assert not np.allclose(
        frame[frame["model"] == "a"]["value"], frame[frame["model"] == "b"]["value"]
    )


def test_columns_and_summary(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(limit=6, tokens=("all", "cls")))
    assert list(frame) == list(COLUMNS)
    assert len(frame) == 2 * 4 * (144 + 23 + 9 + 5)
    shown = summary(frame)
    assert shown[shown["model"] == "a"]["shift"].unique().tolist() == [-6, -1, 0, 1, 6]
    assert len(shown) == 4 * (5 + 3)


def test_the_resume_key_leaves_out_a_corruption_that_is_not_made():
    assert Config(seed=1).resume_key() == Config(corruption="noise").resume_key()
    assert (
        Config(mode=("corrupted",), seed=1).resume_key() != Config(mode=("corrupted",)).resume_key()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mode": ("some",)},
            "mode must be one or more of same, other, corrupted, each once, got some",
        ),
        ({"mode": ("same", "same")}, "each once, got same, same"),
        ({"mode": ()}, "mode must be one or more"),
        ({"tokens": ("heads",)}, "tokens must be one or more of cls, dist, reg, patches, all"),
        ({"site": "residual"}, "unknown site 'residual'"),
        ({"corruption": "blur"}, "corruption must be shuffle or noise, got 'blur'"),
        ({"steps": (0, 3)}, "steps must be >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Config(**options)


def test_where_each_cell_is_a_run_the_default_number_of_images_is_limited(
    tiny, monkeypatch, caplog
):
    data = DigitScenes("test", length=9)
    module = sys.modules["bvit_interp.analyses.patching.measure"]
    monkeypatch.setattr(module, "_MOST_IMAGES", 5)

    def images(**options):
        return set(measure({"m": tiny}, data, Config(mode=("same",), steps=(3,), **options))["n"])

    assert images() == {9}  # one run gives all cells
    assert not caplog.text
    assert images(tokens=("all", "cls")) == {5}
    assert "5 of 9 images are used" in caplog.text
    assert images(tokens=("cls",), limit=7) == {7}


def test_the_bar_moves_with_every_patched_step(tiny, digits, monkeypatch):
    shares = []

    def noting(models, data, config, scores, **given):
        def noted(batch):
            own = replace(batch, advance=shares.append)
            return scores(own)

        return stream(models, data, config, noted, **given)

    monkeypatch.setattr(sys.modules["bvit_interp.analyses.patching.measure"], "stream", noting)
    config = Config(
        mode=("same", "other", "corrupted"), tokens=("all", "cls"), steps=(3, 9), limit=6
    )
    measure({"m": tiny}, digits, config)
    # two steps for each pair of images; whole states of one map need no patching
    assert shares == pytest.approx([(i + 1) / len(shares) for i in range(len(shares))])
    pairs = {
        *(("own", "own"), ("own", "partner")),  # receiver and donors of same
        *(("own", "partner"), ("own", "third")),  # of other
        *(("corrupted", "own"), ("corrupted", "partner")),
    }
    assert len(shares) == 2 * len(pairs)


def test_bad_input(tiny, make, digits, squares):
    with pytest.raises(UserError, match="at least 2 are needed, got 1"):
        measure({"m": tiny}, digits, Config(limit=1, mode=("same",)))
    with pytest.raises(UserError, match="mode other needs at least 3 images"):
        measure({"m": tiny}, digits, Config(limit=2))
    with pytest.raises(UserError, match="no step 13; steps: 1..12"):
        measure({"m": tiny}, digits, Config(limit=3, steps=(13,)))
    with pytest.raises(UserError, match="each of the 6 images has the class of its partner"):
        measure({"m": make(num_classes=3)}, squares(6), Config(mode=("other",), steps=(1,)))
    with torch.no_grad():
        tiny.head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="logits hold NaN"):
        measure({"m": tiny}, digits, Config(limit=3, steps=(1,)))
