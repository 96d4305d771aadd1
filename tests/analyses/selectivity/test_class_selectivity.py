"""Formulas of unit lives against explicit loops, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from bvit_interp.analyses.selectivity.class_selectivity import (
    Lives,
    lives,
    reliability,
    roles,
    selectivity,
    two_way,
)


def sums(values, labels, classes):
    """Sums by class, counts and squares of values ``(n, T, U)``, by a loop."""
    total = torch.stack([values[labels == c].sum(0) for c in range(classes)])
    count = torch.tensor([float((labels == c).sum()) for c in range(classes)], dtype=torch.float64)
    return total, count, values.square().sum(0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_selectivity_is_the_anova_of_scipy():
    values, labels = drawn(30, 2, 3), torch.arange(30) % 4
    values[:, 1, 2] += 2.0 * labels
    found = selectivity(*sums(values, labels, 6))
    alive = found.alive(0.0)
    for t in range(2):
        for u in range(3):
            x = values[:, t, u].numpy()
            groups = [x[labels.numpy() == c] for c in range(4)]
            between = sum(len(g) * (g.mean() - x.mean()) ** 2 for g in groups)
            eta = between / ((x - x.mean()) ** 2).sum()
            assert found.eta[t, u] == pytest.approx(eta)
            assert found.value[t, u] == pytest.approx((eta - 3 / 29) / (1 - 3 / 29))
            p = stats.f_oneway(*groups).pvalue
            assert bool(alive[t, u]) == bool(p < 0.05 / 6 and found.value[t, u] >= 0)
    assert alive[1, 2]
    assert (found.classes, found.images, found.null) == (4, 30, pytest.approx(3 / 29))
    assert not found.alive(0.99).any()


def test_selectivity_of_permuted_labels_is_nothing_on_average():
    values, labels = drawn(40, 1, 2, seed=1).exp(), torch.arange(40) % 5
    rng = np.random.default_rng(0)
    found = [selectivity(*sums(values, labels[rng.permutation(40)], 5)) for _ in range(400)]
    etas = torch.stack([each.eta for each in found])
    assert torch.allclose(etas.mean(0), torch.tensor(4 / 39, dtype=torch.float64), atol=0.008)
    assert torch.stack([each.value for each in found]).mean().abs() < 0.01


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_the_interval_covers_the_share_of_normal_answers(share):
    """Two thousand data sets of eight classes with a known share of variance between them."""
    labels, units = torch.arange(200) % 8, 2000
    means = torch.linspace(-1, 1, 8, dtype=torch.float64)
    means = means / means.square().mean().sqrt() * share**0.5
    values = means[labels][:, None, None] + (1 - share) ** 0.5 * drawn(200, 1, units, seed=2)
    found = selectivity(*sums(values, labels, 8))
    low, high = found.interval()
    assert ((low <= share) & (share <= high)).double().mean().item() > 0.93
    assert (
        high - low
    ).mean() / 2 < 1.5 * 1.96 * found.value.std()  # and it is not wide for nothing


def test_what_does_not_vary_has_no_selectivity():
    values, labels = drawn(12, 1, 2), torch.arange(12) % 3
    values[:, 0, 0] = 1e3 / 3
    found = selectivity(*sums(values, labels, 3))
    assert found.value[0].isnan().tolist() == [True, False]
    assert not found.alive(0.0)[0, 0]
    few = selectivity(*sums(values[:3], labels[:3], 3))
    assert few.value.isnan().all()
    assert not few.alive(0.0).any()
    assert few.interval()[0].isnan().all()


def test_two_way_shares_by_hand():
    """a = +-1.5 and b = +-0.5 give squares of 9 and 1 in four cells."""
    table = torch.tensor([[2.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    crossed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # interaction alone
    shares = two_way(torch.stack([table, crossed, 5 + 0 * table], dim=-1))
    assert shares[:, 0].tolist() == pytest.approx([0.9, 0.1, 0.0])
    assert shares[:, 1].tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert shares[:, 2].isnan().all()
    assert torch.allclose(two_way(drawn(4, 3, 5)).sum(0), torch.ones(5, dtype=torch.float64))


def test_births_and_deaths():
    alive = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    found = lives(alive)
    assert found["birth"].nan_to_num(0).tolist() == [2, 1, 0, 3]
    assert found["death"].nan_to_num(0).tolist() == [4, 4, 0, 3]
    assert found["lifetime"].tolist() == [2, 4, 0, 1]


def test_roles_against_numpy():
    means = drawn(5, 4, 3)
    alive = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]]).bool()
    found, null = roles(means, alive), roles(means, alive, null=True)

    def r(s, t, u, v):
        return np.corrcoef(means[:, s, u], means[:, t, v])[0, 1]

    assert found["role_change"][:2].tolist() == pytest.approx(
        [1 - r(0, 1, 0, 0), 1 - r(2, 3, 1, 1)]
    )
    assert found["role_change_ends"][:2].tolist() == pytest.approx(
        [1 - r(0, 3, 0, 0), 1 - r(0, 3, 1, 1)]
    )
    assert found["stability"][0] == pytest.approx(
        np.mean([r(0, 1, 0, 0), r(0, 3, 0, 0), r(1, 3, 0, 0)])
    )
    assert found["stability"][1] == pytest.approx(
        np.mean([r(0, 2, 1, 1), r(0, 3, 1, 1), r(2, 3, 1, 1)])
    )
    assert all(values[2].isnan() for values in found.values())
    # at step 4 units 0 and 1 are alive, so each is compared with the other; at step 3 unit 1 with
    # unit 2
    assert null["role_change_ends"][:2].tolist() == pytest.approx(
        [1 - r(0, 3, 0, 1), 1 - r(0, 3, 1, 0)]
    )
    assert null["stability"][1] == pytest.approx(
        np.mean([r(0, 2, 1, 2), r(0, 3, 1, 0), r(2, 3, 1, 0)])
    )
    assert null["role_change"][0].isnan()  # unit 0 is alone at step 2


def test_reliability_against_numpy():
    total, count = (
        drawn(2, 4, 3, 2),
        torch.tensor([[3.0, 1, 2, 0], [2.0, 5, 1, 4]], dtype=torch.float64),
    )
    found = reliability(total, count)
    tables = (total / count[..., None, None])[
        :, :3
    ]  # the fourth class has no image in the first half
    tables = tables - tables.mean(1, keepdim=True)
    for u in range(2):
        first, own, other = (tables[i, :, :, v].flatten() for i, v in ((0, u), (1, u), (1, 1 - u)))
        assert found["value"][u] == pytest.approx(np.corrcoef(first, own)[0, 1])
        assert found["null"][u] == pytest.approx(np.corrcoef(first, other)[0, 1])
    assert reliability(total, torch.eye(2, 4, dtype=torch.float64))["value"].isnan().all()


def test_lists_take_units_once_and_then_the_most_selective():
    eta = torch.tensor([[0.9, 0.8, 0.7, 0.1]], dtype=torch.float64)
    selective = type("S", (), {"value": eta})
    birth = torch.tensor([2.0, 5.0, 5.0, torch.nan])
    statistics = {
        "birth": {"value": birth},
        "lifetime": {"value": torch.tensor([3.0, 3.0, 1.0, 0.0])},
    }
    of = Lives(selective, selective, eta > 0, eta[None], torch.arange(1), statistics)
    assert of.order("birth", True, 1).tolist() == [1, 2, 0]
    assert of.order("birth", False, 1).tolist() == [0, 1, 2]
    assert of.order("birth", True, 3).tolist() == [1, 0]
    assert of.first_of({"birth": True}, 1, 3) == [1]
    assert of.first_of({"birth": True}, 4, 3) == [1, 0, 2, 3]
