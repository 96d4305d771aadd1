"""Class selectivity against explicit loops, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import stats

from bvit_interp.analyses.selectivity.class_selectivity import Selectivity, class_selectivity


def sums(values, labels, classes):
    """Sums by class, counts and squares of values ``(n, T, U)``, by a loop."""
    total = torch.stack([values[labels == c].sum(0) for c in range(classes)])
    count = torch.tensor([float((labels == c).sum()) for c in range(classes)], dtype=torch.float64)
    return total, count, values.square().sum(0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_selectivity_is_the_anova_of_scipy():
    values, labels = normal(30, 2, 3), torch.arange(30) % 4
    values[:, 1, 2] += 2.0 * labels
    found = class_selectivity(*sums(values, labels, 6))
    selective = found.selective(0.0)
    for t in range(2):
        for u in range(3):
            x = values[:, t, u].numpy()
            groups = [x[labels.numpy() == c] for c in range(4)]
            between = sum(len(g) * (g.mean() - x.mean()) ** 2 for g in groups)
            eta = between / ((x - x.mean()) ** 2).sum()
            assert found.eta_squared[t, u] == pytest.approx(eta)
            assert found.value[t, u] == pytest.approx((eta - 3 / 29) / (1 - 3 / 29))
            p = stats.f_oneway(*groups).pvalue
            assert bool(selective[t, u]) == bool(p < 0.05 / 6 and found.value[t, u] >= 0)
    assert selective[1, 2]
    assert (found.classes, found.images, found.null) == (4, 30, pytest.approx(3 / 29))
    assert not found.selective(0.99).any()


def test_selectivity_of_permuted_labels_is_nothing_on_average():
    values, labels = normal(40, 1, 2, seed=1).exp(), torch.arange(40) % 5
    rng = np.random.default_rng(0)
    found = [class_selectivity(*sums(values, labels[rng.permutation(40)], 5)) for _ in range(400)]
    etas = torch.stack([each.eta_squared for each in found])
    assert torch.allclose(etas.mean(0), torch.tensor(4 / 39, dtype=torch.float64), atol=0.008)
    assert torch.stack([each.value for each in found]).mean().abs() < 0.01


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_the_interval_covers_the_share_of_normal_answers(share):
    """Two thousand data sets of eight classes with a known share of variance between them."""
    labels, units = torch.arange(200) % 8, 2000
    means = torch.linspace(-1, 1, 8, dtype=torch.float64)
    means = means / means.square().mean().sqrt() * share**0.5
    values = means[labels][:, None, None] + (1 - share) ** 0.5 * normal(200, 1, units, seed=2)
    found = class_selectivity(*sums(values, labels, 8))
    low, high = found.interval()
    assert ((low <= share) & (share <= high)).double().mean().item() > 0.93
    assert (
        high - low
    ).mean() / 2 < 1.5 * 1.96 * found.value.std()  # and it is not wide for nothing


def test_what_does_not_vary_has_no_selectivity():
    values, labels = normal(12, 1, 2), torch.arange(12) % 3
    values[:, 0, 0] = 1e3 / 3
    found = class_selectivity(*sums(values, labels, 3))
    assert found.value[0].isnan().tolist() == [True, False]
    assert not found.selective(0.0)[0, 0]
    few = class_selectivity(*sums(values[:3], labels[:3], 3))
    assert few.value.isnan().all()
    assert not few.selective(0.0).any()
    assert few.interval()[0].isnan().all()


def test_the_interval_by_hand():
    """Two classes of three images: n = 6, k = 2, a = 1/2, b = 2."""
    value = torch.tensor([[0.5]], dtype=torch.float64)
    found = Selectivity(value, value, 0.2, 2, 6)
    variance = 4 * 0.5 * (0.5 * 4) ** 2 / (35 * 9) + 1 / (2.5**2 * 3.5)
    low, high = found.interval()
    half = stats.norm.ppf(0.975) * variance**0.5 / 0.8
    assert low.item() == pytest.approx(0.5 - half)
    assert high.item() == pytest.approx(0.5 + half)


def test_the_scale_of_the_responses_does_not_matter():
    values, labels = normal(30, 2, 3), torch.arange(30) % 4
    found = class_selectivity(*sums(values, labels, 4)).value
    for scale in (1e-9, 1e9):
        scaled = class_selectivity(*sums(scale * values, labels, 4)).value
        torch.testing.assert_close(scaled, found)


def test_a_unit_at_the_threshold_is_selective():
    value = torch.tensor([[0.25, 0.2499]], dtype=torch.float64)
    found = Selectivity(torch.ones(1, 2, dtype=torch.float64), value, 0.0, 2, 50)
    assert found.selective(0.25).tolist() == [[True, False]]


@pytest.mark.parametrize("images", [1, 2, 3])
def test_as_many_classes_as_images_or_one_class_show_nothing(images):
    values = normal(images, 1, 2)
    for labels in (torch.arange(images), torch.zeros(images, dtype=torch.int64)):
        found = class_selectivity(*sums(values, labels, 3))
        assert not found.selective(0.0).any()


def test_wrong_shapes_are_refused():
    total, count, squares = sums(normal(6, 2, 3), torch.arange(6) % 2, 2)
    with pytest.raises(TypeCheckError):
        class_selectivity(total, count[:1], squares)
    with pytest.raises(TypeCheckError):
        class_selectivity(total, count, squares.T)
