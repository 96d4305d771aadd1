"""Batches, shards, corrupt images and halving."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bvit_interp.data import loader as module
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.folders import ImageFolderSamples
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Loader
from bvit_interp.errors import DataError, UserError

SAME = Geometry((32, 32), 32, (0.5,) * 3, (0.5,) * 3, "bilinear")
SMALL = Geometry((16, 16), 32, (0.5,) * 3, (0.5,) * 3, "bilinear")


class Counted(DigitScenes):
    """Scenes that remember what was read."""

    def __init__(self, length: int) -> None:
        super().__init__(length=length)
        self.reads: list[int] = []

    def read(self, i: int):
        self.reads.append(i)
        return super().read(i)


@pytest.fixture
def with_corrupt(tmp_path, put_image):
    """Four images of two classes, the second and the fourth damaged."""
    for seed, name in enumerate(("ant/1", "ant/2", "bee/3", "bee/4")):
        put_image(tmp_path / f"{name}.jpg", 40, 40, seed)
    for name in ("ant/2", "bee/4"):
        file = tmp_path / f"{name}.jpg"
        file.write_bytes(file.read_bytes()[:700])
    return ImageFolderSamples(tmp_path)


def test_batches_hold_every_view_and_decode_once():
    scenes = Counted(5)
    batches = list(Loader(scenes, [SAME, SMALL, SAME], 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert scenes.reads == [0, 1, 2, 3, 4]
    last = batches[2]
    image, label, mask = scenes.read(4)
    assert last.index.tolist() == [4]
    assert last.labels.tolist() == [label]
    assert last.names == [scenes.name(4)]
    assert list(last.views) == [SAME, SMALL]
    assert last.index.dtype == last.labels.dtype == torch.int64
    for geometry in (SAME, SMALL):
        expected_image, expected_mask = geometry(image, mask)
        assert torch.equal(last.views[geometry][0][0], expected_image)
        assert torch.equal(last.views[geometry][1][0], expected_mask)
    with pytest.raises(ValueError, match="2 geometries"):
        _ = last.images


def test_equal_geometries_are_computed_once(monkeypatch):
    calls, show = [], Geometry.__call__
    monkeypatch.setattr(
        Geometry, "__call__", lambda self, *args: calls.append(self) or show(self, *args)
    )
    list(Loader(DigitScenes(length=2), [SAME, SMALL, replace(SAME)], 2))
    assert calls == [SAME, SMALL] * 2


def test_the_only_view_has_short_names(with_corrupt):
    batch = next(iter(Loader(DigitScenes(length=3), [SAME], 3)))
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.masks.shape == (3, 32, 32)
    assert next(iter(Loader(with_corrupt, [SAME], 1))).masks is None


@pytest.mark.parametrize("limit", [None, 7])
def test_two_ranks_cover_each_image_once(monkeypatch, limit):
    scenes, seen = DigitScenes(length=21), []
    for rank in (0, 1):
        monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, 2))
        loader = Loader(scenes, [SAME], 4, limit=limit)
        part = [int(i) for batch in loader for i in batch.index]
        assert part == loader.index
        assert len(loader) == -(-len(part) // 4)
        seen += part
    assert sorted(seen) == (list(range(21)) if limit is None else list(range(0, 21, 3)))


def test_a_limit_reaches_all_classes(tmp_path, put_image):
    for name in ("ant", "bee", "cat"):
        for i in range(4):
            put_image(tmp_path / name / f"{i}.png", 32, 32)
    samples = ImageFolderSamples(tmp_path)
    batch = next(iter(Loader(samples, [SAME], 8, limit=3)))
    assert batch.labels.tolist() == [0, 1, 2]
    assert Loader(samples, [SAME], 8, limit=99).index == list(range(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_the_pass_by_name(with_corrupt, workers):
    with pytest.raises(DataError, match=r"ant/2\.jpg: the image cannot be read \(.*\)$") as caught:
        list(Loader(with_corrupt, [SAME], 4, workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 4), (1, 3), (0, 1)])
def test_or_is_skipped_and_listed(with_corrupt, workers, batch_size):
    loader = Loader(with_corrupt, [SAME], batch_size, workers=workers, skip_corrupt=True)
    for _ in range(2):  # a second pass starts its list anew
        assert [name for batch in loader for name in batch.names] == ["ant/1.jpg", "bee/3.jpg"]
        assert loader.skipped == ["ant/2.jpg", "bee/4.jpg"]


def test_a_pass_without_a_readable_image_is_an_error(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.jpg").write_bytes(b"nothing")
    loader = Loader(ImageFolderSamples(tmp_path), [SAME], 2, skip_corrupt=True)
    with pytest.raises(DataError, match=r"none of the 1 images can be read, e.g. ant/1\.jpg"):
        list(loader)


def test_bad_options():
    with pytest.raises(UserError, match="batch size must be at least 1, got 0"):
        Loader(DigitScenes(), [SAME], 0)
    with pytest.raises(UserError, match="limit must be at least 1, got -1"):
        Loader(DigitScenes(), [SAME], 2, limit=-1)
    with pytest.raises(DataError, match="no images"):
        Loader(DigitScenes(length=0), [SAME], 2)
