"""Accuracy by step against `evaluate` at T, and against models of every length."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import timm
import torch

from bvit_interp.analyses import evaluate
from bvit_interp.analyses.step_accuracy import COLUMNS, Config, measure, summary
from bvit_interp.analyses.step_accuracy.measure import _gflops
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import DataError, UserError
from bvit_interp.models.cost import flops
from bvit_interp.models.steps import Steps
from bvit_interp.models.unroll import unroll

SHARED = ["n", "accuracy", "low", "high", "top5_accuracy", "loss", "confidence", "chance"]


def batch_of(model, data):
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in range(len(data))]
    return torch.stack([geometry(image, None)[0] for image, _, _ in scenes]), torch.tensor(
        [s[1] for s in scenes]
    )


def test_at_the_trained_step_it_is_evaluate_exactly(any_model, digits):
    frame = measure({"m": any_model}, digits, Config(batch_size=11))
    whole = evaluate.measure({"m": any_model}, digits, evaluate.Config(batch_size=11))
    at_t = frame[frame["step"] == frame["trained_steps"]]
    assert len(at_t) == 1
    assert at_t[SHARED].iloc[0].to_dict() == whole[SHARED].iloc[0].to_dict()
    assert at_t["agreement"].item() == 1.0


def test_every_step_is_a_model_of_so_many_steps(any_model, digits):
    """One pass of 24 steps against 24 models run one by one, accuracies and losses computed
    here."""
    recurrent = isinstance(any_model.blocks, Steps)
    frame = measure({"m": any_model}, digits, Config()).set_index("step")
    assert list(frame.index) == list(range(1, (24 if recurrent else 3) + 1))
    images, labels = batch_of(any_model, digits)
    with torch.no_grad():
        own = any_model(images).argmax(-1)
        for t in frame.index:
            logits = unroll(any_model, steps=t)(images)
            assert frame.loc[t, "accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
            assert frame.loc[t, "agreement"] == (logits.argmax(-1) == own).double().mean().item()
            loss = torch.nn.functional.cross_entropy(logits.double(), labels)
            assert frame.loc[t, "loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert frame["loss"].nunique() == len(
        frame
    )  # no two steps answer alike, or the comparison says little


def test_answers_along_the_steps_against_a_loop_over_images(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(steps=4)).set_index("step")
    images, labels = batch_of(tiny, digits)
    with torch.no_grad():
        logits = [unroll(tiny, steps=t)(images).double() for t in range(1, 5)]
    for t in (2, 4):
        now, before = logits[t - 1], logits[t - 2]
        rank = [
            1 + sum(value > row[label] for value in row)
            for row, label in zip(now, labels, strict=True)
        ]
        entropy = torch.distributions.Categorical(logits=now).entropy().mean().item()
        assert frame.loc[t, "true_rank"] == pytest.approx(np.mean(rank))
        assert frame.loc[t, "entropy"] == pytest.approx(entropy, rel=1e-4)
        assert frame.loc[t, "flips"] == (now.argmax(-1) != before.argmax(-1)).double().mean().item()
        shares = [np.bincount(x.argmax(-1), minlength=10) / 60 for x in (now, before)]
        assert frame.loc[t, "flips_null"] == pytest.approx(1 - shares[0] @ shares[1])
    assert np.isnan(frame.loc[1, ["flips", "flips_null"]].astype(float)).all()
    assert (frame["true_rank_null"] == 5.5).all()


def test_against_the_forward_written_by_hand(tiny, digits, by_hand):
    frame = measure({"m": tiny}, digits, Config(steps=14)).set_index("step")
    images, labels = batch_of(tiny, digits)
    with torch.no_grad():
        sites = by_hand.run(tiny, images, [tiny.blocks[0]] * 14)
        for t in (1, 7, 12, 14):
            logits = by_hand.logits(tiny, sites[t]["resid_post"])
            loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
            assert frame.loc[t, "loss"] == pytest.approx(loss, rel=1e-4)
            assert frame.loc[t, "confidence"] == pytest.approx(
                logits.softmax(-1).amax(-1).mean().item(), rel=1e-4
            )


@pytest.mark.parametrize("kind", ["average pooling", "registers of timm", "two heads"])
def test_the_models_own_head_answers(make, digits, kind):
    """Pooled tokens, tokens beside CLS, and DeiT's mean of two heads: each as the model itself
    reads them."""
    if kind == "average pooling":
        model = make(global_pool="avg")
    elif kind == "registers of timm":
        model = make(name="vit_tiny_patch16_224", depth=3, reg_tokens=2, global_pool="avg")
    else:
        model = make(name="deit_tiny_distilled_patch16_224", depth=3)
    frame = measure({"m": model}, digits, Config(steps=12))
    whole = evaluate.measure({"m": model}, digits, evaluate.Config())
    assert frame[SHARED].iloc[-1].to_dict() == whole[SHARED].iloc[0].to_dict()


def test_two_heads_at_an_earlier_step(make, digits):
    model = make(name="deit_tiny_distilled_patch16_224", depth=3)
    frame = measure({"m": model}, digits, Config())
    images, labels = batch_of(model, digits)
    with torch.no_grad():
        tokens = model.norm(
            model.blocks[1](model.blocks[0](model._pos_embed(model.patch_embed(images))))
        )
        logits = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert frame["loss"].iloc[1] == pytest.approx(loss, rel=1e-5)


def test_flops_of_each_step(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(steps=14, limit=2))
    for name, model in (("a", tiny), ("b", stacked)):
        for _, row in frame[frame["model"] == name].iterrows():
            step = row["step"]
            assert row["gflops"] == flops(model, count_attention=False, steps=step) / 1e9
            assert row["gflops_attention"] == flops(model, count_attention=True, steps=step) / 1e9
    assert (frame["gflops_attention"] > frame["gflops"]).all()


def test_bvit_b_costs_what_the_paper_prints():
    with torch.device("meta"):
        model = timm.create_model("bvit_base_patch16_224")
    # 2.788688 GFLOPs a step beside 0.232747 (Table 5's column "no early exit" and before)
    assert _gflops(model, 12, False) == pytest.approx(33.697, abs=1e-3)
    assert _gflops(model, 24, False) == pytest.approx(0.232747 + 24 * 2.788688, abs=1e-4)


def test_a_cost_that_is_not_known_is_left_out(make, digits):
    pooled = make(name="vit_tiny_patch16_224", depth=2, global_pool="map", class_token=False)
    frame = measure({"m": pooled}, digits, Config(steps=2, limit=2))
    assert frame["gflops"].isna().all()
    assert frame["accuracy"].notna().all()


def test_fewer_steps_than_trained_have_no_agreement(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(steps=3, limit=5))
    assert frame["step"].tolist() == [1, 2, 3]
    assert frame["agreement"].isna().all()
    assert (frame["trained_steps"] == 12).all()
    full = measure({"m": tiny}, digits, Config(limit=5))
    pd.testing.assert_frame_equal(
        frame.drop(columns="agreement"), full.head(3).drop(columns="agreement"), check_exact=True
    )


def test_an_unroll_has_the_steps_it_has(tiny, digits):
    longer = unroll(tiny, steps=15)
    frame = measure({"m": longer}, digits, Config(limit=5))
    assert frame["step"].max() == 15
    with pytest.raises(UserError, match="unroll the model it came from"):
        measure({"m": longer}, digits, Config(steps=3, limit=5))


def test_a_matched_stack_stops_at_its_blocks(make, digits):
    """Twelve blocks and one round: past the last one there is none, as in a ViT of timm; one block
    alone goes on."""
    frame = measure({"m": make(name="vit_rms_small_patch16_224")}, digits, Config(limit=5))
    assert frame["step"].tolist() == list(range(1, 13))
    assert frame["agreement"].iloc[-1] == 1.0
    frame = measure({"hybrid": make(num_blocks=2, num_steps=3)}, digits, Config(steps=8, limit=5))
    assert frame["step"].max() == 8
    frame = measure({"once": make(num_blocks=1, num_steps=1)}, digits, Config(steps=3, limit=5))
    assert frame["step"].max() == 3


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
    assert every.groupby("model").size().to_dict() == {"a": 24, "b": 24, "c": 3}
    alone = measure({"b": tiny_reg4}, Counted("test", length=20), Config())
    pd.testing.assert_frame_equal(every[every["model"] == "b"].reset_index(drop=True), alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_out_of_memory_halves_the_batch_and_counts_no_image_twice(tiny, digits, monkeypatch):
    """The failure comes after some steps have answered, as it would on a GPU."""
    whole = measure({"m": tiny}, digits, Config())
    head, calls = type(tiny).forward_head, []

    def fail_late(self, x, pre_logits=False):
        calls.append(len(x))
        if len(x) > 20 and calls.count(len(x)) % 5 == 0:
            raise torch.OutOfMemoryError
        return head(self, x, pre_logits)

    monkeypatch.setattr(type(tiny), "forward_head", fail_late)
    halved = measure({"m": tiny}, digits, Config())
    assert 60 in calls
    assert 15 in calls
    assert (halved["n"] == 60).all()
    pd.testing.assert_frame_equal(halved, whole, rtol=1e-5)


def test_columns_and_chance(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(limit=30))
    assert list(frame) == list(COLUMNS)
    labels = [digits.read(i)[1] for i in range(0, 60, 2)]
    assert (frame["chance"] == np.bincount(labels).max() / 30).all()
    pd.testing.assert_frame_equal(summary(frame), frame)


def test_bad_input(tiny, digits):
    with pytest.raises(UserError, match="steps must be >= 1, got 0"):
        Config(steps=0)
    tiny.reset_classifier(7)
    with pytest.raises(DataError, match="do not match the model's 7"):
        measure({"m": tiny}, digits, Config())
