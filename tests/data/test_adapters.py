"""Data that Python already holds: data sets, loaders, tensors."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

from bvit_interp.data.adapters import as_samples, from_huggingface, from_loader, from_tensors
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.options import LoaderOptions
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import stream
from bvit_interp.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def pictures():
    """Five pictures ``(5, 8, 8, 3)`` uint8."""
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def refusal(function, *args, **given):
    with pytest.raises(UserError) as caught:
        function(*args, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def channels_first(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


class Pairs(Dataset):
    def __init__(self, items, **about):
        self.items = items
        for name, value in about.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Rows:
    """A split as the `datasets` library has it."""

    def __init__(self, columns, names=None):
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: SimpleNamespace() for name in columns}
        if names:
            self.features["label"] = SimpleNamespace(names=names)

    def __len__(self):
        return len(self.columns["label"])

    def __getitem__(self, i):
        return {name: values[i] for name, values in self.columns.items()}


def test_samples_and_names_are_taken_as_they_are():
    scenes = DigitScenes(length=3)
    assert as_samples(scenes) is scenes
    assert as_samples("digits-s").name(0) == "digits-s/test/000000"
    for other in (3, None, {"a": 1}, object()):
        assert "torchvision" in refusal(as_samples, other)


def test_a_data_set_of_torchvision(tmp_path, put_image):
    picture = put_image(tmp_path / "bee" / "0.png")
    put_image(tmp_path / "ant" / "0.png")
    samples = as_samples(ImageFolder(str(tmp_path)))
    assert isinstance(samples, Samples)
    assert (len(samples), samples.classes, samples.native_size) == (2, ("ant", "bee"), None)
    image, label, mask = samples.read(1)
    np.testing.assert_array_equal(image, picture)
    assert (label, mask) == (1, None)
    part = as_samples(Subset(ImageFolder(str(tmp_path)), [1]))
    assert part.classes == ("ant", "bee")
    assert part.read(0)[1] == 1


def test_what_a_transform_gives_is_not_resized_again(make, pictures):
    tensors = Pairs([(v2.functional.to_image(p), 0) for p in pictures], classes=["a"])
    samples = as_samples(tensors)
    assert samples.native_size == 8
    np.testing.assert_array_equal(samples.read(3)[0], pictures[3])


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "bfloat16", "numpy", "normalised"])
def test_tensors_of_every_kind_are_the_same_pictures(pictures, kind):
    images, given = channels_first(pictures), {}
    if kind == "numpy":
        images = images.numpy()
    elif kind == "normalised":
        images = v2.functional.normalize(images / 255, list(MEAN), list(STD))
        given = {"mean": MEAN, "std": STD}
    elif kind != "uint8":
        images = (images / 255).to(getattr(torch, kind))
    samples = from_tensors(images, torch.tensor([0, 1, 2, 1, 0]), **given)
    assert samples.classes == ("0", "1", "2")
    assert [samples.read(i)[1] for i in range(5)] == [0, 1, 2, 1, 0]
    most = 1 if kind == "bfloat16" else 0
    for i in range(5):
        assert np.abs(samples.read(i)[0].astype(int) - pictures[i]).max() <= most


def test_masks_come_with_tensors(pictures):
    masks = np.zeros((5, 8, 8), int)
    masks[2, 1] = 1
    images = channels_first(pictures)
    samples = from_tensors(images, np.zeros(5, int), classes=["a"], masks=masks)
    assert samples.has_masks
    np.testing.assert_array_equal(samples.read(2)[2], masks[2])
    wrong = from_tensors(images, np.zeros(5, int), classes=["a"], masks=masks[:, :4])
    assert "mask (4, 8)" in refusal(wrong.read, 0)


def test_grey_pictures_and_files_in_memory(pictures):
    grey = from_tensors(channels_first(pictures)[:, :1], [0] * 5)
    np.testing.assert_array_equal(grey.read(0)[0], np.repeat(pictures[0][..., :1], 3, -1))
    stored = io.BytesIO()
    Image.fromarray(pictures[0]).save(stored, "PNG")
    for image in (Image.fromarray(pictures[0]), {"bytes": stored.getvalue()}, stored.getvalue()):
        samples = as_samples(Rows({"image": [image], "label": [1]}, names=["a", "b"]))
        np.testing.assert_array_equal(samples.read(0)[0], pictures[0])
        assert (samples.classes, samples.read(0)[1], samples.native_size) == (("a", "b"), 1, None)


def test_columns_of_a_hugging_face_data_set(pictures):
    images = list(map(Image.fromarray, pictures))
    data = Rows({"scan": images, "label": [0, 1, 0, 1, 0]}, names=["a", "b"])
    assert "image=" in refusal(as_samples, data)
    assert "scan" in refusal(from_huggingface, data, image="picture")
    assert len(from_huggingface(data, image="scan")) == 5
    unnamed = Rows({"img": images, "label": [0] * 5})
    assert "classes=" in refusal(as_samples, unnamed)
    assert as_samples(unnamed, classes=["a"]).classes == ("a",)
    splits = SimpleNamespace(column_names={"train": ["img"], "test": ["img"]})
    assert "train, test" in refusal(as_samples, splits)
    streamed = SimpleNamespace(column_names=["img", "label"])
    assert "stream" in refusal(as_samples, streamed)


def test_a_loader_is_its_data_set_in_order(pictures):
    data = TensorDataset(channels_first(pictures), torch.tensor([2, 1, 0, 1, 0]))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    assert "classes=" in refusal(as_samples, loader)
    samples = from_loader(loader, classes=["a", "b", "c"])
    assert [samples.read(i)[1] for i in range(5)] == [2, 1, 0, 1, 0]
    np.testing.assert_array_equal(samples.read(4)[0], pictures[4])


def test_what_a_loader_makes_of_its_items_is_kept(pictures):
    class Endless(IterableDataset):
        def __iter__(self):
            yield from zip(channels_first(pictures), [1, 0, 1, 0, 1], strict=True)

    samples = as_samples(DataLoader(Endless(), batch_size=2))
    assert (len(samples), samples.classes) == (5, ("0", "1"))
    np.testing.assert_array_equal(samples.read(3)[0], pictures[3])

    def flipped(items):
        return torch.stack([i[0].flip(-1) for i in items]), torch.tensor([i[1] for i in items])

    data = Pairs(list(Endless()), classes=["a", "b"])
    samples = as_samples(DataLoader(data, batch_size=2, collate_fn=flipped))
    assert samples.classes == ("a", "b")
    np.testing.assert_array_equal(samples.read(3)[0], pictures[3][:, ::-1])
    as_dict = DataLoader(data, collate_fn=lambda items: {"image": items[0][0]})
    assert "(images, labels)" in refusal(as_samples, as_dict)


def test_what_is_missing_is_said(pictures):
    images, labels = channels_first(pictures), torch.tensor([0, 1, 2, 1, 0])
    normalised = v2.functional.normalize(images / 255, list(MEAN), list(STD))
    assert "mean=" in refusal(as_samples, (normalised, labels))
    assert "wrong" in refusal(as_samples, (normalised * 9, labels), mean=MEAN, std=STD)
    assert "mean" in refusal(as_samples, (normalised, labels), mean=MEAN)
    assert "uint8" in refusal(as_samples, (images, labels), mean=MEAN, std=STD)
    assert "three" in refusal(as_samples, (images, labels), mean=(0.5, 0.5), std=(1, 1))
    assert "mean=" in refusal(as_samples, (images * float("nan"), labels))
    assert "int64" in refusal(as_samples, (images.long(), labels))
    assert "(N, 3, H, W)" in refusal(as_samples, (images[0], labels))
    assert "(3, H, W)" in refusal(as_samples, (images.permute(0, 2, 3, 1), labels))
    for wrong in (labels[:4], labels.float(), labels[:, None]):
        assert "5 integers" in refusal(as_samples, (images, wrong))
    assert "no images" in refusal(as_samples, (images[:0], labels[:0]))
    assert "classes=" in refusal(as_samples, FakeData(2, (3, 8, 8)))
    assert "(image, label)" in refusal(as_samples, Pairs([images[0]], classes=["a"]))
    for label in ("a", 0.5, [0, 1], None):
        data = as_samples(Pairs([(images[0], label)], classes=["a"]))
        assert "one integer" in refusal(data.read, 0)
    beyond = as_samples(Pairs([(images[0], 1)], classes=["a"]))
    assert "label 1 of 1 classes" in refusal(beyond.read, 0)


def test_errors_of_somebody_elses_data_set_are_one_line():
    class Broken(Pairs):
        def __getitem__(self, i):
            raise KeyError("no\nsuch")

    assert "Broken/000000: cannot be read (KeyError" in refusal(as_samples, Broken([0], classes=[]))


def test_a_pass_takes_them_all(make):
    scenes, model = DigitScenes(length=6), make()
    read = [scenes.read(i) for i in range(6)]
    images = channels_first(np.stack([image for image, _, _ in read]))
    labels = torch.tensor([label for _, label, _ in read])
    names = list(scenes.classes)
    rows = Rows({"image": [Image.fromarray(r[0]) for r in read], "label": labels.tolist()}, names)
    pairs = Pairs(list(zip(images, labels, strict=True)), classes=names)
    wanted = passed(model, scenes)
    for data in (pairs, DataLoader(pairs, 2), as_samples((images, labels), classes=names)):
        found = passed(model, data)
        assert torch.equal(found.images, wanted.images)
        assert torch.equal(found.labels, wanted.labels)
    assert torch.equal(passed(model, rows, resize=32).images, wanted.images)


def passed(model, data, **options):
    found = stream(
        {"m": model}, data, LoaderOptions(**options), lambda b: b, progress="x", labels=True
    )
    ((_, batch),) = list(found)
    return batch
