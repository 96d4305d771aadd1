"""Terms of the gradient against autograd, finite differences and loops; importance against sorting
by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

from bvit_interp.analyses.step_attribution import gradients
from bvit_interp.analyses.step_attribution.gradients import PARTS, Layout, StepGradients, Untied
from bvit_interp.errors import UserError
from bvit_interp.models import masks
from bvit_interp.models.masks import PLACES, Masks
from bvit_interp.models.unroll import unroll

LABELS = torch.tensor([1, 3, 3, 7])


def loss_of(model, images):
    return F.cross_entropy(model(images), LABELS, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_sum_to_autograds_gradient_of_the_stored_blocks(any_model, images, dtype):
    before = {name: value.clone() for name, value in any_model.state_dict().items()}
    untied = Untied(any_model, dtype)
    terms, layout = untied.gradients(images, LABELS), untied.layout
    whole = copy.deepcopy(any_model).to(dtype)
    loss_of(whole, images.to(dtype)).backward()
    stored = list(whole.blocks.children())
    assert terms.shape == (len(any_model.blocks), sum(p.numel() for p in untied.leaves[0]))
    assert [len(own) for own in layout.groups] == [len(any_model.blocks) // len(stored)] * len(
        stored
    )
    for block, own in zip(stored, layout.groups, strict=True):
        wanted = torch.cat([block.get_parameter(name).grad.flatten() for name in layout.names])
        assert {n for n, _ in block.named_parameters()} == set(layout.names)
        torch.testing.assert_close(
            terms[own].sum(0), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item()
        )
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in any_model.parameters()
    )
    assert all(torch.equal(value, before[name]) for name, value in any_model.state_dict().items())


@pytest.mark.parametrize("kind", ["tiny", "tiny_te", "tiny_hybrid", "tiny_fl", "tiny_sc_block"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_term_is_the_change_of_the_loss_with_that_step_alone(request, images, kind, step):
    """Central differences along a random direction in the weights of one step, its inner updates
    with it."""
    model = request.getfixturevalue(kind)
    terms = Untied(model, torch.float64).gradients(images, LABELS)
    view = copy.deepcopy(unroll(model)).double()
    view.blocks[step - 1] = copy.deepcopy(view.blocks[step - 1])
    block, generator = view.blocks[step - 1], torch.Generator().manual_seed(step)
    names = Untied(model).layout.names
    direction = [
        torch.randn(block.get_parameter(n).shape, generator=generator).double() for n in names
    ]
    losses = []
    with torch.no_grad():
        for size in (1e-6, -2e-6):  # there, and from there to the other side
            for name, along in zip(names, direction, strict=True):
                block.get_parameter(name).add_(along, alpha=size)
            losses.append(loss_of(view, images.double()).item())
    wanted = (losses[0] - losses[1]) / 2e-6
    found = terms[step - 1] @ torch.cat([along.flatten() for along in direction])
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_the_layout_of_heads_and_neurons(tiny):
    """Width 32, 4 heads: rows and columns marked in the matrices themselves."""
    layout = Untied(tiny).layout
    block, width = tiny.blocks[0], 32
    neurons = block.mlp.fc1.weight.shape[0]
    for head in range(4):
        rows = range(8 * head, 8 * head + 8)
        marks = {name: torch.zeros_like(block.get_parameter(name)) for name in layout.names}
        for part in range(3):
            for row in rows:
                marks["attn.qkv.weight"][part * width + row] = 1
        for column in rows:
            marks["attn.proj.weight"][:, column] = 1
        assert torch.equal(
            torch.cat([m.flatten() for m in marks.values()]) == 1, layout.heads == head
        )
    for neuron in (0, 5, neurons - 1):
        marks = {name: torch.zeros_like(block.get_parameter(name)) for name in layout.names}
        marks["mlp.fc1.weight"][neuron], marks["mlp.fc2.weight"][:, neuron] = 1, 1
        assert torch.equal(
            torch.cat([m.flatten() for m in marks.values()]) == 1, layout.neurons == neuron
        )
    k = Untied(tiny).weights[0][layout.parts["k"]].view(width, width)
    assert torch.equal(k, block.attn.qkv.weight[width : 2 * width])
    vectors = sum(p.numel() for p in block.parameters() if p.ndim == 1)
    assert layout.parts["vectors"] == slice(layout.pruned, layout.pruned + vectors)


def test_masks_of_steps_are_those_of_a_masked_model(tiny_hybrid, images):
    untied, whole = Untied(tiny_hybrid), masks.full(tiny_hybrid)
    generator = torch.Generator().manual_seed(0)
    of = {name: torch.rand(mask.shape, generator=generator) < 0.7 for name, mask in whole.items()}
    with torch.no_grad():
        untied.keep(torch.cat([of[name].flatten(1) for name in PLACES], 1))
        wanted = masks.masked(tiny_hybrid, Masks(of, whole.blocks))(images)
        torch.testing.assert_close(untied.view(images), wanted)
        same = torch.cat(
            [of[name][:2].flatten(1) for name in PLACES], 1
        )  # one for each of the two blocks
        untied.keep(same)
        cycled = Masks({name: mask[[0, 1] * 3] for name, mask in of.items()}, whole.blocks)
        torch.testing.assert_close(untied.view(images), masks.masked(tiny_hybrid, cycled)(images))
        untied.keep(None)
        assert torch.equal(untied.view(images), tiny_hybrid(images))


@pytest.fixture
def small():
    """Five steps of two blocks, 1 of them once; random terms of two halves, 4 numbers a part, 2
    heads, 2 neurons."""
    generator = torch.Generator().manual_seed(3)
    parts = {part: slice(4 * i, 4 * i + 4) for i, part in enumerate(PARTS[:-1])}
    heads, neurons = torch.full((28,), 2), torch.full((28,), 2)
    heads[:16], neurons[16:24] = torch.arange(16) % 2, torch.arange(8) // 2 % 2
    layout = Layout((0, 0, 1, 0, 0), (), (), parts, heads, neurons, 24)
    halves = (
        torch.randn(2, 5, 28, generator=generator).double()
        * torch.tensor([3.0, 1, 1, 2, 1])[:, None]
    )
    return layout, halves, torch.randn(2, 28, generator=generator).double()


def test_measures_against_loops(small):
    layout, halves, weights = small
    found = gradients.describe(halves, torch.tensor([1.0, 3.0]).double(), weights, layout)
    g = (halves[0] / 4 + 3 * halves[1] / 4).numpy()
    a, b = halves.numpy()
    own, w = [0, 1, 3, 4], weights.numpy()[[0, 0, 1, 0, 0]]
    cuts = {**layout.parts, "all": slice(None)}
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
        place = len(PARTS) + (unit == "neuron")
        assert found["entropy"][0, place].item() == pytest.approx(np.mean(entropies))
        assert found["owner"][own, place].tolist() == [owners.count(t) / 2 for t in own]
    for key in ("head_share", "head_taylor", "neuron_share", "owner", "cosine", "cosine_apart"):
        assert found[key][2].isnan().all(), key  # the block of one step
    for key in ("entropy", "head_entropy", "sum_ratio", "owner_agreement"):
        assert found[key][1].isnan().all(), key


def test_equal_terms_have_entropy_1_and_cosine_1_and_sum_ratio_t(small):
    layout, halves, weights = small
    equal = halves[:1, :1].expand(2, 5, -1)
    found = gradients.describe(equal, torch.ones(2).double(), weights, layout)
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
    found = gradients.describe(alone, torch.ones(2).double(), weights, layout)
    np.testing.assert_allclose(found["entropy"][0], 0, atol=1e-12)
    assert (found["owner"][0] == 1).all()


def test_weights_without_a_gradient_have_no_owner(small):
    """A key's bias, which softmax cancels: what rounding leaves of it must not decide."""
    layout, halves, weights = small
    without = {key: halves.clone() for key in ("zero", "rounded")}
    without["zero"][..., 4:6], without["rounded"][..., 4:6] = 0, halves[..., 4:6] * 1e-15
    found = {
        key: gradients.describe(value, torch.ones(2).double(), weights, layout)
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
    mixed = gradients.shuffled(halves, layout, seed=1)
    for cut in layout.parts.values():
        assert torch.equal(mixed[..., cut].sort(-1).values, halves[..., cut].sort(-1).values)
    assert not torch.equal(mixed[:, 0], halves[:, 0])
    assert torch.equal(mixed, gradients.shuffled(halves, layout, seed=1))
    assert not torch.equal(mixed, gradients.shuffled(halves, layout, seed=2))


def test_the_cosine_of_shuffled_terms_against_shuffling():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 40), rng.normal(-0.3, 2, 40)
    draws = (
        np.array([a @ rng.permutation(b) for _ in range(20000)])
        / np.linalg.norm(a)
        / np.linalg.norm(b)
    )
    layout = Layout((0, 0), (), (), {"q": slice(0, 40)}, torch.zeros(40), torch.zeros(40), 40)
    mean, deviation = gradients.shuffled_cosine(torch.from_numpy(np.stack([a, b])), layout)
    assert mean[0, 1, 0].item() == pytest.approx(draws.mean(), abs=4 * draws.std() / 141)
    assert deviation[0, 1, 0].item() == pytest.approx(draws.std(), rel=0.03)


def test_the_jackknife_of_a_mean_is_students_interval():
    values = torch.tensor([1.0, 4.0, 2.0, 9.0]).double()
    without = torch.stack([torch.cat([values[:i], values[i + 1 :]]).mean() for i in range(4)])
    wanted = 3.182 * values.std() / 2
    assert gradients.jackknife(without).item() == pytest.approx(wanted.item())


def test_sums_of_folds(small):
    layout, _, _ = small
    metric = StepGradients(4, 5, 28)
    rng = torch.Generator().manual_seed(0)
    parts = [
        (fold, torch.randn(5, 28, generator=rng).double(), n)
        for fold, n in ((0, 2), (1, 1), (2, 3), (3, 1), (1, 2))
    ]
    for fold, terms, n in parts[:3]:
        metric.update(fold, terms, n)
    with pytest.raises(UserError, match="a fold of the images is empty"):
        metric.compute()
    for fold, terms, n in parts[3:]:
        metric.update(fold, terms, n)
    total, count = metric.compute()
    assert count.tolist() == [2, 3, 3, 1]
    assert torch.equal(total[1], parts[1][1] + parts[4][1])
    halves, images = gradients.halves_of(total, count, without=1)
    assert images.tolist() == [5, 1]
    torch.testing.assert_close(halves[0], (total[0] + total[2]) / 5)
    torch.testing.assert_close(halves[1], total[3])
    means = (total / count[:, None, None]).numpy()
    apart = means - total.sum(0).numpy() / 9
    wanted = np.sqrt((apart[:, :, 4:8] ** 2).sum((0, 2)) / 12)
    np.testing.assert_allclose(gradients.noise_norm(total, count, layout)[:, 1], wanted)
    with pytest.raises(
        UserError, match="sums of 16 folds of images would take 119 GiB: take fewer folds"
    ):
        StepGradients(16, 100, 10**7)


def test_rankings_against_sorting(small):
    layout, halves, weights = small
    g, w = halves[0, :, :24].numpy(), weights[:, :24].numpy()
    own = [[0, 1, 3, 4], [2]]
    scores = {
        "magnitude": [abs(w[b]) for b in (0, 1)],
        "taylor": [abs(w[b] * sum(g[t] for t in own[b])) for b in (0, 1)],
        "stepwise": [sum(abs(w[b] * g[t]) for t in own[b]) for b in (0, 1)],
        "step_max": [np.max([abs(w[b] * g[t]) for t in own[b]], 0) for b in (0, 1)],
    }
    for method, score in scores.items():
        ranks = gradients.ranking(method, halves[0], weights, layout)
        flat = np.concatenate(score)
        assert ranks.flatten().tolist() == [sum(other < value for other in flat) for value in flat]
        kept = gradients.kept(ranks, method, 0.25)
        assert kept.sum() == 36
        assert flat[~kept.flatten().numpy()].max() < flat[kept.flatten().numpy()].min()
    for method, source in {"own_masks": [0, 1, 2, 3, 4], "shifted_masks": [1, 3, 2, 4, 0]}.items():
        kept = gradients.kept(gradients.ranking(method, halves[0], weights, layout), method, 0.25)
        assert kept.sum(1).tolist() == [18] * 5
        for t, s in enumerate(source):
            score = abs(w[0 if s in own[0] else 1] * g[s])
            assert set(np.flatnonzero(~kept[t].numpy())) == set(score.argsort()[:6])
    chance = gradients.ranking("random", halves[0], weights, layout, seed=1)
    assert sorted(chance.flatten().tolist()) == list(range(48))
    assert torch.equal(chance, gradients.ranking("random", halves[1], weights, layout, seed=1))


def test_what_cannot_be_split_is_refused(tiny, stacked, make, images):
    pruned = copy.deepcopy(stacked)
    prune.random_unstructured(pruned.blocks[1].mlp.fc1, "weight", 0.5)
    with pytest.raises(
        UserError, match="step 2: gradients are split over blocks of qkv, proj, fc1 and fc2"
    ):
        Untied(pruned)
    uneven = copy.deepcopy(stacked)
    uneven.blocks[2] = make(name="vit_tiny_patch16_224", depth=3, mlp_ratio=2.0).blocks[2]
    with pytest.raises(UserError, match="the model's blocks differ in shape"):
        Untied(uneven)
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="gradients hold NaN or infinite values"):
        Untied(broken).gradients(images, LABELS)
