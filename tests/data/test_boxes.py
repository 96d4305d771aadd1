"""ImageNet's boxes as masks, against pixels drawn by hand, and every line that refuses a set."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bvit_interp.cli import main
from bvit_interp.data.boxes import Box, Boxes, ImageNetBoxes
from bvit_interp.data.catalog import export, open_samples
from bvit_interp.data.folders import ImageNetS
from bvit_interp.data.labels import label_map
from bvit_interp.errors import DataError

TENCH, SPRINGER, CHURCH = "n01440764", "n02102040", "n03028079"
HEADER = "ImageId,PredictionString\n"
FILE = "LOC_val_solution.csv"
ROW = f"a,{TENCH} 0 0 1 1\n"
ROWS = f"""{HEADER}a,{TENCH} 1 0 2 1
b,{SPRINGER} 0 2 0 3 {SPRINGER} 0 3 5 3{" "}
elsewhere,n15075141 0 0 9999 9999
"""
MASKS = {  # of images 6 wide and 4 high: the boxes above, drawn by hand
    "a": ["011000", "011000", "000000", "000000"],
    "b": ["000000", "000000", "200000", "222222"],
}


@pytest.fixture
def boxed(tmp_path, put_image):
    """Class folders with a CSV file: a tench of one box, a springer of two that share a pixel."""
    put_image(tmp_path / "val" / TENCH / "a.JPEG", seed=1)
    put_image(tmp_path / "val" / SPRINGER / "b.JPEG", seed=2)
    (tmp_path / FILE).write_text(ROWS)
    return tmp_path


@pytest.fixture
def put_xml():
    """``put_xml(path, size, *objects)``: Pascal VOC's way, objects as (wnid, x1, y1, x2, y2)."""

    def put(path, size, *objects):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "<annotation><folder>val</folder>"
        if size is not None:
            text += f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        for wnid, *corners in objects:
            named = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False)
            inner = "".join(f"<{k}>{v}</{k}>" for k, v in named)
            text += f"<object><name>{wnid}</name><bndbox>{inner}</bndbox></object>"
        path.write_text(text + "</annotation>")

    return put


def drawn(mask):
    """A mask as rows of digits."""
    return ["".join(map(str, row)) for row in mask]


def opened(root, read):
    """The set, of which image `read` has been read unless it is None."""
    samples = open_samples(f"imagenet-boxes:{root}")
    if read is not None:
        samples.read(read)
    return samples


def refusal(root, read=None):
    """The one line that refuses a set, or its image `read`."""
    with pytest.raises(DataError) as caught:
        opened(root, read)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_masks_from_csv(boxed):
    samples = open_samples(f"imagenet-boxes:{boxed}")
    assert isinstance(samples, ImageNetBoxes)
    assert samples.classes == (TENCH, SPRINGER)
    assert samples.has_masks
    assert samples.native_size is None
    assert len(samples) == 2
    assert [samples.name(i) for i in range(2)] == [f"{TENCH}/a.JPEG", f"{SPRINGER}/b.JPEG"]
    for i, stem in enumerate("ab"):
        image, label, mask = samples.read(i)
        assert label == i
        assert mask.dtype == np.int32
        assert drawn(mask) == MASKS[stem]
        with Image.open(boxed / "val" / samples.name(i)) as stored:
            np.testing.assert_array_equal(image, np.array(stored))


def test_the_first_box_touches_just_its_own_pixels(boxed):
    """Columns and rows count from 0 and both ends are inside: 0 0 0 0 is the upper left pixel."""
    (boxed / FILE).write_text(f"{HEADER}a,{TENCH} 0 0 0 0\nb,{SPRINGER} 5 3 5 3\n")
    samples = ImageNetBoxes(boxed)
    assert np.argwhere(samples.read(0)[2]).tolist() == [[0, 0]]
    assert np.argwhere(samples.read(1)[2]).tolist() == [[3, 5]]


@pytest.mark.parametrize("place", ["ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "val"])
def test_flat_images_have_the_class_of_their_boxes(boxed, place):
    """b sorts after a as a name, yet its class would come first: images are sorted by class."""
    for wnid, stem in ((TENCH, "a"), (SPRINGER, "b")):
        target = boxed / "flat" / place / f"{stem}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        (boxed / "val" / wnid / f"{stem}.JPEG").rename(target)
    swapped = ROWS.replace("a,", "A,").replace("b,", "a,").replace("A,", "b,")
    (boxed / "flat" / FILE).write_text(swapped)
    samples = open_samples(f"imagenet-boxes:{boxed / 'flat'}")
    assert samples.classes == (TENCH, SPRINGER)
    assert [samples.name(i) for i in range(2)] == [f"{TENCH}/b.JPEG", f"{SPRINGER}/a.JPEG"]
    assert [drawn(samples.read(i)[2]) for i in range(2)] == [MASKS["a"], MASKS["b"]]


XML = ["ILSVRC/Annotations/CLS-LOC/val", "Annotations/CLS-LOC/val", "bbox/val", "bboxes/val", "val"]


@pytest.mark.parametrize("place", XML)
def test_masks_from_xml_which_goes_before_the_csv(boxed, put_xml, place):
    (boxed / FILE).write_text("not read")
    put_xml(boxed / place / "a.xml", (6, 4), (TENCH, 1, 0, 2, 1))
    two = (SPRINGER, 0, 2, 0, 3), (SPRINGER, 0, 3, 5, 3)
    put_xml(boxed / place / "b.xml", (6, 4), *two, (TENCH, 1, 0, 2, 0))
    put_xml(boxed / place / "elsewhere.xml", (6, 4), ("person", 0, 0, 9, 9))
    samples = ImageNetBoxes(boxed)
    assert drawn(samples.read(0)[2]) == MASKS["a"]
    assert drawn(samples.read(1)[2]) == MASKS["b"]  # without its tench


def test_boxes_are_scaled_by_the_size_that_the_xml_states(boxed, put_xml):
    """12 x 4 squashed to 6 x 4, and 3 x 2 blown up to 6 x 4, by hand.

    Squashed: pixel x shows columns 2x and 2x + 1 with its centre at their border, 2x + 1: columns
    3..6 hold the centres of pixels 1 (at 3) and 2 (at 5), not of 3 (at 7). Blown up: column 1
    becomes 2 and 3, row 0 becomes 0 and 1.
    """
    put_xml(boxed / "bbox" / "val" / "a.xml", (12, 4), (TENCH, 3, 1, 6, 2))
    put_xml(boxed / "bbox" / "val" / "b.xml", (3, 2), (SPRINGER, 1, 0, 1, 0))
    samples = ImageNetBoxes(boxed)
    assert drawn(samples.read(0)[2]) == ["000000", "011000", "011000", "000000"]
    assert drawn(samples.read(1)[2]) == ["002200", "002200", "000000", "000000"]


@pytest.mark.parametrize("size", [(224, 224), (37, 91), (500, 375), (1001, 13)])
def test_scaled_boxes_are_what_resizing_the_mask_would_give(size):
    """Against PIL's nearest neighbour of the mask drawn at the annotated size."""
    random = np.random.default_rng(0)
    for _ in range(20):
        left, right = sorted(random.choice(500, 2, replace=False).tolist())
        top, bottom = sorted(random.choice(375, 2, replace=False).tolist())
        right, bottom = max(right, min(left + 40, 499)), max(bottom, min(top + 40, 374))
        whole = np.zeros((375, 500), np.uint8)
        whole[top : bottom + 1, left : right + 1] = 7
        wanted = np.array(Image.fromarray(whole).resize(size, Image.Resampling.NEAREST))
        boxes = Boxes("x", (Box(TENCH, left, top, right, bottom),), (500, 375))
        np.testing.assert_array_equal(boxes.mask(TENCH, 7, size[1], size[0]), wanted)


def test_a_box_too_thin_for_a_centre_keeps_one_pixel():
    """37 pixels of 13.5 columns each: the centre of pixel 0 is in column 6, not in column 0."""
    for column, pixel in ((6, 0), (0, 0), (499, 36), (13, 0), (14, 1)):
        mask = Boxes("x", (Box(TENCH, column, 0, column, 374),), (500, 375)).mask(TENCH, 1, 375, 37)
        assert np.unique(np.argwhere(mask)[:, 1]).tolist() == [pixel]


def test_the_one_pixel_of_counting_from_1_is_cut_off(boxed, put_xml):
    (boxed / FILE).write_text(f"{HEADER}a,{TENCH} 1 1 6 4\nb,{SPRINGER} 0 2 0 3")
    assert drawn(ImageNetBoxes(boxed).read(0)[2]) == ["000000", "011111", "011111", "011111"]
    put_xml(boxed / "bbox" / "val" / "a.xml", (12, 8), (TENCH, 2, 2, 12, 8))
    put_xml(boxed / "bbox" / "val" / "b.xml", None, (SPRINGER, 0, 2, 0, 3))
    assert drawn(ImageNetBoxes(boxed).read(0)[2]) == ["000000", "011111", "011111", "011111"]


@pytest.mark.parametrize("corners", ["0 0 7 3", "0 0 5 5", "6 0 6 3", "0 4 5 4"])
def test_a_box_beyond_its_image_names_file_and_box(boxed, put_xml, corners):
    """Without a stated size the image is what counts; with one, the picture that was annotated."""
    (boxed / FILE).write_text(f"{HEADER}{ROW}b,{SPRINGER} {corners}\n")
    beyond = f"box {SPRINGER} {corners} lies beyond its image of 6 x 4 pixels"
    assert refusal(boxed, read=1) == f"{boxed}/LOC_val_solution.csv, line 3: {beyond}"
    put_xml(boxed / "bbox" / "val" / "a.xml", (6, 4), (TENCH, 0, 0, 1, 1))
    put_xml(boxed / "bbox" / "val" / "b.xml", None, (SPRINGER, *corners.split()))
    assert refusal(boxed, read=1) == f"{boxed}/bbox/val/b.xml: {beyond}"
    put_xml(boxed / "bbox" / "val" / "b.xml", (6, 4), (SPRINGER, *corners.split()))
    assert refusal(boxed) == f"{boxed}/bbox/val/b.xml: {beyond}"
    put_xml(boxed / "bbox" / "val" / "b.xml", (60, 40), (SPRINGER, *corners.split()))
    assert ImageNetBoxes(boxed).read(1)[2].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": its first line is not ImageId,PredictionString"),
        ("image,boxes\n", ": its first line is not ImageId,PredictionString"),
        (f"{HEADER}a\n", ", line 2: 1 fields, not ImageId and PredictionString"),
        (f"{HEADER}a,{TENCH} 0 0 1 1,b\n", ", line 2: 3 fields, not ImageId and PredictionString"),
        (f"{HEADER}a,{TENCH} 0 0 1\n", ", line 2: 4 words; a box is wnid x1 y1 x2 y2"),
        (f"{HEADER}a,{TENCH} 0 0 1 1 {TENCH}\n", ", line 2: 6 words; a box is wnid x1 y1 x2 y2"),
        (f"{HEADER}a,{TENCH} 0 0 1 x\n", f", line 2: box {TENCH} 0 0 1 x: needs a wnid and whole"),
        (f"{HEADER}a,{TENCH} 0 0 1 1.5\n", f", line 2: box {TENCH} 0 0 1 1.5: needs a wnid and"),
        (f"{HEADER}a,{TENCH} 2 0 1 1\n", f", line 2: box {TENCH} 2 0 1 1: begins before 0 or ends"),
        (f"{HEADER}a,{TENCH} 0 2 1 1\n", f", line 2: box {TENCH} 0 2 1 1: begins before 0 or ends"),
        (
            f"{HEADER}a,{TENCH} -1 0 1 1\n",
            f", line 2: box {TENCH} -1 0 1 1: begins before 0 or ends",
        ),
        (f"{ROWS}a,{TENCH} 0 0 1 1\n", ", line 5: 'a' has a line already"),
        (
            f"{HEADER}{ROW}b,{CHURCH} 0 0 1 1\n",
            f", line 3: a box of '{CHURCH}', none of the folders",
        ),
        (
            f"{HEADER}{ROW}b,{TENCH} 0 0 1 1\n",
            f", line 3: boxes of {TENCH}, but b.JPEG is {SPRINGER}",
        ),
    ],
)
def test_csv_that_cannot_be_right(boxed, text, message):
    (boxed / FILE).write_text(text)
    assert message in refusal(boxed)
    assert refusal(boxed).startswith(f"{boxed}/LOC_val_solution.csv")


def test_csv_that_is_no_text(boxed):
    (boxed / FILE).write_bytes(b"ImageId,PredictionString\n\xff\xfe\x00\n")
    assert refusal(boxed).startswith(f"{boxed}/LOC_val_solution.csv: cannot be read as CSV (")


def test_csv_of_another_system(boxed):
    """A byte order mark, CRLF, quotes and empty lines change nothing."""
    text = ROWS.replace(f"{TENCH} 1 0 2 1", f'"{TENCH} 1 0 2 1"').replace("\n", "\r\n") + "\r\n"
    (boxed / FILE).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert drawn(ImageNetBoxes(boxed).read(0)[2]) == MASKS["a"]


@pytest.mark.parametrize("text", [f"{HEADER}{ROW}", f"{HEADER}{ROW}b, \n"])
def test_images_without_boxes_are_counted_and_named(boxed, text):
    (boxed / FILE).write_text(text)
    assert refusal(boxed) == f"1 images of {boxed}/val have no box in {boxed}/{FILE}: b.JPEG"


def test_images_without_boxes_in_xml(boxed, put_xml):
    put_xml(boxed / "bbox" / "val" / "a.xml", (6, 4), (TENCH, 0, 0, 1, 1))
    assert refusal(boxed) == f"1 images of {boxed}/val have no box in {boxed}/bbox/val: b.JPEG"
    put_xml(boxed / "bbox" / "val" / "b.xml", (6, 4))
    assert refusal(boxed) == f"1 images of {boxed}/val have no box in {boxed}/bbox/val: b.JPEG"


@pytest.mark.parametrize(
    ("size", "objects", "message"),
    [
        (None, [("person", 0, 0, 1, 1)], "a box of 'person', none of the folders of"),
        (None, [(TENCH, 0, 0, 1, 1)], f"boxes of {TENCH}, but b.JPEG is {SPRINGER}"),
        (None, [("", 0, 0, 1, 1)], "box without a name 0 0 1 1: needs a wnid and"),
        (None, [(SPRINGER, 0, 0, 1)], f"box {SPRINGER} 0 0 1 None: needs a wnid and whole numbers"),
        (None, [(SPRINGER, 0, 0, 1, "one\ntwo")], f"box {SPRINGER} 0 0 1 one two: needs"),
        (None, [(SPRINGER, 3, 0, 1, 1)], f"box {SPRINGER} 3 0 1 1: begins before 0 or"),
        ((0, 4), [(SPRINGER, 0, 0, 1, 1)], "states a size of '0' x '4' pixels"),
        (("six", 4), [(SPRINGER, 0, 0, 1, 1)], "states a size of 'six' x '4' pixels"),
    ],
)
def test_xml_that_cannot_be_right(boxed, put_xml, size, objects, message):
    put_xml(boxed / "bbox" / "val" / "a.xml", (6, 4), (TENCH, 0, 0, 1, 1))
    put_xml(boxed / "bbox" / "val" / "b.xml", size, *objects)
    assert refusal(boxed).startswith(f"{boxed}/bbox/val/b.xml: {message}")


def test_xml_that_is_cut_off(boxed, put_xml):
    put_xml(boxed / "bbox" / "val" / "a.xml", (6, 4), (TENCH, 0, 0, 1, 1))
    (boxed / "bbox" / "val" / "b.xml").write_text("<annotation><object>")
    assert refusal(boxed).startswith(f"{boxed}/bbox/val/b.xml: cannot be read as XML (")


def test_flat_images_need_one_known_class(tmp_path, put_image):
    put_image(tmp_path / "val" / "a.JPEG")
    file = tmp_path / "LOC_val_solution.csv"
    file.write_text(f"{HEADER}a,{TENCH} 0 0 1 1 {CHURCH} 0 0 1 1\n")
    two = f"boxes of {TENCH}, {CHURCH}: which is the image's class?"
    assert refusal(tmp_path) == f"{file}, line 2: {two}"
    file.write_text(f"{HEADER}a,n00000001 0 0 1 1\n")
    assert refusal(tmp_path) == f"{file}, line 2: a box of 'n00000001', none of ImageNet's 1000"


def test_missing_images_and_missing_boxes(tmp_path, put_image):
    places = "val or ILSVRC/Data/CLS-LOC/val"
    assert refusal(tmp_path) == f"{tmp_path}: no folder {places} with the validation images"
    (tmp_path / "val").mkdir()
    assert refusal(tmp_path) == f"{tmp_path}/val: no images"
    put_image(tmp_path / "val" / "a.JPEG")
    assert refusal(tmp_path) == (
        f"{tmp_path}: no boxes: neither LOC_val_solution.csv nor XML files in"
        " ILSVRC/Annotations/CLS-LOC/val or bbox/val"
    )
    (tmp_path / "val" / TENCH).mkdir()
    assert refusal(tmp_path) == f"{tmp_path}/val: images beside class folders, a.JPEG for one"
    assert "no folder /gone, which should hold val/<wnid>/*.JPEG or Kaggle's" in refusal("/gone")


def test_a_corrupt_image_is_named(boxed):
    (boxed / "val" / TENCH / "a.JPEG").write_bytes(b"no image")
    file = boxed / "val" / TENCH / "a.JPEG"
    assert refusal(boxed, read=0) == f"{file}: the image cannot be read (no image file)"


def test_labels_of_a_model_of_imagenet(boxed, make):
    assert label_map(ImageNetBoxes(boxed), make(num_classes=1000)).tolist() == [0, 217]


def test_boxes_are_exported_in_imagenet_s_layout(boxed, tmp_path):
    samples = ImageNetBoxes(boxed)
    assert export(samples, tmp_path / "out", progress=False) == 2
    back = open_samples(str(tmp_path / "out"))
    assert isinstance(back, ImageNetS)
    assert back.classes == samples.classes
    for i in range(2):
        for a, b in zip(back.read(i), samples.read(i), strict=True):
            np.testing.assert_array_equal(a, b)
    assert sorted(path.name for path in boxed.iterdir()) == ["LOC_val_solution.csv", "out", "val"]


def test_the_pointing_game_runs_on_them(boxed, tmp_path):
    model = ["--ckpt", "timm:vit_tiny_patch16_224@random"]
    where = ["--data", f"imagenet-boxes:{boxed}", "--out", str(tmp_path / "out")]
    assert main(["pointing-game", *model, *where]) == 0
    assert (pd.read_csv(tmp_path / "out" / "pointing_game.csv")["n"] == 2).all()
