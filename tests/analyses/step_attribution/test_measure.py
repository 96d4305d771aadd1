"""Gradients by step against autograd on the model itself, and pruned accuracies against models
pruned by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from foreign import STEPS, answer_by_hand, entry_by_hand, foreign

from bvit_interp.analyses.step_attribution import COLUMNS, Config, measure, summary
from bvit_interp.analyses.step_attribution.measure import _pruning_rows, _Setting
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.unroll import with_steps

FEW = {"folds": 4, "limit": 12, "batch_size": 5}


def batch_of(model, data, limit=12):
    """The chosen images, their labels, and which half each is in."""
    geometry = Geometry.of(model, data)
    scenes = [data.read(i * len(data) // limit) for i in range(limit)]
    images = torch.stack([geometry(image, None)[0] for image, _, _ in scenes])
    half = np.random.default_rng(0).permutation(limit) % 4 % 2
    return images, torch.tensor([label for _, label, _ in scenes]), torch.from_numpy(half)


def values(frame, metric, layer="all", **keys):
    rows = frame[(frame["metric"] == metric) & (frame["layer"] == layer)]
    for key, value in keys.items():
        rows = rows[rows[key] == value]
    return rows


def test_the_parts_of_the_gradient_add_up_to_autograds(any_model, digits):
    """Norms and the ratio of their sum, against the norm of the gradient of the stored blocks."""
    before = {name: value.clone() for name, value in any_model.state_dict().items()}
    frame = measure(
        {"m": any_model}, digits, Config(**FEW, methods=("random", "own_masks"), sparsities=(0.5,))
    )
    assert list(frame) == list(COLUMNS)
    assert all(torch.equal(value, before[name]) for name, value in any_model.state_dict().items())
    whole = copy.deepcopy(any_model).double()
    images, labels, _ = batch_of(any_model, digits)
    F.cross_entropy(whole(images.double()), labels).backward()
    stored, steps = list(whole.blocks.children()), len(any_model.blocks)
    tied = steps > len(stored)
    norms = values(frame, "norm")
    assert norms["step"].tolist() == list(range(1, steps + 1))
    for b, block in enumerate(stored):
        wanted = sum(p.grad.square().sum().item() for p in block.parameters())
        squares = (norms[norms["block"] == b]["value"] ** 2).sum()
        ratio = values(frame, "sum_ratio", block=b)["value"].item() if tied else 1.0
        assert ratio * squares == pytest.approx(wanted, rel=1e-6)
        fc1 = (values(frame, "norm", "fc1", block=b)["value"] ** 2).sum()
        ratio = values(frame, "sum_ratio", "fc1", block=b)["value"].item() if tied else 1.0
        assert ratio * fc1 == pytest.approx(
            block.mlp.fc1.weight.grad.square().sum().item(), rel=1e-6
        )
        if tied:
            for layer in ("all", "q", "head", "neuron"):
                assert values(frame, "owner", layer, block=b)["value"].sum() == pytest.approx(1)
            of_head = values(frame, "share", "head", block=b, unit=1)
            assert of_head["value"].sum() == pytest.approx(1)
            assert of_head["null"].sum() == pytest.approx(1)
    for metric in ("share", "taylor"):
        shares = values(frame, metric, "v")
        assert shares["value"].sum() == pytest.approx(1)
        assert (shares["null"] == 1 / steps).all()
    untied = {"norm", "share", "taylor", "accuracy"}
    everything = untied | {
        "owner",
        "owner_agreement",
        "entropy",
        "cosine",
        "cosine_apart",
        "sum_ratio",
    }
    assert set(frame["metric"]) == (
        everything if tied else untied
    )  # magnitude and taylor left out: no gain
    assert set(frame["method"].dropna()) == {"none", "random"} | ({"own_masks"} if tied else set())
    assert frame["value"].notna().all()
    assert (frame["trained_steps"] == steps).all()


@pytest.mark.parametrize(
    "kind", ["encoder", "looped_timm", "prelude", "two_state", "dinov3", "torchvision"]
)
def test_models_that_are_not_ours_against_autograd(kind, digits):
    """The terms of a shared block add up to the gradient that autograd gives the user's model."""
    model = foreign(kind)
    config = Config(**FEW, methods=("taylor",), sparsities=(0.5,))
    frame = measure({"m": model}, digits, config)
    whole = copy.deepcopy(model).double()
    images, labels, _ = batch_of(with_steps(model), digits)
    F.cross_entropy(whole(images.double()), labels).backward()
    blocks = {
        "encoder": lambda: [whole.block],
        "torchvision": lambda: whole.encoder.layers,
        "looped_timm": lambda: whole.blocks,
        "prelude": lambda: whole.core,
        "two_state": lambda: [whole.net],
        "dinov3": lambda: whole.blocks,
    }[kind]()
    norms = values(frame, "norm")
    assert norms["step"].tolist() == list(range(1, STEPS[kind] + 1))
    for b, block in enumerate(blocks):
        squares = (norms[norms["block"] == b]["value"] ** 2).sum()
        ratio = 1.0
        if len(blocks) < STEPS[kind]:
            ratio = values(frame, "sum_ratio", block=b)["value"].item()
        wanted = sum(p.grad.square().sum().item() for p in block.parameters())
        assert ratio * squares == pytest.approx(wanted, rel=1e-6)
    assert values(frame, "accuracy")["n"].eq(12).all()


@pytest.mark.parametrize("kind", ["looped_timm", "encoder"])
def test_a_head_of_a_users_model_by_steps_untied_by_hand(kind, digits):
    model = foreign(kind)
    frame = measure({"m": model}, digits, Config(**FEW, methods=("taylor",), sparsities=(0.5,)))
    images, labels, _ = batch_of(with_steps(model), digits)
    whole = copy.deepcopy(model).double()
    of_kind, names = {
        "looped_timm": (lambda: whole.blocks[0], ("attn.qkv.weight", "attn.proj.weight")),
        "encoder": (lambda: whole.block, ("self_attn.in_proj_weight", "self_attn.out_proj.weight")),
    }[kind]
    blocks = [copy.deepcopy(of_kind()) for _ in range(STEPS[kind])]
    tokens = entry_by_hand(whole, images.double())
    for block in blocks:
        tokens = block(tokens)
    F.cross_entropy(answer_by_hand(whole, tokens), labels).backward()
    squares = []
    for block in blocks:
        qkv, proj = (block.get_parameter(name).grad for name in names)
        of_head = qkv.unflatten(0, (3, 4, 8))[:, 1], proj[:, 8:16]
        squares.append(sum(part.square().sum().item() for part in of_head))
    found = values(frame, "share", "head", unit=1)
    assert found["step"].tolist() == list(range(1, STEPS[kind] + 1))
    np.testing.assert_allclose(found["value"], np.array(squares) / sum(squares), rtol=1e-6)


def test_blocks_of_other_matrices_are_refused(digits):
    """EVA-02 has a matrix for each of q, k and v, and a gate in its FFN."""
    with pytest.raises(UserError, match="qkv, proj, fc1 and fc2; this lacks some.*attn.q_proj"):
        measure({"m": foreign("eva02")}, digits, Config(**FEW))


def gradient_by_hand(model, images, labels):
    whole = copy.deepcopy(model)
    F.cross_entropy(whole(images), labels).backward()
    return [
        [block.get_parameter(name).grad for name in MATRICES] for block in whole.blocks.children()
    ]


MATRICES = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@pytest.mark.parametrize("kind", ["stacked", "tiny_hybrid"])
def test_pruned_models_against_models_pruned_by_hand(request, digits, kind, method):
    """The 30 % least weights of all blocks together, by a sort; an image is scored under the other
    half's masks."""
    model = request.getfixturevalue(kind)
    options = {**FEW, "limit": 40}
    frame = measure({"m": model}, digits, Config(**options, methods=(method,), sparsities=(0.3,)))
    images, labels, half = batch_of(model, digits, 40)
    hits, whole = 0, model(images).argmax(-1) == labels
    for h in (0, 1):
        fit, score = half == 1 - h, half == h
        grads = gradient_by_hand(model, images[fit], labels[fit])
        pruned = copy.deepcopy(model)
        blocks = list(pruned.blocks.children())
        flat = []
        for block, of in zip(blocks, grads, strict=True):
            for name, gradient in zip(MATRICES, of, strict=True):
                weight = block.get_parameter(name).detach()
                flat.append((weight * gradient).abs() if method == "taylor" else weight.abs())
        listed = torch.cat([each.flatten() for each in flat])
        edge = listed.sort().values[round(0.3 * len(listed)) - 1]
        with torch.no_grad():
            for weight, importance in zip(
                [b.get_parameter(n) for b in blocks for n in MATRICES], flat, strict=True
            ):
                weight[importance <= edge] = 0
            hits += int((pruned(images[score]).argmax(-1) == labels[score]).sum())
    rows = values(frame, "accuracy").set_index("method")
    assert rows.loc[method, "value"] == hits / 40
    assert rows.loc["none", "value"] == whole.double().mean().item()
    assert rows.loc["none", "null"] == labels.bincount().max().item() / 40
    assert rows["n"].tolist() == [40, 40]


def test_intervals_nulls_and_gains(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(**{**FEW, "limit": 24}, sparsities=(0.2, 0.6)))
    accuracy = values(frame, "accuracy").set_index(["method", "sparsity"])
    gains = values(frame, "gain").set_index(["method", "sparsity", "against"])
    for share in (0.2, 0.6):
        for method in ("stepwise", "own_masks", "random"):
            over = accuracy.loc[(method, share), "value"] - accuracy.loc[("taylor", share), "value"]
            assert gains.loc[(method, share, "taylor"), "value"] == pytest.approx(over)
        assert (
            accuracy.loc[("own_masks", share), "null"]
            == accuracy.loc[("shifted_masks", share), "value"]
        )
        assert accuracy.loc[("stepwise", share), "null"] == accuracy.loc[("random", share), "value"]
    assert len(gains) == 2 * (2 * 7 - 2)
    bounded = frame.dropna(subset=["low"])
    assert (bounded["low"] <= bounded["value"] + 1e-12).all()
    assert (bounded["value"] <= bounded["high"] + 1e-12).all()
    cosines = values(frame, "cosine")
    assert len(cosines) == 66
    assert len(values(frame, "cosine_apart")) == 78
    assert (cosines["null_high"] > cosines["null"]).all()
    weights = sum(p.numel() for p in tiny.blocks[0].parameters())
    assert cosines["null_high"].max() < 3 / math.sqrt(weights)
    owner, null = (values(frame, "owner")[key] for key in ("value", "null"))
    assert null.sum() == pytest.approx(1)
    assert not np.allclose(owner, null)
    neurons = values(frame, "entropy", "neuron").dropna(subset=["unit"])
    assert len(neurons) == tiny.blocks[0].mlp.fc1.weight.shape[0]
    shares = neurons["step"].value_counts(normalize=True)
    owners = values(frame, "owner", "neuron").set_index("step")["value"]
    assert all(owners[t] == pytest.approx(shares.get(t, 0)) for t in owners.index)


def test_batches_do_not_matter_and_models_share_a_pass(tiny, stacked, digits):
    options = {"folds": 4, "limit": 12, "sparsities": (0.5,)}
    both = measure({"a": tiny, "b": stacked}, digits, Config(batch_size=12, **options))
    one = measure({"a": tiny}, digits, Config(batch_size=1, **options))
    part = both[both["model"] == "a"].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, part, rtol=1e-9, atol=1e-9)
    assert set(both["model"]) == {"a", "b"}


def test_without_pruning_and_the_summary(tiny, stacked, digits):
    frame = measure({"a": tiny}, digits, Config(**FEW, methods=()))
    assert set(values(frame, "accuracy")["method"]) == {"none"}
    config = Config(**FEW, sparsities=(0.4, 0.7))
    frame = measure({"a": tiny, "b": stacked}, digits, config)
    untied = {"none", "magnitude", "taylor", "random"}
    assert set(frame["method"][frame["model"] == "b"].dropna()) == untied
    shown = summary(frame)
    assert set(shown["metric"]) == {"entropy", "owner_agreement", "sum_ratio", "accuracy"}
    assert set(shown["sparsity"].dropna()) == {0.0, 0.4}


def test_intervals_are_a_jackknife_over_folds(stacked, digits):
    """Norms and shares of a stack without each fold, by autograd on the model itself."""
    frame = measure({"m": stacked}, digits, Config(**FEW, methods=()))
    images, labels, _ = batch_of(stacked, digits)
    fold = torch.from_numpy(np.random.default_rng(0).permutation(12) % 4)

    def norms(rows):
        whole = copy.deepcopy(stacked).double()
        F.cross_entropy(whole(images[rows].double()), labels[rows]).backward()
        return np.array(
            [
                math.sqrt(sum(p.grad.square().sum().item() for p in block.parameters()))
                for block in whole.blocks.children()
            ]
        )

    without = np.stack([norms(fold != f) for f in range(4)])
    shares = without**2 / (without**2).sum(1, keepdims=True)
    for metric, each in (("norm", without), ("share", shares)):
        half_width = 3.182446 * np.sqrt(3 / 4 * np.square(each - each.mean(0)).sum(0))
        rows = values(frame, metric)
        np.testing.assert_allclose(rows["high"] - rows["value"], half_width, rtol=1e-5)
        np.testing.assert_allclose(rows["value"] - rows["low"], half_width, rtol=1e-5)
    np.testing.assert_allclose(values(frame, "norm")["value"], norms(fold >= 0), rtol=1e-9)


def test_the_null_of_a_norm_is_that_of_the_choice_of_images(stacked, digits):
    """The standard error of the gradient over folds, by autograd on the model itself."""
    frame = measure({"m": stacked}, digits, Config(**FEW, methods=()))
    images, labels, _ = batch_of(stacked, digits)
    fold = torch.from_numpy(np.random.default_rng(0).permutation(12) % 4)

    def gradients(rows):
        whole = copy.deepcopy(stacked).double()
        F.cross_entropy(whole(images[rows].double()), labels[rows]).backward()
        blocks = whole.blocks.children()
        return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in blocks]

    of_folds, of_all = [gradients(fold == f) for f in range(4)], gradients(fold >= 0)
    for b, null in enumerate(values(frame, "norm")["null"]):
        apart = sum((each[b] - of_all[b]).square().sum().item() for each in of_folds)
        assert null == pytest.approx(math.sqrt(apart / (4 * 3)), rel=1e-6)


def test_intervals_of_gains_and_accuracies():
    """Gains from two tables of hits: the interval of their mean difference."""
    settings = [_Setting("none", 0.0), _Setting("magnitude", 0.5), _Setting("taylor", 0.5)]
    scores = np.array(
        [[1, 1, 0, 2], [1, 1, 1, 0], [1, 0, 1, 2], [0, 0, 1, 2], [1, 0, 1, 1], [1, 1, 1, 0]]
    )
    rows = pd.DataFrame(_pruning_rows(settings, scores.astype(float))).set_index(
        ["metric", "method"]
    )
    gain = rows.loc[("gain", "taylor")]
    differences = np.array([-1, 0, 1, 1, 1, 0])
    half_width = 1.959964 * differences.std(ddof=1) / math.sqrt(6)
    assert gain["value"] == pytest.approx(2 / 6)
    assert gain["high"] - gain["value"] == pytest.approx(half_width, rel=1e-6)
    assert gain["value"] - gain["low"] == pytest.approx(half_width, rel=1e-6)
    assert rows.loc[("accuracy", "none"), "null"] == 3 / 6
    accuracy = rows.loc[("accuracy", "taylor")]
    assert (accuracy["value"], accuracy["n"]) == (5 / 6, 6)
    assert (accuracy["low"], accuracy["high"]) == wilson_interval(5, 6)


def test_nulls_of_gains_and_accuracies():
    """Of random masks the most frequent class, of others what random masks give."""
    settings = [
        _Setting("none", 0.0),
        *(_Setting(method, 0.5) for method in ("magnitude", "taylor", "random")),
    ]
    # hits of the four settings, and the class
    scores = np.array([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    rows = pd.DataFrame(_pruning_rows(settings, scores.astype(float)))
    accuracy = rows[rows["metric"] == "accuracy"].set_index("method")["null"]
    assert accuracy.to_dict() == {"none": 0.75, "magnitude": 0.25, "taylor": 0.25, "random": 0.75}
    gains = rows[rows["metric"] == "gain"].set_index(["method", "against"])
    found = gains[["value", "null"]].T.to_dict("list")
    assert found == {
        ("magnitude", "taylor"): [-0.5, -0.5],
        ("taylor", "magnitude"): [0.5, 0.0],
        ("random", "magnitude"): [0.0, 0.0],
        ("random", "taylor"): [-0.5, -0.5],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 3}, "folds must be even, 4 to 16, got 3"),
        ({"folds": 18}, "folds must be even, 4 to 16, got 18"),
        ({"methods": ("best",)}, "methods must be of magnitude, taylor, .*, each once, got 'best'"),
        ({"methods": ("taylor", "taylor")}, "each once, got 'taylor, taylor'"),
        ({"sparsities": (0.5, 1.0)}, "sparsities must be between 0 and 1"),
        ({"limit": 0}, "limit must be >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Config(**options)


def test_fewer_images_than_folds(tiny, digits):
    with pytest.raises(UserError, match="8 folds of images need at least as many images, got 7"):
        measure({"m": tiny}, digits, Config(limit=7))
