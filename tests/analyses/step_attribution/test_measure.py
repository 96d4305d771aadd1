"""Gradients by step against autograd on the model itself, and pruned accuracies against models
pruned by hand."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from bvit_interp.analyses.step_attribution import COLUMNS, Config, measure, plot
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError

FEW = {"folds": 4, "limit": 12, "batch_size": 5}


def batch_of(model, data, limit=12):
    """The chosen images, their labels, and which half each is in."""
    geometry = Geometry.of(model, data)
    scenes = [data.read(i * len(data) // limit) for i in range(limit)]
    images = torch.stack([geometry(image, None)[0] for image, _, _ in scenes])
    half = np.random.default_rng(0).permutation(limit) % 4 % 2
    return images, torch.tensor([label for _, label, _ in scenes]), torch.from_numpy(half)


def values(frame, statistic, part="all", **keys):
    rows = frame[(frame["statistic"] == statistic) & (frame["part"] == part)]
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
            for part in ("all", "q", "head", "neuron"):
                assert values(frame, "owner", part, block=b)["value"].sum() == pytest.approx(1)
            of_head = values(frame, "share", "head", block=b, unit=1)
            assert of_head["value"].sum() == pytest.approx(1)
            assert of_head["null"].sum() == pytest.approx(1)
    for statistic in ("share", "taylor"):
        shares = values(frame, statistic, "v")
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
    assert set(frame["statistic"]) == (
        everything if tied else untied
    )  # magnitude and taylor left out: no gain
    assert set(frame["method"].dropna()) == {"none", "random"} | ({"own_masks"} if tied else set())
    assert frame["value"].notna().all()
    assert (frame["trained_steps"] == steps).all()


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


def test_a_figure_from_the_file(tiny, stacked, digits, tmp_path):
    config = Config(**FEW, sparsities=(0.4, 0.7))
    frame = measure({"a": tiny, "b": stacked}, digits, config)
    text = frame.to_csv(index=False)
    figure = plot(pd.read_csv(io.StringIO(text)))
    assert sum(ax.get_visible() and ax.has_data() for ax in figure.axes if ax.get_title()) == 6
    figure.savefig(tmp_path / "figure.png", dpi=40)
    alone = plot(frame[frame["model"] == "b"])
    alone.savefig(tmp_path / "alone.png", dpi=40)
    assert [ax.get_title() for ax in alone.axes if ax.get_visible()] == [
        "share of squared gradient: b",
        "norm of the gradient, all of the block",
        "pruned, not retrained: b",
    ]
    assert set(frame["method"][frame["model"] == "b"].dropna()) == {
        "none",
        "magnitude",
        "taylor",
        "random",
    }
    assert 0 < len(config.headline(frame)) <= 40


def test_without_pruning(tiny, digits, tmp_path):
    frame = measure({"a": tiny}, digits, Config(**FEW, methods=()))
    assert set(values(frame, "accuracy")["method"]) == {"none"}
    plot(frame).savefig(tmp_path / "figure.png", dpi=40)


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
