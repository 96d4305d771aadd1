"""Hugging Face parquet files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bvit_interp.data.parquet import ParquetSamples, split_files
from bvit_interp.errors import DataError, MissingExtra

pytest.importorskip("pyarrow")
PICTURES = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]


def test_rows_names_and_classes(tmp_path, put_parquet):
    put_parquet(tmp_path / "test.parquet", PICTURES, [1, 0, 1], ["ant", "bee"], ("image", "label"))
    samples = ParquetSamples(tmp_path, "test")
    assert samples.classes == ("ant", "bee")
    assert len(samples) == 3
    assert samples.native_size is None
    image, label, mask = samples.read(2)
    np.testing.assert_array_equal(image, PICTURES[2])
    assert (label, mask, samples.name(2)) == (1, None, f"{tmp_path.name}/test/000002")


def test_shards_are_joined_in_order(tmp_path, put_parquet):
    put_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", PICTURES[2:], [0])
    put_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", PICTURES[:2], [2, 1])
    samples = ParquetSamples(tmp_path, "train")
    assert [samples.read(i)[0][0, 0, 0] for i in range(3)] == [10, 20, 30]
    assert samples.labels.tolist() == [2, 1, 0]
    assert samples.classes == ("0", "1", "2")
    assert split_files(tmp_path, "test") == []


def test_versions_of_a_set_in_several_folders_are_not_joined(tmp_path, put_parquet):
    for folder in ("full_size", "160px"):
        put_parquet(tmp_path / folder / "train-00000-of-00001.parquet", PICTURES, [0, 1, 0])
    with pytest.raises(DataError, match="in several folders: give 160px or full_size$"):
        ParquetSamples(tmp_path, "train")
    assert len(ParquetSamples(tmp_path / "160px", "train")) == 3


def test_missing_shards_and_shards_of_other_classes(tmp_path, put_parquet):
    put_parquet(tmp_path / "train-00001-of-00002.parquet", PICTURES, [0, 1, 0], ["ant", "bee"])
    with pytest.raises(DataError, match=r"that train-00001-of-00002\.parquet counts, 1 are there$"):
        ParquetSamples(tmp_path, "train")
    put_parquet(tmp_path / "train-00000-of-00002.parquet", PICTURES, [0, 1, 0], ["bee", "ant"])
    with pytest.raises(DataError, match="name their classes differently$"):
        ParquetSamples(tmp_path, "train")
    put_parquet(tmp_path / "train-00000-of-00002.parquet", PICTURES, [0, 1, 0], ["ant", "bee"])
    assert len(ParquetSamples(tmp_path, "train")) == 6


def test_what_cannot_be_used_is_named(tmp_path, put_parquet):
    with pytest.raises(DataError, match=r"no test\.parquet or"):
        ParquetSamples(tmp_path, "test")
    put_parquet(tmp_path / "test.parquet", PICTURES, [0, 1, 2], ["ant", "bee"])
    with pytest.raises(DataError, match=r"labels 0..2 for 2 class names"):
        ParquetSamples(tmp_path, "test")
    put_parquet(tmp_path / "test.parquet", PICTURES, [0, None, 1])
    with pytest.raises(DataError, match="label must hold integers without gaps"):
        ParquetSamples(tmp_path, "test")
    put_parquet(tmp_path / "test.parquet", PICTURES, [0, 1, 2], columns=("picture", "label"))
    with pytest.raises(DataError, match=r"needs the columns img or image and .*has picture, label"):
        ParquetSamples(tmp_path, "test")
    put_parquet(tmp_path / "test.parquet", [], [])
    with pytest.raises(DataError, match="no rows"):
        ParquetSamples(tmp_path, "test")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"test\.parquet: truncated or not a parquet file"):
        ParquetSamples(tmp_path, "test")


def test_a_corrupt_row_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": b"\xff\xd8 no jpeg", "path": "a"}, {"bytes": None, "path": "b"}]
    pq.write_table(pa.table({"img": rows, "label": [0, 1]}), tmp_path / "test.parquet")
    samples = ParquetSamples(tmp_path, "test")
    with pytest.raises(DataError, match="test/000000: the image cannot be read"):
        samples.read(0)
    with pytest.raises(DataError, match="test/000001: the row holds no image bytes"):
        samples.read(1)


def test_without_pyarrow_the_extra_is_named(tmp_path, put_parquet, monkeypatch):
    put_parquet(tmp_path / "test.parquet", PICTURES, [0, 1, 2])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"bvit-interp\[parquet\]"):
        ParquetSamples(tmp_path, "test")
