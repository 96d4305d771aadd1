"""Statistics of units against their parts; rankings by hand."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.selectivity.class_selectivity import Selectivity, class_selectivity
from bvit_interp.analyses.selectivity.profiles import (
    class_means,
    profile_changes,
    reliability,
    variance_shares,
    window_correlations,
)
from bvit_interp.analyses.selectivity.unit_statistics import UnitStatistics


def made(peaks, **metrics):
    """Units with these peaks of selectivity and these metrics."""
    value = torch.tensor([peaks], dtype=torch.float64)
    selectivity = Selectivity(value, value, 0.0, 2, 9)
    return UnitStatistics(
        selectivity=selectivity,
        null_selectivity=selectivity,
        selective=value > 0,
        null_selective=value > 0,
        means=value[None],
        classes=torch.arange(1),
        metrics={
            key: {"value": torch.tensor(values, dtype=torch.float64)}
            for key, values in metrics.items()
        },
    )


def test_rankings_take_units_once_and_then_the_most_selective():
    units = made(
        [0.9, 0.8, 0.7, 0.1],
        onset=[2.0, 5.0, 5.0, torch.nan],
        lifetime=[3.0, 3.0, 1.0, 0.0],
    )
    assert units.ranking("onset", True, 1).tolist() == [1, 2, 0]
    assert units.ranking("onset", False, 1).tolist() == [0, 1, 2]
    assert units.ranking("onset", True, 3).tolist() == [1, 0]
    assert units.first_of({"onset": True}, 1, 3) == [1]
    assert units.first_of({"onset": True}, 4, 3) == [1, 0, 2, 3]
    assert units.first_of({"onset": True, "lifetime": True}, 1, 1) == [1, 0]


def test_of_equal_values_the_more_selective_unit_comes_first():
    units = made([0.1, 0.3, 0.2], onset=[4.0, 4.0, 4.0], lifetime=[2.0, 2.0, 2.0])
    assert units.ranking("onset", True, 1).tolist() == [1, 2, 0]
    assert units.ranking("onset", False, 1).tolist() == [1, 2, 0]


def test_a_unit_that_never_varies_comes_last():
    units = made([0.1, torch.nan, 0.2], onset=[torch.nan] * 3, lifetime=[0.0] * 3)
    assert units.first_of({"onset": True}, 3, 1) == [2, 0, 1]


def test_statistics_are_those_of_the_sums():
    """Sixty images of four classes; halves and groups in other orders."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 3, 5, generator=generator, dtype=torch.float64)
    labels, halves, groups = torch.arange(60) % 4, torch.arange(60) // 30, torch.arange(60) // 15
    values[:, 1:, 2] += labels[:, None]
    total, count = torch.zeros(3, 6, 3, 5, dtype=torch.float64), torch.zeros(3, 6).double()
    for i in range(60):
        for part, row in ((int(halves[i]), int(labels[i])), (2, int(groups[i]))):
            total[part, row] += values[i]
            count[part, row] += 1
    squares = values.square().sum(0)
    sums = {"total": total, "count": count, "squares": squares}
    found = UnitStatistics.from_sums(sums, 0.2)
    by_class = (total[0] + total[1], count[0] + count[1])
    selectivity = class_selectivity(*by_class, squares)
    null = class_selectivity(total[2], count[2], squares)
    assert torch.equal(found.selectivity.value, selectivity.value)
    assert torch.equal(found.null_selectivity.value, null.value)
    assert torch.equal(found.selective, selectivity.selective(0.2))
    assert torch.equal(found.null_selective, null.selective(0.2))
    assert found.selective[1:, 2].all()
    means = class_means(*by_class)
    assert torch.equal(found.means, means)
    assert found.classes.tolist() == [0, 1, 2, 3]
    assert found.metrics["onset"]["value"][2] == 2
    for key in ("profile_change", "profile_change_ends", "profile_stability"):
        for column, swapped in (("value", False), ("null", True)):
            expected = profile_changes(means, found.selective, null=swapped)[key]
            torch.testing.assert_close(found.metrics[key][column], expected, equal_nan=True)
    shares, null_shares = variance_shares(means), variance_shares(class_means(total[2], count[2]))
    for i, key in enumerate(("share_class", "share_step", "share_interaction")):
        assert torch.equal(found.metrics[key]["value"], shares[i])
        assert torch.equal(found.metrics[key]["null"], null_shares[i])
    halves = reliability(total[:2], count[:2])
    assert torch.equal(found.metrics["reliability"]["value"], halves["value"])
    assert list(found.windows) == [1, 2]
    expected = window_correlations(total[:2], count[:2], found.selective, 2)
    for key, columns in expected.items():
        for column, values in columns.items():
            torch.testing.assert_close(found.windows[2][key][column], values, equal_nan=True)


def test_wrong_shapes_are_refused():
    units = made([0.9, 0.8], onset=[1.0, 2.0])
    with pytest.raises(TypeCheckError):
        UnitStatistics(
            selectivity=units.selectivity,
            null_selectivity=units.selectivity,
            selective=units.selective[0],
            null_selective=units.selective,
            means=units.means,
            classes=units.classes,
            metrics=units.metrics,
        )
