"""Hugging Face parquet files."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from bvit_interp.data import parquet
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.files import say
from bvit_interp.data.parquet import ParquetSamples, split_files
from bvit_interp.errors import DataError, MissingExtra

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
PICTURES = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]


def refusal(root):
    with pytest.raises(DataError) as caught:
        ParquetSamples(root, "test")
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_missing_and_double_shards_are_named(tmp_path, put_parquet):
    for number in (0, 1, 3):
        put_parquet(tmp_path / f"data/test-0000{number}-of-00005.parquet", PICTURES, [0, 1, 0])
    assert refusal(tmp_path).endswith(
        "of the 5 files that test-00000-of-00005.parquet counts, 3 are there; missing: 2, 4"
    )
    for number in (2, 4):
        put_parquet(tmp_path / f"data/test-0000{number}-of-00005.parquet", PICTURES, [0, 1, 0])
    assert len(ParquetSamples(tmp_path, "test")) == 15
    put_parquet(tmp_path / "data/test-00002-of-00005-0f3a.parquet", PICTURES, [0, 1, 0])
    assert "two files are shard 2" in refusal(tmp_path)


def test_files_of_several_sets_are_not_joined(tmp_path, put_parquet):
    for of in (1, 2):
        for number in range(of):
            put_parquet(tmp_path / f"test-{number}-of-{of}.parquet", PICTURES, [0, 1, 0])
    assert "several sets, test of 1, test of 2" in refusal(tmp_path)
    for number in range(2):
        (tmp_path / f"test-{number}-of-2.parquet").unlink()
    put_parquet(tmp_path / "test-more-0-of-1.parquet", PICTURES, [0, 1, 0])
    assert "several sets" in refusal(tmp_path)
    (tmp_path / "test-more-0-of-1.parquet").rename(tmp_path / "test-more.parquet")
    assert "test-more.parquet is not one of the shards" in refusal(tmp_path)


def test_shards_that_name_their_classes_in_another_order(tmp_path, put_parquet, caplog):
    for number, names in enumerate((["ant", "bee", "cat"], ["cat", "ant", "bee"])):
        file = tmp_path / f"test-{number}-of-2.parquet"
        put_parquet(file, PICTURES, [0, 1, 2], names)
    say.cache_clear()
    samples = ParquetSamples(tmp_path, "test")
    assert samples.classes == ("ant", "bee", "cat")
    assert samples.labels.tolist() == [0, 1, 2, 2, 0, 1]
    (note,) = samples.notes
    assert "test-1-of-2.parquet" in note
    assert caplog.messages == [note]


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["ant", "dog"], "dog only here"),
        (["ant"], "bee only there"),
        (["ant", "bee", "bee"], "twice"),
        (None, "names none"),
    ],
)
def test_shards_of_other_classes_are_refused(tmp_path, put_parquet, names, wrong):
    put_parquet(tmp_path / "test-0-of-2.parquet", PICTURES, [0, 1, 0], ["ant", "bee"])
    put_parquet(tmp_path / "test-1-of-2.parquet", PICTURES, [0, 0, 0], names)
    message = refusal(tmp_path)
    assert "test-1-of-2.parquet: its classes are not those of test-0-of-2.parquet" in message
    assert wrong in message


def test_the_hubs_converted_layout(tmp_path, put_parquet):
    for number in range(2):
        file = tmp_path / "default" / "test" / f"000{number}.parquet"
        put_parquet(file, PICTURES, [number] * 3, ["ant", "bee"])
    for root in (tmp_path, tmp_path / "default"):
        samples = open_samples(str(root))
        assert samples.classes == ("ant", "bee")
        assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "default" / "test" / "0000.parquet").unlink()
    assert "missing: 0" in refusal(tmp_path)
    put_parquet(tmp_path / "other" / "test" / "0000.parquet", PICTURES, [0, 0, 0])
    assert "give default/test or other/test" in refusal(tmp_path)


@pytest.mark.parametrize("large", [False, True])
def test_images_as_bytes_alone(tmp_path, put_parquet, large):
    put_parquet(tmp_path / "test.parquet", PICTURES, [0, 1, 1], ["ant", "bee"])
    table = pq.read_table(tmp_path / "test.parquet")
    contents = [row["bytes"] for row in table["img"].to_pylist()]
    kind = pa.large_binary() if large else pa.binary()
    pq.write_table(table.set_column(0, "img", pa.array(contents, kind)), tmp_path / "test.parquet")
    samples = ParquetSamples(tmp_path, "test")
    np.testing.assert_array_equal(samples.read(1)[0], PICTURES[1])
    assert samples.classes == ("ant", "bee")


# ---- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        ["a", "b"],
        [1, 2],
        [[1, 2], [3]],
        [{"path": "a"}, {"path": "b"}],
        [{"bytes": "a"}, {"bytes": "b"}],
    ],
)
def test_columns_that_hold_no_images(tmp_path, images):
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "test.parquet")
    assert "column image must hold the bytes of images" in refusal(tmp_path)


@pytest.mark.parametrize(
    "labels", [["a", "b"], [0.5, 1.0], [[0], [1]], [None, 1], [True, False], [-1, 0], [10**12, 0]]
)
def test_columns_that_hold_no_labels(tmp_path, labels):
    images = [{"bytes": b"x", "path": "x"}] * 2
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "test.parquet")
    assert "label" in refusal(tmp_path)


def test_a_label_beyond_64_bits(tmp_path):
    labels = pa.array([2**63, 0], pa.uint64())
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": labels}), tmp_path / "test.parquet")
    assert str(2**63) in refusal(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        b"no json",
        b"\xff",
        b"[1]",
        b"null",
        b"[" * 100_000,
        b'{"info": 3}',
        b'{"info": {"features": []}}',
        b'{"info": {"features": {"label": {"names": 5}}}}',
        b'{"info": {"features": {"label": {"names": ["a", 5]}}}}',
        b'{"info": {"features": {"label": {"names": {"0": "a"}}}}}',
    ],
)
def test_metadata_that_is_not_what_the_datasets_library_writes(tmp_path, metadata):
    table = pa.table({"image": [b"x", b"y"], "label": [0, 1]})
    table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "test.parquet")
    assert "test.parquet: its metadata" in refusal(tmp_path)


def test_metadata_without_names_is_none(tmp_path):
    table = pa.table({"image": [b"x", b"y"], "label": [0, 1]})
    for metadata in (b"{}", b'{"info": {"features": {"label": {"dtype": "int64"}}}}'):
        named = table.replace_schema_metadata({"huggingface": metadata})
        pq.write_table(named, tmp_path / "test.parquet")
        assert ParquetSamples(tmp_path, "test").classes == ("0", "1")


@pytest.mark.parametrize("dictionary", [False, True])
def test_sizes_are_known_before_the_images_are_read(tmp_path, monkeypatch, dictionary):
    """A hundred images of 100 kB of zeros are a small file, of 10 MB as they are used."""
    table = pa.table({"image": [bytes(100_000)] * 100, "label": [0] * 100})
    pq.write_table(table, tmp_path / "test.parquet", use_dictionary=dictionary)
    assert (tmp_path / "test.parquet").stat().st_size < 1_000_000
    monkeypatch.setattr(parquet, "memory", lambda: 5_000_000)
    assert "GiB" in refusal(tmp_path)
    monkeypatch.setattr(parquet, "memory", lambda: 20_000_000)
    assert len(ParquetSamples(tmp_path, "test")) == 100


def test_the_free_memory_is_that_of_the_machine_at_most():
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**26 < parquet.memory() <= machine


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "test.parquet")
    assert "not a regular file" in refusal(tmp_path)


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
