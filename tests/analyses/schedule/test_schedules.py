"""Schedules against loops written by hand, the discriminant against scikit-learn's, removals
against their states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.utils import prune

from bvit_interp.analyses.schedule import schedules as schedule
from bvit_interp.analyses.schedule.schedules import (
    REMOVALS,
    Discriminant,
    Outcomes,
    Plan,
    Run,
    StepMoments,
    judged,
    removals,
    removed,
    same_steps,
    schedules,
    substitutions,
    with_mean_row,
)
from bvit_interp.errors import UserError
from bvit_interp.models.stepping import State, advance, answer, embed
from bvit_interp.models.unroll import run_on, unroll


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(states):
    """Sums of states ``(n, T, D)``, in two batches."""
    metric = StepMoments(states.shape[1], states.shape[2])
    for part in states.split(len(states) // 2 + 1):
        for t in range(states.shape[1]):
            metric.update(part[:, None, t], t + 1)
    return metric.compute()


def test_schedules_of_three_steps():
    found = schedules(3, runs=(2, 5), shifts=(1, 3))
    assert found == {
        Run("normal"): (1, 2, 3),
        Run("reverse"): (3, 2, 1),
        Run("again"): (1, 2, 3, 1, 2, 3),
        Run("skip", 1): (2, 3),
        Run("skip", 2): (1, 3),
        Run("skip", 3): (1, 2),
        Run("repeat", 1): (1, 1, 2, 3),
        Run("repeat", 2): (1, 2, 2, 3),
        Run("repeat", 3): (1, 2, 3, 3),
        Run("fixed", 1): (1, 1, 1),
        Run("fixed", 2): (2, 2, 2),
        Run("fixed", 3): (3, 3, 3),
        Run("swap", 1, 2): (2, 1, 3),
        Run("swap", 2, 3): (1, 3, 2),
        Run("delay", 1): (2, 3),
        Run("lag", 1): (1, 1, 2),
        Run("lead", 1): (2, 3, 3),
        Run("run", 2): (1, 2),
        Run("run", 5): (1, 2, 3, 4, 5),
    }
    assert next(iter(found)) == Run("normal")
    put = substitutions(3)
    assert len(put) == 9
    assert put["put", 2, 3] == (1, 3, 3)
    assert put["put", 1, 1] == (1, 2, 3)
    assert next(iter(put.values())) == (1, 2, 3)


def test_schedules_against_one_loop_each(any_model, images):
    """Shared beginnings and steps taken for the same change nothing, bit for bit."""
    view = run_on(any_model, 14)
    trained = len(any_model.blocks)
    wanted = {
        run: s
        for run, s in schedules(trained, (2, 14), (1, 2)).items()
        if max(s) <= len(view.blocks)
    }
    with torch.inference_mode():
        found = Plan(view, wanted).logits(images)
        assert torch.equal(found[0], any_model(images))
        for logits, steps in [*zip(found, wanted.values(), strict=True)][::4]:
            state = embed(view, images)
            for step in steps:
                state = advance(view, State(state.tokens, step - 1, state.memory))
            assert torch.equal(logits, answer(view, state))


def test_another_order_of_the_embedding_and_of_blocks_by_hand(tiny_te, stacked, images, by_hand):
    table = tiny_te.blocks.step_embed.detach()
    runs = {
        Run("swap", 3, 4): [1, 2, 4, 3, *range(5, 13)],
        Run("put", 2, 9): [1, 9, *range(3, 13)],
        Run("x"): [7] * 3,
    }
    with torch.no_grad():
        found = Plan(unroll(tiny_te), {run: tuple(steps) for run, steps in runs.items()}).logits(
            images
        )
        for logits, steps in zip(found, runs.values(), strict=True):
            rows = table[[step - 1 for step in steps]]
            states = by_hand.run(tiny_te, images, [tiny_te.blocks[0]] * len(steps), rows)
            torch.testing.assert_close(
                logits, by_hand.logits(tiny_te, states[-1]["resid_post"]), rtol=1e-4, atol=1e-4
            )
        order = Plan(unroll(stacked), {Run("x"): (3, 1, 1)}).logits(images)
        states = by_hand.run(
            stacked, images, [stacked.blocks[2], stacked.blocks[0], stacked.blocks[0]]
        )
        wanted = by_hand.logits(stacked, states[-1]["resid_post"])
        torch.testing.assert_close(order[0], wanted, rtol=1e-4, atol=1e-4)


def test_for_a_plain_bvit_only_the_number_of_steps_matters(tiny, images):
    wanted = schedules(12, (18,), (1, 6))
    plan = Plan(run_on(tiny, 18), wanted)
    with torch.inference_mode():
        found = dict(zip(plan.runs, plan.logits(images), strict=True))
        of_count = {
            count: unroll(tiny, steps=count)(images) for count in {*map(len, wanted.values())}
        }
        for run, logits in found.items():
            assert torch.equal(logits, of_count[len(wanted[run])]), run
    assert not torch.equal(found["skip", 4, None], found["normal", None, None])


def test_every_shared_step_is_computed_once(tiny, tiny_te, images, monkeypatch):
    calls = []
    monkeypatch.setattr(schedule, "advance", lambda *given: calls.append(1) or advance(*given))
    for model, applied in ((tiny, 24), (tiny_te, None)):
        plan = Plan(unroll(model), schedules(12))
        with torch.inference_mode():
            plan.logits(images)
        assert len(calls) == plan.applied
        assert applied is None or plan.applied == applied
        assert plan.applied < sum(map(len, schedules(12).values()))
        calls.clear()


def test_which_steps_are_the_same(tiny, tiny_te, tiny_hybrid, tiny_sc, tiny_sc_block, stacked):
    assert same_steps(run_on(tiny, 14)) == [1] * 14
    assert same_steps(run_on(tiny_te, 14)) == [*range(1, 13), 12, 12]
    assert same_steps(unroll(tiny_hybrid)) == [1, 2] * 3
    assert same_steps(unroll(tiny_sc)) == [
        1,
        2,
        1,
        2,
        1,
    ]  # the memory is refreshed every second step
    assert same_steps(unroll(tiny_sc_block)) == [1, 2, 3, 4, 5]
    assert same_steps(unroll(stacked)) == [1, 2, 3]


def test_a_changed_step_is_no_other(tiny):
    view = unroll(tiny)
    prune.l1_unstructured(view.blocks[4].mlp.fc1, "weight", amount=0.5)
    hook = view.blocks[7].register_forward_hook(lambda *_: None)
    assert same_steps(view) == [1, 1, 1, 1, 5, 1, 1, 8, 1, 1, 1, 1]
    hook.remove()


def test_the_mean_row(tiny, tiny_te, tiny_fl, images, by_hand):
    assert with_mean_row(tiny) is None
    before = tiny_te.blocks.step_embed.detach().clone()
    mean = before.mean(0, keepdim=True).expand(12, -1)
    with torch.no_grad():
        states = by_hand.run(tiny_te, images, [tiny_te.blocks[0]] * 12, mean)
        wanted = by_hand.logits(tiny_te, states[-1]["resid_post"])
        torch.testing.assert_close(with_mean_row(tiny_te)(images), wanted, rtol=1e-4, atol=1e-4)
        rows = tiny_fl.blocks.step_embed.mean(0, keepdim=True)
        states = by_hand.run(tiny_fl, images, [tiny_fl.blocks[0]] * 4, rows)
        wanted = by_hand.logits(tiny_fl, states[-1]["resid_post"])
        torch.testing.assert_close(with_mean_row(tiny_fl)(images), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(tiny_te.blocks.step_embed, before)


def test_outcomes_against_a_loop_over_images():
    logits, labels = draw(3, 20, 4), torch.arange(20) % 3
    normal = logits[1] + 0.5 * draw(20, 4, seed=1)
    metric = Outcomes(3, 4)
    for part in (slice(0, 13), slice(13, 20)):
        metric.update(logits[:, part], normal[part], labels[part])
    found = metric.compute()
    for k in range(3):
        hits, usual, same, change = [], [], [], []
        for own, other, label in zip(
            logits[k].numpy(), normal.numpy(), labels.tolist(), strict=True
        ):
            hits.append(own.argmax() == label)
            usual.append(other.argmax() == label)
            same.append(own.argmax() == other.argmax())
            change.append(
                own[label] - np.log(np.exp(own).sum()) - other[label] + np.log(np.exp(other).sum())
            )
        assert found["accuracy"][k]["value"] == np.mean(hits)
        assert found["accuracy"][k]["null"] == 7 / 20
        assert found["agreement"][k]["value"] == np.mean(same)
        paired = np.subtract(hits, usual, dtype=float)
        for name, values in (("change", paired), ("log_prob", np.array(change))):
            assert found[name][k]["value"] == pytest.approx(values.mean())
            half = 1.959964 * values.std(ddof=1) / math.sqrt(20)
            assert found[name][k]["high"] - found[name][k]["value"] == pytest.approx(half, rel=1e-5)
            assert "null" not in found[name][k]
        shares = [
            np.bincount(of.argmax(-1), minlength=4) / 20
            for of in (logits[k].numpy(), normal.numpy())
        ]
        assert found["agreement"][k]["null"] == pytest.approx(shares[0] @ shares[1])
    n, p, z = 20, found["accuracy"][0]["value"], 1.959964
    low = (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (
        1 + z * z / n
    )
    assert found["accuracy"][0]["low"] == pytest.approx(low, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_outcomes_refuse_nan_and_nothing():
    with pytest.raises(UserError, match="no image was scored"):
        Outcomes(2, 3).compute()
    with pytest.raises(UserError, match="NaN"):
        Outcomes(1, 3).update(
            torch.full((1, 2, 3), math.nan), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
        )


def test_the_discriminant_is_scikit_learns():
    states = draw(60, 5, 6) + torch.arange(5)[:, None] * draw(5, 6, seed=3)
    states[:, :, 0] += 3 * states[:, :, 1]
    labels = np.tile(np.arange(1, 6), 60)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(states.reshape(-1, 6).numpy(), labels)
    fresh = draw(40, 5, 6, seed=5) + states.mean(0)
    ours = Discriminant(moments_of(states), ridge=1e-12)(fresh).argmax(-1) + 1
    np.testing.assert_array_equal(
        ours.flatten().numpy(), theirs.predict(fresh.reshape(-1, 6).numpy())
    )


def test_judged_against_a_loop():
    scores = draw(2, 3, 4, 4)
    found = judged(scores)
    for b in range(2):
        right, error, told = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
        for k in range(3):
            s = scores[b, k].numpy()
            for t in range(4):
                right[k, t] = s[t].argmax() == t
                error[k, t] = abs(s[t].argmax() - t)
                told[k, t] = np.mean(
                    [s[t, t] + s[u, u] > s[t, u] + s[u, t] for u in range(4) if u != t]
                )
        for j, values in enumerate((right, error, told)):
            np.testing.assert_allclose(found[b, :4, j], values.mean(0))
            np.testing.assert_allclose(found[b, 4, j], values.mean())


def test_a_probe_of_equal_means_tells_nothing_by_forced_choice():
    """Steps that differ in spread alone: the argmax may use the spread, the forced choice
    cannot."""
    spread = torch.linspace(1, 6, 4)[:, None]
    fit, fresh = draw(400, 4, 5) * spread, draw(2000, 4, 5, seed=9) * spread
    score = judged(Discriminant(moments_of(fit), 1e-3)(fresh)[:, None])[:, -1].mean(0)
    assert score[2] == pytest.approx(0.5, abs=0.02)


def test_what_a_removal_leaves():
    states = draw(50, 4, 8) * torch.arange(1, 9) + torch.arange(4)[:, None] * draw(4, 8, seed=2)
    sums = moments_of(states)
    found = removals(sums, (0, 1))
    means = states.mean(0)
    differences = (means - means.mean(0)).numpy()
    assert len(found["subspace"].basis) == len(found["random_subspace"].basis) == 3
    np.testing.assert_allclose(
        found["random_subspace"].basis @ found["random_subspace"].basis.T, np.eye(3), atol=1e-12
    )
    # by the pseudo-inverse, where the code has a singular value decomposition
    onto = torch.from_numpy(np.linalg.pinv(differences, rcond=1e-9) @ differences)
    for t in range(4):
        changed = removed(states[:, t], t + 1, found)
        assert list(changed) == list(REMOVALS)
        far = {name: (tokens - states[:, t]).norm(dim=1) for name, tokens in changed.items()}
        wanted = states[:, t] - (states[:, t] - means.mean(0)) @ onto
        torch.testing.assert_close(changed["subspace"], wanted)
        torch.testing.assert_close(changed["mean"], states[:, t] - means[t] + means.mean(0))
        for name in ("subspace", "mean"):
            torch.testing.assert_close(changed[name].mean(0), means.mean(0))
        torch.testing.assert_close(far["random_scaled"], far["subspace"])
        torch.testing.assert_close(far["random_shift"], far["mean"])
        assert not torch.allclose(changed["random_scaled"], changed["subspace"])


def test_the_sums_after_a_removal_are_those_of_the_states_after_it():
    states, other = draw(50, 4, 8) + draw(4, 8, seed=2), draw(30, 4, 8, seed=4)
    for name, removal in removals(moments_of(states), (0,)).items():
        moved = torch.stack(
            [other[:, t] + removal.delta(other[:, t], t + 1) for t in range(4)], dim=1
        )
        found, wanted = removal.moved(moments_of(other)), moments_of(moved)
        for key in ("gram", "sums", "count", "means"):
            torch.testing.assert_close(
                getattr(found, key), getattr(wanted, key), msg=f"{name} {key}"
            )


def test_random_directions_by_seed():
    sums = moments_of(draw(20, 3, 6))
    first, again, other = (
        removals(sums, seed)["random_subspace"].basis for seed in ((1, 2), (1, 2), (1, 3))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first.T @ first, other.T @ other)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_and_nan_are_refused():
    with pytest.raises(UserError, match="no image is left"):
        StepMoments(2, 3).compute()
    with pytest.raises(UserError, match="NaN"):
        StepMoments(2, 3).update(torch.full((1, 1, 3), math.nan, dtype=torch.float64), 1)
