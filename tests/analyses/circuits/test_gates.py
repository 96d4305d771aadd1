"""Gates against surgery on the weights, slopes against finite differences, choices against tables
on paper."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from bvit_interp.analyses.circuits import gates as circuit
from bvit_interp.analyses.circuits.gates import (
    Fit,
    Gates,
    Judged,
    best,
    best_of_step,
    best_same,
    divergence,
)
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Batch
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll

GEOMETRY = Geometry((32, 32), 32, (0.5,) * 3, (0.5,) * 3, "bilinear")


def fit_of(gates, images, mean=True, size=2):
    parts = torch.arange(len(images)).split(size)
    batches = [
        Batch(
            index,
            torch.zeros(len(index), dtype=torch.int64),
            {GEOMETRY: (images[index], None)},
            ["i"] * len(index),
        )
        for index in parts
    ]
    return Fit(gates, batches, GEOMETRY, mean)


def scaled(model, shares, groups):
    """The model with its heads and groups of neurons scaled in weights of every step's own."""
    view = unroll(model)
    for block, share in zip(view.blocks, shares, strict=True):
        heads = block.attn.num_heads
        neurons = block.mlp.fc2.in_features
        columns = {
            "attn.proj": share[:heads].repeat_interleave(block.attn.proj.in_features // heads),
            "mlp.fc2": torch.stack([share[heads + i * groups // neurons] for i in range(neurons)]),
        }
        for name, column in columns.items():
            parent, _, last = name.partition(".")
            linear = copy.deepcopy(block.get_submodule(name))
            linear.weight = torch.nn.Parameter(linear.weight.detach() * column)
            setattr(getattr(block, parent), last, linear)
    return view


def random_gates(gates, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, gates.steps, gates.units, generator=generator) < 0.7


def test_closed_gates_are_columns_of_zeros(any_model, images):
    gates = Gates(any_model, 5)
    assert gates.units == gates.probe.num_heads + 5
    keep = random_gates(gates)
    with torch.no_grad():
        found = gates.logits(images, keep.float())
        for logits, shares in zip(found, keep, strict=True):
            expected = scaled(any_model, shares.float(), 5)(images)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_closed_gates_give_the_mean_over_the_fit_images(any_model, images):
    gates = Gates(any_model, 3)
    fit_of(gates, images)
    keep = random_gates(gates, 1)
    sites = {"z": gates.kinds["head"], "mlp_post": gates.kinds["neuron"]}
    heads, neurons = gates.probe.num_heads, gates.probe.num_neurons
    with torch.no_grad():
        _, clean = gates.probe.run(images, list(sites))

        def by_hand(activation, address):
            new = activation.clone()
            for unit in range(heads if address.site == "z" else neurons):
                place = unit if address.site == "z" else heads + unit * 3 // neurons
                if not keep[0, address.step - 1, place]:
                    new[:, :, unit] = clean[address.site, address.step].mean(0)[:, unit]
            return new

        with gates.probe.edit(
            {(site, t): by_hand for site in sites for t in range(1, gates.steps + 1)}
        ):
            expected = gates.probe(images)
        torch.testing.assert_close(
            gates.logits(images, keep.float())[0], expected, rtol=1e-3, atol=1e-4
        )


def test_open_gates_are_the_model(any_model, images):
    gates = Gates(any_model, 4)
    fit_of(gates, images)
    with torch.no_grad():
        logits = gates.logits(images, torch.ones(2, gates.steps, gates.units))
        torch.testing.assert_close(
            logits, any_model(images).expand_as(logits), rtol=1e-5, atol=1e-5
        )


def test_slopes_are_finite_differences(make, images):
    """In float64: of the weights' columns scaled by 1 -+ 1e-5, image by image."""
    model, images = make(num_steps=3).double(), images.double()
    gates = Gates(model, 2)
    found = gates.slopes(images)
    assert found.shape == (4, 3, 6)
    answers = model(images).argmax(-1)
    with torch.no_grad():
        for t, unit in itertools.product(range(3), range(6)):
            ends = []
            for share in (1 + 1e-5, 1 - 1e-5):
                shares = torch.ones(3, 6, dtype=torch.float64)
                shares[t, unit] = share
                ends.append(
                    scaled(model, shares, 2)(images).log_softmax(-1)[torch.arange(4), answers]
                )
            assert torch.allclose(
                (ends[0] - ends[1]) / 2e-5, found[:, t, unit].double(), rtol=1e-3, atol=1e-6
            )


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


def test_out_of_memory_halves_the_fit(tiny, images, monkeypatch):
    whole = fit_of(Gates(tiny, 4), images, size=4)
    learned = whole.learned(0.5, False, 1)
    run = Gates._run

    def fail(self, state, keep):
        if len(state.tokens) > 1:
            raise torch.OutOfMemoryError
        return run(self, state, keep)

    monkeypatch.setattr(Gates, "_run", fail)
    halved = fit_of(Gates(tiny, 4), images, size=4)
    torch.testing.assert_close(halved.slopes, whole.slopes, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(halved.learned(0.5, False, 1), learned, rtol=1e-3, atol=1e-4)


def test_learning_descends_and_stays_above_the_best_of_all_masks(make, images):
    model = make(num_steps=2)
    gates = Gates(model, 2)
    fit = fit_of(gates, images)
    fit.slopes = -fit.slopes  # from the least important units
    start = fit.loss(gates.by_kind(lambda scores: best(scores, 0.5), fit.slopes))
    end = fit.loss(gates.by_kind(lambda scores: best(scores, 0.5), fit.learned(0.5, False, 40)))
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
        kl = divergence(whole, gates.logits(images, torch.stack(masks)).log_softmax(-1)).mean(1)
    assert kl.min() - 1e-5 <= end < start <= kl.max() + 1e-5
    assert end < kl.quantile(0.25)
    assert start > kl.quantile(0.75)


def test_learned_gates_of_all_steps_are_the_same_at_every_step(make, images):
    fit = fit_of(Gates(make(num_steps=2), 2), images)
    scores = fit.learned(0.5, True, 2)
    start, end = (
        fit.loss(fit.gates.by_kind(lambda of: best_same(of, 0.5), of))
        for of in (fit.slopes, scores)
    )
    assert end <= start
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores, fit.learned(0.5, True, 2))  # no random number


def test_best_gates_on_paper():
    scores = torch.tensor([[5.0, 1.0, 3.0], [4.0, 2.0, 0.0]])
    assert best(scores, 0.5).tolist() == [[True, False, True], [True, False, False]]
    # sums 9, 3, 3: unit 0 at both steps; the third gate goes to unit 1 (the first of equals) at the
    # first step
    assert best_same(scores, 0.5).tolist() == [[True, True, False], [True, False, False]]
    like = torch.tensor([[True, False, False], [True, True, False]])
    assert best_of_step(scores, like).tolist() == [[True, False, False], [True, True, False]]
    assert best_of_step(scores.flip(0), like).tolist() == [
        [True, False, False],
        [True, False, True],
    ]
    assert best(torch.zeros(2, 3), 0.34).tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("share", [0.1, 0.37, 0.9])
def test_one_circuit_for_all_steps_has_as_many_gates(share):
    scores = torch.rand(12, 7, generator=torch.Generator().manual_seed(0))
    assert best_same(scores, share).sum() == best(scores, share).sum() == round(share * 84)
    # all but one unit are open at every step or at none
    assert ((best_same(scores, share).sum(0) % 12) != 0).sum() <= 1


def test_conditions_have_the_counts_they_say(tiny, images):
    gates = Gates(tiny, 6)
    fit = fit_of(gates, images)
    found = circuit.conditions(fit, "gradient", 0.4, 1, 3, seed=0)
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
    for units in gates.kinds.values():
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
    assert torch.equal(
        circuit.conditions(fit, "gradient", 0.4, 1, 3, seed=0)["random"], found["random"]
    )
    assert not torch.equal(
        circuit.conditions(fit, "gradient", 0.4, 1, 3, seed=1)["random"], found["random"]
    )


def test_no_step_keeps_its_place():
    generator = torch.Generator().manual_seed(0)
    for steps in (2, 3, 12):
        for _ in range(10):
            order = circuit.other_order(steps, generator)
            assert sorted(order.tolist()) == list(range(steps))
            assert all(own != other for own, other in enumerate(order.tolist()))
    assert circuit.other_order(1, generator).tolist() == [0]


def test_overlap_on_paper():
    gates = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    # pairs: 1/3, 2/4, 2/4
    torch.testing.assert_close(
        circuit.overlaps(gates),
        torch.tensor([(1 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2, 1 / 2], dtype=torch.float64),
    )


def test_nulls_of_the_structure_against_all_placements():
    """Two of four gates at each of two steps: overlap 0, 1/3 or 1 with probability 1/6, 4/6,
    1/6."""
    gates = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    found = circuit.structure(gates, 3000, seed=0)
    assert found["kept"].tolist() == [0.5, 0.5]
    assert found["overlap"].tolist() == [1.0, 1.0]
    assert found["overlap_null"].tolist() == pytest.approx([7 / 18] * 2, abs=0.02)
    assert found["overlap_null_low"].tolist() == [0.0, 0.0]
    placed = circuit.placed_at_random(gates, 6000, torch.Generator().manual_seed(0))
    assert (placed.sum(1) == 4).all()
    shares = placed[:, 0].bincount(minlength=5) / 6000  # hypergeometric: 1, 16, 36, 16, 1 of 70
    assert shares.tolist() == pytest.approx([1 / 70, 16 / 70, 36 / 70, 16 / 70, 1 / 70], abs=0.03)


def test_judged_against_a_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 3, generator=generator)
    gated = torch.randn(4, 7, 3, generator=generator)
    labels = torch.randint(3, (7,), generator=generator)
    judged = Judged(3, [1, 1, 2], torch.device("cpu"))
    judged.update(whole[:5], gated[:, :5], labels[:5])
    judged.update(whole[5:], gated[:, 5:], labels[5:])
    found = judged.compute()
    p = whole.double().softmax(-1)
    kl = torch.stack([(p * (p.log() - v.double().softmax(-1).log())).sum(-1) for v in gated])
    torch.testing.assert_close(
        found["kl"]["value"], torch.stack([kl[0].mean(), kl[1].mean(), kl[2:].mean()])
    )
    differences = kl[2:].mean(0) - kl[0]
    half = 1.959963984540054 * differences.std() / 7**0.5
    assert float(found["excess"]["low"][2]) == pytest.approx(float(differences.mean() - half))
    assert float(found["kl_most"][2]) == pytest.approx(float(kl[2:].mean(1).max()))
    hits = [(v.argmax(-1) == labels).double().mean() for v in gated]
    assert float(found["accuracy"]["value"][2]) == pytest.approx(float(hits[2] + hits[3]) / 2)
    same = (gated[1].argmax(-1) == whole.argmax(-1)).double().mean()
    assert float(found["agreement"]["value"][1]) == pytest.approx(float(same))


def test_bad_input(tiny, images):
    with pytest.raises(UserError, match="groups must be 1..128, the neurons of a step, got 129"):
        Gates(tiny, 129)
    with torch.no_grad():
        tiny.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        fit_of(Gates(tiny, 4), images)
