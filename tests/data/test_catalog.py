"""Sets by name and path, the listing and the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kills import contents, kills

from bvit_interp.data.catalog import CATALOG, export, listing, open_samples
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.folders import ImageFolderSamples, ImageNetS
from bvit_interp.data.parquet import ParquetSamples
from bvit_interp.errors import DataError


@pytest.fixture(autouse=True)
def empty_home(tmp_path_factory, monkeypatch):
    monkeypatch.delenv("BVIT_INTERP_DATA", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def test_digits_need_no_path():
    assert open_samples("digits-s").name(0) == "digits-s/test/000000"
    assert open_samples("digits-s", "train").name(0) == "digits-s/train/000000"
    with pytest.raises(DataError, match="takes no path, got 'here'"):
        open_samples("digits-s:here")


def test_a_name_looks_under_the_data_folder(masked_set, monkeypatch):
    with pytest.raises(
        DataError, match=r"no folder data/imagenet-s, .*:PATH or set \$BVIT_INTERP_DATA"
    ):
        open_samples("imagenet-s")
    masked_set.rename(masked_set.parent / "imagenet-s")
    monkeypatch.setenv("BVIT_INTERP_DATA", str(masked_set.parent))
    assert isinstance(open_samples("imagenet-s"), ImageNetS)
    assert {row["name"]: row["where"].endswith("(found)") for row in listing()}["imagenet-s"]


def test_bare_paths_are_recognised(masked_set, put_image, put_parquet, tmp_path):
    assert isinstance(open_samples(str(masked_set)), ImageNetS)
    put_image(tmp_path / "plain" / "ant" / "1.png")
    assert open_samples(str(tmp_path / "plain")).name(0) == "ant/1.png"
    put_image(tmp_path / "splits" / "val" / "ant" / "1.png")
    put_image(tmp_path / "splits" / "train" / "ant" / "2.png")
    assert open_samples(str(tmp_path / "splits")).name(0) == "ant/1.png"
    assert open_samples(str(tmp_path / "splits"), "train").name(0) == "ant/2.png"
    picture = [np.zeros((32, 32, 3), np.uint8)]
    put_parquet(tmp_path / "flowers" / "test.parquet", picture, [0], ["iris", "daisy"])
    flowers = open_samples(str(tmp_path / "flowers"))
    assert isinstance(flowers, ParquetSamples)
    assert flowers.native_size is None
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    put_parquet(tmp_path / "ten" / "test.parquet", picture, [0], names)
    assert open_samples(str(tmp_path / "ten")).native_size == 32
    hundred = [str(i) for i in range(100)]
    put_parquet(tmp_path / "hundred" / "test.parquet", picture, [0], hundred, ("img", "fine_label"))
    assert open_samples(str(tmp_path / "hundred")).native_size == 32


def test_imagenet_has_its_splits_in_folders(tmp_path, put_image):
    put_image(tmp_path / "val" / "n01443537" / "1.JPEG")
    samples = open_samples(f"imagenet:{tmp_path}")
    assert isinstance(samples, ImageFolderSamples)
    assert samples.classes == ("n01443537",)
    with pytest.raises(DataError, match=r"no folder .*train"):
        open_samples(f"imagenet:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("spec", "split", "download", "message"),
    [
        ("digit", None, False, "no data set or folder 'digit'; data sets: digits-s, cifar10, "),
        (
            "imagenette:/wrong",
            None,
            False,
            "imagenette: no folder /wrong, which should hold train/test.parquet",
        ),
        ("imagenette", "val", False, "imagenette has no split 'val'; splits: train, test"),
        ("imagenet-boxes", "train", False, "imagenet-boxes has no split 'train'; splits: val"),
        ("digits-s", "val", False, "digits-s has no split 'val'; splits: train, test"),
        ("imagenet-s:/gone", None, False, "no folder /gone, which should hold validation/<class>"),
        ("cifar10:/gone", None, False, "say cifar10:PATH or set .* or use --download"),
        ("cifar10:", None, False, "the path after the colon is missing"),
        ("imagenet", None, True, "imagenet cannot be downloaded; these can: cifar10, cifar100"),
        (__file__, None, False, "is a file: give the folder"),
        (".", None, False, "no class folders"),
    ],
)
def test_bad_specs_name_the_choices(spec, split, download, message):
    with pytest.raises(DataError, match=message) as caught:
        open_samples(spec, split, download)
    assert "\n" not in str(caught.value)


def test_a_split_that_a_folder_lacks(tmp_path, put_image):
    put_image(tmp_path / "ant" / "1.png")
    with pytest.raises(DataError, match="no split 'train'; splits: one only"):
        open_samples(str(tmp_path), "train")
    put_image(tmp_path / "val" / "ant" / "1.png")
    with pytest.raises(DataError, match=r"no split 'train'; splits: val$"):
        open_samples(str(tmp_path), "train")


def test_the_listing_has_a_row_per_entry():
    rows = listing()
    assert [row["name"] for row in rows] == [entry.name for entry in CATALOG]
    assert rows[0] | {"summary": ""} == {
        "name": "digits-s",
        "splits": "train, test",
        "masks": "yes",
        "summary": "",
        "where": "built in",
    }
    assert rows[1]["where"] == "data/cifar10 (missing)"
    masks = {row["name"]: row["masks"] for row in rows}
    assert (masks["imagenette"], masks["imagenet-boxes"]) == ("no", "yes")


def test_exported_digits_read_back_the_same(tmp_path):
    scenes = DigitScenes("test", length=60)
    assert export(scenes, tmp_path / "out", progress=False) == 60
    back = open_samples(str(tmp_path / "out"))
    assert isinstance(back, ImageNetS)
    assert tuple(back.classes) == scenes.classes
    assert len(back) == 60
    for i in range(60):
        at = int(back.name(i).split("/")[1].removesuffix(".png"))
        for a, b in zip(back.read(i), scenes.read(at), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "out" / "validation").stat().st_mode


def test_export_spreads_its_limit(tmp_path):
    scenes = DigitScenes("test", length=60)
    assert export(scenes, tmp_path / "out", limit=3, progress=False) == 3
    files = {path.stem for path in (tmp_path / "out" / "validation").glob("*/*.png")}
    assert files == {"000000", "000020", "000040"}


def test_export_keeps_high_ids(tmp_path, masked_set, put_mask):
    ids = np.array([[0, 1, 1000, 2, 0, 0]] * 4)
    put_mask(masked_set / "validation-segmentation" / "ant" / "a.png", ids)
    (tmp_path / "out").mkdir()  # an empty folder is fine
    assert export(ImageNetS(masked_set), tmp_path / "out", progress=False) == 3
    back = ImageNetS(tmp_path / "out")
    np.testing.assert_array_equal(back.read(0)[2], ids)
    assert [back.name(i) for i in range(len(back))] == ["ant/a.png", "ant/b.png", "bee/c.png"]


def test_export_leaves_nothing_half_written(tmp_path, masked_set, put_mask):
    put_mask(masked_set / "validation-segmentation" / "bee" / "c.png", np.zeros((1, 1), int))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"bee/c\.png"):
        export(ImageNetS(masked_set), tmp_path / "out", progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_export_refuses_a_full_folder_and_sets_without_masks(tmp_path, masked_set):
    with pytest.raises(DataError, match="set is not empty"):
        export(DigitScenes(), masked_set, progress=False)
    with pytest.raises(
        DataError, match="only a set with masks .*: digits-s, imagenet-s, imagenet-boxes$"
    ):
        export(ImageFolderSamples(masked_set / "validation"), tmp_path / "out", progress=False)


def test_an_export_killed_anywhere_is_whole_after_the_same_call(tmp_path, monkeypatch, caplog):
    scenes = DigitScenes("test", length=3)
    export(scenes, tmp_path / "whole", progress=False)
    number = 0
    for out, written in kills(
        monkeypatch, tmp_path, lambda out: export(scenes, out, progress=False)
    ):
        assert written == 3
        assert contents(out) == contents(tmp_path / "whole")
        number += 1
    assert number > 2
    assert "holds this export already" in caplog.text
    assert len(contents(tmp_path / "whole")) == 2 * 3 + 2
    for other in (DigitScenes("train", length=3), DigitScenes("test", length=2)):
        with pytest.raises(DataError, match="whole is not empty"):
            export(other, tmp_path / "whole", progress=False)


def test_a_home_folder_that_nobody_has(monkeypatch, tmp_path):
    for spec in ("~nosuchuser/x", "imagenet:~nosuchuser/x"):
        with pytest.raises(DataError, match="~nosuchuser/x: no user") as error:
            open_samples(spec)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="~nosuchuser"):
        export(DigitScenes("test", length=1), Path("~nosuchuser/x"), progress=False)
    monkeypatch.setenv("BVIT_INTERP_DATA", "~nosuchuser")
    with pytest.raises(DataError, match="~nosuchuser"):
        listing()
    monkeypatch.setenv("BVIT_INTERP_DATA", "~/sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert listing()[1]["where"] == f"{tmp_path}/sets/cifar10 (missing)"
