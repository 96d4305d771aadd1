"""Trajectories: the points are the CLS tokens, the checks are counted by hand, PaCMAP is repeatable
and quiet."""

from __future__ import annotations

import io
import logging
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.analyses import trajectories
from bvit_interp.analyses.trajectories import COLUMNS, Config, measure, plot
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
    states = cls_by_forward(any_model, digits)
    (n, steps, _), k = states.shape, 3
    points = states.reshape(n * steps, -1)
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
            np.mean(np.isclose(frame[f"staged{suffix}"], expected)) > 0.99
        )  # the rest are ties within rounding
        expected = (label[image[near]] == label[image][:, None]).mean(1)
        assert np.mean(np.isclose(frame[f"same_class{suffix}"], expected)) > 0.99
    pairs = zip(nearest(points, every, k), nearest(flat, every, k), strict=True)
    kept = np.array([len(set(high) & set(low)) / k for high, low in pairs])
    assert np.mean(np.isclose(frame["kept"], kept)) > 0.99
    assert (frame["kept_null"] == k / (n * steps - 1)).all()


def test_nulls_against_permuted_steps_and_labels(tiny, digits):
    """The nulls are the means over permutations, drawn here and counted with the module's own
    neighbours."""
    frame = measure({"m": tiny}, digits, Config(methods=("pca",), neighbours=5))
    rng = np.random.default_rng(0)
    n, steps = 60, 12
    _, near = trajectories._neighbours(frame[["x", "y"]].to_numpy(), 5, steps)
    image, step = np.divmod(np.arange(n * steps), steps)
    staged, same = [], []
    label = np.array([digits.read(i)[1] for i in range(n)])
    for _ in range(200):
        drawn = np.argsort(rng.random((n, steps)), axis=1).ravel()
        staged.append((abs(drawn[near] - step[:, None]) <= 1).mean(1))
        shuffled = rng.permutation(label)
        same.append((shuffled[image[near]] == shuffled[image][:, None]).mean())
    means = pd.Series(np.mean(staged, axis=0)).groupby(step).mean()
    expected = frame.groupby("step")["staged_null"].first()
    np.testing.assert_allclose(expected, means, atol=0.01)
    np.testing.assert_allclose(expected, [2 / 12] + [3 / 12] * 10 + [2 / 12])
    assert frame["same_class_null"].mean() == pytest.approx(
        np.mean(same), abs=4 * np.std(same) / np.sqrt(200)
    )
    share = (np.bincount(label)[label] - 1) / 59
    np.testing.assert_allclose(frame["same_class_null"], share[image])


def test_neighbours_of_points_on_a_line():
    """Two images of three steps at 0, 1, 2 and 10, 11, 13: by hand."""
    points = np.array([[0.0], [1.0], [2.1], [10.0], [11.0], [13.0]])
    near, others = trajectories._neighbours(points, 2, 3)
    assert [set(row) for row in near.tolist()] == [{1, 2}, {0, 2}, {0, 1}, {4, 5}, {3, 5}, {3, 4}]
    assert others.tolist() == [[3, 4], [3, 4], [3, 4], [2, 1], [2, 1], [2, 1]]


def test_staged_and_parted_states_are_seen(stacked, digits, monkeypatch):
    """Each step far from the others: all neighbours within a step; each class far from the others:
    all of it."""
    from bvit_interp.analyses.trajectories import states as statetable

    label = np.array([digits.read(i)[1] for i in range(60)])
    noise = np.random.default_rng(0).normal(size=(60, 3, 32))

    def given(states):
        monkeypatch.setattr(
            statetable.StateTable,
            "compute",
            lambda self: (np.arange(60), label, states.astype(np.float32)),
        )
        return measure({"m": stacked}, digits, Config(neighbours=2, methods=("pca",)))

    staged = noise.copy()
    staged[:, :, 0] += 1000 * np.arange(3)
    assert given(staged)[["staged", "staged_cls"]].to_numpy().min() == 1
    by_class = noise.copy()
    by_class[:, :, 0] += 1000 * label[:, None]
    frame = given(by_class)
    enough = frame["same_class_null"] * 59 * 3 >= 2
    assert frame.loc[enough, ["same_class", "same_class_cls"]].to_numpy().min() == 1
    frame = given(noise)  # neither: the nulls
    assert frame["staged_cls"].mean() == pytest.approx(frame["staged_null"].mean(), abs=0.08)
    assert frame["same_class_cls"].mean() == pytest.approx(
        frame["same_class_null"].mean(), abs=0.08
    )


def test_pacmap_is_repeatable_quiet_and_leaves_no_state(tiny, digits, caplog):
    pytest.importorskip("pacmap")
    import faiss

    before, threads = np.random.get_state()[1].copy(), faiss.omp_get_max_threads()  # noqa: NPY002
    config = Config(neighbours=3, limit=30)
    with caplog.at_level(logging.DEBUG):
        one, two = (measure({"m": tiny}, digits, config) for _ in range(2))
    assert not [record for record in caplog.records if record.name.startswith("pacmap")]
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    other = measure({"m": tiny}, digits, Config(neighbours=3, limit=30, seed=1))
    assert not np.allclose(one["x"], other["x"])
    pd.testing.assert_frame_equal(one[one["method"] == "pca"], other[other["method"] == "pca"])
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert faiss.omp_get_max_threads() == threads
    mean = one.groupby("method").mean(numeric_only=True)
    assert mean.loc["pacmap", "kept"] > 10 * mean.loc["pacmap", "kept_null"]
    assert one.groupby("method")[["staged_cls", "same_class_cls"]].mean().nunique().tolist() == [
        1,
        1,
    ]


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


def test_columns_and_figure_from_the_csv_alone(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, PCA)
    assert list(frame) == list(COLUMNS)
    assert len(frame) == 60 * (12 + 3)
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert len(panels) == 2 * 10
    of_class = frame[(frame["model"] == "a") & (frame["label"] == panels[2].get_title())]
    means = of_class.groupby("step")[["x", "y"]].mean()
    np.testing.assert_allclose(panels[2].lines[-1].get_xydata(), means, rtol=1e-6)
    np.testing.assert_array_equal(panels[2].collections[1].get_array(), of_class["step"])
    assert [text.get_text() for text in panels[2].texts] == ["1", "12"]


def test_bad_input(tiny, digits):
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
    with torch.no_grad():
        tiny.pos_embed[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        measure({"m": tiny}, digits, PCA)
