"""Ticket searches: their table, one subset as IMP, kill and resume, every kind of subset."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from bvit_interp.cli import main
from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError
from bvit_interp.models.masks import Masks
from bvit_interp.results import read_table
from bvit_interp.training.pruning import by_subset, routing, subsets
from bvit_interp.training.pruning.subnetworks import build_model
from bvit_interp.training.pruning.ticket_plan import TicketPlan

FEW = {"classes": ("0", "1", "4"), "sparsity": (0.5, 0.75), "iterations": 2, "retrain_epochs": 1}


@pytest.fixture
def plan(recipe):
    """A recipe of 60 images in batches of 8."""
    return recipe(images_per_epoch=60, warmup_epochs=0.0)


def test_a_search_leaves_a_table_masks_and_weights(plan, tmp_path):
    frame = by_subset.run(plan, TicketPlan(**FEW), tmp_path)
    assert list(frame) == list(by_subset.COLUMNS)
    pd.testing.assert_frame_equal(read_table(tmp_path / "tickets.csv"), frame, check_dtype=False)
    whole = frame[(frame["subset"] == "all") & (frame["layer"] == "all")].set_index(
        ["method", "round"]
    )
    assert len(whole) == 8
    np.testing.assert_allclose(
        whole["sparsity"],
        1 - whole.index.get_level_values("round").map({1: 0.5, 2: 0.25}),
        atol=1e-4,
    )
    for number in (1, 2):
        rtl, imp, multi, random = (
            whole.loc[(method, number)] for method in ("rtl", "imp", "multi", "random")
        )
        masks = Masks.load(
            tmp_path / "subnets" / "rtl" / f"round-{number:02d}" / "00" / "masks.safetensors"
        )
        assert masks.count == 3
        assert rtl["parameters"] == sum(int(m.any(0).sum()) for m in masks.values())
        assert multi["parameters"] == sum(int(m.sum()) for m in masks.values())
        assert imp["parameters"] == round(
            sum(m[0].numel() for m in masks.values()) * (1 - imp["sparsity"])
        )
        assert rtl["similarity"] == multi["similarity"] and np.isnan(imp["similarity"])
        assert random["similarity"] == pytest.approx(random["null_similarity"], abs=0.02)
        assert rtl["n_train"] == imp["n_train"] == multi["n_train"]
        own = frame[
            (frame["method"] == "imp") & (frame["round"] == number) & (frame["layer"] == "all")
        ]
        assert own["subset"].tolist() == ["all", "0", "1", "4"]
    assert whole["balanced_accuracy"].between(0, 1).all()
    assert whole["swapped"].notna().groupby("method").all().to_dict() == {
        "rtl": True,
        "random": True,
        "imp": False,
        "multi": False,
    }
    done = read_table(tmp_path / "trainings.csv")
    images_of = done.groupby(["method", "purpose", "round"])["images"].sum()
    for method, extracted in (
        ("rtl", "rtl"),
        ("imp", "imp"),
        ("multi", "rtl"),
    ):  # equal exposure, as it was trained
        images = images_of[extracted, "extract"].sum() + images_of[method, "retrain", 2]
        assert images == whole.loc[(method, 2), "n_train"]
    assert {"0", "1", "4"} == {*read_table(tmp_path / "subsets.csv")["subset"].astype(str)}
    assert not list(tmp_path.rglob(".*"))


def test_scores_are_those_of_the_saved_subnets(plan, tmp_path):
    """Recall and the swapped null, worked out from the files: the one-vs-rest logit of theta *
    m_k."""
    from safetensors.torch import load_file
    from torch.func import functional_call

    frame = by_subset.run(
        plan, TicketPlan(**{**FEW, "sparsity": (0.75,)}, methods=("rtl",)), tmp_path
    )
    folder, scenes = tmp_path / "subnets" / "rtl" / "round-02" / "00", DigitScenes("test")
    images, labels = zip(
        *((x, y) for x, y, _ in (scenes.read(i) for i in range(len(scenes))) if y in (0, 1, 4)),
        strict=True,
    )
    model = build_model(plan, subsets.Pool(scenes, ("0", "1", "4"), None)).eval()
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    masks = Masks.load(folder / "masks.safetensors", model)
    mean, std = (np.array(model.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = torch.tensor((np.array(images) / 255 - mean) / std).float().permute(0, 3, 1, 2)
    truth = np.array([(0, 1, 4).index(y) for y in labels])
    with torch.no_grad():
        for k, name in enumerate(("0", "1", "4")):
            for column, taken in (("balanced_accuracy", k), ("swapped", (k + 1) % 3)):
                own = {n: model.get_parameter(n) * mask[taken] for n, mask in masks.items()}
                said = (functional_call(model, own, (pixels,))[:, k] > 0).numpy()
                wanted = (said[truth == k].mean() + (~said[truth != k]).mean()) / 2
                row = frame[
                    (frame["subset"] == name) & (frame["layer"] == "all") & frame["n"].notna()
                ]
                assert row[column].item() == pytest.approx(wanted)


def test_routing_over_one_subset_is_imp(plan, tmp_path, monkeypatch):
    """One tensor for one subset, one mask and one model: the same masks, weights and scores, bit
    for bit."""
    monkeypatch.setattr(subsets, "_several", tuple)
    rows = [
        {"split": s, "index": i, "one": "x"}
        for s, n in (("train", 50_000), ("test", 40))
        for i in range(n)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "one.csv", index=False)
    search = TicketPlan(
        by="column",
        column=f"{tmp_path / 'one.csv'}:one",
        sparsity=(0.5,),
        iterations=2,
        retrain_epochs=1,
        methods=("rtl", "imp", "multi"),
    )
    frame = by_subset.run(plan, search, tmp_path / "out")
    whole = frame[(frame["subset"] == "all") & (frame["layer"] == "all")].set_index("method")
    columns = [
        "sparsity",
        "parameters",
        "recall",
        "precision",
        "balanced_accuracy",
        "accuracy",
        "n_train",
    ]
    for other in ("imp", "multi"):
        assert whole.loc[other, columns].tolist() == whole.loc["rtl", columns].tolist()
        for file in ("model.safetensors", "masks.safetensors"):
            mine, theirs = (
                tmp_path / "out" / "subnets" / m / "round-01" / "00" / file for m in ("rtl", other)
            )
            assert mine.read_bytes() == theirs.read_bytes()


def test_weights_that_no_subset_keeps_stay_the_first_ones(plan, tmp_path):
    """And the first ones are those of the ordinary training that was asked for."""
    from safetensors.torch import load_file

    from bvit_interp.errors import CheckpointError

    frame = by_subset.run(
        plan,
        TicketPlan(**{**FEW, "sparsity": (0.75,)}, rewind=3, methods=("rtl", "random")),
        tmp_path,
    )
    made = build_model(plan, subsets.Pool(DigitScenes("test"), ("0", "1", "4"), None))
    first = load_file(str(tmp_path / "extraction" / "first.safetensors"))
    mask = tmp_path / "extraction" / "rtl" / "round-02" / "00.safetensors"
    with pytest.raises(CheckpointError, match="masks of other weights"):
        Masks.load(mask, made)
    for method in ("rtl", "random"):
        folder = tmp_path / "subnets" / method / "round-02" / "00"
        weights, masks = (
            load_file(str(folder / "model.safetensors")),
            Masks.load(folder / "masks.safetensors"),
        )
        for name, own in masks.items():
            union = own.any(0)
            assert not union.all() and union.any()
            assert torch.equal(weights[name][~union], first[name][~union])
            assert not torch.equal(first[name], made.get_parameter(name))
    made.load_state_dict(first)
    assert Masks.load(mask, made).count == 1
    seen = frame[frame["n_train"].notna()].groupby("method")["n_train"].max()
    assert seen["rtl"] - seen["random"] == 2 * 2 * 3 * 8  # two rounds of two steps of three subsets


def contents(folder):
    """Every file that a search leaves, by its place."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*.*"))
        if p.suffix != ".json"
    }


def test_a_search_killed_anywhere_ends_the_same(plan, tmp_path, monkeypatch):
    search = TicketPlan(**{**FEW, "classes": ("0", "1")}, rewind=2)
    by_subset.run(plan, search, tmp_path / "whole")
    trained, calls = routing.train, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return trained(*arguments)

    monkeypatch.setattr(routing, "train", killed)
    stops = 0
    for _ in range(20):
        try:
            by_subset.run(plan, search, tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 3
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


_KILLED = """
import os, signal, sys
from pathlib import Path
from bvit_interp.data import digits
digits.LENGTHS["test"] = 40
import bvit_interp.models.bvit
from bvit_interp.training.pruning import lottery
from bvit_interp.training.pruning import by_subset
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning.ticket_plan import TicketPlan
import torch; torch.set_num_threads(1)
save = lottery.save_model
# the file is whole, not yet in place
lottery.save_model = lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL))
by_subset.run(Recipe(**eval(sys.argv[1])), TicketPlan(**eval(sys.argv[2])), Path(sys.argv[3]))
"""


def test_a_search_killed_by_the_system_ends_the_same(plan, settings, tmp_path):
    search = {**FEW, "classes": ("0", "1"), "sparsity": (0.5,), "methods": ("rtl", "imp")}
    given = settings(images_per_epoch=60, warmup_epochs=0.0)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, repr(given), repr(search), str(tmp_path / "stopped")],
        capture_output=True,
    )
    assert killed.returncode == -9, killed.stderr.decode()
    assert (
        len(read_table(tmp_path / "stopped" / "trainings.csv")) == 2
    )  # the masks of both classes are kept
    for folder in ("stopped", "whole"):
        by_subset.run(plan, TicketPlan(**search), tmp_path / folder)
    left = list((tmp_path / "stopped").rglob(".*"))
    assert all(path.name.endswith(".partial") for path in left)
    assert {
        k: v for k, v in contents(tmp_path / "stopped").items() if not k.endswith(".partial")
    } == contents(tmp_path / "whole")


def test_another_method_joins_a_search_and_another_option_does_not(plan, tmp_path):
    search = {**FEW, "sparsity": (0.5,)}
    by_subset.run(plan, TicketPlan(**search, methods=("rtl",)), tmp_path)
    before = contents(tmp_path / "subnets" / "rtl")
    frame = by_subset.run(plan, TicketPlan(**search, methods=("rtl", "multi")), tmp_path)
    assert {*frame["method"]} == {"rtl", "multi"}
    assert contents(tmp_path / "subnets" / "rtl") == before
    with pytest.raises(UserError, match=r"made with other options \(iterations: 2 there, 3 now\)"):
        by_subset.run(plan, TicketPlan(**{**search, "iterations": 3}), tmp_path)
    frame = by_subset.run(
        plan, TicketPlan(**{**search, "iterations": 3}, methods=("imp",)), tmp_path, overwrite=True
    )
    assert {*frame["method"]} == {"imp"}
    (tmp_path / "trainings.csv").unlink()
    with pytest.raises(UserError, match=r"holds tickets.csv and no trainings.csv"):
        by_subset.run(plan, TicketPlan(**search), tmp_path)


def test_the_trainings_of_an_older_search_are_refused_and_left(plan, tmp_path):
    search = {**FEW, "sparsity": (0.5,), "methods": ("rtl",)}
    by_subset.run(plan, TicketPlan(**search), tmp_path)
    path = tmp_path / "trainings.csv"
    path.write_text(path.read_text().replace("subset_index", "part", 1))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"trainings.csv has other columns: it lacks subset_index"):
        by_subset.run(plan, TicketPlan(**search), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("by", ["class-step", "cluster", "column"])
def test_other_subsets(plan, tmp_path, by):
    more = {}
    if by == "cluster":
        more = {"features": "timm:vit_tiny_patch16_224@random", "clusters": 2}
    if by == "column":
        by_subset.run(
            plan, TicketPlan(**{**FEW, "sparsity": (0.5,)}, methods=("imp",)), tmp_path / "first"
        )
        more = {"column": f"{tmp_path / 'first' / 'subsets.csv'}:subset"}
        shutil.copy(tmp_path / "first" / "subsets.csv", tmp_path / "parts.csv")
    search = {**FEW, "sparsity": (0.5,), "by": by, **more}
    frame = by_subset.run(plan, TicketPlan(**search), tmp_path / "out")
    whole = frame[(frame["subset"] == "all") & (frame["layer"] == "all")].set_index("method")
    assert whole["balanced_accuracy"].notna().all() and (whole["by"] == by).all()
    masks = Masks.load(
        tmp_path / "out" / "subnets" / "rtl" / "round-01" / "00" / "masks.safetensors"
    )
    assert masks.count == {"class-step": 9, "cluster": 2, "column": 3}[by]
    assert whole.loc["rtl", "parameters"] == sum(int(m.any(0).sum()) for m in masks.values())
    if by == "class-step":
        assert all(name.startswith("blocks.0.") for name in masks)
        assert masks.density().tolist() == pytest.approx([0.5] * 9, abs=1e-3)
        steps = frame[
            (frame["method"] == "rtl")
            & (frame["subset"] == "1")
            & frame["layer"].str.endswith("fc1[3]")
        ]
        assert 0 < steps["step_similarity"].item() < 1
    else:
        assert (
            whole.loc["rtl", "n"]
            == frame[(frame["method"] == "rtl") & frame["n"].notna() & (frame["subset"] != "all")][
                "n"
            ].sum()
        )


def test_a_layer_that_is_emptied_is_named(plan, tmp_path, caplog):
    frame = by_subset.run(
        plan, TicketPlan(**{**FEW, "sparsity": (0.999,), "rate": 0.9}, methods=("rtl",)), tmp_path
    )
    last = frame[(frame["subset"] == "all") & (frame["layer"] == "all")].iloc[-1]
    assert last["empty"] > 0 and last["balanced_accuracy"] >= 0
    assert "layers without a weight:" in caplog.text and " for " in caplog.text


def test_recipes_that_do_not_do(recipe, tmp_path):
    with pytest.raises(UserError, match="trained without mixup, cutmix; switch it off"):
        by_subset.run(recipe(mixup=0.2, cutmix=1.0), TicketPlan(**FEW), tmp_path)
    with pytest.raises(UserError, match=r"the loss is (nan|inf): a lower lr"):
        by_subset.run(
            recipe(lr=1e6, images_per_epoch=60), TicketPlan(**{**FEW, "iterations": 6}), tmp_path
        )


def test_the_command(settings, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings(images_per_epoch=60)))
    given = [
        "tickets",
        "--recipe",
        str(tmp_path / "tiny.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--iterations",
        "2",
        "--retrain-epochs",
        "1",
        "--sparsity",
        "0.5",
        "--device",
        "cpu",
        "--seed",
        "3",
    ]
    assert main([*given, "--classes", "0", "1", "--model", "timm:test_resnet"]) == 0
    assert "null_similarity" in capsys.readouterr().out
    frame = read_table(tmp_path / "out" / "tickets.csv")
    assert (frame["seed"] == 3).all() and frame["layer"].str.contains("conv").any()
    assert (tmp_path / "out" / "tickets.png").is_file()
    for wrong, message in (
        (["--classes", "9", "cat"], "no class cat; classes: 0, 1"),
        (
            ["--by", "column", "--column", "x.csv:y"],
            "needs FILE.csv:COLUMN of a file that is there",
        ),
        (["--by", "column"], "--column FILE.csv:COLUMN is given with --by column"),
        (["--by", "colour"], "--by takes class, class-step, cluster, column; got 'colour'"),
        (["--model", "resnet10t"], "--model takes timm:NAME"),
        (["--classes", "7"], "one subset only (7)"),
    ):
        assert main([*given, *wrong, "--overwrite"]) == 2
        assert message in capsys.readouterr().err
