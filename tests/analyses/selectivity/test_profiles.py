"""Profiles of class means against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.selectivity.profiles import (
    class_means,
    profile_changes,
    reliability,
    selective_period,
    variance_shares,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_class_means_leave_out_empty_classes():
    sums = torch.tensor([[[2.0, 4.0]], [[5.0, 5.0]], [[9.0, 3.0]]], dtype=torch.float64)
    counts = torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64)
    assert class_means(sums, counts).tolist() == [[[1.0, 2.0]], [[3.0, 1.0]]]


def test_variance_shares_by_hand():
    """a = +-1.5 and b = +-0.5 give squares of 9 and 1 in four cells."""
    table = torch.tensor([[2.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    crossed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # interaction alone
    shares = variance_shares(torch.stack([table, crossed, 5 + 0 * table], dim=-1))
    assert shares[:, 0].tolist() == pytest.approx([0.9, 0.1, 0.0])
    assert shares[:, 1].tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert shares[:, 2].isnan().all()
    assert torch.allclose(
        variance_shares(normal(4, 3, 5)).sum(0), torch.ones(5, dtype=torch.float64)
    )


def test_the_scale_of_the_responses_does_not_matter():
    means, selective = normal(4, 3, 5), torch.ones(3, 5, dtype=torch.bool)
    counts = torch.ones(2, 4, dtype=torch.float64)
    for scale in (1e-9, 1e9):
        torch.testing.assert_close(variance_shares(scale * means), variance_shares(means))
        changes, scaled = (profile_changes(x, selective) for x in (means, scale * means))
        torch.testing.assert_close(scaled, changes)
        halves = torch.stack([means, normal(4, 3, 5, seed=1)])
        whole, scaled = (reliability(x, counts) for x in (halves, scale * halves))
        torch.testing.assert_close(scaled, whole)


def test_onset_and_offset():
    selective = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    found = selective_period(selective)
    assert found["onset"].nan_to_num(0).tolist() == [2, 1, 0, 3]
    assert found["offset"].nan_to_num(0).tolist() == [4, 4, 0, 3]
    assert found["lifetime"].tolist() == [2, 4, 0, 1]


def test_profile_changes_against_numpy():
    means = normal(5, 4, 3)
    selective = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]]).bool()
    found, null = profile_changes(means, selective), profile_changes(means, selective, null=True)

    def r(s, t, u, v):
        return np.corrcoef(means[:, s, u], means[:, t, v])[0, 1]

    assert found["profile_change"][:2].tolist() == pytest.approx(
        [1 - r(0, 1, 0, 0), 1 - r(2, 3, 1, 1)]
    )
    assert found["profile_change_ends"][:2].tolist() == pytest.approx(
        [1 - r(0, 3, 0, 0), 1 - r(0, 3, 1, 1)]
    )
    assert found["profile_stability"][0] == pytest.approx(
        np.mean([r(0, 1, 0, 0), r(0, 3, 0, 0), r(1, 3, 0, 0)])
    )
    assert found["profile_stability"][1] == pytest.approx(
        np.mean([r(0, 2, 1, 1), r(0, 3, 1, 1), r(2, 3, 1, 1)])
    )
    assert all(values[2].isnan() for values in found.values())
    # at step 4 units 0 and 1 are selective, so each is compared with the other; at step 3 unit 1
    # is compared with unit 2
    assert null["profile_change_ends"][:2].tolist() == pytest.approx(
        [1 - r(0, 3, 0, 1), 1 - r(0, 3, 1, 0)]
    )
    assert null["profile_stability"][1] == pytest.approx(
        np.mean([r(0, 2, 1, 2), r(0, 3, 1, 0), r(2, 3, 1, 0)])
    )
    assert null["profile_change"][0].isnan()  # unit 0 is alone at step 2


def test_reliability_against_numpy():
    total, count = (
        normal(2, 4, 3, 2),
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


def test_a_profile_that_does_not_vary_has_no_correlation():
    means = normal(4, 3, 2)
    means[:, 1, 0] = 1e3 / 3
    found = profile_changes(means, torch.ones(3, 2, dtype=torch.bool))
    r = np.corrcoef(means[:, 0, 0], means[:, 2, 0])[0, 1]
    assert found["profile_change"][0].isnan()
    assert found["profile_change_ends"][0] == pytest.approx(1 - r)
    assert found["profile_stability"][0] == pytest.approx(r)
    assert not found["profile_change"][1].isnan()


def test_one_step_shows_no_change():
    found = profile_changes(normal(4, 1, 2), torch.tensor([[True, False]]))
    assert all(values.isnan().all() for values in found.values())


def test_the_reliability_of_one_unit_has_no_null():
    found = reliability(normal(2, 3, 2, 1), torch.ones(2, 3, dtype=torch.float64))
    assert found["null"].isnan().all()
    assert not found["value"].isnan().any()


def test_wrong_shapes_are_refused():
    means = normal(5, 4, 3)
    for call in (
        lambda: class_means(means, torch.ones(4, dtype=torch.float64)),
        lambda: variance_shares(means[0]),
        lambda: profile_changes(means, torch.ones(3, 4, dtype=torch.bool)),
        lambda: selective_period(torch.ones(3, 4)),
        lambda: reliability(means[None], torch.ones(1, 5, dtype=torch.float64)),
    ):
        with pytest.raises(TypeCheckError):
            call()
