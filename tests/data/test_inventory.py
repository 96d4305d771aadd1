"""What is found, what is left out, and that it is said: folders as people have them."""

from __future__ import annotations

import codecs
import os

import numpy as np
import pytest
from PIL import Image

from bvit_interp.data.catalog import open_samples
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.files import escaped, say
from bvit_interp.data.folders import ImageFolderSamples, ImageNetS
from bvit_interp.data.inventory import about
from bvit_interp.data.samples import read_image
from bvit_interp.errors import DataError


@pytest.fixture(autouse=True)
def nothing_said_before():
    say.cache_clear()


def names(samples):
    return [samples.name(i) for i in range(len(samples))]


def refusal(make, *args):
    with pytest.raises(DataError) as caught:
        make(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- folders -------------------------------------------------------------------------------------


def test_images_one_folder_deeper_are_of_the_class_and_counted(tmp_path, put_image, caplog):
    for name in ("cat/0", "cat/1", "dog/0", "dog/more/0", "dog/more/1"):
        put_image(tmp_path / f"{name}.png")
    samples = ImageFolderSamples(tmp_path)
    assert names(samples) == [
        "cat/0.png",
        "cat/1.png",
        "dog/0.png",
        "dog/more/0.png",
        "dog/more/1.png",
    ]
    assert [samples.read(i)[1] for i in range(5)] == [0, 0, 1, 1, 1]
    (note,) = samples.notes
    assert "2 images of 5" in note
    assert "dog/more/0.png" in note
    assert caplog.messages == [note]


def test_folders_of_class_folders_are_no_classes(tmp_path, put_image):
    for name in ("first/cat", "first/dog", "second/cat"):
        put_image(tmp_path / name / "0.png")
    assert str(tmp_path / "first") in refusal(ImageFolderSamples, tmp_path)
    assert ImageFolderSamples(tmp_path / "first").classes == ("cat", "dog")


def test_what_is_left_out_is_counted_and_named(tmp_path, put_image):
    put_image(tmp_path / "cat" / "0.JPG")
    (tmp_path / "cat" / "list.txt").write_text("")
    (tmp_path / "cat" / "scan.heic").write_text("")
    (tmp_path / "spare").mkdir()
    (tmp_path / "cat" / ".hidden").write_text("")
    samples = ImageFolderSamples(tmp_path)
    assert samples.classes == ("cat",)
    assert names(samples) == ["cat/0.JPG"]
    files, folders = samples.notes
    assert "2 files" in files
    assert "cat/list.txt, cat/scan.heic" in files
    assert "1 folder" in folders
    assert "spare" in folders
    assert about(samples) == {
        "images": 1,
        "classes": 1,
        "images_per_class": {"least": 1, "most": 1},
        "notes": samples.notes,
    }
    assert about(DigitScenes(length=3)) == {"images": 3, "classes": 10, "notes": []}


def test_pipes_are_never_opened(tmp_path, put_image, masked_set):
    put_image(tmp_path / "plain" / "cat" / "0.png")
    os.mkfifo(tmp_path / "plain" / "cat" / "1.png")
    (tmp_path / "plain" / "cat" / "2.png").symlink_to(tmp_path / "plain" / "cat" / "1.png")
    (tmp_path / "plain" / "cat" / "3.png").symlink_to(tmp_path / "gone.png")
    samples = ImageFolderSamples(tmp_path / "plain")
    assert names(samples) == ["cat/0.png", "cat/2.png", "cat/3.png"]
    assert "cat/1.png" in samples.notes[0]
    assert "not a regular file" in refusal(samples.read, 1)
    assert "no such file" in refusal(samples.read, 2)
    masks = masked_set / "validation-segmentation"
    (masks / "ant" / "a.png").unlink()
    os.mkfifo(masks / "ant" / "a.png")
    assert "1 images without a mask" in refusal(ImageNetS, masked_set)
    (masks / "ant" / "a.png").unlink()
    (masks / "ant" / "a.png").symlink_to(tmp_path / "plain" / "cat" / "1.png")
    assert "not a regular file" in refusal(ImageNetS(masked_set).read, 0)
    os.mkfifo(masked_set / "categories.txt")
    assert "categories.txt: not a regular file" in refusal(ImageNetS, masked_set)


def test_names_that_are_not_utf_8_are_escaped_and_reported(tmp_path, put_image):
    picture = put_image(tmp_path / "x.png")
    odd = tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png")
    try:
        odd.parent.mkdir()
        (tmp_path / "x.png").rename(odd)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    samples = ImageFolderSamples(tmp_path)
    assert samples.classes == (r"caf\xe9",)
    assert names(samples) == [r"caf\xe9/\xff.png"]
    np.testing.assert_array_equal(samples.read(0)[0], picture)
    (note,) = samples.notes
    assert r"caf\xe9/\xff.png" in note
    note.encode()
    odd.write_bytes(b"no image")
    refusal(samples.read, 0).encode()
    assert escaped("é") == "é"


# ---- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["valid", "dev", "val", "validation", "test", "Valid"])
def test_the_images_that_are_not_for_training_are_read(tmp_path, put_image, caplog, split):
    put_image(tmp_path / "train" / "ant" / "trained.png")
    put_image(tmp_path / split / "ant" / "held_out.png")
    assert names(open_samples(str(tmp_path))) == ["ant/held_out.png"]
    assert any(split.lower() in line and "train" in line for line in caplog.messages)
    assert names(open_samples(str(tmp_path), "train")) == ["ant/trained.png"]
    assert names(open_samples(str(tmp_path), split.lower())) == ["ant/held_out.png"]


@pytest.mark.parametrize("other", [None, "held-out"])
def test_training_images_are_read_only_when_asked_for(tmp_path, put_image, other):
    put_image(tmp_path / "train" / "ant" / "1.png")
    if other:
        put_image(tmp_path / other / "ant" / "1.png")
    assert "--split train" in refusal(open_samples, str(tmp_path))
    assert len(open_samples(str(tmp_path), "train")) == 1


def test_a_class_may_be_called_train(tmp_path, put_image):
    for name in ("car/1", "train/1", "train/old/2"):
        put_image(tmp_path / f"{name}.png")
    assert open_samples(str(tmp_path)).classes == ("car", "train")


def test_tiny_imagenets_layout(tmp_path, put_image):
    for wnid in ("n01443537", "n01440764"):
        put_image(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    put_image(tmp_path / "test" / "images" / "test_0.JPEG")
    pictures = [put_image(tmp_path / "val" / "images" / f"val_{i}.png", seed=i) for i in range(3)]
    lines = [f"val_{i}.png\tn0144{end}\t0\t0\t9\t9" for i, end in ((0, 3537), (2, "0764"))]
    list_of = tmp_path / "val" / "val_annotations.txt"
    list_of.write_text("\n".join(lines))
    val = open_samples(str(tmp_path))
    assert val.classes == ("n01440764", "n01443537")
    assert names(val) == ["n01440764/val_2.png", "n01443537/val_0.png"]
    image, label, mask = val.read(0)
    np.testing.assert_array_equal(image, pictures[2])
    assert (label, mask) == (0, None)
    assert "1 file" in val.notes[0]
    assert "val_1.png" in val.notes[0]
    assert names(open_samples(str(tmp_path), "train"))[1] == "n01443537/images/n01443537_0.JPEG"
    for text, wrong in (("\n".join(lines * 2), "twice"), ("a b", "line 1"), ("x.png\ta", "x.png")):
        list_of.write_text(text)
        assert wrong in refusal(open_samples, str(tmp_path))


# ---- masks and lists -----------------------------------------------------------------------------


def test_masks_with_suffixes_in_any_case(masked_set):
    for file in (masked_set / "validation-segmentation").glob("*/*.png"):
        file.rename(file.with_suffix(".PNG"))
    assert ImageNetS(masked_set).read(2)[2].tolist() == [[2, 2, 2, 0, 0, 0]] * 4


def test_two_files_for_one_mask_are_refused(masked_set, put_image, put_mask):
    put_image(masked_set / "validation" / "ant" / "a.png")
    assert "two images are called ant/a" in refusal(ImageNetS, masked_set)
    (masked_set / "validation" / "ant" / "a.png").unlink()
    put_mask(masked_set / "validation-segmentation" / "ant" / "a.PNG", np.zeros((4, 6), int))
    if len(list((masked_set / "validation-segmentation" / "ant").glob("a.*"))) == 2:
        assert "two masks are called ant/a" in refusal(ImageNetS, masked_set)


def test_a_list_with_a_byte_order_mark(masked_set):
    lists = b"bee\r\nant\r\n"
    (masked_set / "categories.txt").write_bytes(codecs.BOM_UTF8 + lists)
    assert ImageNetS(masked_set).classes == ("bee", "ant")


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("bee\nant".encode("utf-16"), "not UTF-8"),
        (b"b\xe9e\nant", "not UTF-8"),
        (b"ant\nbee\nant", "'ant' comes twice"),
    ],
)
def test_a_list_that_cannot_be_one(masked_set, content, wrong):
    (masked_set / "categories.txt").write_bytes(content)
    message = refusal(ImageNetS, masked_set)
    assert "categories.txt" in message
    assert wrong in message


def test_a_folder_without_images_does_not_shift_the_ids_of_masks(masked_set):
    (masked_set / "validation" / "ape").mkdir()
    assert "no images in ape" in refusal(ImageNetS, masked_set)
    (masked_set / "categories.txt").write_text("ant\nape\nbee")
    assert ImageNetS(masked_set).classes == ("ant", "ape", "bee")


# ---- pixels --------------------------------------------------------------------------------------


def put(path, array):
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    deep = np.array([[0, 128, 129, 257, 65535 // 2, 65535]], np.uint16)
    file = put(tmp_path / f"x.{suffix}", deep)
    image = read_image(file, str(file))
    assert image.shape == (1, 6, 3)
    assert image[0].tolist() == [[value] * 3 for value in (0, 0, 1, 1, 127, 255)]
    assert read_image(file.read_bytes(), "x").tolist() == image.tolist()


def test_a_deep_portable_greymap(tmp_path):
    content = b"P5 2 1 65535\n" + np.array([257, 65535], ">u2").tobytes()
    assert read_image(content, "x")[0, :, 0].tolist() == [1, 255]


def test_floats_are_taken_from_0_to_1(tmp_path):
    file = put(tmp_path / "x.tif", np.array([[0, 0.25, 0.5, 1]], np.float32))
    assert read_image(file, "x")[0, :, 2].tolist() == [0, 64, 128, 255]
    for wrong in ([1.01, 0], [-0.1, 0], [float("nan"), 0], [float("inf"), 0], [200, 30]):
        file = put(tmp_path / "x.tif", np.array([wrong], np.float32))
        assert "x.tif: its pixels are floats beyond 0..1" in refusal(read_image, file, "x.tif")


def test_integers_of_32_bits_are_refused(tmp_path):
    file = put(tmp_path / "x.tif", np.array([[0, 70_000]], np.int32))
    assert "x.tif: its pixels are 32-bit integers" in refusal(read_image, file, "x.tif")


def test_an_orientation_is_not_applied_and_that_is_said_once(tmp_path, caplog):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    for name in "ab":
        Image.new("RGB", (6, 4)).save(tmp_path / f"{name}.jpg", exif=exif)
        assert read_image(tmp_path / f"{name}.jpg", name).shape == (4, 6, 3)
    (line,) = caplog.messages
    assert "EXIF" in line
