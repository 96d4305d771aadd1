"""Circuits against masks applied by hand, their nulls, and the sweep that continues."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import STEPS, LoopedEncoder, foreign
from scipy import stats
from torch import nn

from bvit_interp import results
from bvit_interp.analyses.circuits import COLUMNS, Config, measure, summary
from bvit_interp.analyses.circuits.gates import Gates
from bvit_interp.analyses.circuits.measure import _fit_positions
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import DataError, UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.unroll import with_steps
from bvit_interp.probes.probe import Probe

SMALL = {"fractions": (0.5,), "groups": 4, "n_fit": 6, "draws": 1}


def batch_of(model, data, places):
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in places]
    return torch.stack([geometry(image, None)[0] for image, _, _ in scenes]), torch.tensor(
        [s[1] for s in scenes]
    )


def whole_rows(frame):
    means = (frame["step"] == "all") & (frame["draw"] == "all")
    return frame[means].set_index("condition")


def gates_of(frame, steps):
    """The circuit read back from the table: heads, and groups of neurons, ``(T, n)`` of 0 and 1."""
    tables = []
    for site in ("z", "mlp_post"):
        part = frame[frame["site"] == site]
        assert part["step"].tolist() == [str(t) for t in range(1, steps + 1)]
        tables.append(np.array([[float(char == "#") for char in gates] for gates in part["gates"]]))
    return tables


@pytest.mark.parametrize("kind", ["encoder", "prelude", "two_state", "looped_timm", "dinov3"])
def test_the_circuit_of_models_that_are_not_ours_applied_by_hand(kind, digits):
    """Heads and neurons are silenced by hooks written here, in the model's own forward."""
    model, steps = foreign(kind), STEPS[kind]
    config = Config(**SMALL, limit=8, ablation="zero")
    frame = measure({"m": model}, digits, config)
    heads, neurons = gates_of(frame, steps)
    images, _ = batch_of(with_steps(model), digits, [i * 60 // 8 for i in range(8)])
    # the layer that reads the heads, and the layer that reads the neurons, in the order of calls
    readers = {
        "encoder": ("block.self_attn", "block.linear2"),
        "prelude": ("core.{}.attn.proj", "core.{}.mlp.fc2"),
        "two_state": ("net.attn.proj", "net.mlp.fc2"),
        "looped_timm": ("blocks.0.attn.proj", "blocks.0.mlp.fc2"),
        "dinov3": ("blocks.{}.attn.proj", "blocks.{}.mlp.fc2"),
    }[kind]
    handles, calls = [], {}

    def silence(which, name):
        tables = (heads, neurons)[which]

        def hook(module, args):
            t = calls.setdefault(name, list(places[name]))
            keep = torch.tensor(tables[t.pop(0)], dtype=torch.float32)
            return (args[0] * keep.repeat_interleave(args[0].shape[-1] // len(keep)), *args[1:])

        return hook

    per_step = {"prelude": [t % 2 for t in range(6)], "dinov3": [0, 1, 2]}.get(kind, [0] * steps)
    places = {}
    for which, pattern in enumerate(readers):
        for t, block in enumerate(per_step):
            places.setdefault(pattern.format(block), []).append(t)
        for name in {pattern.format(block) for block in per_step}:
            module = model.get_submodule(name)
            if name == "block.self_attn":
                handles.append(_SilencedHeads(module, heads))
            else:
                handles.append(module.register_forward_pre_hook(silence(which, name)))
    with torch.no_grad():
        gated = model(images).double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        whole = model(images).double().log_softmax(-1)
    kl = (whole.exp() * (whole - gated)).sum(-1).mean().item()
    assert whole_rows(frame).loc["per-step"]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert kl > 1e-3


class _SilencedHeads:
    """`nn.MultiheadAttention` written out, with heads that give zero: another table at every call.

    Its output projection is no call of a module, so no hook sees what it reads.
    """

    def __init__(self, module, heads):
        self.module, self.own, self.tables = module, module.forward, list(heads)
        module.forward = self

    def __call__(self, x, *_, **__):
        m, keep = self.module, torch.tensor(self.tables.pop(0), dtype=torch.float32)
        q, k, v = (x @ m.in_proj_weight.T + m.in_proj_bias).unflatten(-1, (3, 4, 8)).unbind(2)
        pattern = (torch.einsum("bqhe,bkhe->bhqk", q, k) / 8**0.5).softmax(-1)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v) * keep[:, None]
        return z.flatten(2) @ m.out_proj.weight.T + m.out_proj.bias, None

    def remove(self):
        del self.module.forward


def test_blocks_without_heads_or_neurons_are_refused(digits):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.mlp = nn.Linear(32, 32)

        def forward(self, x):
            return x + self.mlp(self.norm(x)) + x.mean(1, keepdim=True)

    model = LoopedEncoder()
    model.block = Mixer()
    with pytest.raises(UserError, match="without pattern"):
        measure({"m": model.eval()}, digits, Config(**SMALL, limit=8))


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_the_circuit_applied_by_hand(any_model, digits, ablation):
    """KL, accuracy and interval of the circuit in the table, by edits written here on the images
    that are judged."""
    config = Config(**SMALL, limit=8, ablation=ablation)
    frame = measure({"m": any_model}, digits, config)
    probe = Probe(any_model)
    heads, neurons = gates_of(frame, probe.num_steps)
    fit, _ = batch_of(any_model, digits, _fit_positions(digits, config))
    places = [i * 60 // 8 for i in range(8)]
    assert not set(places) & set(_fit_positions(digits, config))
    images, labels = batch_of(any_model, digits, places)

    def by_hand(activation, address):
        filled = (
            clean[address.site, address.step].mean(0) if ablation == "mean" else torch.zeros(())
        )
        keep = heads[address.step - 1]
        if address.site == "mlp_post":
            keep = np.repeat(neurons[address.step - 1], probe.num_neurons // 4)
        open_ = torch.tensor(keep, dtype=torch.bool)
        open_ = open_[:, None] if address.site == "z" else open_
        return torch.where(open_, activation, filled)

    with torch.no_grad():
        _, clean = probe.run(fit, ["z", "mlp_post"])
        with probe.edit(
            {
                (site, t): by_hand
                for site in ("z", "mlp_post")
                for t in range(1, probe.num_steps + 1)
            }
        ):
            gated = probe(images).double().log_softmax(-1)
        whole = any_model(images).double().log_softmax(-1)
    kl = (whole.exp() * (whole - gated)).sum(-1)
    row = whole_rows(frame).loc["per-step"]
    assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-5)
    half = 1.959963984540054 * kl.std() / 8**0.5
    assert row["kl_high"] == pytest.approx((kl.mean() + half).item(), rel=1e-3, abs=1e-5)
    assert row["accuracy"] == (gated.argmax(-1) == labels).double().mean().item()
    assert row["n"] == 8
    assert row["kl_low"] == pytest.approx((kl.mean() - half).item(), rel=1e-3, abs=1e-5)
    agrees = gated.argmax(-1) == whole.argmax(-1)
    assert row["agreement"] == agrees.double().mean().item()
    right = (gated.argmax(-1) == labels).double()
    half = 1.959963984540054 * right.std() / 8**0.5
    expected = [(right.mean() - half).item(), (right.mean() + half).item()]
    assert row[["low", "high"]].tolist() == pytest.approx(expected)
    full = whole_rows(frame).loc["full"]
    right = whole.argmax(-1) == labels
    assert full["accuracy"] == right.double().mean().item()
    assert (full["low"], full["high"]) == pytest.approx(wilson_interval(right.sum().item(), 8))


def test_fractions_conditions_and_their_counts(tiny, stacked, digits):
    frame = measure(
        {"a": tiny, "b": stacked}, digits, Config(**SMALL | {"fractions": (0.3, 0.7)}, limit=5)
    )
    assert list(frame) == list(COLUMNS)
    for (name, fraction), part in frame[frame["fraction"] < 1].groupby(["model", "fraction"]):
        model = {"a": tiny, "b": stacked}[name]
        steps = len(model.blocks)
        assert whole_rows(part).index.tolist() == [
            "per-step",
            "even",
            "all-steps",
            "shuffled",
            "shuffled-units",
            "random",
            "even-random",
            "same-random",
        ]
        for site, table in zip(("z", "mlp_post"), gates_of(part, steps), strict=True):
            np.testing.assert_allclose(part[part["site"] == site]["kept"], table.mean(1))
            assert table.sum() == round(fraction * table.size)
    assert frame["condition"].eq("full").sum() == 2


def test_excess_is_the_difference_to_the_circuit(tiny, digits):
    rows = whole_rows(measure({"m": tiny}, digits, Config(**SMALL | {"draws": 3}, limit=9)))
    others = rows.drop(index=["full", "per-step"])
    np.testing.assert_allclose(
        others["excess"], others["kl"] - rows.loc["per-step", "kl"], atol=1e-9
    )
    assert rows.loc[["full", "per-step"], "excess"].isna().all()
    bounds = others[["excess_low", "excess_high"]]
    np.testing.assert_allclose(bounds.mean(axis=1), others["excess"], atol=1e-9)
    assert (others["excess_low"] < others["excess"]).all()
    labels = [digits.read(i * 60 // 9)[1] for i in range(9)]
    assert (rows["chance"] == np.bincount(labels).max() / 9).all()


RANDOM = ["shuffled", "shuffled-units", "random", "even-random", "same-random"]
ENDS = ["kl_low", "kl_high", "excess_low", "excess_high", "low", "high"]


def test_every_draw_has_a_row_and_its_mean_an_interval_over_draws(tiny, digits):
    config = Config(**SMALL | {"draws": 4}, limit=9)
    frame = measure({"m": tiny}, digits, config)
    means = whole_rows(frame)
    draws = frame[frame["draw"] != "all"]
    assert draws["condition"].drop_duplicates().tolist() == RANDOM
    for condition, part in draws.groupby("condition"):
        assert part["draw"].tolist() == ["1", "2", "3", "4"]
        assert (part["site"] == "all").all()
        assert part[ENDS].notna().all(axis=None)
        row = means.loc[condition]
        for value, low in (("kl", "kl_low"), ("excess", "excess_low"), ("accuracy", "low")):
            assert part[value].mean() == pytest.approx(row[value])
            # no narrower than what the draws alone say
            half = stats.t.ppf(0.975, 3) * part[value].std() / 2
            assert row[value] - row[low] >= half - 1e-12
        assert part["agreement"].mean() == pytest.approx(row["agreement"])
        np.testing.assert_allclose(
            part["excess"], part["kl"] - means.loc["per-step", "kl"], atol=1e-9
        )
    assert draws[draws["condition"] == "random"]["kl"].nunique() == 4


@pytest.mark.parametrize("draws", [1, 2])
def test_a_mean_of_few_draws_has_no_interval(tiny, digits, draws):
    means = whole_rows(measure({"m": tiny}, digits, Config(**SMALL | {"draws": draws}, limit=9)))
    assert means.loc[RANDOM, ENDS].isna().all(axis=None)
    assert means.loc[RANDOM, ["kl", "excess", "accuracy"]].notna().all(axis=None)
    assert means.loc[["even", "all-steps"], ENDS].notna().all(axis=None)


def test_the_unit_that_answers_is_found(make, digits):
    """Only head 2 of step 3 and one group of step 2 reach the residual: at one gate a kind, these
    stay open."""
    model = make(name="vit_tiny_patch16_224", depth=3)
    with torch.no_grad():
        for t, block in enumerate(model.blocks):
            if t != 2:
                block.attn.proj.weight.zero_()
            if t != 1:
                block.mlp.fc2.weight.zero_()
        head = torch.arange(32) // 8 == 2
        model.blocks[2].attn.proj.weight[:, ~head] = 0
        model.blocks[1].mlp.fc2.weight[:, 32:] = 0  # of 128 neurons, group 0 of 4 stays
    frame = measure({"m": model}, digits, Config(**SMALL | {"fractions": (1 / 12,)}, limit=6))
    heads, neurons = gates_of(frame, 3)
    assert np.argwhere(heads).tolist() == [[2, 2]]
    assert np.argwhere(neurons).tolist() == [[1, 0]]
    rows = whole_rows(frame)
    assert rows.loc["per-step", "kl"] == pytest.approx(0, abs=1e-9)
    assert rows.loc["per-step", "agreement"] == 1.0
    assert rows.loc["shuffled", "excess"] > 1e-4


def test_batches_and_order_of_models_change_nothing(tiny, stacked, digits):
    config = {**SMALL, "limit": 11, "methods": ("learned",), "epochs": 1}
    one = measure({"a": tiny, "b": stacked}, digits, Config(**config, batch_size=3))
    two = measure({"b": stacked, "a": tiny}, digits, Config(**config, batch_size=64))
    for name in ("a", "b"):
        parts = [frame[frame["model"] == name].reset_index(drop=True) for frame in (one, two)]
        pd.testing.assert_frame_equal(*parts, rtol=1e-6, atol=1e-6)


def test_out_of_memory_halves_the_batch_and_the_fit(tiny, digits, monkeypatch):
    config = Config(**SMALL, limit=12)
    whole = measure({"m": tiny}, digits, config)
    for name, most in (("logits", 5), ("slopes", 1)):
        run = getattr(Gates, name)

        def fail(self, images, *args, run=run, most=most):
            if len(images) > most:
                raise torch.OutOfMemoryError
            return run(self, images, *args)

        monkeypatch.setattr(Gates, name, fail)
    pd.testing.assert_frame_equal(measure({"m": tiny}, digits, config), whole, rtol=1e-6, atol=1e-6)


def test_all_images_are_either_fit_or_scored(tiny):
    data = DigitScenes("test", length=20)
    config = Config(**SMALL | {"n_fit": 50})
    frame = measure({"m": tiny}, data, config)
    assert (whole_rows(frame)["n"] == 10).all()
    assert (frame[frame["site"] == "z"]["n"] == 10).all()
    assert len(set(_fit_positions(data, config))) == 10
    # what the limit leaves out comes first
    assert set(_fit_positions(data, Config(limit=10, n_fit=8))) <= set(range(1, 20, 2))


def test_a_sweep_continues_where_it_stopped(tiny, digits, tmp_path, monkeypatch):
    config = Config(**SMALL | {"fractions": (0.3, 0.7)}, limit=5)
    whole = measure({"m": tiny}, digits, config)
    path, options = tmp_path / "circuits.csv", {"config": config.resume_key()}
    table = results.Table(path, options)
    append, written = table.append, []

    def killed(row):
        if len(written) == 40:
            raise KeyboardInterrupt
        written.append(row)
        append(row)

    monkeypatch.setattr(table, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        measure({"m": tiny}, digits, config, table)
    again = results.Table(path, options)
    assert len(again.rows) == 40
    frame = measure({"m": tiny}, digits, config, again)
    pd.testing.assert_frame_equal(frame, whole, rtol=1e-9)
    monkeypatch.setattr(sys.modules[measure.__module__], "_score", None)  # all is there
    third = measure({"m": tiny}, digits, config, results.Table(path, options))
    pd.testing.assert_frame_equal(third, whole, rtol=1e-9)


def test_the_model_comes_back_as_it_was(tiny_te, digits, watched_models):
    before = {name: tensor.clone() for name, tensor in tiny_te.state_dict().items()}
    measure({"m": tiny_te}, digits, Config(**SMALL, limit=3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_te.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tiny_te.parameters())
    assert tiny_te in watched_models  # the fixture asserts that no hook is left


def test_the_summary_has_the_kl_of_every_condition(tiny, stacked, digits):
    config = Config(**SMALL | {"fractions": (0.3, 0.7)}, limit=6)
    frame = measure({"a": tiny, "b": stacked}, digits, config)
    shown = summary(frame)
    assert len(shown) == 4
    for row in shown.to_dict("records"):
        rows = frame[(frame["model"] == row["model"]) & (frame["fraction"] == row["fraction"])]
        rows = whole_rows(rows)
        assert row["shuffled"] == rows["kl"]["shuffled"]
        assert row["even"] == rows["kl"]["even"]
        assert row["shuffled_excess"] == rows["excess"]["shuffled"]


def test_bad_input(tiny, digits):
    for given, message in (
        ({"fractions": (0.5, 1.0)}, "fractions must be between 0 and 1"),
        ({"fractions": ()}, "fractions must be"),
        (
            {"methods": ("gradient", "gradient")},
            "methods must be one or more of gradient, learned, each once",
        ),
        ({"ablation": "resample"}, "ablation must be mean or zero, got 'resample'"),
        ({"n_fit": 0}, "n-fit must be >= 1, got 0"),
        ({"draws": 0}, "draws must be >= 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**given)
    with pytest.raises(UserError, match="at least 2 are needed, got 1"):
        measure({"m": tiny}, DigitScenes("test", length=1), Config(**SMALL))
    tiny.reset_classifier(7)
    with pytest.raises(DataError, match="do not match the model's 7"):
        measure({"m": tiny}, digits, Config(**SMALL))


def test_nan_and_images_that_cannot_be_read(tiny, digits, monkeypatch):
    read = DigitScenes.read

    def corrupt(self, i):
        if i % 7 == 3:
            raise DataError(f"scene {i} cannot be read")
        return read(self, i)

    monkeypatch.setattr(DigitScenes, "read", corrupt)
    with pytest.raises(DataError, match="cannot be read"):
        measure({"m": tiny}, digits, Config(**SMALL | {"n_fit": 20}, limit=20))
    frame = measure(
        {"m": tiny}, digits, Config(**SMALL | {"n_fit": 20}, limit=20, skip_corrupt=True)
    )
    assert (whole_rows(frame)["n"] < 20).all()
    assert (frame[frame["site"] == "z"]["n"] < 20).all()
    monkeypatch.undo()
    with torch.no_grad():
        tiny.head.bias[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        measure({"m": tiny}, digits, Config(**SMALL, limit=5))
