"""The rank sweep against weights truncated by numpy, and its way through a kill."""

from __future__ import annotations

import copy
import io

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp import results
from bvit_interp.analyses import rank_sweep
from bvit_interp.analyses.rank_sweep import COLUMNS, Config, measure, plot
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.results import Table


def accuracy_by_hand(model, data, rank=None):
    """Accuracy of a copy whose FFN matrices numpy has truncated."""
    model = copy.deepcopy(model)
    for block in model.blocks.children() if rank else ():
        for linear in (block.mlp.fc1, block.mlp.fc2):
            u, s, vt = np.linalg.svd(linear.weight.detach().double().numpy(), full_matrices=False)
            s[rank:] = 0
            linear.weight.data = torch.tensor((u * s) @ vt, dtype=torch.float32)
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in range(len(data))]
    with torch.no_grad():
        predicted = model(torch.stack([geometry(image, None)[0] for image, _, _ in scenes])).argmax(-1)
    return float(np.mean(predicted.numpy() == [label for _, label, _ in scenes]))


def test_accuracy_at_every_rank_against_numpy(any_model, digits):
    frame = measure({"m": any_model}, digits, Config(ranks=(1, 4, 16), batch_size=11))
    assert frame["rank"].tolist() == [1, 4, 16]
    assert frame["accuracy"].tolist() == pytest.approx([accuracy_by_hand(any_model, digits, k) for k in (1, 4, 16)])


def test_full_rank_is_the_untouched_model_exactly(any_model, digits, monkeypatch):
    full = any_model.embed_dim
    seen = []
    original = type(any_model).forward

    def remember(self, *args, **kwargs):
        logits = original(self, *args, **kwargs)
        seen.append(logits.clone())
        return logits

    monkeypatch.setattr(type(any_model), "forward", remember)
    frame = measure({"m": any_model}, digits, Config(ranks=(full,)))
    monkeypatch.undo()
    assert frame["accuracy"].item() == accuracy_by_hand(any_model, digits)
    assert frame["energy_fc1"].item() == pytest.approx(1.0)
    images = torch.stack([Geometry.of(any_model, digits)(digits.read(i)[0], None)[0] for i in range(60)])
    with torch.inference_mode():
        assert torch.equal(torch.cat(seen), any_model(images))


def test_weights_are_put_back_also_after_an_error(tiny, digits, monkeypatch):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    measure({"m": tiny}, digits, Config(ranks=(2,), limit=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())

    def fail(*_):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(type(tiny), "forward", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        measure({"m": tiny}, digits, Config(ranks=(2,), limit=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_default_ranks_are_the_papers_in_proportion(tiny, make):
    assert rank_sweep._ranks("m", tiny, Config()) == [3, 5, 11, 16, 21, 27, 29, 31, 32]
    base = make(embed_dim=768, num_heads=12)
    assert rank_sweep._ranks("m", base, Config()) == [64, 128, 256, 384, 512, 640, 702, 744, 760, 768]


def test_it_continues_where_it_stopped(tiny, stacked, digits, tmp_path):
    models, config = {"a": tiny, "b": stacked}, Config(ranks=(2, 8, 32), limit=20)
    options = {"ranks": [2, 8, 32]}
    whole = measure(models, digits, config, table=Table(tmp_path / "whole.csv", options))
    path = tmp_path / "killed.csv"
    results.write_json({"options": options}, path.with_suffix(".json"))
    whole.iloc[:3].to_csv(path, index=False)  # killed after three of six rows
    counted = []
    original = rank_sweep._count_hits

    def count(models, cut, *args):
        counted.append(dict(cut))
        return original(models, cut, *args)

    rank_sweep._count_hits = count
    try:
        resumed = measure(models, digits, config, table=Table(path, options))
    finally:
        rank_sweep._count_hits = original
    assert counted == [{"b": 8}, {"a": 32, "b": 32}]
    pd.testing.assert_frame_equal(resumed, whole)
    pd.testing.assert_frame_equal(pd.read_csv(path, engine="python"), whole)
    with pytest.raises(UserError, match=r"made with other options \(ranks: \[2, 8, 32\] there, \[2\] now\)"):
        Table(path, {"ranks": [2]})


def test_columns_intervals_and_figure_from_the_csv_alone(tiny, digits):
    frame = measure({"a": tiny}, digits, Config(limit=30))
    assert list(frame) == list(COLUMNS)
    labels = [digits.read(i)[1] for i in range(0, 60, 2)]
    assert frame["chance"].iloc[0] == pytest.approx(np.bincount(labels).max() / 30)
    assert ((frame["low"] <= frame["accuracy"]) & (frame["accuracy"] <= frame["high"])).all()
    assert frame["energy_fc2"].is_monotonic_increasing
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), frame["accuracy"])


def test_bad_ranks(tiny, digits):
    with pytest.raises(UserError, match=r"ranks must be >= 1, got \(0, 4\)"):
        Config(ranks=(0, 4))
    with pytest.raises(UserError, match=r"rank 33 is above the full rank 32 of m; ranks: 1\.\.32"):
        measure({"m": tiny}, digits, Config(ranks=(33,)))
