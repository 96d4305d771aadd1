"""Tickets: schedules and counts by hand, one subset as IMP, kill and resume, every kind of subset,
refusals."""

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
from bvit_interp.metrics import independent_jaccard, jaccard
from bvit_interp.models.masks import Masks
from bvit_interp.results import read_table
from bvit_interp.training.pruning import by_subset as tickets
from bvit_interp.training.pruning import lottery, routing, subsets, ticket_table
from bvit_interp.training.pruning.ticket_plan import TicketPlan, schedule

FEW = {"classes": ("0", "1", "4"), "sparsity": (0.5, 0.75), "iterations": 2, "retrain_epochs": 1}


@pytest.fixture
def plan(recipe):
    """A recipe of 60 images in batches of 8."""
    return recipe(images_per_epoch=60, warmup_epochs=0.0)


# ---- schedule, masks and counts ----


def test_rounds_meet_every_target_in_equal_ratios():
    assert schedule((0.5, 0.25, 0.75), 0.5) == [(0.25, True), (0.5, True), (0.75, True)]
    rounds = schedule((0.0, 0.36, 0.9), 0.2)
    assert [s for s, target in rounds if target] == [0.0, 0.36, 0.9]
    np.testing.assert_allclose([s for s, _ in rounds[:3]], [0, 0.2, 0.36])
    density = 1 - np.array([s for s, _ in rounds[2:]])
    ratios = density[1:] / density[:-1]
    np.testing.assert_allclose(ratios, ratios[0])
    assert (
        0.8 <= ratios[0] < 0.8 ** (8 / 9)
    )  # ln(0.1 / 0.64) / ln(0.8) = 8.3: nine rounds, and eight were too few


def test_pruning_takes_the_smallest_over_all_layers():
    masks = Masks({"a": torch.ones(1, 4).bool(), "b": torch.ones(1, 2, 2).bool()})
    weights = {"a": torch.tensor([[1.0, -8, 3, 4]]), "b": torch.tensor([[[-0.1, 5], [0.2, 0.3]]])}
    half = lottery.pruned_to(masks, weights, 0.5)
    assert half["a"].tolist() == [[False, True, True, True]]
    assert half["b"].tolist() == [[[False, True], [False, False]]]
    assert lottery.pruned_to(half, weights, 0.75)["a"].tolist() == [[False, True, False, False]]
    with pytest.raises(UserError, match="leaves none of the 8"):
        lottery.pruned_to(masks, weights, 0.95)


@pytest.fixture
def by_hand():
    """Three subsets over two layers; layer b is empty for the second."""
    a = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]
    b = [[1, 0], [0, 0], [1, 0]]
    return Masks({"a.weight": torch.tensor(a).bool(), "b.weight": torch.tensor(b).bool()})


def rows_of(masks, rows, names, **more):
    return {
        (row["subset"], row["layer"]): row
        for row in ticket_table.mask_rows(masks, rows, names, **more)
    }


def test_rows_of_masks_worked_out_on_paper(by_hand):
    rows = rows_of(by_hand, 1, ["x", "y", "z"])
    assert rows["all", "a"]["parameters"] == 3 and rows["all", "b"]["parameters"] == 1
    assert rows["all", "all"]["parameters"] == 4  # the union
    assert rows["all", "all"]["ratio"] == pytest.approx(4 / 6)
    assert (
        rows_of(by_hand, 1, ["x", "y", "z"], separate=True)["all", "all"]["parameters"] == 3 + 2 + 4
    )
    assert rows["x", "a"]["similarity"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert rows["all", "a"]["similarity"] == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)
    assert rows["x", "b"]["similarity"] == pytest.approx(
        1 / 2
    )  # 0 with the empty one, 1 with the third
    assert rows["x", "all"]["similarity"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert rows["y", "all"]["sparsity"] == pytest.approx(4 / 6)
    assert (
        rows["all", "b"]["empty"] == 1
        and rows["all", "all"]["empty"] == 1
        and rows["all", "a"]["empty"] == 0
    )
    assert (
        rows["all", "mean"]["similarity"] == rows["all", "a"]["similarity"]
    )  # layer b is left out
    assert ticket_table.empty_layers(by_hand, 1, ["x", "y", "z"]) == ["b for y"]
    null = rows["x", "all"]["null_similarity"]
    both = [2 * 2 / 4 + 0, 2 * 3 / 4 + 1 / 2]  # expected intersections with y and z, layer by layer
    assert null == pytest.approx(
        np.mean([both[0] / (3 + 2 - both[0]), both[1] / (3 + 4 - both[1])])
    )


def test_the_null_of_equal_densities_is_q_over_two_minus_q():
    masks = torch.rand(6, 40_000, generator=torch.Generator().manual_seed(0)) < 0.3
    null = ticket_table.expected([masks[:, None]])
    torch.testing.assert_close(null, independent_jaccard(masks.double().mean(1)))
    off = ~torch.eye(6, dtype=torch.bool)
    assert null[off].mean().item() == pytest.approx(0.3 / 1.7, abs=2e-3)
    assert jaccard(masks)[off].mean().item() == pytest.approx(
        0.3 / 1.7, abs=3e-3
    )  # and that is what such masks have


def test_rows_of_masks_by_step():
    """Two subsets of two steps: rows are (x, 1), (x, 2), (y, 1), (y, 2)."""
    masks = Masks(
        {"a.weight": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]]).bool()}
    )
    rows = rows_of(masks, 2, ["x", "y"])
    assert rows["x", "a[1]"]["similarity"] == pytest.approx(2 / 3)
    assert rows["x", "a[2]"]["similarity"] == 0
    assert rows["x", "all"]["similarity"] == pytest.approx(2 / 5)
    assert rows["x", "a[1]"]["step_similarity"] == pytest.approx(1 / 2)
    assert rows["y", "all"]["step_similarity"] == pytest.approx(1 / 3)
    assert (
        rows["x", "all"]["parameters"] == 2 and rows["all", "all"]["parameters"] == 3
    )  # unions over the steps too
    assert rows_of(masks, 2, ["x", "y"], separate=True)["all", "all"]["parameters"] == 2 + 3
    assert rows["x", "all"]["sparsity"] == pytest.approx(5 / 8)


def test_collapse_is_a_rise_above_the_least():
    values = {1: 0.8, 2: 0.6, 3: 0.63, 4: 0.7, 5: 0.62}
    frame = pd.DataFrame(
        [
            {"method": m, "subset": "all", "layer": "mean", "round": r, "similarity": s}
            for r, s in values.items()
            for m in ("rtl", "multi")
        ]
        + [{"method": "rtl", "subset": "all", "layer": "all", "round": 1, "similarity": 0.8}]
    )
    found = ticket_table.with_collapse(frame, 0.05)
    rtl = found[(found["method"] == "rtl") & (found["layer"] == "mean")]
    np.testing.assert_allclose(rtl["rise"], [0, 0, 0.03, 0.1, 0.02], atol=1e-12)
    assert rtl["collapsed"].tolist() == [0, 0, 0, 1, 1]
    assert found["rise"].isna().sum() == 1


def test_scores_by_subset_are_those_of_its_images():
    named, true = torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([0, 0, 1, 0, 1, 1])
    eye = torch.eye(3, dtype=torch.bool)  # the third class has no image: it is in no mean
    of_image = np.array([0, 0, 0, 1, 1, 1])
    x, y, whole = ticket_table.score_rows(eye[named], eye[true], of_image, ["x", "y"])
    assert x["n"] == 3 and whole["n"] == 6
    assert x["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert y["balanced_accuracy"] == pytest.approx(3 / 4)
    assert whole["recall"] == pytest.approx((2 / 3 + 2 / 3) / 2)


# ---- runs ----


def test_a_search_leaves_a_table_masks_and_weights(plan, tmp_path):
    frame = tickets.run(plan, TicketPlan(**FEW), tmp_path)
    assert list(frame) == list(tickets.COLUMNS)
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
        assert rtl["train_images"] == imp["train_images"] == multi["train_images"]
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
        assert images == whole.loc[(method, 2), "train_images"]
    assert {"0", "1", "4"} == {*read_table(tmp_path / "subsets.csv")["subset"].astype(str)}
    assert not list(tmp_path.rglob(".*"))


def test_scores_are_those_of_the_saved_subnets(plan, tmp_path):
    """Recall and the swapped null, worked out from the files: the one-vs-rest logit of theta *
    m_k."""
    from safetensors.torch import load_file
    from torch.func import functional_call

    frame = tickets.run(plan, TicketPlan(**{**FEW, "sparsity": (0.75,)}, methods=("rtl",)), tmp_path)
    folder, scenes = tmp_path / "subnets" / "rtl" / "round-02" / "00", DigitScenes("test")
    images, labels = zip(
        *((x, y) for x, y, _ in (scenes.read(i) for i in range(len(scenes))) if y in (0, 1, 4)),
        strict=True,
    )
    model = routing.build(plan, subsets.Pool(scenes, ("0", "1", "4"), None)).eval()
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
    frame = tickets.run(plan, search, tmp_path / "out")
    whole = frame[(frame["subset"] == "all") & (frame["layer"] == "all")].set_index("method")
    columns = [
        "sparsity",
        "parameters",
        "recall",
        "precision",
        "balanced_accuracy",
        "accuracy",
        "train_images",
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

    frame = tickets.run(
        plan, TicketPlan(**{**FEW, "sparsity": (0.75,)}, rewind=3, methods=("rtl", "random")), tmp_path
    )
    made = routing.build(plan, subsets.Pool(DigitScenes("test"), ("0", "1", "4"), None))
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
    seen = frame[frame["train_images"].notna()].groupby("method")["train_images"].max()
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
    tickets.run(plan, search, tmp_path / "whole")
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
            tickets.run(plan, search, tmp_path / "stopped")
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
from bvit_interp.training.pruning import by_subset as tickets
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning.ticket_plan import TicketPlan
import torch; torch.set_num_threads(1)
save = lottery.save_model
# the file is whole, not yet in place
lottery.save_model = lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL))
tickets.run(Recipe(**eval(sys.argv[1])), TicketPlan(**eval(sys.argv[2])), Path(sys.argv[3]))
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
        tickets.run(plan, TicketPlan(**search), tmp_path / folder)
    left = list((tmp_path / "stopped").rglob(".*"))
    assert all(path.name.endswith(".partial") for path in left)
    assert {
        k: v for k, v in contents(tmp_path / "stopped").items() if not k.endswith(".partial")
    } == contents(tmp_path / "whole")


def test_another_method_joins_a_search_and_another_option_does_not(plan, tmp_path):
    search = {**FEW, "sparsity": (0.5,)}
    tickets.run(plan, TicketPlan(**search, methods=("rtl",)), tmp_path)
    before = contents(tmp_path / "subnets" / "rtl")
    frame = tickets.run(plan, TicketPlan(**search, methods=("rtl", "multi")), tmp_path)
    assert {*frame["method"]} == {"rtl", "multi"}
    assert contents(tmp_path / "subnets" / "rtl") == before
    with pytest.raises(UserError, match=r"made with other options \(iterations: 2 there, 3 now\)"):
        tickets.run(plan, TicketPlan(**{**search, "iterations": 3}), tmp_path)
    frame = tickets.run(
        plan, TicketPlan(**{**search, "iterations": 3}, methods=("imp",)), tmp_path, overwrite=True
    )
    assert {*frame["method"]} == {"imp"}
    (tmp_path / "trainings.csv").unlink()
    with pytest.raises(UserError, match=r"holds tickets.csv and no trainings.csv"):
        tickets.run(plan, TicketPlan(**search), tmp_path)


@pytest.mark.parametrize("by", ["class-step", "cluster", "column"])
def test_other_subsets(plan, tmp_path, by):
    more = {}
    if by == "cluster":
        more = {"features": "timm:vit_tiny_patch16_224@random", "clusters": 2}
    if by == "column":
        tickets.run(
            plan, TicketPlan(**{**FEW, "sparsity": (0.5,)}, methods=("imp",)), tmp_path / "first"
        )
        more = {"column": f"{tmp_path / 'first' / 'subsets.csv'}:subset"}
        shutil.copy(tmp_path / "first" / "subsets.csv", tmp_path / "parts.csv")
    search = {**FEW, "sparsity": (0.5,), "by": by, **more}
    frame = tickets.run(plan, TicketPlan(**search), tmp_path / "out")
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
    frame = tickets.run(
        plan, TicketPlan(**{**FEW, "sparsity": (0.999,), "rate": 0.9}, methods=("rtl",)), tmp_path
    )
    last = frame[(frame["subset"] == "all") & (frame["layer"] == "all")].iloc[-1]
    assert last["empty"] > 0 and last["balanced_accuracy"] >= 0
    assert "layers without a weight:" in caplog.text and " for " in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": "colour"}, "by must be one of class, class-step, cluster, column, got 'colour'"),
        ({"by": "column"}, "FILE.csv:COLUMN is given with by column"),
        ({"by": "cluster"}, "--features CKPT is given with --by cluster"),
        ({"features": "x"}, "--features CKPT is given with --by cluster"),
        ({"sparsity": (0.5, 1.0)}, "sparsity must be in 0..1, below 1, got 0.5, 1.0"),
        ({"sparsity": ()}, "sparsity must be in 0..1, below 1, got none"),
        ({"rate": 1.0}, "rate must be between 0 and 1"),
        ({"retrain_epochs": 0}, "retrain-epochs must be >= 1, got 0"),
        ({"methods": ("rtl", "rtl")}, "methods must be of rtl, imp, multi, random, each once"),
        ({"algorithm": "means"}, "algorithm must be kmeans or hdbscan"),
    ],
)
def test_options_that_do_not_do(given, message):
    with pytest.raises(UserError, match=message):
        TicketPlan(**given)


def test_recipes_that_do_not_do(recipe, tmp_path):
    with pytest.raises(UserError, match="trained without mixup, cutmix; switch it off"):
        tickets.run(recipe(mixup=0.2, cutmix=1.0), TicketPlan(**FEW), tmp_path)
    with pytest.raises(UserError, match=r"the loss is (nan|inf): a lower lr"):
        tickets.run(
            recipe(lr=1e30, images_per_epoch=60), TicketPlan(**{**FEW, "iterations": 6}), tmp_path
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
        (["--by", "column", "--column", "x.csv:y"], "needs FILE.csv:COLUMN of a file that is there"),
        (["--by", "column"], "--column FILE.csv:COLUMN is given with --by column"),
        (["--by", "colour"], "--by takes class, class-step, cluster, column; got 'colour'"),
        (["--model", "resnet10t"], "--model takes timm:NAME"),
        (["--classes", "7"], "one subset only (7)"),
    ):
        assert main([*given, *wrong, "--overwrite"]) == 2
        assert message in capsys.readouterr().err
