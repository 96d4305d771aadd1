"""Pruning step by step: what each method prunes, the table, and a run killed at any place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bvit_interp.cli import main
from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import load
from bvit_interp.models.masks import PLACES, Masks, full, masks_of
from bvit_interp.results import read_table
from bvit_interp.training.loop import build
from bvit_interp.training.loop import recipe as recipes
from bvit_interp.training.loop import trainer as run_trainer
from bvit_interp.training.pruning import by_step, graft_training
from bvit_interp.training.pruning.criteria import prune_smallest
from bvit_interp.training.pruning.step_plan import METHODS, StepPlan

DRIVER = Path(__file__).with_name("prune_driver.py")


KILLS = (  # of the driver, in the order in which a run meets them
    "while grafts are written",
    "in a graft",
    "between grafts and masks",
    "after the masks",
    "in a training",
    "before a row",
    "after a row",
    "while a round is copied",
)


def test_the_columns_of_masks_by_hand():
    of = {"qkv": torch.zeros(3, 2, 4), "proj": torch.zeros(3, 4)}
    of["qkv"][0, 0] = of["qkv"][1, 0, :2] = of["proj"][0, 0] = 1
    masks = Masks({name: mask.bool() for name, mask in of.items()})
    about = by_step._about(masks, 2, 0.2)
    assert about == {
        "prunings": 2,
        "expected": pytest.approx(0.36),
        "mask_sparsity": pytest.approx(1 - 7 / 36),
        "weight_sparsity": pytest.approx(1 - 5 / 12),
        "weight_sparsity_layers": pytest.approx(1 - (4 / 8 + 1 / 4) / 2),
        "fully_pruned": "proj[2] qkv[3] proj[3]",
    }


@pytest.fixture
def first(recipe):
    """``first(**changes)``: the recipe's model before its first step."""
    return lambda **changes: build.make_model(recipe(**changes), open_samples("digits-s", "train"))


def masks_in(folder):
    return masks_of(load(f"{folder}@masked"))


def test_a_table_of_three_methods_from_the_same_first_round(recipe, first, tmp_path):
    plan, pruning = recipe(epochs=1), StepPlan(rounds=2, graft_epochs=2)
    frame = by_step.run(plan, pruning, tmp_path)
    assert list(frame) == list(by_step.COLUMNS)
    assert frame["method"].tolist() == [method for method in METHODS for _ in range(3)]
    assert frame["prunings"].tolist() == [0, 1, 2] * 3
    assert frame["mask_sparsity"].tolist() == pytest.approx([0, 0.2, 0.36] * 3, abs=1e-4)
    assert frame["mask_sparsity"].tolist() == pytest.approx(frame["expected"].tolist(), abs=1e-4)
    assert (frame["fully_pruned"] == "none").all()
    assert (frame["n"] == 40).all()
    pd.testing.assert_frame_equal(frame, read_table(tmp_path / "rounds.csv"), check_exact=True)
    one = [tmp_path / method / "round-01" / "model.safetensors" for method in METHODS]
    assert len({file.read_bytes() for file in one}) == 1
    init = first()
    for method in METHODS:
        of = [masks_in(tmp_path / method / f"round-0{number}") for number in (1, 2, 3)]
        assert all(mask.all() for mask in of[0].values())
        history = read_table(tmp_path / method / "round-02" / "history.csv").iloc[-1]
        row = frame[(frame["method"] == method) & (frame["round"] == 2)].iloc[0]
        assert row["train_loss"] == history["loss"]
        for name, column in {"accuracy": "top1", "ema_accuracy": "ema_top1"}.items():
            assert row[name] == history[column]
        assert all(row[name] == history[name] for name in ("test_loss", "ema_loss", "chance"))
        for fewer, more in ((of[1], of[0]), (of[2], of[1])):
            assert all(not (fewer[name] & ~more[name]).any() for name in PLACES)
        kept = Masks.load(
            tmp_path / method / "round-02" / "pruned.safetensors", init
        )  # over the first weights
        assert kept.fingerprint() == of[2].fingerprint()
        same = torch.equal(of[2]["fc1"][0], of[2]["fc1"][2])
        assert same == (method == "magnitude")
    assert not list(tmp_path.rglob("grafts.pt"))
    assert len(read_table(tmp_path / "rtl" / "round-02" / "grafts.csv")) == 2 * 3
    random = frame[frame["method"] == "random"].iloc[2]
    assert random["weight_sparsity"] == pytest.approx(
        0.36**3, abs=0.02
    )  # three masks drawn one by one
    magnitude = frame[frame["method"] == "magnitude"].iloc[2]
    assert magnitude["weight_sparsity"] == pytest.approx(0.36, abs=1e-4)


def test_what_each_method_ranks_by(recipe, first, tmp_path, monkeypatch):
    plan, given = recipe(epochs=1), []
    init = first()
    ones, trained = full(init), graft_training.train

    def noted(*arguments, **named):
        given.append(trained(*arguments, **named))
        return given[-1]

    monkeypatch.setattr(graft_training, "train", noted)
    by_step.run(plan, StepPlan(rounds=1, methods=("rtl", "magnitude"), ranking="layer"), tmp_path)
    by_grafts = prune_smallest(ones, given[0][0], 0.2, "layer")
    assert masks_in(tmp_path / "rtl" / "round-02").fingerprint() == by_grafts.fingerprint()
    found = masks_in(tmp_path / "magnitude" / "round-02")
    block = load(tmp_path / "magnitude" / "round-01").blocks[0]
    for name, place in PLACES.items():
        weight = block.get_submodule(place).weight.abs()
        threshold = weight.flatten().sort().values[round(0.2 * weight.numel()) - 1]
        for t in range(3):
            assert torch.equal(found[name][t], weight > threshold)


def test_each_round_starts_from_the_first_weights(recipe, first, tmp_path, monkeypatch):
    started = []
    original = run_trainer.Trainer.epoch

    def noted(trainer, bar):
        started.append(
            {name: tensor.clone() for name, tensor in trainer.run.model.state_dict().items()}
        )
        return original(trainer, bar)

    monkeypatch.setattr(run_trainer.Trainer, "epoch", noted)
    by_step.run(recipe(epochs=1), StepPlan(rounds=2, methods=("magnitude",)), tmp_path)
    assert len(started) == 3
    for state in started:
        assert all(
            torch.equal(state[name], tensor) for name, tensor in first().state_dict().items()
        )


def test_emptied_layers_are_named_and_nothing_is_nan(recipe, tmp_path, caplog):
    pruning = StepPlan(rounds=4, rate=0.9, methods=("rtl", "random"))
    frame = by_step.run(recipe(epochs=1, model={"step_embed": True}), pruning, tmp_path)
    assert frame["mask_sparsity"].iloc[4] == pytest.approx(0.9999, abs=1e-3)
    assert frame["fully_pruned"].iloc[0] == "none"
    for method in pruning.methods:
        assert frame[frame["method"] == method]["fully_pruned"].iloc[4] != "none"
    values = frame.select_dtypes("number")
    assert np.isfinite(values).all(axis=None)
    assert "round-05: fully pruned: " in caplog.text
    load(f"{tmp_path / 'rtl' / 'round-05'}@masked")


def test_more_rounds_and_methods_may_follow(recipe, tmp_path, monkeypatch):
    plan = recipe(epochs=1)
    by_step.run(plan, StepPlan(rounds=1, methods=("random",)), tmp_path / "run")
    frame = by_step.run(plan, StepPlan(rounds=2, methods=("magnitude", "random")), tmp_path / "run")
    assert sorted(frame["method"] + frame["round"].astype(str)) == [
        f"{method}{number}" for method in ("magnitude", "random") for number in (1, 2, 3)
    ]
    whole = by_step.run(
        plan, StepPlan(rounds=2, methods=("magnitude", "random")), tmp_path / "whole"
    )
    keys = ["method", "round"]
    pd.testing.assert_frame_equal(
        frame.sort_values(keys, ignore_index=True),
        whole.sort_values(keys, ignore_index=True),
        check_exact=True,
    )
    monkeypatch.setattr(run_trainer.Trainer, "_step", None)  # nothing is missing
    by_step.run(plan, StepPlan(rounds=2, methods=("magnitude", "random")), tmp_path / "run")


def test_other_options_are_refused_and_overwrite_starts_again(recipe, tmp_path):
    few = {"rounds": 1, "methods": ("magnitude",)}
    by_step.run(recipe(epochs=1), StepPlan(**few), tmp_path)
    for plan, change, named in (
        (recipe(epochs=1), {"rate": 0.3}, "rate: 0.2 there, 0.3 now"),
        (recipe(epochs=1), {"ranking": "layer"}, "ranking: 'global' there, 'layer' now"),
        (recipe(epochs=1, lr=0.5), {}, "recipe.lr: 0.001 there, 0.5 now"),
    ):
        with pytest.raises(UserError, match=rf"rounds.csv was made with other options \({named}\)"):
            by_step.run(plan, StepPlan(**few, **change), tmp_path)
    (tmp_path / "rounds.csv").rename(tmp_path / "elsewhere.csv")
    with pytest.raises(
        UserError, match=r"holds the pruned magnitude/round-01 and no rounds.csv: .* --overwrite"
    ):
        by_step.run(recipe(epochs=1), StepPlan(**few), tmp_path)
    (tmp_path / "magnitude" / "notes").mkdir()
    frame = by_step.run(recipe(epochs=1), StepPlan(**few, rate=0.5), tmp_path, overwrite=True)
    assert frame["mask_sparsity"].tolist() == pytest.approx([0, 0.5], abs=1e-4)
    assert (tmp_path / "magnitude" / "notes").is_dir()  # not ours


def test_masks_of_another_first_model_are_refused(recipe, tmp_path):
    pruning = StepPlan(rounds=1, methods=("magnitude",))
    by_step.run(recipe(epochs=1), pruning, tmp_path / "a")
    by_step.run(recipe(epochs=1, seed=1), pruning, tmp_path / "b")
    other = tmp_path / "b" / "magnitude" / "round-01" / "pruned.safetensors"
    (tmp_path / "a" / "magnitude" / "round-01" / "pruned.safetensors").write_bytes(
        other.read_bytes()
    )
    with pytest.raises(
        UserError, match=r"round-01/pruned.safetensors: masks of other weights than these"
    ):
        by_step.run(recipe(epochs=1), pruning, tmp_path / "a")


def test_a_model_without_grafts_stops_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(UserError, match="this has 2 blocks"):
        by_step.run(recipe(model={"num_blocks": 2}), StepPlan(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [name for name in recipes.available() if name.endswith("pathways")]
)
def test_the_shipped_recipes(name):
    plan = recipes.read(name)
    model = {"img_size", "patch_size", "embed_dim", "num_heads"}
    assert model <= plan.model.keys()
    assert not plan.compile


def test_the_command(settings, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings()))
    words = [
        "prune",
        "--recipe",
        str(tmp_path / "tiny.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    words += [
        "--epochs",
        "1",
        "--rounds",
        "1",
        "--methods",
        "magnitude",
        "--methods",
        "random",
        "--set",
        "lr=0.002",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out' / 'rounds.csv'}" in printed
    assert (
        json.loads((tmp_path / "out" / "rounds.json").read_text())["options"]["recipe"]["lr"]
        == 0.002
    )
    for wrong, line in (
        (["--rate", "1.5"], "rate must be between 0 and 1, got 1.5"),
        (["--epochs", "0"], "--epochs takes 1 to 1,000,000, got 0"),
        (["--rounds", "0"], "rounds must be >= 1, got 0"),
        (["--set", "model.num_blocks=2"], "this has 2 blocks"),
        (["--graft-epochs", "3"], "graft_epochs: 1 there, 3 now"),
    ):
        assert main([*words, *wrong]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert "Traceback" not in error


def test_the_help_and_the_overview(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--rounds",
        "--epochs",
        "--graft-epochs",
        "--rate",
        "--ranking",
        "--methods",
        "--save-minutes",
    ):
        assert option in text
    assert main([]) == 0
    assert "  prune " in capsys.readouterr().out


@pytest.fixture
def drive(tmp_path):
    """``drive(job)``: the processes of prune_driver.py."""

    def run(job):
        (tmp_path / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(tmp_path / "job.json")],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def files(out):
    """Masks, weights and tables of a pruning by path; cards and histories hold dates and speeds."""
    kept = {f"{word}.safetensors" for word in ("masks", "pruned", "model", "ema")} | {
        "grafts.csv",
        "rounds.csv",
    }
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.name in kept
    }


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_masks_and_weights(settings, tmp_path, drive):
    pruning = {"rounds": 2, "graft_epochs": 2, "methods": ["rtl", "magnitude"]}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    plan = settings(full=True, epochs=1)
    runs = [{"out": str(killed), "kill": kill} for kill in KILLS]
    drive(
        {
            "recipe": plan,
            "pruning": pruning,
            "runs": [*runs, {"out": str(killed)}, {"out": str(whole)}],
        }
    )
    assert files(killed).keys() == files(whole).keys()
    assert len([name for name in files(whole) if name.endswith("masks.safetensors")]) == 6
    for name, content in files(whole).items():
        assert files(killed)[name] == content, name
    assert not list(killed.rglob(".*"))


@pytest.mark.slow
def test_two_processes_prune_as_one_does(settings, tmp_path, drive):
    """Nearly: sums of two halves are rounded otherwise, which may exchange weights of nearly the
    same size."""
    one, two = tmp_path / "one", tmp_path / "two"
    drive(
        {
            "recipe": settings(crop="padded", epochs=1),
            "pruning": {"rounds": 1, "graft_epochs": 2, "methods": ["rtl"]},
            "runs": [{"out": str(one)}, {"out": str(two), "world": 2}],
        }
    )
    tables = [
        read_table(folder / "rounds.csv").drop(columns=["method", "fully_pruned"])
        for folder in (one, two)
    ]
    np.testing.assert_allclose(*tables, rtol=0, atol=2e-3)
    np.testing.assert_allclose(
        *(read_table(folder / "rtl" / "round-01" / "grafts.csv") for folder in (one, two)),
        rtol=0,
        atol=1e-4,
    )
    a, b = (load_file(folder / "rtl" / "round-01" / "model.safetensors") for folder in (one, two))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    a, b = (masks_in(folder / "rtl" / "round-02") for folder in (one, two))
    assert all((a[name] != b[name]).float().mean() < 2e-3 for name in a)
