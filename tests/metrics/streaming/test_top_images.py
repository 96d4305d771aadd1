"""The list of the largest against numpy's sort of everything, however the images came."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.top_images import TopImages


def drawn(seed, images, few=False):
    """Values of few kinds (so that many are equal) or many, patches, and numbers of images in a
    random order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(images, 2, 3, generator=generator)
    values = values.round() if few else values
    return (
        values,
        torch.randint(16, values.shape, generator=generator),
        torch.randperm(500, generator=generator)[:images],
    )


def by_numpy(values, patches, index, k):
    """First k by falling value, then rising image."""
    # (T, F, k) places
    order = np.stack(
        [[np.lexsort((index, -values[:, t, f]))[:k] for f in range(3)] for t in range(2)]
    )
    pick = lambda array: np.stack([[array[order[t, f], t, f] for f in range(3)] for t in range(2)])  # noqa: E731
    return pick(values), np.asarray(index)[order], pick(patches)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(5, 30), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_against_numpy_in_any_batches(seed, images, k, batch, few):
    values, patches, index = drawn(seed, images, few)
    metric = TopImages(2, 3, k)
    for first in range(0, images, batch):
        part = slice(first, first + batch)
        metric.update(values[part], patches[part], index[part])
    found = metric.compute()
    expected = by_numpy(values.numpy(), patches.numpy(), index.numpy(), k)
    for key, wanted in zip(("values", "images", "patches"), expected, strict=True):
        assert found[key].shape == (2, 3, k)
        np.testing.assert_array_equal(found[key], wanted, err_msg=key)
    assert metric.best.shape == (2, 3, k, 3)  # memory does not grow


@pytest.mark.parametrize("few", [False, True])
def test_merged_shards_are_the_whole(few):
    """Equal values too go to the lower image, whichever process saw it; one process may have seen
    none."""
    values, patches, index = drawn(3, 40, few)
    shards = [TopImages(2, 3, 4) for _ in range(4)]
    for rank, shard in enumerate(shards[:3]):
        shard.update(values[rank::3], patches[rank::3], index[rank::3])
    gathered = shards[0]._reductions["best"](torch.stack([shard.best for shard in shards]))
    for shard in shards[1:]:
        shards[0].merge_state(shard)
    assert torch.equal(gathered, shards[0].best)
    expected = by_numpy(values.numpy(), patches.numpy(), index.numpy(), 4)
    for key, wanted in zip(("values", "images", "patches"), expected, strict=True):
        np.testing.assert_array_equal(shards[0].compute()[key], wanted)


def test_fewer_images_than_entries():
    metric = TopImages(1, 1, 3)
    metric.update(torch.tensor([[[-2.0]]]), torch.tensor([[[7]]]), torch.tensor([11]))
    found = metric.compute()
    assert found["values"].tolist() == [[[-2.0, -torch.inf, -torch.inf]]]
    assert found["images"].tolist() == [[[11, -1, -1]]]
    assert found["patches"].tolist() == [[[7, -1, -1]]]


def test_bad_input():
    with pytest.raises(UserError, match="k >= 1, got 0"):
        TopImages(1, 1, 0)
    with pytest.raises(UserError, match="NaN or infinite"):
        TopImages(1, 1, 1).update(
            torch.tensor([[[torch.nan]]]), torch.tensor([[[0]]]), torch.tensor([0])
        )


def test_wrong_shapes_are_refused():
    metric, values = TopImages(2, 3, 1), torch.zeros(4, 2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        metric.update(values, torch.zeros(4, 2, 2, dtype=torch.int64), torch.arange(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        metric.update(values, torch.zeros(4, 2, 3, dtype=torch.int64), torch.arange(5))
