"""The one pass: what each model sees, halves where memory does not suffice, order and nulls."""

from __future__ import annotations

import itertools

import pytest
import torch

from bvit_interp.data import stream as module
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.options import LoaderOptions
from bvit_interp.data.partners import Partners
from bvit_interp.data.stream import ModelBatch, at_most, halve_on_oom, stream
from bvit_interp.errors import DataError, UserError
from bvit_interp.models.stepping import device_of


@pytest.fixture
def data():
    return DigitScenes("test", length=7)


def batches(models, data, options, **given):
    """The batches that a pass hands to `compute`, by model."""
    found = {name: [] for name in models}
    for name, batch in stream(models, data, options, lambda batch: batch, progress="test", **given):
        assert batch.model == name
        found[name].append(batch)
    return found


def test_every_model_sees_each_image_once_in_its_own_geometry(make, data):
    models = {"small": make(), "large": make(img_size=48, seed=1)}
    found = batches(models, data, LoaderOptions(batch_size=3))
    for name, model in models.items():
        assert [len(batch) for batch in found[name]] == [3, 3, 1]
        geometry = Geometry.of(model, data)
        for batch in found[name]:
            for i, image, mask in zip(batch.index, batch.images, batch.masks, strict=True):
                pixels, label, ids = data.read(int(i))
                wanted, wanted_mask = geometry(pixels, ids)
                assert torch.equal(image, wanted)
                assert torch.equal(mask, wanted_mask)
                row = batch.index.tolist().index(int(i))
                assert batch.data_labels[row] == label
                assert batch.names[row] == data.name(int(i))
        assert torch.cat([batch.index for batch in found[name]]).tolist() == list(range(7))


def test_labels_are_in_the_models_classes(make, data):
    model = make()
    order = [*reversed(data.classes)]
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": order}
    (batch,) = batches({"m": model}, data, LoaderOptions(), labels=True)["m"]
    assert batch.labels.tolist() == [9 - int(label) for label in batch.data_labels]
    (without,) = batches({"m": model}, data, LoaderOptions())["m"]
    with pytest.raises(ValueError, match="labels=True"):
        without.labels  # noqa: B018


def test_classes_that_do_not_match_are_refused_before_the_pass(make, data):
    seen = []
    found = stream(
        {"m": make(num_classes=3)}, data, LoaderOptions(), seen.append, progress="x", labels=True
    )
    with pytest.raises(DataError, match="10 classes"):
        next(found)
    assert not seen


def test_partners_come_with_their_labels(make, data):
    model, partners = make(), Partners(data)
    (batch,) = batches({"m": model}, data, LoaderOptions(), labels=True, partners=partners)["m"]
    images, labels = partners(batch.index, Geometry.of(model, data))
    assert torch.equal(batch.partner_images, images)
    assert torch.equal(batch.partner_labels.cpu(), labels)  # digits: class i is class i
    (without,) = batches({"m": model}, data, LoaderOptions())["m"]
    with pytest.raises(ValueError, match="partners"):
        without.partner_images  # noqa: B018


def test_partners_are_read_once_for_all_models_of_a_geometry(make, data):
    models, partners, asked = (
        {"a": make(), "b": make(seed=1), "c": make(img_size=48)},
        Partners(data),
        [],
    )

    def counting(index, geometry):
        asked.append(geometry)
        return partners(index, geometry)

    found = batches(models, data, LoaderOptions(), partners=counting)
    assert len(asked) == len(set(asked)) == 2
    assert torch.equal(found["a"][0].partner_images, found["b"][0].partner_images)
    assert found["c"][0].partner_images.shape[-1] == 48


def test_images_at_once_bounds_each_call(make, data):
    models = {"few": make(), "all": make(seed=1)}
    found = batches(models, data, LoaderOptions(batch_size=7), images_at_once={"few": 2})
    assert [len(batch) for batch in found["few"]] == [1, 2, 2, 2]
    assert [len(batch) for batch in found["all"]] == [7]
    one = batches(models, data, LoaderOptions(batch_size=7), images_at_once={"few": 0})
    assert [len(batch) for batch in one["few"]] == [1] * 7


def test_gradients_are_off_unless_asked_for(make, data):
    modes = []

    def look(batch: ModelBatch) -> None:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    for grad in (False, True):
        for _ in stream({"m": make()}, data, LoaderOptions(), look, progress="x", grad=grad):
            assert not torch.is_inference_mode_enabled()  # the consumer's own mode
    assert modes == [(True, False), (False, True)]


def test_take_keeps_everything_together(make, data):
    options = {"labels": True, "partners": Partners(data)}
    (batch,) = batches({"m": make()}, data, LoaderOptions(), **options)["m"]
    rows = torch.tensor([5, 0])
    mask = torch.zeros(7, dtype=torch.bool)
    mask[[0, 5]] = True
    for chosen, wanted in ((rows, [5, 0]), (mask, [0, 5]), (slice(4, 6), [4, 5])):
        part = batch.take(chosen)
        assert part.index.tolist() == wanted
        assert part.names == tuple(data.name(i) for i in wanted)
        for key in ("images", "masks", "data_labels", "labels", "partner_images", "partner_labels"):
            assert torch.equal(getattr(part, key), getattr(batch, key)[wanted]), key


# ---- cost ----------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """The numbers of images that the progress bar shows, one after the other, and its total."""

    class Bar:
        def __init__(self, total, **_):
            self.n, self.numbers, self.total, bars[0:] = 0, [], total, [self]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def set_postfix(self, **given):
            self.postfix = given["skipped"]

        def update(self, more):
            self.numbers.append(self.n)

    bars: list[Bar] = []
    monkeypatch.setattr(module, "tqdm", Bar)
    return bars


def test_the_bar_counts_images_of_every_model_and_parts_of_a_batch(make, data, shown):
    models = {"a": make(), "b": make(seed=1)}

    def compute(batch: ModelBatch) -> None:
        batch.advance(0.5)
        for part in (batch.take(slice(1)), batch):
            part.advance(1.0)  # what is taken out of a batch is still on the whole

    list(stream(models, data, LoaderOptions(batch_size=4), compute, progress="x"))
    assert shown[0].total == 14
    ends = [0, 4, 8, 11, 14]
    wanted = [[(a + b) / 2, b, b, b] for a, b in itertools.pairwise(ends)]
    assert shown[0].numbers == [n for part in wanted for n in part] + [14]


def test_the_bar_counts_what_is_skipped(make, tmp_path, put_image, shown):
    for seed, name in enumerate(("ant/1", "ant/2", "bee/3")):
        put_image(tmp_path / f"{name}.jpg", 32, 32, seed)
    (tmp_path / "ant" / "2.jpg").write_bytes(b"nothing")
    options = LoaderOptions(batch_size=1, skip_corrupt=True)
    found = stream({"m": make()}, tmp_path, options, len, progress="x")
    assert [count for _, count in found] == [1, 1]
    assert (shown[0].total, shown[0].numbers, shown[0].postfix) == (3, [1, 3, 3], 1)


def test_costly_measures_are_limited_unless_asked_for(data, caplog):
    limited = at_most(LoaderOptions(batch_size=3), data, 5, "a test")
    assert limited == LoaderOptions(batch_size=3, limit=5)
    assert "a test: 5 of 7 images" in caplog.text
    assert "--limit 7" in caplog.text
    caplog.clear()
    for options, most in ((LoaderOptions(limit=6), 5), (LoaderOptions(), 7)):
        assert at_most(options, data, most, "another") is options
    assert not caplog.text


# ---- memory --------------------------------------------------------------------------------------


def out_of_memory_above(most: int, sizes: list[int]):
    def compute(batch: ModelBatch) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.index.tolist()

    return compute


def test_a_batch_that_does_not_fit_is_computed_in_halves(make, data):
    sizes: list[int] = []
    compute = out_of_memory_above(2, sizes)
    found = list(stream({"m": make()}, data, LoaderOptions(), compute, progress="x"))
    assert found == [("m", [0]), ("m", [1, 2]), ("m", [3, 4]), ("m", [5, 6])]
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    (batch,) = batches({"m": make()}, data, LoaderOptions())["m"]
    assert halve_on_oom(out_of_memory_above(9, []), batch) == [list(range(7))]


def test_a_single_image_that_does_not_fit_is_named(make, data):
    found = stream({"m": make()}, data, LoaderOptions(), out_of_memory_above(0, []), progress="x")
    with pytest.raises(UserError, match=r"out of GPU memory with a single image .*000000"):
        list(found)


def test_other_errors_pass_through(make, data):
    def fail(batch: ModelBatch) -> None:
        raise RuntimeError("not memory")

    with pytest.raises(RuntimeError, match="not memory"):
        list(stream({"m": make()}, data, LoaderOptions(), fail, progress="x"))


def test_the_device_of_a_model(make):
    assert device_of(make()) == torch.device("cpu")
