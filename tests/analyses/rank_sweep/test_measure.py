"""The rank sweep against weights truncated by numpy, and its way through a kill."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp import results
from bvit_interp.analyses.rank_sweep import COLUMNS, Config, measure
from bvit_interp.analyses.rank_sweep.measure import _calibration, _ranks
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.results import Table, read_table


def batch_of(model, data, index=None):
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in (range(len(data)) if index is None else index)]
    return torch.stack([geometry(image, None)[0] for image, _, _ in scenes]), np.array(
        [s[1] for s in scenes]
    )


def truncated(weight, rank):
    u, s, vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return torch.tensor((u[:, :rank] * s[:rank]) @ vt[:rank], dtype=torch.float32)


def accuracy_by_hand(model, data, rank=None):
    """Accuracy of a copy whose FFN matrices numpy has truncated."""
    model = copy.deepcopy(model)
    for block in model.blocks.children() if rank else ():
        for linear in (block.mlp.fc1, block.mlp.fc2):
            linear.weight.data = truncated(linear.weight, rank)
    images, labels = batch_of(model, data)
    with torch.no_grad():
        return float(np.mean(model(images).argmax(-1).numpy() == labels))


def inputs_by_hooks(model, images, step=None):
    """What fc1 and fc2 read, ``{name: (tokens, width)}`` float64, at all steps or one, by hooks on
    the model itself."""
    reads = {"fc1": [], "fc2": []}
    block = next(iter(model.blocks.children()))
    handles = [
        getattr(block.mlp, name).register_forward_pre_hook(
            lambda _, x, to=to: to.append(x[0].flatten(0, 1).double())
        )
        for name, to in reads.items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat(x if step is None else [x[step - 1]]).numpy() for name, x in reads.items()
    }


def whitened_by_hand(weight, x, rank):
    """SVD-LLM's W_k with the Cholesky factor of the inputs' second moment."""
    weight, root = weight.detach().double().numpy(), np.linalg.cholesky(x.T @ x / len(x))
    u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)


def test_accuracy_at_every_rank_against_numpy(any_model, digits):
    frame = measure(
        {"m": any_model}, digits, Config(ranks=(1, 4, 16), methods=("svd",), batch_size=11)
    )
    assert frame["rank"].tolist() == [1, 4, 16]
    assert set(frame["method"]) == {"svd"}
    assert set(frame["step"]) == {"all"}
    assert frame["accuracy"].tolist() == pytest.approx(
        [accuracy_by_hand(any_model, digits, k) for k in (1, 4, 16)]
    )


@pytest.mark.parametrize("step", [None, 4])
def test_whitened_against_a_copy_and_numpy(tiny, digits, step):
    """Accuracy and both errors of the cut whose inputs are those of calibration images held out."""
    blocks = "all" if step is None else "each"
    config = Config(
        limit=40, ranks=(2, 9), methods=("svd", "whitened"), blocks=blocks, n_calibration=20
    )
    frame = measure({"m": tiny}, digits, config)
    frame = frame[frame["step"] == ("all" if step is None else str(step))].set_index(
        ["method", "rank"]
    )
    scored = [i * 60 // 40 for i in range(40)]
    held_out = [i for i in range(60) if i not in scored]
    assert len(held_out) == 20
    reads = inputs_by_hooks(tiny, batch_of(tiny, digits, held_out)[0], step)
    images, labels = batch_of(tiny, digits, scored)
    for rank in (2, 9):
        view, model = unroll(tiny), copy.deepcopy(tiny)
        for name in ("fc1", "fc2"):
            weight = getattr(tiny.blocks[0].mlp, name).weight
            cuts = {
                "whitened": whitened_by_hand(weight, reads[name], rank),
                "svd": truncated(weight, rank).double().numpy(),
            }
            dense = weight.detach().double().numpy()
            for method, cut in cuts.items():
                error = (
                    np.square(reads[name] @ (dense - cut).T).sum()
                    / np.square(reads[name] @ dense.T).sum()
                )
                assert frame.loc[(method, rank), f"error_{name}"] == pytest.approx(error, rel=1e-3)
                kept = np.square(cut).sum() / np.square(dense).sum()
                assert frame.loc[(method, rank), f"energy_{name}"] == pytest.approx(kept, rel=1e-3)
            assert (
                frame.loc[("whitened", rank), f"error_{name}"]
                < frame.loc[("svd", rank), f"error_{name}"]
            )
            new = torch.nn.Parameter(torch.tensor(cuts["whitened"], dtype=torch.float32))
            getattr(model.blocks[0].mlp, name).weight = new
            if step is not None:
                getattr(view.blocks[step - 1].mlp, name).weight = new
        with torch.no_grad():
            logits = model(images) if step is None else view(images)
        assert frame.loc[("whitened", rank), "accuracy"] == np.mean(
            logits.argmax(-1).numpy() == labels
        )
    assert (frame["n_calibration"] == 20).all()
    assert (frame["calibration_scored"] == 0).all()


def test_each_step_alone_against_numpy(any_model, digits):
    """The unroll with one step's weights replaced by hand, inner updates too; every step once."""
    config = Config(ranks=(2, 32), methods=("svd",), blocks="each", n_calibration=0, limit=30)
    frame = measure({"m": any_model}, digits, config)
    steps = len(any_model.blocks)
    assert frame["step"].tolist() == [str(t) for t in range(1, steps + 1) for _ in range(2)]
    images, labels = batch_of(any_model, digits, range(0, 60, 2))
    for t in range(1, steps + 1):
        view = unroll(any_model)
        for block in (view.blocks[t - 1], *getattr(view.blocks[t - 1], "inner", ())):
            for name in ("fc1", "fc2"):
                linear = getattr(block.mlp, name)
                linear.weight = torch.nn.Parameter(truncated(linear.weight, 2))
        with torch.no_grad():
            accuracies = [
                float(np.mean(m(images).argmax(-1).numpy() == labels)) for m in (view, any_model)
            ]
        assert frame[frame["step"] == str(t)]["accuracy"].tolist() == pytest.approx(accuracies)
    assert frame["error_fc1"].isna().all()
    assert (frame["n_calibration"] == 0).all()


@pytest.mark.parametrize("blocks", ["all", "each"])
def test_a_stack_of_copies_is_the_recurrent_model(make, digits, blocks):
    """Cut the same, they answer the same; inputs are averaged over the steps of one and by block in
    the other."""
    recurrent = make(num_steps=3)
    stack = make(name="vit_rms_small_patch16_224", num_blocks=3)
    with torch.no_grad():
        weights = recurrent.state_dict()
        stack.load_state_dict(
            {
                key: weights[key.replace("blocks.1", "blocks.0").replace("blocks.2", "blocks.0")]
                for key in stack.state_dict()
            }
        )
    methods = ("svd", "random") if blocks == "all" else ("svd", "whitened", "random")
    config = Config(ranks=(3, 12), blocks=blocks, methods=methods)
    frame = measure({"one": recurrent, "three": stack}, digits, config)
    one, three = (
        part.drop(columns="model").reset_index(drop=True)
        for _, part in frame.groupby("model", sort=False)
    )
    if (
        blocks == "all"
    ):  # three blocks draw three sets of random directions, and average three errors
        one, three = (
            part[part["method"] == "svd"].drop(columns=["error_fc1", "error_fc2"])
            for part in (one, three)
        )
    pd.testing.assert_frame_equal(one, three, rtol=1e-5)


def test_full_rank_is_the_untouched_model_exactly_and_run_once(any_model, digits):
    full = any_model.embed_dim
    seen = []
    handle = any_model.register_forward_hook(lambda _, __, logits: seen.append(logits.clone()))
    methods = ("svd", "whitened", "random")
    frame = measure(
        {"m": any_model}, digits, Config(ranks=(full,), methods=methods, n_calibration=8)
    )
    handle.remove()
    assert frame["method"].tolist() == list(methods)
    assert (frame["accuracy"] == accuracy_by_hand(any_model, digits)).all()
    assert frame["energy_fc1"].to_numpy() == pytest.approx(1.0)
    assert (frame[["error_fc1", "error_fc2"]] == 0).all(axis=None)
    assert [len(logits) for logits in seen] == [8, 60]  # the calibration, and once for all methods
    with torch.inference_mode():
        assert torch.equal(seen[1], any_model(batch_of(any_model, digits)[0]))


def test_the_model_comes_back_as_it_went_also_after_an_error(tiny, stacked, digits, watched_models):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    pointers = {name: (id(p), p.data_ptr(), p._version) for name, p in tiny.named_parameters()}
    view = unroll(tiny)  # an unroll may be given too, and keeps its modules
    watched_models.append(view)
    modules = dict(view.named_modules())
    config = Config(
        ranks=(2,),
        limit=4,
        blocks="each",
        methods=("svd", "whitened", "random"),
        n_calibration=3,
    )
    measure({"m": tiny, "view": view, "s": stacked}, digits, config)

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = tiny.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        measure({"m": tiny}, digits, Config(ranks=(2,), limit=4))
    handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert {
        name: (id(p), p.data_ptr(), p._version) for name, p in tiny.named_parameters()
    } == pointers
    assert dict(view.named_modules()) == modules


def test_random_directions_are_a_null_with_a_seed(tiny, digits):
    def frame_of(seed, **options):
        return measure(
            {"m": tiny},
            digits,
            Config(ranks=(8,), methods=("random",), seed=seed, limit=4, **options),
        )

    first = frame_of(0)
    pd.testing.assert_frame_equal(first, frame_of(0))
    assert first["energy_fc1"].item() != frame_of(1)["energy_fc1"].item()
    every = [frame_of(seed)["energy_fc1"].item() for seed in range(8)]
    assert np.mean(every) == pytest.approx(8 / 32, abs=0.05)
    single = frame_of(0, blocks="each")
    assert single["energy_fc1"].nunique() == 1  # the same directions at every step
    assert single["error_fc1"].nunique() == 12


def test_n_calibration_are_held_out_where_there_are_enough(digits):
    for limit, images, places, scored in (
        (20, 10, range(60), 0.0),
        (20, 40, range(60), 0.0),
        (20, 45, None, 1 / 3),
        (None, 12, range(0, 60, 5), 1.0),
        (None, 100, range(60), 1.0),
        (10, 0, [], 0.0),
    ):
        methods = ("svd",) if images == 0 else ("whitened",)
        found, also_scored = _calibration(
            digits, Config(limit=limit, n_calibration=images, methods=methods)
        )
        assert len(found) == min(images, 60)
        assert also_scored == pytest.approx(scored, abs=0.02)
        assert len(set(found.index)) == len(found)
        if places is not None:
            assert set(found.index) <= set(places)
        if len(found):
            assert found.name(3) == digits.name(found.index[3])
            assert found.read(3)[1] == digits.read(found.index[3])[1]


def test_out_of_memory_halves_the_batch_and_counts_no_input_twice(tiny, digits, monkeypatch):
    """The failure comes in the middle of the forward, when some steps have been seen."""
    config = Config(ranks=(4,), methods=("svd", "whitened"), limit=12, n_calibration=48)
    whole = measure({"m": tiny}, digits, config)
    norm, calls = type(tiny.blocks[0].norm1).forward, []

    def fail_late(self, x):
        calls.append(len(x))
        if len(x) > 15 and len(calls) % 7 == 0:
            raise torch.OutOfMemoryError
        return norm(self, x)

    monkeypatch.setattr(type(tiny.blocks[0].norm1), "forward", fail_late)
    halved = measure({"m": tiny}, digits, config)
    assert max(calls) == 48
    assert 12 in calls
    pd.testing.assert_frame_equal(halved, whole, rtol=1e-6)


def test_default_ranks_are_the_papers_in_proportion():
    assert _ranks("m", 32, Config()) == [3, 5, 11, 16, 21, 27, 29, 31, 32]
    assert _ranks("m", 768, Config()) == [
        64,
        128,
        256,
        384,
        512,
        640,
        702,
        744,
        760,
        768,
    ]


def test_models_of_different_widths_and_lengths_share_the_passes(tiny, make, digits):
    reads = []

    class Counted(type(digits)):
        def read(self, i):
            reads.append(i)
            return super().read(i)

    wide = make(name="vit_tiny_patch16_224", depth=2, embed_dim=48)
    config = Config(blocks="each", methods=("svd",), n_calibration=0)
    frame = measure({"a": tiny, "b": wide}, Counted("test", length=6), config)
    assert frame.groupby("model").size().to_dict() == {"a": 12 * 9, "b": 2 * 9}
    assert len(reads) == 6 * (12 * 8 + 1)  # b's units ride along; full rank once
    alone = measure({"b": wide}, Counted("test", length=6), config)
    pd.testing.assert_frame_equal(frame[frame["model"] == "b"].reset_index(drop=True), alone)


def test_it_continues_where_it_stopped(tiny, stacked, digits, tmp_path, monkeypatch):
    models, config = {"a": tiny, "b": stacked}, Config(ranks=(2, 8, 32), limit=20, methods=("svd",))
    options = {"ranks": [2, 8, 32]}
    whole = measure(models, digits, config, table=Table(tmp_path / "whole.csv", options))
    path = tmp_path / "killed.csv"
    results.write_json({"options": options}, path.with_suffix(".json"))
    whole.iloc[:3].to_csv(path, index=False)  # killed after three of six rows
    counted = []
    module = importlib.import_module("bvit_interp.analyses.rank_sweep.measure")
    original = module._count_hits

    def count(models, cuts, *args):
        counted.append({name: cut.rank for name, cut in cuts.items()})
        return original(models, cuts, *args)

    monkeypatch.setattr(module, "_count_hits", count)
    resumed = measure(models, digits, config, table=Table(path, options))
    assert counted == [{"b": 8}, {"a": 32, "b": 32}]
    pd.testing.assert_frame_equal(resumed, whole)
    pd.testing.assert_frame_equal(read_table(path), whole)
    with pytest.raises(
        UserError, match=r"made with other options \(ranks: \[2, 8, 32\] there, \[2\] now\)"
    ):
        Table(path, {"ranks": [2]})


def test_a_table_grows_by_methods_and_steps(tiny, digits, tmp_path, monkeypatch):
    """Steps alone are read back as numbers; nothing is measured twice, and a finished sweep reads
    no image."""
    path, options = tmp_path / "t.csv", {}
    first = Config(ranks=(4, 32), methods=("svd",), blocks="each", limit=4, n_calibration=5)
    more = Config(
        ranks=(4, 32), methods=("svd", "whitened"), blocks="each", limit=4, n_calibration=5
    )
    assert first.resume_key() == more.resume_key() == Config(limit=4, n_calibration=5).resume_key()
    measure({"m": tiny}, digits, first, table=Table(path, options))
    assert pd.read_csv(path)["step"].dtype == np.int64
    grown = measure({"m": tiny}, digits, more, table=Table(path, options))
    pd.testing.assert_frame_equal(grown, measure({"m": tiny}, digits, more), check_exact=True)
    every = Config(ranks=(4, 32), methods=("svd", "whitened"), limit=4, n_calibration=5)
    last = measure({"m": tiny}, digits, every, table=Table(path, options))
    assert (
        last["step"].tolist() == [str(t) for t in range(1, 13) for _ in range(2)] * 2 + ["all"] * 4
    )

    def refuse(*_):
        raise AssertionError("an image is read")

    monkeypatch.setattr(type(digits), "read", refuse)
    again = measure({"m": tiny}, digits, more, table=Table(path, options))
    pd.testing.assert_frame_equal(again, last)


def test_a_table_of_an_earlier_version_is_refused(tiny, digits, tmp_path):
    """Before the first image is read, and left as it is."""
    path = tmp_path / "old.csv"
    path.write_text("model,rank,accuracy\nm,4,0.5\n")
    results.write_json({"options": {}}, path.with_suffix(".json"))
    with pytest.raises(
        UserError,
        match=r"old.csv has other columns: it lacks method, step; --overwrite replaces it",
    ):
        measure({"m": tiny}, digits, Config(limit=4), table=Table(path, {}))
    assert path.read_text().startswith("model,rank,accuracy")


def test_columns_intervals_and_losses(tiny, stacked, digits):
    methods = ("svd", "whitened", "random")
    models = {"a": tiny, "b": stacked}
    together = measure(
        models, digits, Config(limit=10, methods=methods, ranks=(4, 16, 32), n_calibration=9)
    )
    single = measure(
        models,
        digits,
        Config(limit=10, methods=methods, ranks=(4, 16, 32), n_calibration=9, blocks="each"),
    )
    frame = pd.concat([together, single])
    assert list(frame) == list(COLUMNS)
    labels = [digits.read(i)[1] for i in range(0, 60, 6)]
    assert frame["chance"].iloc[0] == pytest.approx(np.bincount(labels).max() / 10)
    assert ((frame["low"] <= frame["accuracy"]) & (frame["accuracy"] <= frame["high"])).all()
    for _, part in frame.groupby(["model", "method", "step"]):
        assert part["energy_fc2"].is_monotonic_increasing
        assert part["error_fc1"].is_monotonic_decreasing
    by_key = frame.set_index(["model", "method", "step", "rank"])
    whitened, svd = (by_key["error_fc2"].xs(method, level=1) for method in ("whitened", "svd"))
    assert (whitened.reindex(svd.index) <= svd + 1e-12).all()


def test_bad_input(tiny, digits):
    with pytest.raises(UserError, match=r"ranks must be >= 1, got \(0, 4\)"):
        Config(ranks=(0, 4))
    with pytest.raises(UserError, match=r"rank 33 is above the full rank 32 of m; ranks: 1\.\.32"):
        measure({"m": tiny}, digits, Config(ranks=(33,)))
    for methods in ((), ("svd", "svd"), ("svd", "pca")):
        with pytest.raises(
            UserError, match="methods must be one or more of svd, whitened, random, each once"
        ):
            Config(methods=methods)
    with pytest.raises(UserError, match="blocks must be all or each, got 'some'"):
        Config(blocks="some")
    for images, methods in ((0, ("whitened",)), (-1, ("svd",))):
        with pytest.raises(UserError, match="n-calibration must be >= 1 for whitened"):
            Config(n_calibration=images, methods=methods)
    with torch.no_grad():
        tiny.pos_embed[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="the inputs of fc1 hold NaN or infinite values"):
        measure({"m": tiny}, digits, Config(limit=2))
