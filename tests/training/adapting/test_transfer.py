"""Transfer: the probe, a killed run, and the table with nulls."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from bvit_interp.cli import main
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models import adapters, checkpoint
from bvit_interp.models.adapters import Adapted, Spec
from bvit_interp.results import read_table
from bvit_interp.training.adapting import transfer, tuning
from bvit_interp.training.adapting.probe import feature_batches
from bvit_interp.training.adapting.transfer import COLUMNS, run, summary
from bvit_interp.training.adapting.tuning import recipe_of
from bvit_interp.training.loop import feed


def test_a_probe_on_kept_features_is_the_head_trained_on_images(work, small):
    """The same order of images, so the same weights as training through the frozen model."""
    job = work(epochs=2)
    recipe = recipe_of(job.plan, "probe", 7, "colours", len(job.train))
    one, other = (Adapted(small, Spec(mode="probe"), job.classes, 7) for _ in range(2))
    train, _, _ = job.features(None, one)
    tuning.fit(
        one.model.head, one, lambda e: feature_batches(train, recipe, e), len(job.train), recipe
    )
    geometry = Geometry.of(small, job.train)

    def batches(epoch):
        return feed.batches(
            feed.Epoch(recipe, job.train, lambda image, _: geometry(image)[0], epoch), 0, 0
        )

    tuning.fit(other.view, other, batches, len(job.train), recipe)
    torch.testing.assert_close(
        one.trained["head.weight"], other.trained["head.weight"], atol=1e-4, rtol=1e-3
    )


def test_a_probe_with_the_distilled_models_two_heads_is_one_head(tiny_distilled, work):
    job = work(tiny_distilled)
    frame = run(job)
    view = adapters.load(next(job.out.glob("*/adapter.safetensors")), tiny_distilled)
    hits = torch.cat([logits.argmax(-1) == labels for logits, labels in job._logits(view)])
    assert frame["accuracy"].item() == pytest.approx(hits.double().mean().item())


def test_the_table_its_nulls_and_its_summary(work, small):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    job = work(mode=("probe", "lora-qv"), seeds=(0, 1), random_baseline=True, rank=2, epochs=2)
    frame = run(job)
    assert list(frame) == list(read_table(job.out / "transfer.csv")) == list(COLUMNS)
    assert frame["mode"].tolist() == ["probe", "lora-qv", "probe"] * 2
    assert frame["backbone"].tolist() == ["trained", "trained", "random"] * 2
    assert frame["steps"].tolist() == ["none", "all", "none"] * 2
    assert frame["trainable_parameters"].tolist() == [0, 4 * 32 * 2 + 32, 0] * 2
    assert set(frame["head_parameters"]) == {3 * 32 + 3}
    assert set(frame["n"]) == {9}
    assert set(frame["chance"]) == {1 / 3}
    for _, row in frame.iterrows():
        assert (row["low"], row["high"]) == wilson_interval(round(9 * row["accuracy"]), 9)
        assert (row["exact_accuracy"] >= 0) == (row["mode"] == "probe")
    assert frame.loc[frame["backbone"] == "trained", "exact_accuracy"].dropna().nunique() == 1
    table = summary(frame)
    own = frame[frame["mode"] == "lora-qv"]["accuracy"]
    found = table[table["mode"] == "lora-qv"].iloc[0]
    assert (found["accuracy"], found["seeds"]) == (own.mean(), 2)
    assert found["deviation"] == pytest.approx(own.std())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    adapter = next(job.out.glob("small-colours-lora-qv-all-1-*/adapter.safetensors"))
    view = adapters.load(adapter, small)
    hits = torch.cat([logits.argmax(-1) == labels for logits, labels in job._logits(view)])
    assert own.iloc[1] == pytest.approx(hits.double().mean().item())


def test_it_learns(work):
    """Colours are told by full tuning and by a time embedding, which random features and few epochs
    leave apart."""
    frame = run(work(mode=("full", "te"), epochs=12, lr=3e-3))
    assert frame["accuracy"].min() > 0.85
    assert frame["train_loss"].max() < 0.6


class Killed(Exception):
    """In place of SIGKILL."""


@pytest.mark.parametrize("mode", ["lora-ffn", "te"])
def test_a_killed_run_ends_with_the_same_weights_and_finished_rows_are_kept(
    work, small, monkeypatch, mode
):
    plan = {"mode": ("probe", mode), "rank": 2}
    run(work(**plan, out="whole"))
    save = tuning._save

    def dying(*arguments):
        save(*arguments)
        if arguments[4] == 2:
            raise Killed

    monkeypatch.setattr(tuning, "_save", dying)
    with pytest.raises(Killed):
        run(work(**plan))
    out = work(**plan).out
    assert read_table(out / "transfer.csv")["mode"].tolist() == ["probe"]
    assert len(list(out.glob("*/state.pt"))) == 1
    with pytest.raises(
        UserError, match=r"was made with other options \(alpha: 16.0 there, 4.0 now\)"
    ):
        run(work(**plan, alpha=4.0))
    monkeypatch.setattr(tuning, "_save", save)
    seen, epoch = [], feed.Epoch
    monkeypatch.setattr(transfer.feed, "Epoch", lambda *a: seen.append(a[-1]) or epoch(*a))
    job = work(**plan)
    monkeypatch.setattr(job, "_probe", None)  # its row is there: it must not run again
    run(job)
    assert seen == [2]
    assert not list(out.glob("*/state.pt"))
    whole = out.parent / "whole"
    assert (out / "transfer.csv").read_bytes() == (whole / "transfer.csv").read_bytes()
    for file in whole.glob("*/adapter.safetensors"):
        one, other = (
            safetensors.torch.load_file(f) for f in (file, out / file.parent.name / file.name)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sweep_has_every_step_and_both_ends(work):
    job = work(mode=("lora-qv",), sweep_steps=True, epochs=1, rank=1)
    frame = run(job)
    assert frame["steps"].tolist() == ["all", "none", "step 1", "step 2", "step 3"]
    assert frame["trainable_parameters"].tolist() == [160, 32, 160, 160, 160]
    assert read_table(job.out / "transfer.csv")["steps"].tolist() == frame["steps"].tolist()
    chosen = work(mode=("lora-qv",), steps=(3, 2), epochs=1, rank=1)
    assert run(chosen)["steps"].tolist()[-1] == "steps 2 3"


def test_merged_and_not_merged(work, small, images):
    run(job := work(mode=("lora-ffn",), epochs=1), merge=True)
    opened = checkpoint.load(next(job.out.glob("*/merged")))
    view = adapters.load(next(job.out.glob("*/adapter.safetensors")), small)
    torch.testing.assert_close(opened(images), view(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="does not merge"):
        run(work(mode=("lora-ffn",), epochs=1, steps=(2,)), merge=True)


def test_the_command_and_its_errors(small, colours, tmp_path, capfd):
    ckpt = str(checkpoint.save(small, tmp_path / "small"))
    given = [
        "transfer",
        "--ckpt",
        ckpt,
        "--data",
        f"folder:{colours}",
        "--out",
        str(tmp_path / "x"),
        "--seeds",
        "0",
    ]
    assert main([*given, "--mode", "probe", "lora-qv", "--epochs", "1", "--rank", "2"]) == 0
    assert (tmp_path / "x" / "transfer.png").is_file()
    assert set(read_table(tmp_path / "x" / "transfer.csv")["data"]) == {"colours"}
    assert read_table(tmp_path / "x" / "transfer_summary.csv")["seeds"].tolist() == [1, 1]
    capfd.readouterr()
    for more, said in (
        (["--mode", "lora-qv", "--rank", "99"], "rank must be in 1..32"),
        (["--mode", "lora-qv", "--steps", "4"], "steps must be of 1..3, got 4"),
        (["--test-split", "train"], "nothing to score on beside the training images"),
    ):
        assert main([*given, *more]) == 2
        assert said in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(small, colours, tmp_path):
    ckpt = str(checkpoint.save(small, tmp_path / "small"))
    frames = []
    for n in (1, 2):
        command = [
            "-m",
            "bvit_interp.cli",
            "transfer",
            "--ckpt",
            ckpt,
            "--data",
            f"folder:{colours}",
            "--seeds",
            "0",
        ]
        command += [
            "--mode",
            "probe",
            "lora-qv",
            "--epochs",
            "2",
            "--train-batch",
            "4",
            "--out",
            str(tmp_path / str(n)),
        ]
        if n > 1:
            command = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                *command,
            ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        frames.append(read_table(tmp_path / str(n) / "transfer.csv"))
    one, two = frames
    assert one.drop(columns="train_loss").equals(two.drop(columns="train_loss"))
    np.testing.assert_allclose(one["train_loss"], two["train_loss"], rtol=1e-4)
