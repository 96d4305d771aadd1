"""Means, intervals and correlations equal numpy's on all the data at once, however the data
came."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bvit_interp import metrics
from bvit_interp.metrics.streaming.means import MapCorrelations, MeanCI


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parts", [(30,), (1, 9, 20), (13, 17)])
def test_moments_in_any_split(parts):
    values = drawn(30, 2, 3) * 3 + 5
    values[4, 0] = math.nan
    values[:, 1, 2] = math.nan
    values[1:, 0, 0] = math.nan  # one image alone
    metric = MeanCI(2, 3)
    for part in values.split(parts):
        metric.update(part)
    found = metric.compute()
    for index in np.ndindex(2, 3):
        kept = values[(slice(None), *index)].double().numpy()
        kept = kept[~np.isnan(kept)]
        assert found["n"][index] == len(kept)
        if not len(kept):
            assert found["value"][index].isnan()
            continue
        assert found["value"][index] == pytest.approx(kept.mean(), rel=1e-12)
        if len(kept) == 1:
            assert found["low"][index].isnan()
            assert found["high"][index].isnan()
            continue
        low, high = stats.norm.interval(0.95, kept.mean(), stats.sem(kept))
        assert (found["low"][index], found["high"][index]) == (
            pytest.approx(low),
            pytest.approx(high),
        )


def test_equal_images_have_an_interval_of_no_width():
    metric = MeanCI(1)
    metric.update(torch.full((50, 1), math.log(17)))
    found = metric.compute()
    assert found["high"] - found["low"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("parts", [(6,), (1, 5), (2, 2, 2)])
def test_map_pairs_against_every_pair_of_images(parts):
    """Loops over all pairs of different images and numpy's correlation; two constant maps are left
    out."""
    maps = drawn(6, 2, 3, 10, seed=1).softmax(-1)
    maps[2, 1, 0] = maps[4, 0, 2] = 0.1
    metric = MapCorrelations(2, 3, 10)
    for part in maps.split(parts):
        metric.update(metrics.unit_maps(part))
    found = metric.compute()
    varied = maps.double().std(-1) > 1e-6
    for s, h, t, k in np.ndindex(2, 3, 2, 3):
        same, other = [], []
        for i in range(6):
            for j in range(6):
                if varied[i, s, h] and varied[j, t, k]:
                    pair = np.corrcoef(maps[i, s, h].double(), maps[j, t, k].double())[0, 1]
                    (same if i == j else other).append(pair)
        assert found["same_image"][s, h, t, k] == pytest.approx(np.mean(same), abs=1e-9)
        assert found["other_images"][s, h, t, k] == pytest.approx(np.mean(other), abs=1e-9)


def test_one_image_has_no_other():
    metric = MapCorrelations(2, 1, 5)
    metric.update(metrics.unit_maps(drawn(1, 2, 1, 5)))
    found = metric.compute()
    assert found["other_images"].isnan().all()
    assert found["same_image"][0, 0, 0, 0] == pytest.approx(1)
