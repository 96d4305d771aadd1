"""The table against loops over images with numpy's correlation, stacks of copies, and nulls in
closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from bvit_interp.analyses.attention import COLUMNS, Config, measure, summary
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import DataError, UserError
from bvit_interp.probes import saliency
from bvit_interp.probes.probe import Probe


def batch_of(model, data):
    geometry = Geometry.of(model, data)
    return torch.stack([geometry(data.read(i)[0])[0] for i in range(len(data))])


def patterns_of(model, data):
    """``(n, T, H, N, N)`` float64."""
    probe = Probe(model)
    return probe.run(batch_of(model, data), "pattern")[1][
        "pattern"
    ].detach().double().numpy(), probe


def row(frame, metric, step, head="mean", other=None):
    found = frame[
        (frame["metric"] == metric) & (frame["step"] == step) & (frame["head"] == str(head))
    ]
    found = found[found["other_step"].isna() if other is None else found["other_step"] == other]
    assert len(found) == 1
    return found.iloc[0]


def test_single_step_rows_in_a_loop(any_model, digits):
    frame = measure({"m": any_model}, digits, Config(batch_size=13))
    patterns, probe = patterns_of(any_model, digits)
    tokens, (_, steps, heads) = patterns.shape[-1], patterns.shape[:3]
    cls = patterns[:, :, :, 0]
    entropy = -(cls * np.log(cls)).sum(-1)
    for t, head in itertools.product(range(steps), [*range(heads), "mean"]):
        each = entropy[:, t].mean(-1) if head == "mean" else entropy[:, t, head]
        found = row(frame, "attention_entropy", t + 1, head)
        assert found["value"] == pytest.approx(each.mean(), rel=1e-5)
        low, high = stats.norm.interval(0.95, each.mean(), stats.sem(each))
        assert (found["low"], found["high"]) == (
            pytest.approx(low, rel=1e-5),
            pytest.approx(high, rel=1e-5),
        )
        assert (found["null"], found["n"]) == (pytest.approx(math.log(tokens)), len(digits))
        share = row(frame, "normalised_entropy", t + 1, head)
        assert share["null"] == 1
        assert share[["value", "low", "high"]].tolist() == pytest.approx(
            [found[key] / math.log(tokens) for key in ("value", "low", "high")]
        )
        kept = row(frame, "cls_to_patches", t + 1, head)
        each = cls[..., probe.num_prefix_tokens :].sum(-1)[:, t]
        assert kept["value"] == pytest.approx(
            (each if head == "mean" else each[:, head]).mean(), rel=1e-5
        )
        assert kept["null"] == 16 / tokens
    distance, share = row(frame, "attention_distance", 2), row(frame, "normalised_distance", 2)
    assert share["value"] == pytest.approx(distance["value"] / math.hypot(4, 4))
    assert share["null"] == pytest.approx(distance["null"] / math.hypot(4, 4))


def test_agreement_and_its_nulls_in_a_loop(any_model, digits):
    """Every pair of images, heads and of three pairs of steps, with numpy's correlation."""
    digits = type(digits)("test", length=8)
    frame = measure({"m": any_model}, digits, Config(batch_size=3))
    patterns, probe = patterns_of(any_model, digits)
    maps = patterns[:, :, :, 0, probe.num_prefix_tokens :]
    heads, steps = maps.shape[2], maps.shape[1]
    for s, t in {(0, 1), (1, steps - 1), (0, steps - 1)}:
        every = np.corrcoef(maps[:, s].reshape(8 * heads, -1), maps[:, t].reshape(8 * heads, -1))
        every = every[: 8 * heads, 8 * heads :].reshape(8, heads, 8, heads)
        same_image = np.stack([every[i, :, i] for i in range(8)])  # (n, head at s, head at t)
        own = np.stack([np.diag(table) for table in same_image])
        others = [(i, j) for i in range(8) for j in range(8) if i != j]
        shuffled = np.mean([np.diag(every[i, :, j]) for i, j in others], axis=0)
        table = same_image.mean(0)
        for h in range(heads):
            found = row(frame, "step_correlation", s + 1, h, t + 1)
            assert found["value"] == pytest.approx(own[:, h].mean(), abs=1e-5)
            assert found["null_other_images"] == pytest.approx(shuffled[h], abs=1e-5)
            different = [
                table[a, b] for a in range(heads) for b in range(heads) if a != b and h in (a, b)
            ]
            assert found["null"] == pytest.approx(np.mean(different), abs=1e-5)
            assert math.isnan(found["p_value"])
        found = row(frame, "step_correlation", s + 1, "mean", t + 1)
        assert found["value"] == pytest.approx(own.mean(), abs=1e-5)
        half = 1.959964 * stats.sem(own.mean(1))
        assert found["high"] - found["low"] == pytest.approx(2 * half, rel=1e-3, abs=1e-6)
        assert found["null"] == pytest.approx(
            (table.sum() - np.trace(table)) / (heads * (heads - 1)), abs=1e-5
        )
        assert found["null_other_images"] == pytest.approx(shuffled.mean(), abs=1e-5)
        totals = [
            sum(table[h, p[h]] for h in range(heads)) for p in itertools.permutations(range(heads))
        ]
        assert found["p_value"] == np.mean([total >= totals[0] - 1e-12 for total in totals])
    pairs = frame[(frame["metric"] == "step_correlation") & (frame["head"] == "mean")]
    assert len(pairs) == steps * (steps - 1) / 2
    assert (pairs["other_step"] > pairs["step"]).all()


def test_rollout_rows(any_model, digits):
    frame = measure({"m": any_model}, digits, Config(batch_size=13))
    patterns, probe = patterns_of(any_model, digits)
    rolled = (
        saliency.rollout(probe, batch_of(any_model, digits))[:, :, 0].double().numpy()
    )  # (n, T, P)
    raw = patterns[:, :, :, 0, probe.num_prefix_tokens :].mean(2)
    n = len(digits)
    for t in (0, 1, probe.num_steps - 1):
        every = np.corrcoef(raw[:, t], rolled[:, t])[:n, n:]
        found = row(frame, "rollout_correlation", t + 1)
        assert found["value"] == pytest.approx(np.trace(every) / n, abs=1e-5)
        assert found["null_other_images"] == pytest.approx(
            (every.sum() - np.trace(every)) / (n * (n - 1)), abs=1e-5
        )
    assert row(frame, "rollout_correlation", 1)["value"] == pytest.approx(1)
    cls = 0.5 * patterns[:, 0].mean(1)[:, 0]
    cls[:, 0] += 0.5
    assert row(frame, "rollout_entropy", 1)["value"] == pytest.approx(
        -(cls * np.log(cls)).sum(-1).mean(), rel=1e-5
    )


def test_uniform_attention_is_its_nulls_and_its_maps_agree_with_nothing(any_model, digits):
    width = any_model.embed_dim
    with torch.no_grad():
        for block in any_model.blocks.children():
            block.attn.qkv.weight[: 2 * width] = 0
            block.attn.qkv.bias[: 2 * width] = 0
    frame = measure({"m": any_model}, digits, Config(limit=9))
    correlations = frame["metric"].str.endswith("step_correlation")
    assert (
        frame[correlations][["value", "low", "null", "null_other_images", "p_value"]]
        .isna()
        .all(axis=None)
    )
    assert (frame[correlations]["n"] == 0).all()
    uniform = frame[~correlations]
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(uniform[column], uniform["null"], atol=1e-5)
    assert uniform["null_other_images"].isna().all()


def test_a_stack_of_copies_is_the_bvit(tiny, make, digits):
    stack = make(name="vit_rms_small_patch16_224", seed=3)
    weights = {
        f"blocks.{t}.{k}": v for t in range(12) for k, v in tiny.blocks[0].state_dict().items()
    }
    others = {k: v for k, v in tiny.state_dict().items() if not k.startswith("blocks.")}
    stack.load_state_dict({**others, **weights})
    frame = measure({"m": tiny, "stack": stack}, digits, Config(limit=12))
    one, two = (
        frame[frame["model"] == name].drop(columns="model").reset_index(drop=True)
        for name in ("m", "stack")
    )
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_heads_of_a_bvit_keep_their_number_and_shuffled_ones_do_not(make, digits):
    """Three blocks with the same q and k; then each has its heads in an order of its own."""
    model = make(name="vit_rms_small_patch16_224", num_blocks=3, seed=1)

    def put(orders):
        with torch.no_grad():
            for block, order in zip(model.blocks.children(), orders, strict=True):
                heads = torch.randn(2, 4, 8, 32, generator=torch.Generator().manual_seed(5))
                block.attn.qkv.weight[:64] = heads[:, order].reshape(64, 32)
                block.attn.qkv.bias[:64] = 0
                block.attn.proj.weight *= 0.01
                block.mlp.fc2.weight *= 0.01
                block.attn.proj.bias *= 0.01
                block.mlp.fc2.bias *= 0.01
        frame = measure({"m": model}, digits, Config(limit=20))
        return frame[(frame["metric"] == "step_correlation") & (frame["head"] == "mean")]

    same = put([list(range(4))] * 3)
    assert (same["value"] > same["null"] + 0.2).all()
    assert (same["p_value"] == 1 / 24).all()
    mixed = put([[0, 1, 2, 3], [1, 2, 3, 0], [3, 0, 1, 2]])
    assert (mixed["value"] < mixed["null"]).all()
    assert (mixed["p_value"] > 0.3).all()


def test_one_head_has_no_other_and_registers_are_counted(make, tiny_reg4, digits):
    frame = measure(
        {"one": make(num_heads=1, num_steps=2), "r": tiny_reg4}, digits, Config(limit=5)
    )
    agreement = frame[(frame["model"] == "one") & (frame["metric"] == "step_correlation")]
    assert agreement["value"].notna().all()
    assert agreement[["null", "p_value"]].isna().all(axis=None)
    registers = frame[frame["metric"] == "cls_to_reg"]
    assert set(registers["model"]) == {"r"}
    assert registers["null"].unique() == pytest.approx([4 / 21])


def test_without_cls(make, tiny, digits, tmp_path):
    pooled = make(name="vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg")
    frame = measure({"a": pooled, "b": tiny}, digits, Config(limit=5), folder=tmp_path)
    of_a = frame[frame["model"] == "a"]
    assert set(of_a["metric"]) == {"attention_distance", "normalised_distance"}
    assert of_a["path"].isna().all()


def test_several_models_share_one_pass_and_change_nothing(tiny, tiny_reg4, stacked, digits):
    reads = []

    class Counted(type(digits)):
        def read(self, i):
            reads.append(i)
            return super().read(i)

    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    models = {"a": tiny, "b": tiny_reg4, "c": stacked}
    every = measure(models, Counted("test", length=20), Config())
    assert sorted(reads) == list(range(20))
    alone = measure({"b": tiny_reg4}, Counted("test", length=20), Config())
    pd.testing.assert_frame_equal(every[every["model"] == "b"].reset_index(drop=True), alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_table_is_the_same_for_any_batch_size(tiny, digits):
    a, b = (measure({"m": tiny}, digits, Config(batch_size=size)) for size in (7, 60))
    pd.testing.assert_frame_equal(a, b, rtol=1e-6, atol=1e-6)


def test_files_of_example_maps(tiny, tiny_reg4, digits, tmp_path):
    frame = measure({"a": tiny, "b": tiny_reg4}, digits, Config(limit=5), folder=tmp_path)
    assert list(frame) == list(COLUMNS)
    for name, model in (("a", tiny), ("b", tiny_reg4)):
        path = str(tmp_path / f"attention_{name}.npz")
        assert frame.loc[frame["model"] == name, "path"].unique().tolist() == [path]
        with np.load(path) as arrays:
            assert arrays["index"].tolist() == [0, 20, 40]
            assert (arrays["image"].dtype, arrays["maps"].dtype) == (np.uint8, np.float32)
            geometry = Geometry.of(model, digits)
            for i, image, maps in zip(*arrays.values(), strict=True):
                np.testing.assert_allclose(image, digits.read(i)[0], atol=1)
                pixels = geometry(digits.read(i)[0])[0]
                expected = saliency.attention(Probe(model), pixels[None])[0]
                np.testing.assert_allclose(maps.reshape(12, 4, 16), expected, atol=1e-6)


def test_example_images_that_cannot_be_read(tiny, digits, tmp_path, monkeypatch):
    read = digits.read

    def torn(i):
        if i == 5:
            raise DataError("torn.png cannot be read")
        return read(i)

    monkeypatch.setattr(digits, "read", torn)
    chosen = {"limit": 3, "example_images": (5, 2)}
    with pytest.raises(DataError, match="torn"):
        measure({"m": tiny}, digits, Config(**chosen), folder=tmp_path)
    measure({"m": tiny}, digits, Config(**chosen, skip_corrupt=True), folder=tmp_path)
    with np.load(tmp_path / "attention_m.npz") as arrays:
        assert arrays["index"].tolist() == [2]
        assert len(arrays["image"]) == len(arrays["maps"]) == 1
    unreadable = Config(limit=3, example_images=(5,), skip_corrupt=True)
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        measure({"m": tiny}, digits, unreadable, folder=tmp_path)


def test_chosen_images(tiny, digits, tmp_path):
    frame = measure(
        {"m/x@y": tiny}, digits, Config(limit=4, example_images=(59, 7, 59)), folder=tmp_path
    )
    assert frame["path"].unique().tolist() == [str(tmp_path / "attention_m_x_y.npz")]
    with np.load(frame["path"].iloc[0]) as kept:
        assert kept["index"].tolist() == [59, 7]
    none = measure({"m": tiny}, digits, Config(limit=4, n_examples=0), folder=tmp_path)
    assert none["path"].isna().all()


def test_one_image_has_no_interval(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(limit=1))
    assert frame["value"].notna().all()
    assert frame[["low", "high"]].isna().all(axis=None)
    assert frame["null_other_images"].isna().all()


def test_summary_has_the_means_without_correlations_between_steps(tiny, digits):
    shown = summary(measure({"m": tiny}, digits, Config(limit=4)))
    assert set(shown["head"]) == {"mean"}
    expected = {"attention_entropy", "normalised_distance", "rollout_correlation", "cls_to_patches"}
    assert expected < set(shown["metric"])
    assert "step_correlation" not in set(shown["metric"])


def test_bad_input(tiny, digits, tmp_path):
    with pytest.raises(UserError, match="n-examples must be >= 0, got -1"):
        Config(n_examples=-1)
    with pytest.raises(UserError, match="positions in the data set, from 0, got 3 -2"):
        Config(example_images=(3, -2))
    with pytest.raises(UserError, match=r"no image 60; images: 0\.\.59"):
        measure({"m": tiny}, digits, Config(example_images=(60,)), folder=tmp_path)
    with torch.no_grad():
        tiny.blocks[0].attn.qkv.weight.mul_(1e30)
    with pytest.raises(UserError, match="hold NaN"):
        measure({"m": tiny}, digits, Config(limit=2))
