"""Transfer: the probe by two ways, a killed run, the table with its nulls, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bvit_interp.cli import main
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models import adapters, checkpoint
from bvit_interp.models.adapters import Adapted, Spec
from bvit_interp.results import read_table
from bvit_interp.training.adapting import transfer, tuning
from bvit_interp.training.adapting.transfer import COLUMNS, Transfer, places_of, run, summary
from bvit_interp.training.adapting.transfer_plan import DEFAULTS, Plan
from bvit_interp.training.loop import feed

COLOURS = {"red": 0, "green": 1, "blue": 2}


def write_pictures(root, colours=COLOURS, train=6, test=3):
    """Noisy pictures of one colour each, folders of classes in train and test."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        for name, channel in colours.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 90, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 160
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "colours")


@pytest.fixture
def small(make):
    """bViT of 3 steps."""
    return make(num_steps=3)


@pytest.fixture
def work(small, pictures, tmp_path):
    """``work(**plan)``: the small model taken to the pictures."""

    def of(model=None, out="out", **plan):
        train, test = (open_samples(str(pictures), split) for split in ("train", "test"))
        settings = Plan(**{"seeds": (0,), "epochs": 3, "train_batch": 4, **plan})
        return Transfer("small", model or small, "colours", train, test, settings, tmp_path / out)

    return of


def test_defaults_are_the_protocol():
    """40 epochs, 5 of warm-up, 128 images for CIFAR and 64 else; learning rate by mode."""
    plan = Plan()
    assert (plan.epochs, plan.seeds, plan.rank, plan.alpha) == (40, (0, 1, 2), 8, 16.0)
    found = {mode: plan.recipe(mode, 0, "cifar10", 1000) for mode in DEFAULTS}
    assert {r.warmup_epochs for r in found.values()} == {5}
    assert {r.batch_size for r in found.values()} == {128}
    assert plan.recipe("probe", 0, "pets", 1000).batch_size == 64
    assert plan.recipe("probe", 0, "pets", 10).batch_size == 10
    rates = {mode: (r.lr, r.min_lr, r.weight_decay) for mode, r in found.items()}
    assert rates["probe"] == (1e-3, 0.0, 1e-4)
    assert rates["full"] == (1e-4, 1e-6, 0.05)
    assert rates["te"] == rates["lora-qv"] == rates["lora-ffn"] == (1e-3, 1e-5, 0.01)
    assert Plan(lr=0.5, min_lr=0.0).recipe("full", 0, "pets", 99).lr == 0.5


def test_a_probe_on_kept_features_is_the_head_trained_on_images(work, small):
    """The same order of images, so the same weights as training through the frozen model."""
    job = work(epochs=2)
    recipe = job.plan.recipe("probe", 7, "colours", len(job.train))
    one, other = (Adapted(small, Spec(mode="probe"), job.classes, 7) for _ in range(2))
    train, _, _ = job.features(None, one)
    tuning.fit(
        one.model.head, one, lambda e: tuning.shares(train, recipe, e), len(job.train), recipe
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
    hits = torch.cat([logits.argmax(-1) == labels for logits, labels in job._answers(view)])
    assert frame["accuracy"].item() == pytest.approx(hits.double().mean().item())


def test_the_exact_solver_stands_where_a_long_trained_probe_ends():
    """Two classes that a line through a known place tells: test images on either side of it, one
    mislabelled."""
    x = torch.tensor([[-1.0], [-0.5], [0.5], [1.0], [3.0]])
    y = torch.tensor([0, 0, 1, 1, 1])
    assert (
        tuning.exact_accuracy(
            (x, y), (torch.tensor([[-2.0], [2.0], [2.0]]), torch.tensor([0, 1, 0]))
        )
        == 2 / 3
    )


def test_random_weights_are_fresh_and_drawn_by_seed(any_model):
    before = torch.get_rng_state()
    one, same, other = (
        dict(tuning.untrained(any_model, seed).named_parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in any_model.named_parameters():
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], tensor), name
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert torch.equal(one["norm.weight"], torch.ones(32))


def test_the_table_its_nulls_and_its_summary(work, small):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    job = work(mode=("probe", "lora-qv"), seeds=(0, 1), random_baseline=True, rank=2, epochs=2)
    frame = run(job)
    assert list(frame) == list(read_table(job.out / "transfer.csv")) == list(COLUMNS)
    assert frame["mode"].tolist() == ["probe", "lora-qv", "probe"] * 2
    assert frame["backbone"].tolist() == ["trained", "trained", "random"] * 2
    assert frame["steps"].tolist() == ["none", "all", "none"] * 2
    assert frame["trainable"].tolist() == [0, 4 * 32 * 2 + 32, 0] * 2
    assert set(frame["head"]) == {3 * 32 + 3}
    assert set(frame["n"]) == {9}
    assert set(frame["chance"]) == {1 / 3}
    for _, row in frame.iterrows():
        assert (row["low"], row["high"]) == wilson_interval(round(9 * row["accuracy"]), 9)
        assert (row["exact"] >= 0) == (row["mode"] == "probe")
    assert frame.loc[frame["backbone"] == "trained", "exact"].dropna().nunique() == 1
    table = summary(frame)
    own = frame[frame["mode"] == "lora-qv"]["accuracy"]
    found = table[table["mode"] == "lora-qv"].iloc[0]
    assert (found["accuracy"], found["seeds"]) == (own.mean(), 2)
    assert found["deviation"] == pytest.approx(own.std())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    adapter = next(job.out.glob("small-colours-lora-qv-all-1-*/adapter.safetensors"))
    view = adapters.load(adapter, small)
    hits = torch.cat([logits.argmax(-1) == labels for logits, labels in job._answers(view)])
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
    keep = tuning._keep

    def dying(*arguments):
        keep(*arguments)
        if arguments[4] == 2:
            raise Killed

    monkeypatch.setattr(tuning, "_keep", dying)
    with pytest.raises(Killed):
        run(work(**plan))
    out = work(**plan).out
    assert read_table(out / "transfer.csv")["mode"].tolist() == ["probe"]
    assert len(list(out.glob("*/state.pt"))) == 1
    with pytest.raises(
        UserError, match=r"was made with other options \(alpha: 16.0 there, 4.0 now\)"
    ):
        run(work(**plan, alpha=4.0))
    monkeypatch.setattr(tuning, "_keep", keep)
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
            checkpoint.read_weights(f) for f in (file, out / file.parent.name / file.name)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_state_of_other_options_or_torn_is_refused(work, tmp_path):
    job = work(mode=("te",))
    path = tmp_path / "state.pt"
    adapted = Adapted(job.model, Spec(mode="te"), job.classes)
    recipe = job.plan.recipe("te", 0, "colours", 18)
    optimizer = tuning._optimizer(adapted, recipe)
    tuning._keep(path, {"alpha": 1.0}, adapted, optimizer, 1, 0.5)
    assert tuning._resumed(path, {"alpha": 1.0}, adapted, optimizer) == (1, 0.5)
    with pytest.raises(UserError, match=r"of another run \(alpha: 1.0 there, 2.0 now\)"):
        tuning._resumed(path, {"alpha": 2.0}, adapted, optimizer)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not the whole state of a run"):
        tuning._resumed(path, {}, adapted, optimizer)


def test_norms_biases_and_embeddings_are_free_of_decay(work):
    job = work(mode=("full",))
    for mode in ("te", "full", "lora-qv"):
        adapted = Adapted(job.model, Spec(mode=mode), job.classes)
        groups = tuning._optimizer(adapted, job.plan.recipe(mode, 0, "colours", 18)).param_groups
        decayed = {
            id(tensor) for group in groups if group["weight_decay"] for tensor in group["params"]
        }
        names = {name for name, tensor in adapted.trained.items() if id(tensor) in decayed}
        assert "head.weight" in names
        assert not [
            name for name in names if "norm" in name or "bias" in name or name.endswith("_embed")
        ]
        assert ("blocks.0.attn.qkv.lora_a" in names) == (mode == "lora-qv")


def test_a_sweep_has_every_step_and_both_ends(work):
    job = work(mode=("lora-qv",), sweep_steps=True, epochs=1, rank=1)
    frame = run(job)
    assert frame["steps"].tolist() == ["all", "none", "step 1", "step 2", "step 3"]
    assert frame["trainable"].tolist() == [160, 32, 160, 160, 160]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": ()}, "mode must be one or more"),
        ({"seeds": (1, 1)}, "seeds must be one or more different values"),
        ({"seeds": (-1,)}, "seeds must be >= 0"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"limit_train": 0}, "limit-train must be >= 1"),
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"autocast": "fp16"}, "autocast must be off or bf16"),
        ({"steps": (5,)}, "steps are chosen for lora-qv and lora-ffn, not for probe"),
        ({"mode": ("lora-qv",), "steps": (5,), "sweep_steps": True}, "steps or sweep-steps"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(UserError, match=message):
        Plan(**options)


def test_bad_data(small, tmp_path, work):
    (tmp_path / "one").mkdir()
    write_pictures(tmp_path / "one", {"red": 0})
    one = open_samples(str(tmp_path / "one"), "train")
    with pytest.raises(UserError, match=r"the data set has one class \(red\)"):
        transfer.chosen(one, None)
    three = work().train.pool.samples
    with pytest.raises(UserError, match=r"no training image of 1 classes: .*\(raise limit-train\)"):
        transfer.chosen(three, 2)
    empty = FewLabels()
    with pytest.raises(UserError, match="no training image of 1 classes: mauve$"):
        transfer.chosen(empty, None)
    with pytest.raises(UserError, match="lack 2 classes of the test set: green, blue|blue, green"):
        places_of(three, ("red",))


class FewLabels:
    """Samples with a class that no image has."""

    has_masks = False
    native_size = None
    classes = ("red", "green", "blue", "mauve")
    labels = (0, 1, 2)

    def __len__(self):
        return 3


def test_the_command_and_its_errors(small, pictures, tmp_path, capfd):
    ckpt = str(checkpoint.save(small, tmp_path / "small"))
    given = [
        "transfer",
        "--ckpt",
        ckpt,
        "--data",
        f"folder:{pictures}",
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
def test_two_processes_give_the_table_of_one(small, pictures, tmp_path):
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
            f"folder:{pictures}",
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
