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
    window_correlations,
    windows_of,
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


def test_windows():
    assert [windows_of(steps) for steps in (1, 2, 3, 6, 12)] == [
        [],
        [1],
        [1, 2],
        [1, 3, 5],
        [1, 6, 11],
    ]


def test_window_correlations_against_numpy():
    """Each profile from another half of the images, in both ways, over the root of the product of
    the reliabilities."""
    true = normal(6, 4, 3)
    total = true + 0.3 * normal(2, 6, 4, 3, seed=1)
    count = torch.ones(2, 6, dtype=torch.float64)
    count[1, 5] = 0  # the sixth class has no image in the second half
    count[0, 2], total[0, 2] = 2.0, 2 * total[0, 2]
    selective = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]]).bool()
    halves = (total / count.clamp(min=1)[..., None, None])[:, :5].numpy()

    def r(s, t, u, v, first, second):
        return np.corrcoef(halves[first, :, s, u], halves[second, :, t, v])[0, 1]

    for window, partners in (
        (1, {0: [1, 2, 0], 1: [2, None, 0], 2: [2, None, 0]}),
        (3, {0: [1, 2, 0]}),
    ):
        found = window_correlations(total, count, selective, window)
        for s, partner in partners.items():
            for u, v in enumerate(partner):
                if v is None:
                    for key in ("raw", "corrected"):
                        assert found[key]["value"][s, u].isnan()
                        assert found[key]["null"][s, u].isnan()
                    continue
                for column, other in (("value", u), ("null", v)):
                    t = s + window
                    raw = (r(s, t, u, other, 0, 1) + r(s, t, u, other, 1, 0)) / 2
                    scale = (r(s, s, u, u, 0, 1) * r(t, t, other, other, 0, 1)) ** 0.5
                    assert min(r(s, s, u, u, 0, 1), r(t, t, other, other, 0, 1)) > 0.3
                    assert found["raw"][column][s, u] == pytest.approx(raw)
                    assert found["corrected"][column][s, u] == pytest.approx(raw / scale)


@pytest.mark.parametrize("truth", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shared", [False, True])
def test_the_correction_finds_the_planted_correlation(truth, shared):
    """Noise as strong as the profile lowers r to half; the correction takes that back, also where
    the same images give both steps the same noise."""
    classes, units = 40, 400
    first, fresh = normal(2, classes, units)
    true = torch.stack([first, truth * first + (1 - truth**2) ** 0.5 * fresh], dim=1)
    noise = normal(2, classes, 1 if shared else 2, units, seed=1)
    total, count = true + noise, torch.ones(2, classes, dtype=torch.float64)
    selective = torch.ones(2, units, dtype=torch.bool)
    found = window_correlations(total, count, selective, 1)
    assert found["corrected"]["value"].nanmean().item() == pytest.approx(truth, abs=0.04)
    assert found["raw"]["value"].nanmean().item() == pytest.approx(truth / 2, abs=0.05)
    assert found["corrected"]["null"].nanmean().item() == pytest.approx(0, abs=0.03)
    same_images = np.mean(
        [np.corrcoef(total.mean(0)[:, :, u].T.numpy())[0, 1] for u in range(units)]
    )
    if shared:  # as the correlation over all images would be too large
        assert same_images > truth / 2 + (0.3 if truth < 1 else 0.4)


def test_profiles_that_are_mostly_noise_are_left_out():
    total = torch.stack([normal(6, 2, 3), normal(6, 2, 3)])
    total[1, :, 1, 0] = -total[0, :, 1, 0]  # a reliability of -1
    own = total[0, :, 0, 1] - total[0, :, 0, 1].mean()
    fresh = normal(6, seed=5) - normal(6, seed=5).mean()
    fresh = fresh - own * (own @ fresh) / (own @ own)
    total[1, :, 0, 1] = own / own.norm() + 5 * fresh / fresh.norm()
    count, selective = torch.ones(2, 6, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    low = np.corrcoef(total[0, :, 0, 1], total[1, :, 0, 1])[0, 1]
    assert 0.1 < low < 0.3
    found = window_correlations(total, count, selective, 1)
    assert found["corrected"]["value"].isnan().tolist() == [[True, True, False]]
    assert found["corrected"]["value"][0, 2] == pytest.approx(
        np.corrcoef(total[0, :, 0, 2], total[0, :, 1, 2])[0, 1]
    )
    assert found["corrected"]["null"].isnan().all()  # no other unit has a value
    two = torch.cat([torch.ones(2, 2), torch.zeros(2, 4)], 1).double()
    assert window_correlations(total, two, selective, 1)["raw"]["value"].isnan().all()


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
