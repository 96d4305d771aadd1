"""Schedules against other models, decoding against scikit-learn, removals by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import STEPS, answer_by_hand, foreign, states_by_hand
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from bvit_interp.analyses.schedule import COLUMNS, Config, measure, summary
from bvit_interp.analyses.schedule.measure import _roles
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.bvit import BViT
from bvit_interp.models.stepping import State, answer, embed, proceed
from bvit_interp.models.unroll import unroll, with_steps

SMALL = {"limit": 24, "n_scored": 6, "n_matrix": 4, "runs": (6, 14), "shifts": (1,)}
VALUES = ["value", "low", "high", "null", "n"]


def images_of(model, data, role, config):
    """Images and labels of those that have this role."""
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in sorted(_roles(len(data), config)[role])]
    return torch.stack([geometry(image, None)[0] for image, _, _ in scenes]), torch.tensor(
        [s[1] for s in scenes]
    )


def only(frame, **wanted):
    """The one row with these values."""
    kept = frame[
        np.logical_and.reduce(
            [(frame[key] == value).fillna(False).astype(bool) for key, value in wanted.items()]
        )
    ]
    assert len(kept) == 1
    return kept.iloc[0]


def test_every_model_has_its_rows(any_model, digits):
    frame = measure({"m": any_model}, digits, Config(**SMALL))
    assert list(frame) == list(COLUMNS)
    trained = len(any_model.blocks)
    assert (frame["trained_steps"] == trained).all()
    schedule = frame[frame["experiment"] == "schedule"]
    recurrent = isinstance(any_model, BViT)
    found = schedule[(schedule["variant"] == "run") & (schedule["metric"] == "accuracy")][
        "step"
    ].tolist()
    assert found == ([s for s in (6, 14) if recurrent or s <= trained])
    timed = getattr(any_model.blocks, "step_embed", None) is not None
    assert (set(schedule["variant"]) >= {"mean_embedding", "embedding"}) == timed
    plain = (
        type(any_model.blocks).__name__ == "Steps"
        and len(any_model.blocks._modules) == 1
        and not timed
    )
    assert ("replace" in set(schedule["variant"])) != plain
    whole = only(frame, variant="normal", metric="accuracy")
    images, labels = images_of(any_model, digits, "test", Config(**SMALL))
    with torch.no_grad():
        assert whole["value"] == (any_model(images).argmax(-1) == labels).double().mean().item()
    assert whole["n"] == 6
    assert only(frame, variant="normal", metric="agreement")["value"] == 1
    assert only(frame, variant="normal", metric="log_prob_change")["value"] == 0
    assert frame.loc[frame["experiment"] == "decoding", ["value", "null"]].notna().all(axis=None)
    assert frame.loc[frame["experiment"] == "removal", "value"].notna().all()
    assert (
        frame.loc[frame["metric"].isin(["accuracy", "agreement"]), ["low", "high", "null"]]
        .notna()
        .all(axis=None)
    )


def test_a_plain_bvit_counts_by_the_number_of_steps_alone(tiny, digits):
    config = Config(**{**SMALL, "runs": (11, 13)})
    frame = measure({"m": tiny}, digits, config)
    images, labels = images_of(tiny, digits, "test", config)
    with torch.no_grad():
        normal = tiny(images).double().log_softmax(-1)
        for count, kind in ((11, "skip"), (13, "repeat")):
            runs = frame[frame["variant"] == kind]
            assert sorted(runs["step"].unique()) == list(range(1, 13))
            for name, rows in runs.groupby("metric"):
                wanted = only(frame, variant="run", step=count, metric=name)
                for _, row in rows.iterrows():
                    pd.testing.assert_series_equal(row[VALUES], wanted[VALUES], check_names=False)
            other = unroll(tiny, steps=count)(images).double().log_softmax(-1)
            change = (other - normal)[torch.arange(6), labels].mean().item()
            assert only(frame, variant="run", step=count, metric="log_prob_change")[
                "value"
            ] == pytest.approx(change, rel=1e-6)
            assert abs(change) > 1e-3
    still = frame[frame["variant"].isin(["swap", "reverse", "lag", "lead", "fixed"])]
    assert (still[still["metric"].isin(["accuracy_change", "log_prob_change"])]["value"] == 0).all()
    assert (still[still["metric"] == "agreement"]["value"] == 1).all()


def test_the_embedding_of_step_s_in_place_of_step_t(tiny_te, digits, by_hand):
    frame = measure({"m": tiny_te}, digits, Config(**SMALL))
    images, labels = images_of(tiny_te, digits, "matrix", Config(**SMALL))
    table = tiny_te.blocks.step_embed.detach()
    blocks = [tiny_te.blocks[0]] * 12
    replaced = frame[
        (frame["variant"] == "replace") & (frame["metric"] == "log_prob_change")
    ].set_index(["step", "other_step"])
    assert len(replaced) == 144
    assert (replaced["n"] == 4).all()
    with torch.no_grad():

        def log_p(rows):
            logits = by_hand.logits(
                tiny_te, by_hand.run(tiny_te, images, blocks, rows)[-1]["resid_post"]
            )
            return logits.double().log_softmax(-1)[torch.arange(4), labels]

        for t, s in ((3, 9), (12, 1), (5, 5)):
            rows = table.clone()
            rows[t - 1] = table[s - 1]
            change = (log_p(rows) - log_p(table)).mean().item()
            assert replaced.loc[(t, s), "value"] == pytest.approx(change, abs=1e-4)
    assert (replaced["value"].abs() > 1e-3).sum() > 100
    lengths = frame[(frame["variant"] == "embedding") & (frame["tokens"] == "cls")][
        "value"
    ].tolist()
    fit, _ = images_of(tiny_te, digits, "fit", Config(**SMALL))
    with torch.no_grad():
        states = by_hand.run(tiny_te, fit, blocks, table)
    norms = [
        states[t]["resid_post"][:, 0].norm(dim=1).log().mean().exp().item() for t in range(1, 13)
    ]
    np.testing.assert_allclose(
        lengths,
        [row.norm().item() / norm for row, norm in zip(table, norms, strict=True)],
        rtol=1e-4,
    )


def states_of(model, images):
    with torch.no_grad():
        return torch.stack(
            [proceed(unroll(model), embed(model, images), t).tokens for t in range(1, 13)], dim=1
        )


def test_the_decoded_step_against_scikit_learn(tiny, digits):
    config = Config(limit=60, n_scored=20, n_matrix=0, runs=(), shifts=(), ridge=1e-9)
    frame = measure({"m": tiny}, digits, config)
    fit, test = (
        states_of(tiny, images_of(tiny, digits, role, config)[0]).double()
        for role in ("fit", "test")
    )
    assert len(fit) == 26
    steps = np.arange(1, 13)
    for kind, rows in (("cls", slice(0, 1)), ("patches", slice(1, None))):
        known, fresh = (of[:, :, rows].transpose(1, 2) for of in (fit, test))  # (B, K, T, D)
        for name, read in (
            ("raw", lambda x: x),
            ("direction", lambda x: x / x.norm(dim=-1, keepdim=True)),
            ("norm", lambda x: x.norm(dim=-1, keepdim=True).log()),
        ):
            labels = np.broadcast_to(steps, known.shape[:3]).ravel()
            theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(
                read(known).flatten(0, 2).numpy(), labels
            )
            said = theirs.predict(read(fresh).flatten(0, 2).numpy()).reshape(fresh.shape[:3])
            of = frame[
                (frame["variant"] == name)
                & (frame["tokens"] == kind)
                & (frame["experiment"] == "decoding")
            ]
            found = only(of[of["step"].isna()], metric="accuracy")
            assert found["value"] == pytest.approx((said == steps).mean(), abs=0.01)
            assert found["null"] == pytest.approx(1 / 12)
            assert found["n"] == 20
            assert only(of, step=7, metric="step_error")["value"] == pytest.approx(
                np.abs(said[:, :, 6] - 7).mean(), abs=0.05
            )
    assert (
        frame[frame["metric"] == "step_error"]["null"] == 3
    ).all()  # always 6: (5+4+3+2+1+0+1+2+3+4+5+6) / 12


def test_a_state_without_its_step_runs_on(tiny, digits):
    config = Config(**SMALL)
    frame = measure({"m": tiny}, digits, config)
    fit = states_of(tiny, images_of(tiny, digits, "fit", config)[0]).double()
    images, labels = images_of(tiny, digits, "test", config)
    own = states_of(tiny, images).double()
    t = 4
    stripped, shifted = own[:, t - 1].clone(), own[:, t - 1].clone()
    for rows in (slice(0, 1), slice(1, None)):
        means = fit[:, :, rows].mean((0, 2))
        onto = (
            np.linalg.pinv((means - means.mean(0)).numpy(), rcond=1e-9)
            @ (means - means.mean(0)).numpy()
        )
        stripped[:, rows] -= (stripped[:, rows] - means.mean(0)) @ torch.from_numpy(onto)
        shifted[:, rows] += means.mean(0) - means[t - 1]
    with torch.no_grad():
        normal = tiny(images).double().log_softmax(-1)[torch.arange(6), labels]
        for kind, tokens in (("subspace", stripped), ("mean", shifted)):
            logits = answer(tiny, proceed(unroll(tiny), State(tokens.float(), t))).double()
            change = (logits.log_softmax(-1)[torch.arange(6), labels] - normal).mean().item()
            row = only(frame, experiment="removal", variant=kind, step=t, metric="log_prob_change")
            assert row["value"] == pytest.approx(change, abs=2e-4)
            far = ((tokens - own[:, t - 1]).norm(dim=-1) / own[:, t - 1].norm(dim=-1)).mean().item()
            found = only(frame, experiment="removal", variant=kind, step=t, metric="distance")[
                "value"
            ]
            assert found == pytest.approx(far, rel=1e-4)
    distance = frame[frame["metric"] == "distance"].pivot(
        index="step", columns="variant", values="value"
    )
    assert (distance["random_subspace"] - distance["subspace"]).abs().max() > 1e-3


def test_a_decoder_after_the_removal_is_worse(tiny, digits):
    from bvit_interp.data.digits import DigitScenes

    config = Config(limit=400, n_scored=20, n_matrix=0, runs=(), shifts=())
    frame = measure({"m": tiny}, DigitScenes("test", length=400), config)
    order = frame[(frame["metric"] == "pair_accuracy") & frame["step"].isna()].set_index(
        ["tokens", "variant"]
    )["value"]
    for tokens in ("cls", "patches"):
        assert order[tokens, "raw"] > 0.95
        for stripped in ("subspace", "mean"):
            assert order[tokens, stripped] < 0.8


def test_batches_models_and_order_do_not_matter(tiny_te, stacked, digits):
    both = measure({"a": tiny_te, "b": stacked}, digits, Config(**SMALL))
    alone = measure({"b": stacked}, digits, Config(**SMALL, batch_size=5))
    part = both[both["model"] == "b"].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, alone, rtol=1e-5, atol=1e-6)


def test_the_roles_share_no_image():
    roles = _roles(1000, Config(limit=100, n_scored=30, n_matrix=10))
    assert {role: len(places) for role, places in roles.items()} == {
        "matrix": 10,
        "test": 30,
        "fit": 46,
        "refit": 24,
    }
    assert roles["matrix"] < roles["test"]
    assert len(roles["test"] | roles["fit"] | roles["refit"]) == 100
    assert max(map(max, roles.values())) == 990
    assert len(_roles(20, Config())["test"]) == 10
    # at random, since data sets are sorted by class
    assert min(roles["fit"] | roles["refit"]) < max(roles["test"])
    assert max(roles["test"]) > 500 > min(roles["test"])
    assert roles["test"] != _roles(1000, Config(limit=100, n_scored=30, seed=1))["test"]


def test_out_of_memory_halves_the_batch_and_counts_no_image_twice(tiny, digits, monkeypatch):
    whole = measure({"m": tiny}, digits, Config(**SMALL))
    block, calls = type(tiny.blocks[0]).forward, []

    def fail_late(self, x, *args, **kwargs):
        calls.append(len(x))
        if len(x) > 3 and calls.count(len(x)) % 9 == 0:
            raise torch.OutOfMemoryError
        return block(self, x, *args, **kwargs)

    monkeypatch.setattr(type(tiny.blocks[0]), "forward", fail_late)
    halved = measure({"m": tiny}, digits, Config(**SMALL))
    assert min(calls) <= 3
    pd.testing.assert_frame_equal(halved, whole, rtol=1e-4, atol=1e-5)


def test_the_model_is_returned_as_it_came(tiny_te, digits):
    before = {name: tensor.clone() for name, tensor in tiny_te.state_dict().items()}
    measure({"m": tiny_te}, digits, Config(**{**SMALL, "n_matrix": 0}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_te.state_dict().items())


def test_the_summary_has_accuracies_of_the_models_and_of_removals_half_way(tiny_te, digits):
    frame = measure({"m": tiny_te}, digits, Config(**SMALL))
    shown = summary(frame)
    assert list(shown["variant"].unique()) == [
        "normal",
        "run",
        "mean_embedding",
        "subspace",
        "random_scaled",
        "raw",
        "norm",
    ]
    assert (shown[shown["experiment"] == "removal"]["step"] == 6).all()
    normal = only(frame, variant="normal", metric="accuracy")["value"]
    assert shown["value"].iloc[0] == normal


@pytest.mark.parametrize("kind", ["encoder", "prelude", "two_state", "looped_timm", "dinov3"])
def test_models_that_are_not_ours_by_hand(kind, digits):
    """Steps stay in their places: early ends, steps left out, and runs on from a state without its
    step, by forwards written out."""
    model, last = foreign(kind), STEPS[kind]
    config = Config(**SMALL | {"runs": (2, 14), "n_matrix": 4})
    frame = measure({"m": model}, digits, config)
    view = with_steps(model)
    prefix = view.num_prefix_tokens
    kinds = {"encoder": [slice(None)], "dinov3": [slice(0, 1), slice(1, 5), slice(5, None)]}
    kinds = kinds.get(kind, [slice(0, prefix), slice(prefix, None)])
    images, labels = images_of(view, digits, "test", config)
    t = 2

    def log_prob(logits):
        return logits.double().log_softmax(-1)[torch.arange(6), labels]

    def row(experiment, variant, step, metric="log_prob_change"):
        return only(frame, experiment=experiment, variant=variant, step=step, metric=metric)[
            "value"
        ]

    with torch.no_grad():
        run = states_by_hand(model, images)
        fit = states_by_hand(model, images_of(view, digits, "fit", config)[0])[1:]
        shifted = run[t].clone()
        for rows in kinds:
            means = torch.stack([state[:, rows].double().mean((0, 1)) for state in fit])
            shifted[:, rows] += (means.mean(0) - means[t - 1]).float()
        normal = log_prob(answer_by_hand(model, run[-1]))
        changed = states_by_hand(model, images, put={t: shifted})[-1]
        expected = (log_prob(answer_by_hand(model, changed)) - normal).mean().item()
        assert row("removal", "mean", t) == pytest.approx(expected, abs=3e-4)
        expected = (log_prob(answer_by_hand(model, run[2])) - normal).mean().item()
        assert row("schedule", "run", 2) == pytest.approx(expected, abs=3e-4)
        if kind != "two_state":  # whose later steps read more than the state before them
            skipped = states_by_hand(model, images, put={3: run[2]})[-1]
            expected = (log_prob(answer_by_hand(model, skipped)) - normal).mean().item()
            assert row("schedule", "skip", 3) == pytest.approx(expected, abs=3e-4)
            assert abs(expected) > 1e-3
    schedule = frame[frame["experiment"] == "schedule"]
    assert set(schedule["variant"]) == {"normal", "run", "skip"}
    skips = schedule[(schedule["variant"] == "skip") & (schedule["metric"] == "accuracy")]
    # to skip the last step is to end early
    assert skips["step"].tolist() == ([last] if kind == "two_state" else [*range(2, last + 1)])
    assert (frame["trained_steps"] == last).all()
    decoded = frame[(frame["variant"] == "raw") & (frame["metric"] == "accuracy")]
    assert len(decoded) == len(kinds) * (last + 1)


def test_bad_input(tiny, make, digits):
    for options, message in (
        ({"runs": (6, 0)}, "runs must be >= 1, each once, got 6 0"),
        ({"shifts": (2, 2)}, "shifts must be >= 1, each once, got 2 2"),
        ({"n_scored": 0}, "n-scored must be >= 1, got 0"),
        ({"n_matrix": -1}, "n-matrix must be >= 0, got -1"),
        ({"ridge": 0.0}, "ridge must be > 0 and finite, got 0.0"),
        ({"ridge": float("inf")}, "ridge must be > 0 and finite, got inf"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**options)
    with pytest.raises(UserError, match="at least 6 are needed, got 5"):
        measure({"m": tiny}, digits, Config(limit=5))
    with pytest.raises(UserError, match="at least 2 steps are needed"):
        measure({"m": make(num_steps=1)}, digits, Config(**SMALL))
    with torch.no_grad():
        tiny.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        measure({"m": tiny}, digits, Config(**SMALL))
