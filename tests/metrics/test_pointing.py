"""Points and masks, against values worked out by hand or computed another way."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from bvit_interp import metrics

nan = math.nan


def test_patch_centres_on_paper():
    mask = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5],
            [10, 11, 12, 13, 14, 15],
            [20, 21, 22, 23, 24, 25],
            [30, 31, 32, 33, 34, 35],
        ]
    )[None]
    # 2 x 3 patches of 2 x 2 px: rows 1, 3 and columns 1, 3, 5
    assert metrics.at_patch_centres(mask, (2, 3)).tolist() == [[11, 13, 15, 31, 33, 35]]
    # 4 x 2 patches of 1 x 3 px: rows 0..3 and columns 1, 4
    assert metrics.at_patch_centres(mask, (4, 2)).tolist() == [[1, 4, 11, 14, 21, 24, 31, 34]]
    assert metrics.at_patch_centres(mask, (1, 1)).tolist() == [[23]]
    assert metrics.at_patch_centres(mask, (4, 6)).tolist() == [mask.flatten().tolist()]
    # 3 x 4 patches of 1 px: the last row and the last two columns belong to none
    rest = [[0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]]
    assert metrics.at_patch_centres(mask, (3, 4)).tolist() == rest


def test_patch_centres_at_224():
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    pixels = torch.stack([rows, columns])
    found = metrics.at_patch_centres(pixels, (14, 14)).view(2, 14, 14)
    for r in range(14):
        for c in range(14):
            assert found[:, r, c].tolist() == [16 * r + 8, 16 * c + 8]


def test_dilate_is_a_strict_disc():
    positive = torch.zeros(1, 5, 7, dtype=torch.bool)
    positive[0, 2, 3] = True
    assert metrics.dilate(positive, 0) is positive
    # a neighbour is at distance 1, not below it
    assert torch.equal(metrics.dilate(positive, 1), positive)
    plus = torch.tensor(
        [
            [0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 1, 0, 0, 0],
            [0] * 7,
        ]
    )
    assert torch.equal(metrics.dilate(positive, 1.2)[0].int(), plus.int())
    square = torch.tensor(
        [[0] * 7, [0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0] * 7]
    )
    # sqrt(2) < 2, and 2 is not
    assert torch.equal(metrics.dilate(positive, 2)[0].int(), square.int())
    narrow, broad = [0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]
    disc = torch.tensor([narrow, broad, broad, broad, narrow])
    # sqrt(5) < 2.3 < sqrt(8)
    assert torch.equal(metrics.dilate(positive, 2.3)[0].int(), disc.int())


@pytest.mark.parametrize("tolerance", [0.5, 1, 1.5, 3, 4.2, 15])
def test_dilate_is_scipys_distance_below_the_radius(tolerance):
    positive = torch.from_numpy(np.random.default_rng(5).random((3, 40, 31)) < 0.004)
    assert positive.flatten(1).any(1).all()
    distance = np.stack([ndimage.distance_transform_edt(~mask) for mask in positive.numpy()])
    assert np.array_equal(metrics.dilate(positive, tolerance).numpy(), distance < tolerance)


def test_dilate_of_nothing_is_nothing():
    assert not metrics.dilate(torch.zeros(2, 6, 6, dtype=torch.bool), 3).any()


def test_point_hits_on_paper():
    maps = torch.tensor(
        [
            [0.1, 0.9, 0.2, 0.3],  # on the object
            [0.1, 0.2, 0.9, 0.3],  # beside it
            [0.5, 0.5, 0.5, 0.1],  # three tie, two on the object
            [0.9, 0.9, 0.1, 0.1],  # two tie, one ignored, one on the object
            [0.9, 0.1, 0.1, 0.1],  # on ignored ground
            [0.9, 0.1, 0.9, 0.9],  # three tie, one ignored, none on the object
        ]
    )
    positive = torch.tensor([0, 1, 0, 0]).bool().expand(6, -1).clone()
    positive[2, 0] = True
    ignored = torch.zeros(6, 4, dtype=torch.bool)
    ignored[3:, 0] = True
    hits = metrics.point_hits(maps, positive, ignored)
    assert hits.dtype == torch.float64
    np.testing.assert_allclose(hits, [1, 0, 2 / 3, 1, nan, 0])


def test_ignored_ground_is_never_a_hit():
    maps, everything = torch.rand(3, 5), torch.ones(3, 5, dtype=torch.bool)
    assert metrics.point_hits(maps, everything, everything).isnan().all()


def test_steps_and_heads_are_scored_apart():
    generator = torch.Generator().manual_seed(2)
    maps = torch.randint(0, 4, (5, 3, 2, 9), generator=generator).float()  # coarse: many ties
    positive, ignored = (torch.rand(5, 9, generator=generator) < share for share in (0.4, 0.3))
    hits = metrics.point_hits(maps, positive, ignored)
    assert hits.shape == (5, 3, 2)
    for b, t, h in np.ndindex(5, 3, 2):
        best = max(maps[b, t, h].tolist())
        tied = [p for p in range(9) if maps[b, t, h, p] == best and not ignored[b, p]]
        expected = sum(bool(positive[b, p]) for p in tied) / len(tied) if tied else nan
        np.testing.assert_allclose(hits[b, t, h], expected)


def test_the_mask_as_map_always_hits_and_its_complement_never():
    positive = torch.rand(50, 36, generator=torch.Generator().manual_seed(4)) < 0.3
    nothing = torch.zeros_like(positive)
    assert (metrics.point_hits(positive.float(), positive, nothing) == 1).all()
    assert (metrics.point_hits(-positive.float(), positive, nothing) == 0).all()


def test_random_maps_hit_at_the_rate_of_the_mask_area():
    n, patches, covered = 4000, 49, 13
    positive = torch.zeros(n, patches, dtype=torch.bool)
    positive[:, :covered] = True
    maps = torch.rand(n, patches, generator=torch.Generator().manual_seed(6))
    hits = metrics.point_hits(maps, positive, torch.zeros_like(positive)).sum().item()
    low, high = stats.binom.interval(0.999, n, covered / patches)
    assert low <= hits <= high


def test_wrong_shapes_are_refused():
    maps, mask = torch.rand(3, 2, 9), torch.zeros(3, 9, dtype=torch.bool)
    for wrong in (mask[:2], mask[:, :8], mask.float()):
        with pytest.raises(jaxtyping.TypeCheckError):
            metrics.point_hits(maps, wrong, mask)
        with pytest.raises(jaxtyping.TypeCheckError):
            metrics.point_hits(maps, mask, wrong)
    with pytest.raises(jaxtyping.TypeCheckError):
        metrics.dilate(mask, 1.0)
    with pytest.raises(jaxtyping.TypeCheckError):
        metrics.at_patch_centres(torch.zeros(4), (1, 1))
