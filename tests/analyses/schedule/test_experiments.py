"""The experiments on one model: which schedules are run, and what a batch leaves."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.schedule.experiments import FirstPass, Subject
from bvit_interp.analyses.schedule.schedules import Run
from bvit_interp.errors import UserError
from bvit_interp.models.stepping import proceed, states


def test_which_schedules_each_model_runs(tiny, tiny_te, stacked):
    for model, timed, replaced in ((tiny, False, 0), (tiny_te, True, 144), (stacked, False, 9)):
        subject = Subject(model, (2, 14), (1,), matrix=True)
        runs = [run for plan in subject.plans for run in plan.runs]
        assert runs[0] == Run("normal")
        assert (Run("mean_embedding") in runs) == timed
        assert (Run("run", 14) in runs) == (model is not stacked)
        assert Run("run", 2) in runs
        assert sum(len(plan.runs) for plan in subject.matrix) == replaced
        assert not Subject(model, (), (), matrix=False).matrix


def test_only_roles_with_images_are_computed(stacked, images):
    subject = Subject(stacked, (), (), matrix=True)
    labels = torch.zeros(len(images), dtype=torch.int64)
    with torch.inference_mode():
        learned = subject.learn({"fit": (images, labels)})
        assert learned.outcomes is None
        assert learned.matrix is None
        wanted = list(states(subject.view, images))[1:]
        assert [state.step for state in learned.states["fit"]] == [1, 2, 3]
        for found, expected in zip(learned.states["fit"], wanted, strict=True):
            assert torch.equal(found.tokens, expected.tokens)
        learned = subject.learn({"matrix": (images, labels)})
        assert learned.states == {}
        logits, _ = learned.matrix
        assert torch.equal(logits[0], stacked(images))


def test_the_state_that_is_decoded_is_of_its_own_step(stacked, images):
    """Decoders that were fitted to the same images find most of their steps."""
    subject = Subject(stacked, (), (), matrix=False)
    labels = torch.zeros(len(images), dtype=torch.int64)
    first = FirstPass(subject)
    with torch.inference_mode():
        first.update(subject.learn({"fit": (images, labels), "refit": (images, labels)}))
        fitted = first.fit(1e-3, seed=0)
        found = subject.test(images, labels, fitted)
        assert found.scores["patches", "raw"][:, -1, 0].mean() > 0.9
        assert torch.equal(found.normal, stacked(images))
        # the last step runs on for no step: `mean` after it only shifts the state
        last = proceed(subject.view, list(states(subject.view, images))[-1])
        shift = fitted.removals[2]["cls"]["mean"].offset[2]
        norm = last.tokens.norm(dim=-1)
        moved = shift.norm() / norm[:, 0]
        patches = fitted.removals[2]["patches"]["mean"].offset[2].norm() / norm[:, 1:]
        wanted = torch.cat([moved[:, None], patches], dim=1).mean(1)
        position = 2 * 5 + 3  # third step, `mean` of five removals
        torch.testing.assert_close(found.distance[:, position], wanted.double(), rtol=1e-4, atol=0)
        # every step has random directions of its own
        far = []
        for kind, rows in (("cls", slice(0, 1)), ("patches", slice(1, None))):
            tokens, removal = last.tokens[:, rows].double(), fitted.removals[2][kind]
            far.append(removal["random_subspace"].change(tokens, 3).norm(dim=-1))
        wanted = (torch.cat(far, dim=1) / norm).mean(1)
        torch.testing.assert_close(found.distance[:, 2 * 5 + 1], wanted, rtol=1e-4, atol=0)
        with pytest.raises(TypeCheckError):
            subject.test(images, labels[:-1], fitted)


def test_a_model_of_one_step_is_refused(make):
    with pytest.raises(UserError, match="at least 2 steps"):
        Subject(make(num_steps=1), (), (), matrix=False)
