"""CIFAR in its two forms."""

from __future__ import annotations

import hashlib
import os
import pickle

import numpy as np
import pytest
from torchvision import datasets

from bvit_interp.data.cifar import CIFAR10, open_cifar
from bvit_interp.errors import DataError

PICTURES = [np.full((32, 32, 3), value, np.uint8) for value in (10, 20)]


@pytest.fixture
def put_binaries(tmp_path, monkeypatch):
    """Writes a CIFAR-10 test split of two images as torchvision's pickled files, with matching
    checksums."""

    def put(root=tmp_path):
        folder = root / "cifar-10-batches-py"
        folder.mkdir()
        red_first = np.stack([picture.transpose(2, 0, 1).reshape(-1) for picture in PICTURES])
        red_first[1, :1024] = 99  # the red plane comes first
        (folder / "test_batch").write_bytes(pickle.dumps({"data": red_first, "labels": [3, 9]}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}))
        files = [(folder / name).read_bytes() for name in ("test_batch", "batches.meta")]
        sums = [hashlib.md5(content).hexdigest() for content in files]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": sums[1]}
        monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums[0]]])
        monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
        monkeypatch.setattr(datasets.CIFAR10, "train_list", [])

    return put


def test_parquet_without_names_has_the_official_ones(tmp_path, put_parquet):
    put_parquet(tmp_path / "test.parquet", PICTURES, [3, 9])
    samples = open_cifar("cifar10", tmp_path, "test")
    assert samples.classes == CIFAR10
    assert samples.classes[samples.read(0)[1]] == "cat"
    assert samples.native_size == 32
    assert not samples.has_masks


def test_cifar100_takes_the_fine_labels(tmp_path, put_parquet):
    names = [f"class {i}" for i in range(100)]
    put_parquet(
        tmp_path / "cifar100" / "test-0.parquet", PICTURES, [7, 99], names, ("img", "fine_label")
    )
    samples = open_cifar("cifar100", tmp_path, "test")
    assert [samples.classes[samples.read(i)[1]] for i in range(2)] == ["class 7", "class 99"]
    with pytest.raises(DataError, match="100 classes, cifar10 has 10"):
        open_cifar("cifar10", tmp_path, "test")


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_torchvision_files(tmp_path, put_binaries, inside):
    put_binaries()
    samples = open_cifar("cifar10", tmp_path / inside, "test")
    image, label, mask = samples.read(1)
    assert len(samples) == 2
    assert samples.classes == CIFAR10
    assert samples.native_size == 32
    assert (label, mask, image[5, 5].tolist()) == (9, None, [99, 20, 20])


def test_download_fetches_what_is_missing(tmp_path, put_binaries, monkeypatch):
    with pytest.raises(
        DataError, match=r"neither test\.parquet, test-.*cifar-10-batches-py/; --download"
    ):
        open_cifar("cifar10", tmp_path, "test")
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: put_binaries())
    assert len(open_cifar("cifar10", tmp_path, "test", download=True)) == 2


def test_a_damaged_file_and_a_failed_download_are_one_line(tmp_path, put_binaries, monkeypatch):
    put_binaries()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    with pytest.raises(DataError, match="cifar-10-batches-py: incomplete or corrupt"):
        open_cifar("cifar10", tmp_path, "test")

    def offline(self):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"could not be downloaded \(no route to host\)$"):
        open_cifar("cifar10", tmp_path, "test", download=True)


def test_the_real_set(real):
    """The first rows of the test split, their labels from the source paths kept in the file."""
    pq = pytest.importorskip("pyarrow.parquet")
    root = real("cifar10")
    samples = open_cifar("cifar10", root, "test")
    assert samples.classes == CIFAR10
    assert len(samples) == 10_000
    rows = pq.read_table(root / "test.parquet").slice(0, 20).to_pylist()
    for i, row in enumerate(rows):
        image, label, _ = samples.read(i)
        assert image.shape == (32, 32, 3)
        assert f"/{samples.classes[label]}/" in f"/{row['img']['path']}"


def test_a_pipe_among_the_binaries_is_never_opened(tmp_path, put_binaries):
    put_binaries()
    assert len(open_cifar("cifar10", tmp_path, "test")) == 2
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    os.mkfifo(tmp_path / "cifar-10-batches-py" / "test_batch")
    with pytest.raises(DataError, match="test_batch: not a regular file"):
        open_cifar("cifar10", tmp_path, "test")


def test_the_official_order_is_told_by_the_names(tmp_path, put_parquet):
    put_parquet(tmp_path / "test.parquet", PICTURES, [3, 9], list(CIFAR10))
    assert open_cifar("cifar10", tmp_path, "test").official
    put_parquet(tmp_path / "test.parquet", PICTURES, [3, 9], list(CIFAR10)[::-1])
    assert not open_cifar("cifar10", tmp_path, "test").official
