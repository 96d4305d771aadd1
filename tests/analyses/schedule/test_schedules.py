"""Schedules against loops written by hand."""

from __future__ import annotations

import pytest
import torch
from foreign import answer_by_hand, foreign, states_by_hand
from jaxtyping import TypeCheckError
from torch.nn.utils import prune

from bvit_interp.analyses.schedule import schedules as module
from bvit_interp.analyses.schedule.schedules import (
    Plan,
    Run,
    can_run,
    same_steps,
    schedules,
    substitutions,
    with_mean_embedding,
)
from bvit_interp.errors import UserError
from bvit_interp.models.stepping import State, advance, answer, embed
from bvit_interp.models.unroll import run_on, unroll, with_steps


def test_schedules_of_three_steps():
    found = schedules(3, runs=(2, 5), shifts=(1, 3))
    assert found == {
        Run("normal"): (1, 2, 3),
        Run("reverse"): (3, 2, 1),
        Run("twice"): (1, 2, 3, 1, 2, 3),
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
    replaced = substitutions(3)
    assert len(replaced) == 9
    assert replaced["replace", 2, 3] == (1, 3, 3)
    assert replaced["replace", 1, 1] == (1, 2, 3)
    assert next(iter(replaced.values())) == (1, 2, 3)


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
        Run("replace", 2, 9): [1, 9, *range(3, 13)],
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
        by_count = {
            count: unroll(tiny, steps=count)(images) for count in {*map(len, wanted.values())}
        }
        for run, logits in found.items():
            assert torch.equal(logits, by_count[len(wanted[run])]), run
    assert not torch.equal(found["skip", 4, None], found["normal", None, None])


def test_every_shared_step_is_computed_once(tiny, tiny_te, images, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "advance", lambda *given: calls.append(1) or advance(*given))
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


def test_steps_of_a_loop_that_is_not_ours_stay_in_their_places(tiny, images):
    """Each may read something that the model makes for it alone, so none is the same as another."""
    view, reads_more = with_steps(foreign("prelude")), with_steps(foreign("two_state"))
    assert same_steps(view) == [1, 2, 3, 4, 5, 6]
    for steps, possible in (
        ((1, 2, 3), (True, True)),
        ((1, 3, 6), (True, False)),
        ((2, 3), (False, False)),
        ((1, 2, 2), (False, False)),
        ((1, 3, 2), (False, False)),
        ((1, 7), (False, False)),
    ):
        assert (can_run(view, steps), can_run(reads_more, steps)) == possible
        assert can_run(unroll(tiny), steps)
    with pytest.raises(UserError, match=r"swap: .*steps \(1, 3, 2\): a step of a loop"):
        Plan(view, {Run("swap", 2, 3): (1, 3, 2)})
    with pytest.raises(UserError, match=r"swap: .*steps \(1, 6, 5\): a step of a loop"):
        Plan(view, {Run("swap", 5, 6): (1, 6, 5)})  # the last step is one of its six
    with pytest.raises(UserError, match="run: .*it has 6 steps"):
        Plan(view, {Run("run", 7): (1, 2, 3, 4, 5, 6, 7)})
    run = states_by_hand(model := foreign("prelude"), images)
    skipped = states_by_hand(model, images, put={3: run[2]})[-1]
    with torch.no_grad():
        plan = Plan(view, {Run("normal"): (1, 2, 3, 4, 5, 6), Run("skip", 3): (1, 2, 4, 5, 6)})
        found = plan.logits(images)
        assert plan.applied == 9  # the first two steps are shared
        torch.testing.assert_close(found[0], answer_by_hand(model, run[-1]))
        torch.testing.assert_close(found[1], answer_by_hand(model, skipped))


def test_the_mean_embedding(tiny, tiny_te, tiny_fl, images, by_hand):
    assert with_mean_embedding(tiny) is None
    before = tiny_te.blocks.step_embed.detach().clone()
    mean = before.mean(0, keepdim=True).expand(12, -1)
    with torch.no_grad():
        states = by_hand.run(tiny_te, images, [tiny_te.blocks[0]] * 12, mean)
        wanted = by_hand.logits(tiny_te, states[-1]["resid_post"])
        torch.testing.assert_close(
            with_mean_embedding(tiny_te)(images), wanted, rtol=1e-4, atol=1e-4
        )
        rows = tiny_fl.blocks.step_embed.mean(0, keepdim=True)
        states = by_hand.run(tiny_fl, images, [tiny_fl.blocks[0]] * 4, rows)
        wanted = by_hand.logits(tiny_fl, states[-1]["resid_post"])
        torch.testing.assert_close(
            with_mean_embedding(tiny_fl)(images), wanted, rtol=1e-4, atol=1e-4
        )
    assert torch.equal(tiny_te.blocks.step_embed, before)


def test_images_without_a_batch_axis_are_refused(stacked, images):
    with pytest.raises(TypeCheckError):
        Plan(unroll(stacked), {Run("normal"): (1, 2, 3)}).logits(images[0])
