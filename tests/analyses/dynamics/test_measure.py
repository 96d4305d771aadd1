"""Dynamics of real models against the states of timm's own extraction, and verdicts of maps known
on paper."""

from __future__ import annotations

import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from bvit_interp.analyses.dynamics import COLUMNS, Config, measure, summary
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.steps import Steps
from bvit_interp.models.unroll import run_on, unroll

MODULE = sys.modules["bvit_interp.analyses.dynamics.measure"]


def states_by_forward(model, data):
    """Tokens ``(n, S + 1, N, D)`` from timm's own extraction, z_0 as the first block gets it."""
    geometry = Geometry.of(model, data)
    images = torch.stack([geometry(data.read(i)[0], None)[0] for i in range(len(data))])
    with torch.no_grad():
        pairs = model.forward_intermediates(
            images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )
        first = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    after = [torch.cat([prefix, patches], dim=1) for patches, prefix in pairs]
    return torch.stack([first, *after], dim=1).double().numpy()


def values_of(frame, metric, tokens):
    part = frame[(frame["metric"] == metric) & (frame["tokens"] == tokens)]
    return part.sort_values("step").set_index("step")


def test_against_the_states_themselves(any_model, digits):
    """Every metric computed here from the tokens of a forward pass, 15 steps of a bViT, all of a
    stack."""
    data = type(digits)("test", length=12)
    frame = measure({"m": any_model}, data, Config(steps=15, batch_size=5))
    view = run_on(any_model, 15)
    states, trained = states_by_forward(view, data), len(any_model.blocks)
    steps, prefix = states.shape[1] - 1, any_model.num_prefix_tokens
    assert steps == (15 if isinstance(any_model.blocks, Steps) else 3)
    assert (frame["n"] == 12).all()
    assert (frame["trained_steps"] == trained).all()
    kinds = {"cls": slice(0, 1), "patches": slice(prefix, None)}
    if prefix > 1:
        distilled = hasattr(any_model, "dist_token")
        kinds["reg"] = slice(1 + distilled, prefix)
        if distilled:
            kinds["dist"] = slice(1, 2)
    assert set(frame["tokens"]) == set(kinds)
    for kind, rows in kinds.items():
        z = states[:, :, rows].reshape(12, steps + 1, -1)
        length = np.linalg.norm(z, axis=-1)
        update = np.diff(z, axis=1)
        size = np.linalg.norm(update, axis=-1)
        tokens = states[:, :, rows].shape[2]
        np.testing.assert_allclose(
            values_of(frame, "norm", kind)["value"], (length / math.sqrt(tokens)).mean(0), rtol=1e-5
        )
        np.testing.assert_allclose(
            values_of(frame, "step_size", kind)["value"], (size / length[:, :-1]).mean(0), rtol=1e-4
        )
        cosine = (update[:, 1:] * update[:, :-1]).sum(-1) / size[:, 1:] / size[:, :-1]
        np.testing.assert_allclose(
            values_of(frame, "update_cosine", kind)["value"], cosine.mean(0), atol=1e-4
        )
        for metric, s in (("distance_to_trained", trained), ("distance_to_last", steps)):
            apart = np.linalg.norm(z - z[:, s : s + 1], axis=-1) / length[:, s : s + 1]
            np.testing.assert_allclose(
                values_of(frame, metric, kind)["value"], apart.mean(0), atol=1e-4
            )
    cls = states[:, 1:, 0]
    ratio = []
    for t in range(steps):
        eigenvalues = np.linalg.eigvalsh(np.cov(cls[:, t].T)).clip(min=0)
        ratio.append(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
    np.testing.assert_allclose(
        values_of(frame, "participation_ratio", "cls")["value"], ratio, rtol=1e-4
    )
    cka = frame[frame["metric"] == "cka"].set_index(["step", "other_step"])["value"]
    assert len(cka) == trained * (trained + 1) // 2
    for (step, other), value in cka.items():
        x, y = (cls[:, t - 1] - cls[:, t - 1].mean(0) for t in (step, other))
        expected = (
            (np.linalg.norm(x.T @ y) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
        )
        assert value == pytest.approx(expected, rel=1e-4)


def test_similarity_of_the_mean_patch(tiny_reg4, digits):
    """Two steps of twelve images, every measure by its own formula."""
    data, n = type(digits)("test", length=12), 12
    frame = measure({"m": tiny_reg4}, data, Config(steps=2, state="patches"))
    patches = states_by_forward(run_on(tiny_reg4, 2), data)[:, 1:, 5:].mean(2)
    x, y = (patches[:, t] - patches[:, t].mean(0) for t in (0, 1))
    pair = frame[(frame["step"] == 1) & (frame["other_step"] == 2)].set_index("metric")
    lengths = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    null = np.square(x).sum() * np.square(y).sum() / (n - 1) / lengths
    assert pair.loc["cka", "value"] == pytest.approx(np.square(x.T @ y).sum() / lengths, rel=1e-4)
    assert pair.loc["cka", "null"] == pytest.approx(null, rel=1e-4)

    def unbiased(a, b):
        k, m = (each @ each.T * (1 - np.eye(n)) for each in (a, b))
        both = k.sum() * m.sum() / (n - 1) / (n - 2)
        return (k * m).sum() + both - 2 / (n - 2) * k.sum(0) @ m.sum(0)

    debiased = unbiased(x, y) / np.sqrt(unbiased(x, x) * unbiased(y, y))
    assert pair.loc["cka_debiased", "value"] == pytest.approx(debiased, rel=1e-4)
    assert pair.loc["cka_debiased", "null"] == 0
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    turn, _ = orthogonal_procrustes(y, x)
    distance = np.square(x - y @ turn).sum()
    assert pair.loc["procrustes", "value"] == pytest.approx(distance, rel=1e-4)
    assert pair.loc["procrustes", "null"] > distance
    ratios = values_of(frame, "participation_ratio", "patches")
    # of an isotropic Gaussian of 12 points in 32 dimensions
    np.testing.assert_allclose(ratios["null"], (11 * 32 + 2) / (11 + 32 + 1))


def moving(model, monkeypatch, rule):
    """Make `rule` the model's block: z_t of z_{t-1}, for `run_on` copies too."""
    monkeypatch.setattr(type(model.blocks[0]), "forward", lambda self, x, **kwargs: rule(x))
    return model


def verdict(model, data, **options):
    frame = measure({"m": model}, data, Config(limit=4, pair_steps=(1,), **options))
    return {
        metric: frame[(frame["metric"] == metric) & (frame["tokens"] == "cls")]["value"].item()
        for metric in ("period", "direction_period")
    }


def test_verdicts_of_known_maps(make, digits, monkeypatch):
    """A contraction to a point, a flip of sign, a turn by a third, and a straight drift."""
    third = 2 * math.pi / 3
    turn = torch.eye(32)
    for i in range(0, 32, 2):
        turn[i : i + 2, i : i + 2] = torch.tensor(
            [[math.cos(third), -math.sin(third)], [math.sin(third), math.cos(third)]]
        )
    pull = torch.linspace(1, 2, 32)
    cases = {
        "contraction": (lambda x: pull + (x - pull) / 2, (1, 1)),
        "flip": (lambda x: -x, (2, 2)),
        "third": (lambda x: x @ turn.T, (3, 3)),
        "drift": (lambda x: x + 10 * pull, (0, 1)),
        "growth": (lambda x: 1.2 * x, (0, 1)),
        "slow turn": (lambda x: x + 0.02 * x @ turn.T, (0, 0)),
    }
    for name, (rule, expected) in cases.items():
        with monkeypatch.context() as patch:
            found = verdict(moving(make(), patch, rule), digits)
            assert (found["period"], found["direction_period"]) == expected, name


def test_no_verdict_without_steps_past_the_trained(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(steps=14, limit=4, pair_steps=(1,)))
    assert not frame["metric"].isin(["period", "return_distance"]).any()
    frame = measure({"a": tiny}, digits, Config(steps=5, limit=4))
    assert not frame["metric"].isin(["period", "distance_to_trained"]).any()
    assert frame[frame["metric"] == "cka"]["step"].max() == 5


def test_pairs_between_models(tiny, tiny_te, stacked, digits):
    """A model beside its unroll has CKA 1 at equal steps; a stack's blocks are compared with a
    bViT's steps."""
    models = {"a": tiny, "same": unroll(tiny), "stack": stacked}
    frame = measure(models, digits, Config(steps=12, pair_steps=(1, 3, 12)))
    cka = frame[frame["metric"] == "cka"].set_index(["model", "step", "other_model", "other_step"])
    assert len(cka) == 8 * 9 // 2  # 3 + 3 + 2 states
    for t in (1, 3, 12):
        assert cka.loc["a", t, "same", t]["value"] == pytest.approx(1)
    assert ("a", 12, "stack", 3) in cka.index
    assert ("a", 12, "stack", 12) not in cka.index
    assert (cka["value"] <= 1 + 1e-9).all()
    frame = measure({"a": tiny, "te": tiny_te}, digits, Config(steps=2, state="patches"))
    assert set(frame[frame["metric"] == "cka"]["tokens"]) == {"patches"}


def test_a_stack_of_copies_moves_as_the_recurrent_model(make, tiny, digits):
    copies = make(name="vit_rms_small_patch16_224")
    state = tiny.state_dict()
    copies.load_state_dict(
        {
            key: state[f"blocks.0.{key.split('.', 2)[2]}" if key.startswith("blocks.") else key]
            for key in copies.state_dict()
        }
    )
    one, other = (
        measure({"m": model}, digits, Config(steps=12, limit=20)) for model in (tiny, copies)
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-6)


def test_several_models_alone_and_together_and_in_parts(tiny, stacked, digits, monkeypatch):
    config = Config(steps=20, limit=20, pair_steps=(1,))
    every = measure({"a": tiny, "b": stacked}, digits, config)
    alone = measure({"b": stacked}, digits, config)
    moved = every["other_model"].isna()
    pd.testing.assert_frame_equal(
        every[(every["model"] == "b") & moved].reset_index(drop=True),
        alone[alone["other_model"].isna()],
    )
    monkeypatch.setattr(MODULE, "_STATE_BYTES", 4 * 21 * 17 * 32 * 3)  # three images at a time
    pd.testing.assert_frame_equal(
        measure({"a": tiny, "b": stacked}, digits, config), every, rtol=1e-5, atol=1e-7
    )


def test_columns_and_summary(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(steps=24, limit=20))
    assert list(frame) == list(COLUMNS)
    assert set(summary(frame)["metric"]) == {
        "norm",
        "period",
        "direction_period",
        "participation_ratio",
    }


def test_bad_input(tiny, make, digits):
    for options, message in (
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1, got 0.0"),
        ({"state": "reg"}, "state must be cls or patches, got 'reg'"),
        ({"pair_steps": (0,)}, "pair-steps must be >= 1"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**options)
    with pytest.raises(
        UserError, match=r"pair-steps \[13\] are past the trained steps; steps: 1..12"
    ):
        measure({"m": tiny}, digits, Config(pair_steps=(1, 13)))
    without = make(name="vit_tiny_patch16_224", depth=3, class_token=False, global_pool="avg")
    with pytest.raises(UserError, match="no CLS token"):
        measure({"m": without}, digits, Config(limit=4))
    assert set(measure({"m": without}, digits, Config(limit=4, state="patches"))["tokens"]) == {
        "patches"
    }
    with torch.no_grad():
        tiny.pos_embed[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        measure({"m": tiny}, digits, Config(limit=2))


def test_pairs_too_large_are_refused(tiny, digits, monkeypatch):
    monkeypatch.setattr(MODULE, "_PAIR_BYTES", 1000)
    with pytest.raises(UserError, match="choose fewer by pair-steps"):
        measure({"m": tiny}, digits, Config(limit=2))
