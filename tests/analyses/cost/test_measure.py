"""Counts against the paper's tables, and times against a clock of the test."""

from __future__ import annotations

import importlib
import itertools
import math
import time

import pandas as pd
import pytest
import timm
import torch

from bvit_interp.analyses.cost import COLUMNS, Config, measure, summary
from bvit_interp.analyses.cost.measure import counts
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll


def counted(name, **kwargs):
    with torch.device("meta"):
        return counts(timm.create_model(name, **kwargs))


@pytest.mark.parametrize(
    ("name", "arguments", "millions", "gflops"),
    [
        # Table 1
        ("bvit_small_patch16_224", {}, 2.5, 8.5),
        ("bvit_base_patch16_224", {}, 8.6, 33.7),
        ("bvit_large_patch16_224", {}, 14.6, 119.3),
        # Table 2: blocks x steps at width 384
        ("bvit_small_patch16_224", {"num_blocks": 2, "num_steps": 6}, 4.3, 8.5),
        ("bvit_small_patch16_224", {"num_blocks": 3, "num_steps": 4}, 6.1, 8.5),
        ("bvit_small_patch16_224", {"num_blocks": 4, "num_steps": 3}, 7.9, 8.5),
        ("bvit_small_patch16_224", {"num_blocks": 6, "num_steps": 2}, 11.4, 8.5),
        ("vit_rms_small_patch16_224", {}, 22.0, 8.5),
        # Table 6
        ("bvit_base_fl_patch16_224", {}, 8.6, 134.1),
        ("bvit_base_sc_patch16_224", {}, 8.6, 33.7),
    ],
)
def test_the_numbers_the_paper_prints(name, arguments, millions, gflops):
    found = counted(name, **arguments)
    assert round(found["parameters"] / 1e6, 1) == millions
    assert round(found["gflops"], 1) == gflops


def test_parts_of_bvit_b_written_out():
    found = counted("bvit_base_patch16_224")
    width = 768
    assert found["blocks"] == 12 * width**2 + 9 * width + 2 * width == 7_086_336
    assert found["embedding"] == (3 * 16 * 16 * width + width) + width + 197 * width
    assert (found["norm"], found["head"]) == (width, 1000 * width + 1000)
    assert found["backbone"] == 7_829_760  # "7.8M", Table 4
    assert counted("vit_rms_base_patch16_224")["backbone"] == 85_779_456  # "85.8M"
    assert found["gflops_attention"] - found["gflops"] == pytest.approx(
        12 * 4 * 197**2 * width / 1e9
    )
    assert counted("bvit_base_te_patch16_224")["blocks"] - found["blocks"] == 12 * width  # "9K"
    assert counted("bvit_base_reg4_patch16_224")["embedding"] - found["embedding"] == 4 * width


def test_every_kind_of_model_and_its_parts_add_up(any_model, digits):
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    frame = measure(
        {"m": any_model, "unrolled": unroll(any_model)}, digits, Config(runs=2, batch_size=2)
    )
    assert list(frame) == list(COLUMNS)
    for _, row in frame.iterrows():
        assert row["embedding"] + row["blocks"] + row["norm"] + row["head"] == row["parameters"]
        assert row["parameters"] == sum(p.numel() for p in any_model.parameters())
        assert row["steps"] == len(any_model.blocks)
        assert row["image_size"] == "32x32"
        assert 0 < row["latency_low"] <= row["latency_ms"] <= row["latency_high"]
        assert row["throughput"] > 0
    same = ["embedding", "blocks", "norm", "head", "gflops", "gflops_attention"]
    assert (frame[same].nunique() == 1).all()
    assert frame["peak_memory"].isna().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())


def test_models_take_turns_and_times_are_of_the_clock(tiny, stacked, digits, monkeypatch):
    """A clock that stands still but in a forward pass: the r-th of `a` takes r ms, of `b` 10 + r
    ms, a batch 100 ms."""
    clock, order = [0.0], []
    ticks = {id(tiny): itertools.count(), id(stacked): itertools.count(10)}

    def tick(model, args, _):
        order.append((id(model), len(args[0])))
        clock[0] += (next(ticks[id(model)]) if len(args[0]) == 1 else 100) / 1e3

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with tiny.register_forward_hook(tick), stacked.register_forward_hook(tick):
        frame = measure({"a": tiny, "b": stacked}, digits, Config(runs=5, batch_size=8)).set_index(
            "model"
        )
    singles = [model for model, images in order if images == 1]
    assert singles == [id(tiny), id(stacked)] * (3 + 5)  # three turns to warm up
    # timed: 3 4 5 6 7 and 13 14 15 16 17 ms
    assert frame.loc["a", ["latency_low", "latency_ms", "latency_high"]].tolist() == pytest.approx(
        [4, 5, 6]
    )
    assert frame.loc["b", ["latency_low", "latency_ms", "latency_high"]].tolist() == pytest.approx(
        [14, 15, 16]
    )
    assert frame["latency_ratio"].tolist() == pytest.approx([1, 15 / 5])
    assert frame["throughput"].tolist() == pytest.approx([80, 80])
    assert frame["runs"].tolist() == [5, 5]


def test_the_ratio_is_of_the_same_turn(tiny, stacked, digits, monkeypatch):
    """A machine that slows down tenfold half way: the ratio is 2 in every turn, that of the medians
    is not."""
    clock, turn = [0.0], itertools.count()
    speed = [1] * 6 + [10] * 3 + [1] * 100

    def tick(model, args, _):
        t = next(turn) // 2
        clock[0] += (1 if model is tiny else 2) * speed[min(t, 99)] * (1 + t) / 1e3

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with tiny.register_forward_hook(tick), stacked.register_forward_hook(tick):
        frame = measure({"a": tiny, "b": stacked}, digits, Config(runs=5, batch_size=2))
    assert frame["latency_ratio"].tolist() == pytest.approx([1, 2])


def test_another_type_and_training_mode_leave_the_model_as_it_was(tiny, digits):
    seen = []
    tiny.train()
    with tiny.head.register_forward_hook(
        lambda module, args, out: seen.append((out.dtype, module.training))
    ):
        frame = measure({"m": tiny}, digits, Config(runs=1, batch_size=2, dtype="bfloat16"))
    assert set(seen) == {(torch.bfloat16, False)}
    assert frame["dtype"].item() == "bfloat16"
    assert tiny.training
    assert tiny.head.weight.dtype == torch.float32


def test_the_data_are_not_read(tiny):
    assert len(measure({"m": tiny}, None, Config(runs=1, batch_size=1))) == 1


def test_flops_that_are_not_known(make, digits):
    pooled = make(name="vit_tiny_patch16_224", depth=2, global_pool="map", class_token=False)
    frame = measure({"m": pooled}, digits, Config(runs=1, batch_size=1))
    assert math.isnan(frame["gflops"].item())
    assert frame["parameters"].item() == sum(p.numel() for p in pooled.parameters())
    pd.testing.assert_frame_equal(summary(frame), frame)


def test_bad_input(tiny, digits, monkeypatch):
    module = importlib.import_module("bvit_interp.analyses.cost.measure")
    with pytest.raises(UserError, match="runs must be >= 1, got 0"):
        Config(runs=0)
    monkeypatch.setattr(module, "rank_and_world", lambda: (1, 2))
    with pytest.raises(UserError, match="without torchrun"):
        measure({"m": tiny}, digits, Config(runs=1))
