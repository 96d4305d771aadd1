"""The points are the CLS tokens, and the checks are counted from all pairwise distances."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.analyses.trajectories import COLUMNS, Config, measure, states, summary
from bvit_interp.analyses.trajectories.neighbours import nearest_neighbours, same_step_neighbours
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import MissingExtra, UserError

PCA = Config(methods=("pca",), neighbours=3)


def cls_by_forward(model, data):
    """CLS tokens after every step ``(n, T, D)`` from timm's own extraction."""
    geometry = Geometry.of(model, data)
    images = torch.stack([geometry(data.read(i)[0], None)[0] for i in range(len(data))])
    with torch.no_grad():
        pairs = model.forward_intermediates(
            images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )
    return np.stack([prefix[:, 0].double().numpy() for _, prefix in pairs], axis=1)


def nearest(points, allowed, k):
    """The k nearest allowed points of each, by sorting every distance."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return np.argsort(np.where(allowed, apart, np.inf), axis=1, kind="stable")[:, :k]


def test_points_and_checks_against_numpy(any_model, digits):
    """PCA of timm's CLS tokens by numpy's SVD, and every share counted from all pairwise
    distances."""
    frame = measure({"m": any_model}, digits, PCA)
    cls_states = cls_by_forward(any_model, digits)
    (n, steps, _), k = cls_states.shape, 3
    points = cls_states.reshape(n * steps, -1)
    image, step = np.divmod(np.arange(len(points)), steps)
    assert frame["image"].tolist() == [digits.name(i) for i in image]
    assert frame["step"].tolist() == (step + 1).tolist()
    label = np.array([digits.read(i)[1] for i in range(n)])
    assert frame["label"].tolist() == [digits.classes[label[i]] for i in image]
    centred = points - points.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    flat = frame[["x", "y"]].to_numpy()
    np.testing.assert_allclose(
        abs(flat), abs(centred @ axes.T), rtol=1e-3, atol=1e-3 * abs(flat).max()
    )
    another, every = image[:, None] != image, ~np.eye(len(points), dtype=bool)
    for space, suffix in ((points, "_cls"), (flat, "")):
        near = nearest(space, another, k)
        expected = (abs(step[near] - step[:, None]) <= 1).mean(1)
        assert (
            np.mean(np.isclose(frame[f"adjacent_step_share{suffix}"], expected)) > 0.99
        )  # the rest are ties within rounding
        near = nearest(space, another & (step[:, None] == step), k)
        expected = (label[image[near]] == label[image][:, None]).mean(1)
        assert np.mean(np.isclose(frame[f"same_step_class_share{suffix}"], expected)) > 0.99
    pairs = zip(nearest(points, every, k), nearest(flat, every, k), strict=True)
    kept = np.array([len(set(high) & set(low)) / k for high, low in pairs])
    assert np.mean(np.isclose(frame["neighbours_kept"], kept)) > 0.99
    assert (frame["neighbours_kept_null"] == k / (n * steps - 1)).all()


def test_nulls_against_permuted_steps_and_labels(tiny, digits):
    """The nulls are the means over permutations, drawn here and counted with the module's own
    neighbours."""
    frame = measure({"m": tiny}, digits, Config(methods=("pca",), neighbours=5))
    rng = np.random.default_rng(0)
    n, steps = 60, 12
    near = nearest_neighbours(frame[["x", "y"]].to_numpy(), 5, steps).other_images
    at_step = same_step_neighbours(frame[["x", "y"]].to_numpy(), 5, steps)
    image, step = np.divmod(np.arange(n * steps), steps)
    staged, same = [], []
    label = np.array([digits.read(i)[1] for i in range(n)])
    for _ in range(200):
        drawn = np.argsort(rng.random((n, steps)), axis=1).ravel()
        staged.append((abs(drawn[near] - step[:, None]) <= 1).mean(1))
        shuffled = rng.permutation(label)
        same.append((shuffled[image[at_step]] == shuffled[image][:, None]).mean())
    means = pd.Series(np.mean(staged, axis=0)).groupby(step).mean()
    expected = frame.groupby("step")["adjacent_step_share_null"].first()
    np.testing.assert_allclose(expected, means, atol=0.01)
    np.testing.assert_allclose(expected, [2 / 12] + [3 / 12] * 10 + [2 / 12])
    assert frame["same_step_class_share_null"].mean() == pytest.approx(
        np.mean(same), abs=4 * np.std(same) / np.sqrt(200)
    )
    share = (np.bincount(label)[label] - 1) / 59
    np.testing.assert_allclose(frame["same_step_class_share_null"], share[image])


def test_states_grouped_by_step_or_by_class(stacked, digits, monkeypatch):
    """Each step far from the others: all neighbours within a step; each class far from the others:
    all of it."""
    label = np.array([digits.read(i)[1] for i in range(60)])
    noise = np.random.default_rng(0).normal(size=(60, 3, 32))

    def given(points):
        monkeypatch.setattr(
            states.StateTable,
            "compute",
            lambda self: (np.arange(60), label, points.astype(np.float32)),
        )
        return measure({"m": stacked}, digits, Config(neighbours=2, methods=("pca",)))

    staged = noise.copy()
    staged[:, :, 0] += 1000 * np.arange(3)
    assert given(staged)[["adjacent_step_share", "adjacent_step_share_cls"]].to_numpy().min() == 1
    by_class = noise.copy()
    by_class[:, :, 0] += 1000 * label[:, None]
    frame = given(by_class)
    enough = frame["same_step_class_share_null"] * 59 >= 2
    assert (
        frame.loc[enough, ["same_step_class_share", "same_step_class_share_cls"]].to_numpy().min()
        == 1
    )
    frame = given(noise)  # neither: the nulls
    assert frame["adjacent_step_share_cls"].mean() == pytest.approx(
        frame["adjacent_step_share_null"].mean(), abs=0.08
    )
    assert frame["same_step_class_share_cls"].mean() == pytest.approx(
        frame["same_step_class_share_null"].mean(), abs=0.08
    )


def test_a_class_that_separates_late_is_not_seen_early(stacked, digits, monkeypatch):
    """States at step 1 are far from one another, with a trace of the class. The nearest of all
    steps are the late states, which are of the class; of the same step they are as chance gives."""
    label = np.arange(60) % 10
    noise = np.random.default_rng(0).normal(size=(60, 3, 32))
    points = 0.01 * noise
    points[:, :, :10] += np.array([30, 100, 100])[:, None] * np.eye(10)[label][:, None]
    points[:, 0, 10:] += 300 * noise[:, 0, 10:]
    monkeypatch.setattr(
        states.StateTable,
        "compute",
        lambda self: (np.arange(60), label, points.astype(np.float32)),
    )
    frame = measure({"m": stacked}, digits, Config(neighbours=3, methods=("pca",)))
    found = frame.groupby("step")["same_step_class_share_cls"].mean()
    assert found[2] == found[3] == 1
    pooled = nearest_neighbours(points.reshape(180, 32), 3, 3).other_images
    of_class = (label[pooled // 3] == label[np.arange(180) // 3][:, None]).mean(1)
    assert of_class[::3].mean() > 0.5
    assert found[1] == pytest.approx(frame["same_step_class_share_null"].mean(), abs=0.08)


def test_both_embeddings(tiny, digits):
    """PaCMAP keeps far more neighbours than chance; CLS space is the same beside either."""
    pytest.importorskip("pacmap")
    config = Config(neighbours=3, limit=30)
    frame, again = (measure({"m": tiny}, digits, config) for _ in range(2))
    pd.testing.assert_frame_equal(frame, again, check_exact=True)
    mean = frame.groupby("method").mean(numeric_only=True)
    assert mean.loc["pacmap", "neighbours_kept"] > 10 * mean.loc["pacmap", "neighbours_kept_null"]
    in_cls = mean[["adjacent_step_share_cls", "same_step_class_share_cls"]]
    assert in_cls.nunique().tolist() == [1, 1]
    assert not np.allclose(
        frame.loc[frame["method"] == "pacmap", "x"], frame.loc[frame["method"] == "pca", "x"]
    )


def test_pacmap_missing(tiny, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "pacmap", None)
    with pytest.raises(
        MissingExtra, match=r"pacmap is not installed: pip install 'bvit-interp\[viz\]'"
    ):
        measure({"m": tiny}, digits, Config())
    assert set(measure({"m": tiny}, digits, PCA)["method"]) == {"pca"}


def test_steps_on_request(tiny, stacked, digits):
    frame = measure(
        {"a": tiny, "b": stacked}, digits, Config(methods=("pca",), steps=14, limit=9, neighbours=2)
    )
    assert frame.groupby("model")["step"].max().to_dict() == {"a": 14, "b": 3}
    assert frame.groupby("model")["n"].first().to_dict() == {"a": 9, "b": 9}
    places = [i * 60 // 9 for i in range(9)]
    first = frame[(frame["model"] == "b") & (frame["step"] == 1)]
    assert first["image"].tolist() == [digits.name(i) for i in places]
    assert first["label"].tolist() == [digits.classes[digits.read(i)[1]] for i in places]


def test_columns_and_summary(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, PCA)
    assert list(frame) == list(COLUMNS)
    assert len(frame) == 60 * (12 + 3)
    means = summary(frame)
    assert means[["model", "step"]].to_numpy().tolist() == [
        *(["a", t] for t in range(1, 13)),
        *(["b", t] for t in range(1, 4)),
    ]
    part = frame[(frame["model"] == "b") & (frame["step"] == 2)]
    assert means["neighbours_kept"].iloc[13] == pytest.approx(part["neighbours_kept"].mean())


def test_bad_input(tiny, stacked, digits):
    with pytest.raises(UserError, match="steps must be >= 1, got 0"):
        Config(steps=0)
    with pytest.raises(UserError, match=r"one or more of pacmap, pca, got \('tsne',\)"):
        Config(methods=("tsne",))
    with pytest.raises(UserError, match="one or more of pacmap, pca"):
        Config(methods=())
    with pytest.raises(UserError, match="neighbours must be >= 1"):
        Config(neighbours=0)
    with pytest.raises(UserError, match="seed must be"):
        Config(seed=-1)
    with pytest.raises(UserError, match="more points than 2 images at 12 steps: raise limit"):
        measure({"m": tiny}, digits, Config(limit=2, neighbours=13, methods=("pca",)))
    with pytest.raises(UserError, match="need more than 9 images, got 9: raise limit"):
        measure({"m": tiny}, digits, Config(limit=9, neighbours=9, methods=("pca",)))
    with pytest.raises(UserError, match="more points than 3 images at 3 steps"):  # six others
        measure({"m": stacked}, digits, Config(limit=3, neighbours=2, methods=("pca",)))
    with torch.no_grad():
        tiny.pos_embed[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        measure({"m": tiny}, digits, PCA)
