"""Measures of the terms against loops, and their nulls against shuffling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.step_attribution.decomposition import (
    describe,
    shuffled,
    shuffled_cosine,
)
from bvit_interp.analyses.step_attribution.untied import LAYERS, Layout


def test_measures_against_loops(small):
    layout, halves, weights = small
    found = describe(halves, torch.tensor([1.0, 3.0]).double(), weights, layout)
    g = (halves[0] / 4 + 3 * halves[1] / 4).numpy()
    a, b = halves.numpy()
    own, w = [0, 1, 3, 4], weights.numpy()[[0, 0, 1, 0, 0]]
    cuts = {**layout.layers, "all": slice(None)}
    for i, cut in enumerate(cuts.values()):
        norms = [math.sqrt(sum(x * x for x in g[t, cut])) for t in range(5)]
        change = [
            sum(abs(x * y) for x, y in zip(g[t, cut], w[t, cut], strict=True)) for t in range(5)
        ]
        np.testing.assert_allclose(found["norm"][:, i], norms)
        np.testing.assert_allclose(found["share"][:, i], np.square(norms) / np.square(norms).sum())
        np.testing.assert_allclose(found["taylor"][:, i], np.array(change) / sum(change))
        entropies, owners, agree, other = [], [], [], []
        for p in range(28)[cut]:
            share = g[own, p] ** 2 / (g[own, p] ** 2).sum()
            entropies.append(-(share * np.log(share)).sum() / math.log(4))
            owners.append(own[int(share.argmax())])
            agree.append(own[int((a[own, p] ** 2).argmax())])
            other.append(own[int((b[own, p] ** 2).argmax())])
        assert found["entropy"][0, i].item() == pytest.approx(np.mean(entropies))
        assert found["owner"][own, i].tolist() == [owners.count(t) / len(owners) for t in own]
        assert found["owner_agreement"][0, i].item() == np.mean(np.array(agree) == np.array(other))
        by_chance = sum(agree.count(t) * other.count(t) for t in own) / len(agree) ** 2
        assert found["agreement_null"][0, i].item() == pytest.approx(by_chance)
        both = g[own][:, cut].sum(0)
        assert found["sum_ratio"][0, i].item() == pytest.approx(
            both @ both / sum(norms[t] ** 2 for t in own)
        )
        for s in own:
            for t in own:
                cosine = g[s, cut] @ g[t, cut] / norms[s] / norms[t]
                assert found["cosine"][s, t, i].item() == pytest.approx(cosine)
                across = [
                    x[s, cut] @ y[t, cut] / np.linalg.norm(x[s, cut]) / np.linalg.norm(y[t, cut])
                    for x, y in ((a, b), (b, a))
                ]
                assert found["cosine_apart"][s, t, i].item() == pytest.approx(np.mean(across))
    for unit, label in (("head", layout.heads), ("neuron", layout.neurons)):
        entropies, owners = [], []
        for u in range(2):
            squares = np.array([(g[t][label.numpy() == u] ** 2).sum() for t in own])
            share = squares / squares.sum()
            np.testing.assert_allclose(found[f"{unit}_share"][own, u], share)
            entropies.append(-(share * np.log(share)).sum() / math.log(4))
            owners.append(own[int(share.argmax())])
        np.testing.assert_allclose(found[f"{unit}_entropy"][0], entropies)
        place = len(LAYERS) + (unit == "neuron")
        assert found["entropy"][0, place].item() == pytest.approx(np.mean(entropies))
        assert found["owner"][own, place].tolist() == [owners.count(t) / 2 for t in own]
    for key in ("head_share", "head_taylor", "neuron_share", "owner", "cosine", "cosine_apart"):
        assert found[key][2].isnan().all(), key  # the block of one step
    for key in ("entropy", "head_entropy", "sum_ratio", "owner_agreement"):
        assert found[key][1].isnan().all(), key


def test_equal_terms_have_entropy_1_and_cosine_1_and_sum_ratio_t(small):
    layout, halves, weights = small
    equal = halves[:1, :1].expand(2, 5, -1)
    found = describe(equal, torch.ones(2).double(), weights, layout)
    for key, wanted in {
        "entropy": 1,
        "head_entropy": 1,
        "sum_ratio": 4,
        "owner_agreement": 1,
    }.items():
        np.testing.assert_allclose(found[key][0], wanted)
    np.testing.assert_allclose(found["cosine"][0, [1, 3, 4]], 1)
    alone = equal.clone()
    alone[:, 1:] = 0
    found = describe(alone, torch.ones(2).double(), weights, layout)
    np.testing.assert_allclose(found["entropy"][0], 0, atol=1e-12)
    assert (found["owner"][0] == 1).all()


def test_weights_without_a_gradient_have_no_owner(small):
    """A key's bias, which softmax cancels: what rounding leaves of it must not decide."""
    layout, halves, weights = small
    without = {key: halves.clone() for key in ("zero", "rounded")}
    without["zero"][..., 4:6], without["rounded"][..., 4:6] = 0, halves[..., 4:6] * 1e-15
    found = {
        key: describe(value, torch.ones(2).double(), weights, layout)
        for key, value in without.items()
    }
    assert all(
        torch.equal(found["zero"][k].nan_to_num(), found["rounded"][k].nan_to_num())
        for k in found["zero"]
    )
    own, terms = [0, 1, 3, 4], halves.mean(0)[[0, 1, 3, 4], 6:8].square()
    owners = [own[i] for i in terms.argmax(0).tolist()]
    assert found["zero"]["owner"][own, 1].tolist() == [owners.count(t) / 2 for t in own]
    half_owners = halves[:, own, 6:8].square().argmax(1)
    assert (
        found["zero"]["owner_agreement"][0, 1] == (half_owners[0] == half_owners[1]).double().mean()
    )
    share = terms / terms.sum(0)
    entropy = -(share * share.log()).sum(0) / math.log(4)
    assert found["zero"]["entropy"][0, 1].item() == pytest.approx(entropy.mean().item())


def test_shuffled_terms_keep_what_each_step_has_in_each_part(small):
    layout, halves, _ = small
    mixed = shuffled(halves, layout, seed=1)
    for cut in layout.layers.values():
        assert torch.equal(mixed[..., cut].sort(-1).values, halves[..., cut].sort(-1).values)
    assert not torch.equal(mixed[:, 0], halves[:, 0])
    assert torch.equal(mixed, shuffled(halves, layout, seed=1))
    assert not torch.equal(mixed, shuffled(halves, layout, seed=2))


def test_the_cosine_of_shuffled_terms_against_shuffling():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 40), rng.normal(-0.3, 2, 40)
    draws = (
        np.array([a @ rng.permutation(b) for _ in range(20000)])
        / np.linalg.norm(a)
        / np.linalg.norm(b)
    )
    none = torch.zeros(40, dtype=torch.int64)
    layout = Layout((0, 0), (), (), {"q": slice(0, 40)}, none, none, 40)
    mean, deviation = shuffled_cosine(torch.from_numpy(np.stack([a, b])), layout)
    assert mean[0, 1, 0].item() == pytest.approx(draws.mean(), abs=4 * draws.std() / 141)
    assert deviation[0, 1, 0].item() == pytest.approx(draws.std(), rel=0.03)


def test_the_importance_of_heads_against_loops(small):
    layout, halves, weights = small
    found = describe(halves, torch.ones(2).double(), weights, layout)
    steps, terms = [0, 1, 3, 4], halves.mean(0).numpy()
    change = np.abs(weights[0].numpy() * terms[steps])
    for head in range(2):
        of_head = change[:, layout.heads.numpy() == head].sum(1)
        np.testing.assert_allclose(found["head_taylor"][steps, head], of_head / of_head.sum())


def test_wrong_shapes_are_refused(small):
    layout, halves, weights = small
    with pytest.raises(TypeCheckError):
        describe(halves[0], torch.ones(2).double(), weights, layout)
    with pytest.raises(TypeCheckError):
        describe(halves, torch.ones(2).double(), weights[:, :5], layout)
    with pytest.raises(TypeCheckError):
        shuffled_cosine(halves, layout)
