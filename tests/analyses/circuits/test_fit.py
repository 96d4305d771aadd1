"""Scores of gates: means of slopes, learning against all masks, batches in parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.circuits.choice import top_gates, top_units
from bvit_interp.analyses.circuits.fit import Fit, unsplit
from bvit_interp.analyses.circuits.gates import Gates
from bvit_interp.errors import UserError


def fit_of(gates, images, mean=True, size=2, split=unsplit):
    return Fit(gates, images, mean, batch_size=size, split=split)


def test_scores_are_means_of_absolute_slopes_however_they_are_batched(tiny, images):
    gates = Gates(tiny, 4)
    fit = fit_of(gates, images, mean=False)
    each = torch.cat([gates.slopes(image[None]) for image in images])
    torch.testing.assert_close(fit.slopes, each.double().abs().mean(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        fit_of(gates, images, mean=False, size=3).slopes, fit.slopes, rtol=1e-4, atol=1e-7
    )
    assert fit.count == 4
    assert all(p.grad is None for p in tiny.parameters())


def test_parts_of_a_batch_give_the_same_fit(tiny, images):
    def one_at_a_time(compute, rows):
        return [compute(row) for row in rows.split(1)]

    whole = fit_of(Gates(tiny, 4), images, size=4)
    parts = fit_of(Gates(tiny, 4), images, size=4, split=one_at_a_time)
    torch.testing.assert_close(parts.slopes, whole.slopes, rtol=1e-4, atol=1e-7)
    learned = [fit.learned(0.5, False, 1) for fit in (whole, parts)]
    torch.testing.assert_close(*learned, rtol=1e-3, atol=1e-4)


def test_learning_descends_and_stays_above_the_best_of_all_masks(make, images):
    model = make(num_steps=2)
    fit = fit_of(Gates(model, 2), images)
    gates = fit.gates
    fit.slopes = -fit.slopes  # from the least important units
    start = fit.loss(gates.by_site(lambda scores: top_gates(scores, 0.5), fit.slopes))
    end = fit.loss(
        gates.by_site(lambda scores: top_gates(scores, 0.5), fit.learned(0.5, False, 40))
    )
    heads = [
        [float(i in chosen) for i in range(8)] for chosen in itertools.combinations(range(8), 4)
    ]
    neurons = [
        [float(i in chosen) for i in range(4)] for chosen in itertools.combinations(range(4), 2)
    ]
    masks = [
        torch.cat([torch.tensor(h).reshape(2, 4), torch.tensor(n).reshape(2, 2)], 1)
        for h, n in itertools.product(heads, neurons)
    ]
    with torch.no_grad():
        whole = model(images).log_softmax(-1)
        kl = (
            (whole.exp() * (whole - gates.logits(images, torch.stack(masks)).log_softmax(-1)))
            .sum(-1)
            .mean(1)
        )
    assert kl.min() - 1e-5 <= end < start <= kl.max() + 1e-5
    assert end < kl.quantile(0.25)
    assert start > kl.quantile(0.75)


def test_learned_gates_of_all_steps_are_the_same_at_every_step(make, images):
    fit = fit_of(Gates(make(num_steps=2), 2), images)
    scores = fit.learned(0.5, True, 2)
    start, end = (
        fit.loss(fit.gates.by_site(lambda table: top_units(table, 0.5), table))
        for table in (fit.slopes, scores)
    )
    assert end <= start
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores, fit.learned(0.5, True, 2))  # no random number


def test_the_first_update_is_a_step_of_adam_from_the_ranks(make, images):
    """One batch and one epoch: Adam's first step is the learning rate times the gradient's sign."""
    fit = fit_of(Gates(make(num_steps=2), 2), images, size=4)
    updated, end = [], fit.loss
    fit.loss = lambda gates: -float(len(updated.append(gates) or updated))  # the last one is taken
    scores = fit.learned(0.5, False, 1)
    fit.loss = end
    ranks = fit.slopes.clone()
    for units in fit.gates.sites.values():
        table = fit.slopes[:, units]
        order = sorted(table.flatten().tolist())
        ranks[:, units] = torch.tensor(
            [[order.index(value) / (len(order) - 1) for value in row] for row in table.tolist()]
        ).double()
    step = scores - ranks
    assert step.abs().max().item() == pytest.approx(0.05, rel=1e-4)
    moved = step.abs() > 1e-6
    assert moved.all()
    torch.testing.assert_close(updated[0], fit.gates.by_site(lambda x: top_gates(x, 0.5), ranks))
    # the sign, by finite differences of the loss in shares between 0 and 1
    start = updated[0].float()
    for t, unit in ((0, 0), (1, 3), (0, 5)):
        shares = [start.clone() for _ in range(2)]
        for share, shift in zip(shares, (1e-2, -1e-2), strict=True):
            share[t, unit] += shift
        slope = fit.loss(shares[0]) - fit.loss(shares[1])
        assert (slope > 0) == (step[t, unit] < 0)


def test_the_rate_falls_and_the_loss_is_taken_at_the_end_of_every_epoch(make, images, monkeypatch):
    fit = fit_of(Gates(make(num_steps=2), 2), images, size=2)
    step, loss, events = torch.optim.Adam.step, fit.loss, []

    def spied_step(self, closure=None):
        events.append(self.param_groups[0]["lr"])
        return step(self, closure)

    def spied_loss(gates):
        events.append("loss")
        return loss(gates)

    monkeypatch.setattr(torch.optim.Adam, "step", spied_step)
    fit.loss = spied_loss
    fit.learned(0.5, False, 2)
    assert events == ["loss", 0.05, 0.05 * 0.75, "loss", 0.05 * 0.5, 0.05 * 0.25, "loss"]


def test_what_cannot_be_done_is_refused(tiny, images):
    with pytest.raises(TypeCheckError):
        Fit(Gates(tiny, 4), images[0], mean=True)
    with torch.no_grad():
        tiny.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        fit_of(Gates(tiny, 4), images)
