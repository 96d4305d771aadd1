"""Subsets by class, column and cluster."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import DataError, UserError
from bvit_interp.training.pruning import subsets
from bvit_interp.training.pruning.subsets import Pool


def test_pool_takes_the_images_of_its_classes(pools):
    train, _ = pools
    scenes = DigitScenes("train")
    labels = [scenes.read(i)[1] for i in range(0, 50_000, 250)]
    chosen = [i * 250 for i, label in enumerate(labels) if label in (1, 4, 7)]
    assert train.index.tolist() == chosen
    assert [(1, 4, 7)[label] for label in train.labels] == [labels[i // 250] for i in chosen]
    np.testing.assert_array_equal(train.read(2), scenes.read(chosen[2])[0])


def test_by_class_refuses_a_class_without_images_and_one_alone():
    train, test = (
        Pool(DigitScenes(split, 8), DigitScenes.classes, None) for split in ("train", "test")
    )
    with pytest.raises(DataError, match=r"class \d has no (training|test) image among the 8"):
        subsets.by_class(train, test)
    with pytest.raises(UserError, match="no class cat; classes: 0, 1"):
        Pool(DigitScenes("train", 8), ("cat",), None)
    alone = [Pool(DigitScenes(split, 60), ("4",), None) for split in ("train", "test")]
    with pytest.raises(UserError, match=r"one subset only \(4\)"):
        subsets.by_class(*alone)


@pytest.fixture
def column(pools, tmp_path):
    """A column `side` of even and odd places, as a file; changed by a function of its rows."""

    def write(change=lambda frame: frame):
        rows = [
            {"split": split, "index": int(i), "side": ("even", "odd")[n % 2]}
            for split, pool in zip(("train", "test"), pools, strict=True)
            for n, i in enumerate(pool.index)
        ]
        change(pd.DataFrame(rows)).to_csv(tmp_path / "env.csv", index=False)
        return f"{tmp_path / 'env.csv'}:side"

    return write


def test_by_column_reads_the_rows_in_any_order(pools, column):
    source = column(lambda frame: frame.sample(frac=1, random_state=0))
    found = subsets.by_column(*pools, source)
    assert [part.name for part in found.parts] == ["even", "odd"]
    np.testing.assert_array_equal(found.of_test, np.arange(len(pools[1])) % 2)
    np.testing.assert_array_equal(found.parts[1].own, np.arange(1, len(pools[0]), 2))
    assert found.parts[0].output is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(index=4), r"no side for 1 of the \d+ train images, for example index"),
        (lambda f: f[f["split"] == "train"], r"no side for \d+ of the \d+ test images"),
        (
            lambda f: f.rename(columns={"side": "place"}),
            "no column 'side'; columns: split, index, place",
        ),
        (lambda f: pd.concat([f, f.iloc[:1]]), "several rows for train image"),
        (lambda f: f.assign(side="one"), r"one subset only \(one\)"),
        (
            lambda f: f.assign(side=["new", *f["side"][1:]]),
            "subset new has 1 training image: nothing",
        ),
        (
            lambda f: f.assign(
                side=["new" if s == "train" and i % 3 else x for s, i, x in f.values.tolist()]
            ),
            "subset new has no test image",
        ),
    ],
)
def test_columns_that_do_not_do(pools, column, change, message):
    with pytest.raises(UserError, match=message):
        subsets.by_column(*pools, column(change))


def test_a_column_needs_a_file(pools, tmp_path):
    for source in ("nowhere.csv:side", str(tmp_path)):
        with pytest.raises(UserError, match=r"needs FILE.csv:COLUMN"):
            subsets.by_column(*pools, source)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="not a table"):
        subsets.by_column(*pools, f"{tmp_path / 'empty.csv'}:side")


@pytest.fixture
def blobs(monkeypatch, pools):
    """Features in the place of a model's: two far blobs, by whether the image's place is even, and
    one outlier."""

    def features(pool, spec, device):
        rng = np.random.default_rng(len(pool))
        return rng.normal(size=(len(pool), 3)) + 50.0 * (np.arange(len(pool))[:, None] % 2)

    monkeypatch.setattr(subsets, "_features", features)


@pytest.mark.parametrize("algorithm", ["kmeans", "hdbscan"])
def test_clusters_are_the_blobs_and_test_images_go_to_the_nearest(pools, blobs, algorithm):
    found = subsets.by_cluster(*pools, "", algorithm, 2, 0, "cpu")
    assert len(found.parts) == 2
    for own, pool in ((found.of_train, pools[0]), (found.of_test, pools[1])):
        assert len({*zip(own.tolist(), (np.arange(len(pool)) % 2).tolist(), strict=True)}) == 2


def test_a_cluster_of_one_image_is_refused(pools, blobs):
    with pytest.raises(DataError, match=r"subset \d+ has 1 training image"):
        subsets.by_cluster(*pools, "", "kmeans", len(pools[0]), 0, "cpu")
    with pytest.raises(UserError, match=r"clusters must be in 2..\d+"):
        subsets.by_cluster(*pools, "", "kmeans", 1, 0, "cpu")


def test_features_are_the_last_cls(pools, tiny, monkeypatch):
    monkeypatch.setattr(subsets, "checkpoint", SimpleNamespace(load_vit=lambda spec, device: tiny))
    found = subsets._features(pools[1], "x", "cpu")
    mean, std = (np.array(tiny.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = torch.tensor((pools[1].read(4) / 255 - mean) / std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        np.testing.assert_allclose(
            found[4], tiny.forward_features(pixels)[0, 0], rtol=1e-4, atol=1e-5
        )


def test_the_table_of_a_partition_is_a_column_again(pools, tmp_path):
    by_class = subsets.by_class(*pools)
    subsets.membership(by_class, *pools).to_csv(tmp_path / "subsets.csv", index=False)
    again = subsets.by_column(*pools, f"{tmp_path / 'subsets.csv'}:subset")
    for one, other in zip(by_class.parts, again.parts, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.own, other.own)
