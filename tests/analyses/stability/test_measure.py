"""Stability against full Jacobians of a tiny model, its nulls, and what must not depend on
batches."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import STEPS, foreign, states_by_hand, step_by_hand
from torch.nn.attention import SDPBackend, sdpa_kernel

from bvit_interp.analyses.stability import COLUMNS, Config, jacobian, measure, plot, summary
from bvit_interp.analyses.stability.vectors import seeded_normal
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.partners import Partners
from bvit_interp.errors import UserError
from bvit_interp.models.stepping import answer, embed, proceed
from bvit_interp.models.unroll import run_on, unroll, with_steps

SMALL = {
    "limit": 3,
    "n_jacobian": 1,
    "steps": 3,
    "jacobian_steps": (1,),
    "leading": 2,
    "iterations": 4,
    "starts": (1,),
    "eps": (0.1,),
}
KEYS = ["model", "metric", "step", "index", "tokens", "source", "start", "eps"]


def small(**changes):
    return Config(**{**SMALL, **changes})


def only(frame, metric, **where):
    part = frame[frame["metric"] == metric]
    for key, value in where.items():
        part = part[part[key] == value]
    return part


def image_of(model, data, place):
    return Geometry.of(model, data)(data.read(place)[0], None)[0][None]


@pytest.mark.parametrize(("steps", "permuted"), [(2, False), (2, True), (4, False), (4, True)])
def test_against_the_full_jacobians(make, digits, steps, permuted):
    """One image, T = 2; singular values, radius and exponents from numpy's decompositions of 160 x
    160 matrices, also where the run goes on past T."""
    tiny = make(img_size=16, num_steps=2)
    frame = measure(
        {"m": tiny}, digits, small(limit=2, steps=steps, jacobian_steps=(2,), iterations=60)
    )
    column = "null" if permuted else "value"
    view = jacobian.differentiable(tiny, steps, 0 if permuted else None)
    states = [embed(view, image_of(tiny, digits, 0).double())]
    states.append(proceed(view, states[0], 1))
    matrices = []
    for state in states:
        step = jacobian.step_map(view, state)
        matrices.append(
            torch.autograd.functional.jacobian(lambda z, step=step: step(z)[0], state.tokens)[
                :, :, 0
            ]
        )
    matrices = [each.reshape(160, 160).numpy() for each in matrices]
    u, s, vh = np.linalg.svd(matrices[1])
    np.testing.assert_allclose(only(frame, "singular_value", step=2)[column], s[:2], rtol=1e-5)
    assert only(frame, "singular_value")["residual"].max() < 1e-2
    radius = only(frame, "spectral_radius", step=2)
    assert radius[column].item() == pytest.approx(
        np.abs(np.linalg.eigvals(matrices[1])).max(), rel=1e-4
    )
    of_cls = {
        name: only(frame, name, step=2, tokens="cls")[column].item()
        for name in ("input_share", "output_share")
    }
    assert of_cls["input_share"] == pytest.approx(np.square(vh[0, :32]).sum(), rel=1e-3)
    assert of_cls["output_share"] == pytest.approx(np.square(u[:32, 0]).sum(), rel=1e-3)
    worst = np.log(np.linalg.svd(matrices[1] @ matrices[0])[1][:2]) / 2
    np.testing.assert_allclose(only(frame, "ftle")[column], worst, rtol=1e-5)
    norms = [state.tokens.norm().item() for state in (*states, proceed(view, states[0], 2))]
    grown = math.log(norms[2] / norms[0]) / 2
    np.testing.assert_allclose(only(frame, "ftle_relative")[column], worst - grown, rtol=1e-5)
    assert only(frame, "state_growth", step=2)[column].item() == pytest.approx(norms[2] / norms[1])
    assert only(frame, "ftle")["step"].tolist() == [2, 2]
    # the gain of one random change of CLS alone, read in patches
    probe = seeded_normal(torch.tensor([0]), (2, 5, 32), 0, 0)[0, 1].flatten().numpy()
    probe[32:] = 0
    passed = np.linalg.norm((matrices[1] @ probe)[32:]) / np.linalg.norm(probe)
    gain = only(frame, "gain", step=2, source="cls", tokens="patches")[column].item()
    assert gain == pytest.approx(passed)
    # Benettin: the volume that two tangents span
    tangents = seeded_normal(torch.tensor([0]), (2, 5, 32), 0, 1)[0].flatten(1).numpy()
    before, after = (
        np.linalg.qr(each.T)[1] for each in (tangents, tangents @ (matrices[1] @ matrices[0]).T)
    )
    logs = np.log(np.abs(np.diag(after) / np.diag(before))) / 2
    np.testing.assert_allclose(only(frame, "lyapunov_exponent", step=2)[column], logs, rtol=1e-6)
    np.testing.assert_allclose(
        only(frame, "lyapunov_exponent_relative", step=2)[column], logs - grown, rtol=1e-6
    )
    first = tangents[0] @ (matrices[1] @ matrices[0]).T
    share = np.square(first[:32]).sum() / np.square(first).sum()
    assert only(frame, "tangent_share", step=2, tokens="cls")[column].item() == pytest.approx(
        share, rel=1e-6
    )


@pytest.mark.parametrize("kind", ["encoder", "prelude", "looped_timm", "dinov3"])
def test_steps_of_models_that_are_not_ours_against_the_full_jacobian(kind, digits):
    """Step 3 by forwards written out, in which input is injected before the step; and a perturbed
    run."""
    model = foreign(kind)
    frame = measure(
        {"m": model},
        digits,
        small(limit=2, steps=9, jacobian_steps=(3,), iterations=40, starts=(0, 2)),
    )
    assert (frame["trained_steps"] == STEPS[kind]).all() and frame["step"].max() == STEPS[kind]
    exact, image = copy.deepcopy(model).double(), image_of(with_steps(model), digits, 0)
    with torch.no_grad():
        run = states_by_hand(exact, image.double())

    def step(z):
        with sdpa_kernel(SDPBackend.MATH):
            return step_by_hand(exact, image.double(), [*run[:2], z])[0]

    count = run[0].numel()
    matrix = torch.autograd.functional.jacobian(step, run[2]).reshape(count, count).numpy()
    of_step = [only(frame, metric, step=3) for metric in ("singular_value", "spectral_radius")]
    np.testing.assert_allclose(
        of_step[0]["value"], np.linalg.svd(matrix)[1][:2], rtol=1e-3, err_msg="singular values"
    )
    radius = np.abs(np.linalg.eigvals(matrix)).max()
    assert of_step[1]["value"].item() == pytest.approx(radius, rel=1e-2)
    assert (of_step[0]["null"] != of_step[0]["value"]).all()
    grown = run[3].norm() / run[2].norm()
    growth = only(frame, "state_growth", step=3)["value"].item()
    assert growth == pytest.approx(grown.item(), rel=1e-5)
    # the other image's state, from the entry on
    geometry, partners = Geometry.of(with_steps(model), digits), Partners(digits, 2)
    far = []
    with torch.no_grad():
        for place in (0, 30):
            own = image_of(with_steps(model), digits, place)
            other = states_by_hand(model, partners(torch.tensor([place]), geometry)[0])
            clean = states_by_hand(model, own)
            change = other[2] - clean[2]
            moved = clean[2] + 0.1 * clean[2].norm() / change.norm() * change
            moved = states_by_hand(model, own, put={2: moved})
            patches = slice(with_steps(model).num_prefix_tokens, None)
            away = moved[3][:, patches] - clean[3][:, patches]
            far.append((away.norm() / clean[3][:, patches].norm()).item())
    row = only(frame, "distance", source="partner", start=2, step=3, tokens="patches")
    assert row["value"].item() == pytest.approx(np.mean(far), rel=1e-3)


def test_a_model_of_features_has_no_prediction(digits):
    """As timm's DINOv3 is made by default; all else is measured."""
    frame = measure({"m": foreign("dinov3", num_classes=0)}, digits, small())
    whole = measure({"m": foreign("dinov3")}, digits, small())
    assert only(frame, "same_prediction").empty
    assert set(whole["metric"]) - set(frame["metric"]) == {"same_prediction"}
    plot(frame)


def test_steps_that_read_more_than_the_state_are_refused(digits):
    with pytest.raises(UserError, match="theirs: its steps read the output of more than one"):
        measure({"theirs": foreign("two_state")}, digits, small())


def test_checkpointing_around_the_steps_is_refused_before_any_pass(digits, monkeypatch):
    model = foreign("eva02")
    model.set_grad_checkpointing(True)
    read = []
    monkeypatch.setattr(type(digits), "read", lambda *_: read.append(1))
    with pytest.raises(UserError, match="under gradient checkpointing"):
        measure({"theirs": model}, digits, small())
    assert not read


def test_curves_against_runs_by_hand(tiny, digits):
    """Mean, interval and null over images, with partners half the chosen images further on."""
    frame = measure({"m": tiny}, digits, small(limit=4, batch_size=3))
    view, geometry, partners = run_on(tiny, 3), Geometry.of(tiny, digits), Partners(digits, 4)
    far, null, same = [], [], []
    with torch.no_grad():
        for place in (0, 15, 30, 45):
            own = proceed(view, embed(view, image_of(tiny, digits, place)), 1)
            other = proceed(view, embed(view, partners(torch.tensor([place]), geometry)[0]), 1)
            change = other.tokens - own.tokens
            moved = type(own)(own.tokens + 0.1 * own.tokens.norm() / change.norm() * change, 1)
            clean, perturbed, beside = (proceed(view, state) for state in (own, moved, other))
            cls = [state.tokens[0, 0] for state in (clean, perturbed, beside)]
            far.append(((cls[1] - cls[0]).norm() / cls[0].norm()).item())
            null.append(((cls[2] - cls[0]).norm() / cls[0].norm()).item())
            same.append((answer(view, perturbed).argmax() == answer(view, clean).argmax()).item())
    row = only(frame, "distance", source="partner", step=3, tokens="cls").iloc[0]
    assert row["value"] == pytest.approx(np.mean(far), rel=1e-4)
    assert row["null"] == pytest.approx(np.mean(null), rel=1e-4)
    half = 1.96 * np.std(far, ddof=1) / 2
    assert row["high"] - row["value"] == pytest.approx(half, rel=1e-3)
    assert row["n"] == 4
    assert only(frame, "same_prediction", source="partner", step=3)["value"].item() == np.mean(same)
    at_start = only(frame, "distance", source="random", step=1)
    assert at_start["step"].tolist() == [1, 1]
    assert only(frame, "distance", step=0).empty


def test_every_model_with_its_kinds_of_token(any_model, digits):
    before = {key: value.clone() for key, value in any_model.state_dict().items()}
    frame = measure({"m": any_model}, digits, small(limit=2, steps=2, iterations=2))
    assert list(frame) == list(COLUMNS)
    assert not frame.duplicated(KEYS).any()
    assert frame["value"].notna().all()
    assert frame.loc[frame["metric"] != "token_share", "null"].notna().all()
    assert (frame["trained_steps"] == len(any_model.blocks)).all()
    kinds = {"cls", "patches"} | ({"reg"} if any_model.reg_token is not None else set())
    kinds |= {"dist"} if hasattr(any_model, "dist_token") else set()
    assert set(only(frame, "distance")["tokens"]) == kinds
    kinds |= {"memory"} if hasattr(any_model.blocks[0], "memory") else set()
    gains = only(frame, "gain", step=1)
    assert set(gains["tokens"]) == set(gains["source"]) == kinds
    for metric in ("token_share", "input_share"):
        shares = only(frame, metric).groupby("step", dropna=False)["value"].sum()
        np.testing.assert_allclose(shares, 1)
    if "memory" in kinds:  # it starts at zero and is the part that cannot have been stretched yet
        assert only(frame, "token_share", tokens="memory")["value"].item() == 0.5
    assert all(torch.equal(value, before[key]) for key, value in any_model.state_dict().items())


def test_tables_do_not_depend_on_batches_or_on_other_models(tiny, tiny_te, digits):
    options = {"limit": 5, "n_jacobian": 3}
    whole = measure({"a": tiny, "b": tiny_te}, digits, small(**options))
    ones = measure({"b": tiny_te}, digits, small(**options, batch_size=2))
    of_b = whole[whole["model"] == "b"].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_b, ones, rtol=1e-6, atol=1e-6)
    assert (only(of_b, "singular_value")["n"] == 3).all()
    assert (only(of_b, "distance")["n"] == 5).all()


def test_steps_past_the_last_and_of_a_stack(tiny, stacked, digits):
    frame = measure(
        {"a": tiny, "b": stacked},
        digits,
        small(limit=2, steps=14, jacobian_steps=(2, 14), starts=(2, 13)),
    )
    of = dict(list(frame.groupby("model")))
    assert set(only(of["a"], "singular_value")["step"]) == {2, 12, 14}
    assert set(only(of["b"], "singular_value")["step"]) == {2, 3}
    assert set(only(of["a"], "ftle")["step"]) == {12}
    assert only(of["a"], "lyapunov_exponent")["step"].max() == 14
    assert only(of["b"], "lyapunov_exponent")["step"].max() == 3
    assert set(only(of["a"], "same_prediction")["start"]) == {2, 13}
    assert set(only(of["b"], "same_prediction")["start"]) == {2}


def test_one_image_has_no_interval(tiny, digits):
    frame = measure({"m": tiny}, digits, small(limit=2))
    row = only(frame, "spectral_radius").iloc[0]
    assert math.isnan(row["low"])
    assert row["n"] == 1


def test_an_unroll_is_its_model(tiny, digits):
    frame = measure({"m": tiny}, digits, small(limit=2, steps=12))
    view = measure({"m": unroll(tiny)}, digits, small(limit=2, steps=12))
    pd.testing.assert_frame_equal(frame, view, rtol=1e-6)


def test_summary(tiny, digits):
    frame = measure(
        {"m": tiny}, digits, small(limit=2, steps=13, jacobian_steps=(13,), eps=(0.1, 0.2))
    )
    shown = summary(frame)
    assert set(shown["step"]) == {12, 13}
    numbers = shown[shown["metric"] != "direction_distance"]
    assert set(numbers["metric"]) == {
        "singular_value",
        "spectral_radius",
        "lyapunov_exponent",
        "lyapunov_exponent_relative",
        "ftle",
        "ftle_relative",
    }
    assert len(numbers) == 10
    assert set(numbers["index"].dropna()) == {1}
    far = shown[shown["metric"] == "direction_distance"]
    assert far[["source", "step"]].to_numpy().tolist() == [
        ["random", 12],
        ["random", 13],
        ["partner", 12],
        ["partner", 13],
    ]
    assert (far["eps"] == 0.2).all()
    assert (far["tokens"] == "cls").all()


def test_resume_key_leaves_out_how_it_is_run():
    assert small(batch_size=3).resume_key() == small(batch_size=7).resume_key()
    assert small(seed=1).resume_key() != small().resume_key()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"n_jacobian": 0}, "n-jacobian must be >= 1, got 0"),
        ({"leading": 0}, "leading must be >= 1, got 0"),
        ({"iterations": 1}, r"iterations must be >= leading \(2\), got 1"),
        ({"jacobian_steps": (0, 3)}, r"jacobian-steps must be >= 1, got \(0, 3\)"),
        ({"starts": ()}, r"starts must be steps >= 0, got \(\)"),
        ({"starts": (-1,)}, "starts must be steps >= 0"),
        ({"eps": (0.0,)}, "eps must be > 0 and finite"),
        ({"eps": (math.nan,)}, "eps must be > 0 and finite"),
        ({"eps": ()}, "eps must be > 0 and finite"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_bad_input(tiny, stacked, digits):
    with pytest.raises(UserError, match="at least 2 are needed, got 1"):
        measure({"m": tiny}, digits, small(limit=1))
    with pytest.raises(
        UserError, match=r"b has no step after any of the starts \(7,\); its starts: 0..2"
    ):
        measure({"a": tiny, "b": stacked}, digits, small(steps=12, starts=(7,)))
    with torch.no_grad():
        tiny.blocks[0].mlp.fc1.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        measure({"m": tiny}, digits, small())
