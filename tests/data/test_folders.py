"""Folders of images, and ImageNet-S layout with everything that can be wrong in it."""

from __future__ import annotations

import numpy as np
import pytest

from bvit_interp.data.folders import ImageFolderSamples, ImageNetS
from bvit_interp.errors import DataError


def test_classes_are_the_sorted_folders(tmp_path, put_image):
    picture = put_image(tmp_path / "bee" / "2.PNG")
    put_image(tmp_path / "ant" / "1.jpg")
    put_image(tmp_path / "bee" / "1.WebP")
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    (tmp_path / "bee" / "._2.PNG").write_text("left by a file manager")
    (tmp_path / ".cache").mkdir()
    samples = ImageFolderSamples(tmp_path)
    assert samples.classes == ("ant", "bee")
    assert not samples.has_masks
    assert samples.native_size is None
    assert [samples.name(i) for i in range(len(samples))] == [
        "ant/1.jpg",
        "bee/1.WebP",
        "bee/2.PNG",
    ]
    image, label, mask = samples.read(2)
    np.testing.assert_array_equal(image, picture)
    assert label == 1
    assert mask is None


def test_a_corrupt_image_is_named(tmp_path, put_image):
    put_image(tmp_path / "ant" / "1.jpg", 40, 40)
    file = tmp_path / "ant" / "1.jpg"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(DataError, match=r"ant/1\.jpg: the image cannot be read .*truncated"):
        ImageFolderSamples(tmp_path).read(0)


def test_missing_empty_and_flat_folders(tmp_path, put_image):
    with pytest.raises(DataError, match=r"no folder .*gone"):
        ImageFolderSamples(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no class folders$"):
        ImageFolderSamples(tmp_path)
    put_image(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"no class folders .*one folder per class"):
        ImageFolderSamples(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"no images .* in 1 class folders"):
        ImageFolderSamples(tmp_path)


def test_masks_come_with_their_images(masked_set):
    samples = ImageNetS(masked_set)
    assert samples.classes == ("ant", "bee")
    assert samples.has_masks
    image, label, mask = samples.read(2)
    assert image.shape == (4, 6, 3)
    assert label == 1
    assert mask.dtype == np.int32
    assert mask.tolist() == [[2, 2, 2, 0, 0, 0]] * 4


def test_class_ids_follow_the_categories_file(masked_set):
    (masked_set / "categories.txt").write_text("bee\nant\nfire hydrant")
    samples = ImageNetS(masked_set)
    assert samples.classes == ("bee", "ant", "fire hydrant")
    assert [samples.read(i)[1] for i in range(3)] == [1, 1, 0]


def test_of_several_official_lists_the_one_that_fits(masked_set):
    lists = masked_set / "data" / "categories"
    lists.mkdir(parents=True)
    (lists / "ImageNetS_categories_im300.txt").write_text("ant\nape\nbee")
    (lists / "ImageNetS_categories_im50.txt").write_text("bee\nant")
    assert ImageNetS(masked_set).classes == ("bee", "ant")
    (lists / "ImageNetS_categories_im50.txt").write_text("bee\nape")
    with pytest.raises(DataError, match=r"im300\.txt, .*_im50\.txt lists just the class folders"):
        ImageNetS(masked_set)


def test_a_class_folder_not_in_the_categories(masked_set):
    (masked_set / "categories.txt").write_text("bee\ncat")
    with pytest.raises(DataError, match=r"class folders not in .*categories.txt: ant$"):
        ImageNetS(masked_set)


def test_images_without_mask_and_masks_without_image(masked_set, put_image):
    for name in "defg":
        put_image(masked_set / "validation" / "bee" / f"{name}.JPEG")
    with pytest.raises(DataError, match=r"^4 images without a mask in .*: bee/d, bee/e, bee/f, "):
        ImageNetS(masked_set)
    for name in "defg":
        (masked_set / "validation" / "bee" / f"{name}.JPEG").unlink()
    (masked_set / "validation" / "ant" / "b.JPEG").unlink()
    with pytest.raises(DataError, match=r"^1 masks without an image in .*validation: ant/b$"):
        ImageNetS(masked_set)


def test_no_masks_at_all(masked_set):
    (masked_set / "validation-segmentation").rename(masked_set / "elsewhere")
    with pytest.raises(DataError, match=r"no folder .*validation-segmentation with the masks"):
        ImageNetS(masked_set)


def test_a_mask_of_another_size_names_both(masked_set, put_mask):
    put_mask(masked_set / "validation-segmentation" / "ant" / "a.png", np.zeros((5, 7), int))
    with pytest.raises(DataError, match=r"ant/a\.png: the mask is 7 x 5 pixels, its image 6 x 4"):
        ImageNetS(masked_set).read(0)


def test_an_id_beyond_the_classes_asks_for_the_categories(masked_set, put_mask):
    ids = np.full((4, 6), 1000)
    put_mask(masked_set / "validation-segmentation" / "ant" / "a.png", ids)
    assert (ImageNetS(masked_set).read(0)[2] == 1000).all()
    ids[0, 0] = 3
    put_mask(masked_set / "validation-segmentation" / "ant" / "a.png", ids)
    with pytest.raises(
        DataError, match=r"class id 3, but there are 2 classes: put .* categories\.txt"
    ):
        ImageNetS(masked_set).read(0)


def test_coco_in_imagenet_s_layout(real):
    """Counts and the centre baseline as the set's README states them: 300 images, 63 classes, 40
    %."""
    samples = ImageNetS(real("coco_seg_s"))
    assert (len(samples), len(samples.classes)) == (300, 63)
    hits = []
    for i in range(len(samples)):
        image, label, mask = samples.read(i)
        assert image.shape[:2] == mask.shape
        assert (mask == label + 1).any()
        centre = mask[mask.shape[0] // 2, mask.shape[1] // 2]
        if centre != 1000:
            hits.append(centre == label + 1)
    assert np.mean(hits) == pytest.approx(0.40, abs=0.005)
