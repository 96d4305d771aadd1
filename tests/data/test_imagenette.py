"""Imagenette from parquet files and official folders, and everything that cannot be it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bvit_interp.data.catalog import open_samples
from bvit_interp.data.folders import ImageFolderSamples
from bvit_interp.data.imagenette import common_side, wnids_of
from bvit_interp.data.labels import label_map
from bvit_interp.data.parquet import ParquetSamples, split_files
from bvit_interp.errors import DataError

TEN = [
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
]
WORDS = [
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
]
SQUARES = [np.full((8, 8, 3), 20 * value, np.uint8) for value in range(10)]  # 20 k is of class k


@pytest.fixture
def put_archive(put_image):
    """``put_archive(root, splits, height, width)``: official folders, an image a class and
    split."""

    def put(root, splits=("train", "val"), height=6, width=8):
        for split in splits:
            for wnid in TEN:
                put_image(root / split / wnid / f"{wnid}_1.JPEG", height, width)
        (root / "noisy_imagenette.csv").write_text("path,noisy_labels_0\n")
        return root

    return put


def test_parquet_of_wnids(tmp_path, put_parquet):
    labels, columns = list(range(10)), ("image", "label")
    put_parquet(tmp_path / "test.parquet", SQUARES, labels, TEN, columns)
    put_parquet(tmp_path / "train.parquet", SQUARES[::-1], labels[::-1], TEN, columns)
    samples = open_samples(f"imagenette:{tmp_path}")
    assert list(samples.classes) == TEN
    assert samples.native_size == 8
    assert not samples.has_masks
    assert samples.name(3) == f"{tmp_path.name}/test/000003"
    assert [samples.read(i)[1] for i in range(10)] == list(range(10))
    train = open_samples(f"imagenette:{tmp_path}", "train")
    assert [train.read(i)[1] for i in range(10)] == list(range(10))[::-1]
    assert train.read(0)[0][0, 0, 0] == 180


def test_classes_in_another_order_and_by_word_end_as_the_same_ten(tmp_path, put_parquet):
    """Names sorted as text, English springer, French horn, ...; the pictures tell the class."""
    order = sorted(range(10), key=lambda k: WORDS[k])
    assert order[:3] == [1, 5, 2]
    names = [WORDS[k] for k in order]
    place = [order.index(k) for k in range(10)]  # label in the file of class k
    put_parquet(tmp_path / "validation-00000-of-00002.parquet", SQUARES[:4], place[:4], names)
    put_parquet(tmp_path / "validation-00001-of-00002.parquet", SQUARES[4:], place[4:], names)
    for spec in (f"imagenette:{tmp_path}", str(tmp_path)):
        samples = open_samples(spec)
        assert list(samples.classes) == TEN
        for k in range(10):
            image, label, _ = samples.read(k)
            assert (image[0, 0, 0], label) == (20 * k, k)
        assert list(samples.labels) == list(range(10))


def test_names_that_tell_the_ten_and_names_that_do_not():
    assert wnids_of(TEN[::-1]) == tuple(TEN[::-1])
    assert wnids_of(WORDS) == tuple(TEN)
    written = ["tench, Tinca tinca", "english_springer", "Cassette Player", "chainsaw", *WORDS[4:]]
    assert wnids_of(written) == tuple(TEN)
    assert wnids_of(None) is None
    assert wnids_of(WORDS[:9]) is None
    assert wnids_of([*WORDS[:9], "tench"]) is None
    assert wnids_of([*WORDS, "beagle"]) is None
    assert wnids_of([*WORDS[:9], ""]) is None


@pytest.mark.parametrize("name", ["imagenette2", "imagenette2-320", "imagenette2-160"])
def test_official_folders_given_themselves_or_from_above(tmp_path, put_archive, name):
    root = put_archive(tmp_path / "sets" / name)
    folder = root / "val" / TEN[3]
    (folder / f"{TEN[3]}_1.JPEG").rename(folder / "ILSVRC2012_val_1.JPEG")
    for spec in (f"imagenette:{root}", f"imagenette:{root.parent}", str(root), str(root.parent)):
        samples = open_samples(spec)
        assert list(samples.classes) == TEN
        assert (len(samples), samples.native_size) == (10, None)
        assert samples.name(3) == f"{TEN[3]}/ILSVRC2012_val_1.JPEG"
        assert [samples.read(i)[1] for i in range(10)] == list(range(10))
        assert open_samples(spec, "train").name(3) == f"{TEN[3]}/{TEN[3]}_1.JPEG"


def test_a_bare_path_is_recognised_by_its_ten_folders_only(tmp_path, put_archive):
    root = put_archive(tmp_path / "mine", ("val",), 8, 8)
    assert open_samples(str(root)).native_size == 8
    (root / "val" / TEN[0]).rename(root / "val" / "n01443537")
    samples = open_samples(str(root))
    assert type(samples) is ImageFolderSamples
    assert samples.native_size is None


def test_native_size_is_true_of_every_image(tmp_path, put_archive, put_image):
    root = put_archive(tmp_path / "imagenette2", ("val",), 8, 8)
    assert open_samples(str(root)).native_size == 8
    for height, width in ((8, 9), (9, 9)):
        put_image(root / "val" / TEN[9] / "last.png", height, width)
        assert open_samples(str(root)).native_size is None


def test_common_side_reads_headers_alone(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:-20])
    assert common_side([tmp_path / "a.jpg", whole, tmp_path / "cut.jpg"]) == 40
    assert common_side([b"no image", None, tmp_path / "gone.jpg", whole]) == 40
    assert common_side([b"no image", None]) is None
    assert common_side([]) is None


def test_labels_of_a_model_of_imagenet(tmp_path, put_archive, make):
    """Places among ImageNet's sorted wnids: 0 tench, 217 English springer, ..., 701 parachute."""
    samples = open_samples(str(put_archive(tmp_path / "imagenette2")))
    places = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert label_map(samples, make(num_classes=1000)).tolist() == places
    model = make()
    model.pretrained_cfg["label_names"] = TEN[::-1]
    assert label_map(samples, model).tolist() == list(range(10))[::-1]


def refusal(spec, split=None):
    """The one line that refuses a set."""
    with pytest.raises(DataError) as caught:
        open_samples(spec, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_other_classes_in_parquet_are_refused(tmp_path, put_parquet):
    others = [
        [*TEN[:9], "n01443537"],
        [*WORDS[:9], "parrot"],
        [*TEN, "n01443537"],
        [*WORDS[:9], "tench"],
    ]
    for names in (None, *others):
        put_parquet(tmp_path / "test.parquet", SQUARES, list(range(10)), names)
        message = refusal(f"imagenette:{tmp_path}")
        assert message.startswith(f"{tmp_path}: {len(names or TEN)} classes, called ")
        assert "n01440764 (tench)" in message
        assert "n03888257 (parachute)" in message
        assert type(open_samples(str(tmp_path))) is ParquetSamples  # as a bare path, any set
    put_parquet(tmp_path / "test.parquet", SQUARES[:9], [*range(8), 9], WORDS)
    assert f"{tmp_path}/test: no image of n03445777;" in refusal(f"imagenette:{tmp_path}")


def test_a_split_that_parquet_lacks(tmp_path, put_parquet):
    put_parquet(tmp_path / "train.parquet", SQUARES, list(range(10)), TEN)
    message = refusal(f"imagenette:{tmp_path}")
    assert str(tmp_path) in message
    assert "test.parquet, test-*.parquet, validation.parquet, validation-*.parquet" in message
    assert "nor val/<wnid>/*.JPEG" in message
    (tmp_path / "train.parquet").rename(tmp_path / "test.parquet")
    assert "neither train.parquet, train-*.parquet nor train/" in refusal(str(tmp_path), "train")
    assert "has no split 'val'; splits: train, test" in refusal(str(tmp_path), "val")


def test_folders_that_cannot_be_right(tmp_path, put_archive, put_image):
    root = put_archive(tmp_path / "imagenette2", ("train",))
    assert f"{root} has neither test.parquet" in refusal(str(root))
    assert "nor val/<wnid>/*.JPEG" in refusal(f"imagenette:{root}")
    put_archive(root, ("val",))
    (root / "val" / TEN[2] / f"{TEN[2]}_1.JPEG").unlink()
    assert f"{root}/val: no image of n02979186" in refusal(str(root))
    (root / "val" / TEN[2]).rmdir()
    assert f"{root}/val: no folder n02979186;" in refusal(f"imagenette:{root}")
    put_image(root / "val" / TEN[2] / "1.JPEG")
    put_image(root / "val" / "n01443537" / "1.JPEG")
    message = refusal(f"imagenette:{root}")
    assert f"{root}/val: folders of no class of imagenette: n01443537; try folder:" in message
    gone = tmp_path / "gone"
    assert f"no folder {gone}, which should hold train/test.parquet" in refusal(
        f"imagenette:{gone}"
    )


def test_two_archives_in_one_folder_are_not_chosen_between(tmp_path, put_archive):
    for name in ("imagenette2-160", "imagenette2-320"):
        put_archive(tmp_path / name)
    message = refusal(str(tmp_path))
    assert f"holds imagenette2-320, imagenette2-160: name one, imagenette:{tmp_path}" in message


def test_the_shared_copy(real):
    """Counts, classes and sizes as the set's README states them."""
    pq = pytest.importorskip("pyarrow.parquet")
    root = real("imagenette")
    for split, count in (("train", 9103), ("test", 3925)):
        samples = open_samples(f"imagenette:{root}", split)
        assert len(samples) == count
        assert list(samples.classes) == TEN
        assert samples.native_size == 224
        tables = [pq.read_table(file) for file in split_files(root, split)]
        rows = [row for table in tables for row in table["image"].to_pylist()]
        paths = [row["path"] for row in rows]  # train/n02979186/x.JPEG
        assert [path.split("/")[1] for path in paths] == [TEN[label] for label in samples.labels]
        assert samples.read(count - 1)[0].shape == (224, 224, 3)
    assert len(open_samples(str(root))) == 3925


def test_the_shared_boxes_in_imagenet_s_layout(real):
    """300 images, masks of the images' own size with the folder's class alone, 0.44 of the area."""
    samples = open_samples(f"imagenet-s:{real('imagenette_boxes_s')}")
    assert list(samples.classes) == TEN
    assert len(samples) == 300
    area = []
    for i in range(300):
        image, label, mask = samples.read(i)
        assert image.shape == (224, 224, 3)
        assert set(np.unique(mask)) <= {0, label + 1}
        area.append((mask == label + 1).mean())
    assert np.mean(area) == pytest.approx(0.44, abs=0.005)
