"""Gates of all conditions: how many, and which."""

from __future__ import annotations

import torch

from bvit_interp.analyses.circuits.conditions import conditions
from bvit_interp.analyses.circuits.fit import Fit
from bvit_interp.analyses.circuits.gates import Gates


def test_conditions_have_the_counts_they_say(tiny, images):
    gates = Gates(tiny, 6)
    fit = Fit(gates, images, mean=True)
    found = conditions(fit, "gradient", 0.4, 1, 3, seed=0)
    own = found["per-step"][0]
    assert {name: len(masks) for name, masks in found.items()} == {
        "per-step": 1,
        "even": 1,
        "all-steps": 1,
        "shuffled": 3,
        "shuffled-units": 3,
        "random": 3,
        "even-random": 3,
        "same-random": 3,
    }
    for units in gates.sites.values():
        total = round(0.4 * own[:, units].numel())
        assert all((mask[:, units].sum() == total) for masks in found.values() for mask in masks)
        for name in ("shuffled-units", "random"):
            assert all(
                torch.equal(mask[:, units].sum(1), own[:, units].sum(1)) for mask in found[name]
            )
        for mask in (*found["even"], *found["even-random"]):
            assert torch.equal(mask[:, units].sum(1), found["all-steps"][0][:, units].sum(1))
        for mask in (found["all-steps"][0], *found["same-random"]):
            assert ((mask[:, units].sum(0) % gates.steps) != 0).sum() <= 1
        # each step's own best: no closed gate of a step scores above an open one
        for scores, mask in zip(fit.slopes[:, units], found["even"][0][:, units], strict=True):
            assert not mask.any() or mask.all() or scores[mask].min() >= scores[~mask].max()
    rows = [tuple(row) for row in own.tolist()]
    for mask in found["shuffled"]:
        assert sorted(map(tuple, mask.tolist())) == sorted(rows)
    assert not torch.equal(found["same-random"][0], found["same-random"][1])
    assert torch.equal(conditions(fit, "gradient", 0.4, 1, 3, seed=0)["random"], found["random"])
    assert not torch.equal(
        conditions(fit, "gradient", 0.4, 1, 3, seed=1)["random"], found["random"]
    )


def test_shuffled_units_are_those_another_step_ranks_first(tiny, images):
    """The order of the steps is that of `shuffled`, and differs from draw to draw."""
    fit = Fit(Gates(tiny, 6), images, mean=True)
    found = conditions(fit, "gradient", 0.4, 1, 4, seed=0)
    own = found["per-step"][0]
    orders = set()
    for shuffled, mask in zip(found["shuffled"], found["shuffled-units"], strict=True):
        orders.add(tuple(map(tuple, shuffled.tolist())))
        for t in range(12):
            sources = [s for s in range(12) if s != t and torch.equal(own[s], shuffled[t])]
            matches = []
            for s in sources:
                expected = torch.zeros(10, dtype=torch.bool)
                for units in fit.gates.sites.values():
                    ranked = fit.slopes[s, units].argsort(descending=True)
                    expected[units.start + ranked[: int(own[t, units].sum())]] = True
                matches.append(torch.equal(expected, mask[t]))
            assert any(matches)
    assert len(orders) > 1


def test_learned_gates_have_scores_of_their_own_for_all_steps(make, images):
    fit = Fit(Gates(make(num_steps=2), 2), images, mean=True)
    found = conditions(fit, "learned", 0.5, 3, 1, seed=0)
    scores = fit.learned(0.5, same=True, epochs=3)
    for units in fit.gates.sites.values():
        mask, totals = found["all-steps"][0][:, units], scores[:, units].sum(0)
        assert mask[0].tolist() == mask[1].tolist()
        assert totals[mask[0]].min() >= totals[~mask[0]].max()


def test_each_condition_is_chosen_by_the_scores_that_are_learned_for_it(make, images, monkeypatch):
    """Half of the gates, where the learned scores are random numbers."""
    fit = Fit(Gates(make(num_steps=2), 2), images, mean=True)
    generator = torch.Generator().manual_seed(0)
    own, shared = torch.rand(2, *fit.slopes.shape, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(fit, "learned", lambda _, same, epochs: (own, shared)[same])
    found = conditions(fit, "learned", 0.5, 3, 1, seed=0)
    for units in fit.gates.sites.values():
        assert torch.equal(found["per-step"][0][:, units], own[:, units] > own[:, units].median())
        totals = shared[:, units].sum(0)
        wanted = (totals > totals.median()).expand(2, -1)
        assert torch.equal(found["all-steps"][0][:, units], wanted)
        best = own[:, units] > own[:, units].median(1, keepdim=True).values
        assert torch.equal(found["even"][0][:, units], best)
