"""Routing: what a masked step moves, Adam of each weight on its own batches, batches, subsets and
the models built."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import nn

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import DataError, UserError
from bvit_interp.models.masks import Masks
from bvit_interp.models.unroll import unroll
from bvit_interp.training.pruning import routing, subsets
from bvit_interp.training.pruning.masked_adam import MaskedAdam
from bvit_interp.training.pruning.routing import Batches, Subnets
from bvit_interp.training.pruning.subsets import Part, Pool


@pytest.fixture(scope="module")
def pools():
    """200 training scenes and 60 test scenes of the digits 1, 4 and 7."""
    classes = ("1", "4", "7")
    return Pool(DigitScenes("train"), classes, 200), Pool(DigitScenes("test", 200), classes, None)


def random_masks(model, places, count, seed=0):
    generator, own = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    return Masks({n: torch.rand(count, *own[n].shape, generator=generator) < 0.5 for n in places})


# ---- the masked step ----


@pytest.mark.parametrize("kind", ["bvit", "resnet", "by step"])
def test_pruned_weights_are_left_bit_for_bit_on_their_subsets_batch_and_move_on_others(
    recipe, kind, images
):
    arguments = (
        {"name": "test_resnet", "num_classes": 10} if kind == "resnet" else dict(recipe().model)
    )
    model = timm.create_model(arguments.pop("name"), **arguments)
    places = routing.places_of(model, by_step=kind == "by step")
    rows = len(next(iter(places.values())))
    assert rows == (3 if kind == "by step" else 1)
    masks = random_masks(model, places, 2 * rows)
    subnets = Subnets(unroll(model) if kind == "by step" else model, places, masks, [0, 1])
    optimizer = MaskedAdam([{"params": list(model.parameters()), "weight_decay": 0.1}], lr=1e-2)
    model.train()
    for k in (0, 1, 0, 1):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        subnets.loss(images, torch.tensor([0, 1, 0, 1]), k, 0.0).backward()
        optimizer.step(subnets.kept[k])
        optimizer.zero_grad()
        for name in places:
            union = masks[name][k * rows : (k + 1) * rows].any(0)
            now = model.get_parameter(name).detach()
            assert torch.equal(now[~union], before[name][~union]), name
            assert (now[union] != before[name][union]).any(), name
        head = model.get_classifier().weight.detach()
        name = next(n for n, p in model.named_parameters() if p is model.get_classifier().weight)
        assert ((head != before[name]).any(1)).nonzero().flatten().tolist() == [
            k
        ]  # the subset's own output


def test_the_gradient_is_that_of_the_masked_model_times_the_mask(recipe, images):
    """Algorithm 2: grad * m_k, with the gradient taken at theta * m_k."""
    model = timm.create_model("test_resnet", num_classes=10).eval()
    places = routing.places_of(model)
    masks = random_masks(model, places, 1)
    subnets = Subnets(model, places, masks, [None])
    subnets.loss(images, torch.arange(4), 0, 0.0).backward()
    other = timm.create_model("test_resnet", num_classes=10).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in places:
            other.get_parameter(name).mul_(masks[name][0])
    nn.functional.cross_entropy(other(images), torch.arange(4)).backward()
    for name, p in other.named_parameters():
        wanted = p.grad * masks[name][0] if name in places else p.grad
        torch.testing.assert_close(model.get_parameter(name).grad, wanted)


def test_masks_of_steps_give_the_masked_unroll(tiny, images):
    from bvit_interp.models.masks import PLACES, masked

    places = routing.places_of(tiny, by_step=True)
    masks = random_masks(tiny, places, 2 * 12)
    of_second = Masks({short: masks[f"blocks.0.{at}.weight"][12:] for short, at in PLACES.items()})
    subnets = Subnets(unroll(tiny), places, masks, [None, None])
    torch.testing.assert_close(subnets(images, 1), masked(tiny, of_second)(images))


def test_untied_steps_start_equal_and_are_separate(tiny, images):
    apart = routing.untied(tiny)
    assert torch.equal(apart(images), tiny(images))
    weights = [block.mlp.fc1.weight for block in apart.blocks]
    assert len({id(weight) for weight in weights}) == 12
    assert apart.blocks[3].norm1.weight is apart.blocks[5].norm1.weight
    assert not {id(p) for p in apart.parameters()} & {id(p) for p in tiny.parameters()}


def test_adam_with_everything_kept_is_torchs():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    mine = MaskedAdam([{"params": [ours], "weight_decay": 0.1}], lr=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(2, 3)
        theirs.grad = ours.grad.clone()
        mine.step({})
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_adam_of_a_weight_is_adam_on_the_batches_that_keep_it():
    """Two weights of one tensor, kept in turn: each ends where an AdamW that saw only its own
    batches ends."""
    gradients = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    ours = nn.Parameter(torch.ones(2))
    mine = MaskedAdam([{"params": [ours], "weight_decay": 0.1}], lr=0.1)
    for j, gradient in enumerate(gradients):
        ours.grad = gradient.clone()
        mine.step({ours: torch.arange(2) == j % 2})
    for i in range(2):
        alone = nn.Parameter(torch.ones(1))
        reference = torch.optim.AdamW([alone], lr=0.1, weight_decay=0.1)
        for gradient in gradients[i::2]:
            alone.grad = gradient[i : i + 1].clone()
            reference.step()
        torch.testing.assert_close(ours[i : i + 1], alone)


# ---- which weights, which models ----


def test_linear_layers_and_convolutions_are_masked_and_the_classifier_is_not(tiny):
    assert set(routing.places_of(tiny)) == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    }
    resnet = timm.create_model("test_resnet")
    convolutions = {f"{n}.weight" for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(routing.places_of(resnet)) == convolutions


def test_models_that_cannot_be_masked(tiny_distilled, tiny_hybrid):
    with pytest.raises(UserError, match="not one classifier"):
        routing.places_of(tiny_distilled)
    with pytest.raises(UserError, match="2 blocks"):
        routing.places_of(tiny_hybrid, by_step=True)
    with pytest.raises(UserError, match="masks of steps are of a bViT, not of ResNet"):
        routing.places_of(timm.create_model("test_resnet"), by_step=True)


def test_build_gives_an_output_a_class_and_the_same_weights_for_a_seed(recipe, pools):
    assert routing.build(recipe(), pools[0]).num_classes == 3
    plan = replace(recipe(), model={"name": "test_resnet"})
    one, other = (routing.build(plan, pools[0]) for _ in range(2))
    assert one.num_classes == 3
    assert torch.equal(one.conv1[0].weight, other.conv1[0].weight)
    assert routing.seen_by(one, DigitScenes("test")).patch_embed.img_size == (32, 32)
    with pytest.raises(UserError, match="cannot make the model test_resnet"):
        routing.build(replace(plan, model={**plan.model, "wide": 3}), pools[0])
    with pytest.raises(UserError, match="cannot make the model resnet0"):
        routing.build(replace(plan, model={"name": "resnet0"}), pools[0])


# ---- batches ----


class Plain:
    """In the place of an `Augmentation`: images as they are, and what was drawn for them."""

    width = 4

    def __init__(self):
        self.drawn = []

    def cropped(self, images, draws):
        self.drawn.append(draws[0])
        return images

    def coloured(self, images, draws):
        np.testing.assert_array_equal(draws, self.drawn)
        return images.float()


view = Plain()


def test_batches_of_a_class_are_half_its_own_and_go_through_all_of_them(recipe, pools):
    train, test = pools
    parts = subsets.by_class(train, test).parts
    batches = Batches(recipe(batch_size=8), train, parts, view, (0,), 60)
    seen = {k: [] for k in range(3)}
    for j in range(60):
        labels = train.labels[batches.places(j)]
        assert (labels == j % 3).sum() == 4
        seen[j % 3] += batches.places(j)[:4].tolist()
    for k, part in enumerate(parts):  # every image as often as every other, give or take a pass
        counts = np.bincount(seen[k], minlength=len(train))[part.own]
        assert counts.max() - counts.min() <= 1
        assert sorted(seen[k][: len(part.own)]) == part.own.tolist()
    drawn = []
    for j in (5, 8, 5):
        batches.view = Plain()
        images, labels = batches[j]
        np.testing.assert_array_equal(labels, train.labels[batches.places(j)])
        np.testing.assert_array_equal(
            images[2].byte().permute(1, 2, 0), train.read(batches.places(j)[2])
        )
        drawn.append(np.array(batches.view.drawn))
    np.testing.assert_array_equal(drawn[0], drawn[2])  # of the seed, the key and the batch alone
    assert len({value for table in drawn[:2] for value in table.flat}) == 2 * 8 * 4


def test_a_small_subset_is_repeated(recipe, pools):
    part = Part("two", np.array([3, 5]), np.arange(0))
    batches = Batches(recipe(batch_size=8), pools[0], [part], view, (0,), 3)
    assert np.bincount(batches.places(2))[[3, 5]].tolist() == [4, 4]


# ---- subsets ----


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
        (lambda f: f.drop(index=4), r"no side for 1 of the \d+ train images, as that of index"),
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
    monkeypatch.setattr(subsets, "checkpoint", SimpleNamespace(load=lambda spec, device: tiny))
    found = subsets._features(pools[1], "x", "cpu")
    mean, std = (np.array(tiny.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = torch.tensor((pools[1].read(4) / 255 - mean) / std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        np.testing.assert_allclose(
            found[4], tiny.forward_features(pixels)[0, 0], rtol=1e-4, atol=1e-5
        )


def test_the_table_of_a_partition_is_a_column_again(pools, tmp_path):
    by_class = subsets.by_class(*pools)
    subsets.table(by_class, *pools).to_csv(tmp_path / "subsets.csv", index=False)
    again = subsets.by_column(*pools, f"{tmp_path / 'subsets.csv'}:subset")
    for one, other in zip(by_class.parts, again.parts, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.own, other.own)
