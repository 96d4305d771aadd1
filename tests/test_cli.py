"""The command line as a stranger meets it: help, results, and what bad input gets."""

from __future__ import annotations

import html
import importlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_runs import OPTIONS, as_arguments

from bvit_interp.analyses import ANALYSES
from bvit_interp.cli import main
from bvit_interp.cli.commands import MADE, find
from bvit_interp.cli.parsing import gathered, parse
from bvit_interp.cli.run.processes import processes
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.samples import evenly_spaced
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import load, save
from bvit_interp.models.masks import FILE, full
from bvit_interp.results import Table

COMMANDS = [word.replace("_", "-") for word in ANALYSES]
EVERY = [*COMMANDS, *MADE]
SCRIPT = Path(sys.executable).with_name("bvit-interp")


@pytest.fixture
def ckpt(tiny, tmp_path):
    return str(save(tiny, tmp_path / "tiny"))


@pytest.fixture
def pictures(tmp_path):
    """Twenty-four digits in ImageNet-S layout."""
    pictures = str(tmp_path / "pictures")
    assert main(["data", "export", "digits-s", pictures, "--limit", "24"]) == 0
    return tmp_path / "pictures"


def error_of(capfd, arguments):
    """The one line on stderr of a command that must end with exit code 2."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [
        line
        for line in capfd.readouterr().err.splitlines()
        if "error:" in line or "Traceback" in line
    ]
    assert len(lines) == 1
    return lines[0]


# ---- help ----


def question_of(word):
    """The first paragraph of an analysis' docstring, in one line."""
    module = importlib.import_module(f"bvit_interp.analyses.{word.replace('-', '_')}")
    return " ".join(module.__doc__.split("\n\n")[0].split())


def test_overview_names_every_command_and_its_question(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for word in EVERY:
        assert f"  {word} " in text
    for word in COMMANDS:
        assert question_of(word) in text


@pytest.mark.parametrize("word", EVERY)
def test_help_of_every_command(word, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*word.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: bvit-interp {word}")
    if word in COMMANDS:
        assert question_of(word) in " ".join(text.split())
        for flag in ("--ckpt", "--data", "--limit", "--device", "--skip-corrupt"):
            assert flag in text
        assert "Expected:" not in text  # the method is in measure.py


@pytest.mark.parametrize("word", EVERY)
def test_help_says_each_text_once(word, capsys):
    with pytest.raises(SystemExit):
        main([*word.split(), "--help"])
    words = " ".join(re.sub(r"[│─]", " ", capsys.readouterr().out).split())
    command, _ = find(word.split())
    for text in (command.text, *(group.__doc__ for group in command.options.values())):
        for paragraph in text.split("\n\n"):
            assert words.count(" ".join(paragraph.split())) == 1


def test_help_of_all_commands_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from bvit_interp.cli import main\n"
        "from bvit_interp.cli.commands import MADE\n"
        "from bvit_interp.analyses import ANALYSES\n"
        "main(['--help'])\n"
        "for word in [*MADE, *(word.replace('_', '-') for word in ANALYSES)]:\n"
        "    try:\n        main([*word.split(), '--help'])\n"
        "    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'pandas', 'numpy', 'timm', 'matplotlib', 'yaml', 'typeguard'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("given", ["", "pointing-game", "transfer"])
def test_help_answers_at_once(given):
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([SCRIPT, *given.split(), "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert seconds() < 0.5  # of CPU: 0.2 measured, 0.35 on a slow machine


def test_repeated_flags_are_gathered():
    given = ["--ckpt", "a", "--limit", "3", "--ckpt", "b", "c", "--ckpt=d", "--seed", "1"]
    assert gathered(given, "--ckpt") == [
        "--ckpt",
        "a",
        "b",
        "c",
        "d",
        "--limit",
        "3",
        "--seed",
        "1",
    ]
    assert gathered(["--limit", "3"], "--ckpt") == ["--limit", "3"]


# ---- results ----


@pytest.mark.parametrize("word", ANALYSES)
def test_every_analysis_writes_table_figure_and_provenance(word, ckpt, pictures, tmp_path, capsys):
    out, name, options = tmp_path / "out", "tiny", {"limit": 24, **OPTIONS[word]}
    if word == "pathways":
        model = load(ckpt)
        full(model).save(Path(ckpt) / FILE, model)
        ckpt, name = f"{ckpt}@masked", "tiny@masked"
    if word == "early_exit":
        exits = str(tmp_path / "exits")
        training = [
            "early-exit",
            "train",
            "--ckpt",
            ckpt,
            "--limit",
            "30",
            "--epochs",
            "1",
            "--out",
            exits,
        ]
        assert main(training) == 0
        options["exits"] = (exits,)
    command = [
        word.replace("_", "-"),
        "--ckpt",
        ckpt,
        "--data",
        str(pictures),
        "--out",
        str(out),
        *as_arguments(options),
    ]
    assert main(command) == 0
    frame = pd.read_csv(out / f"{word}.csv")
    assert set(frame["model"]) == {name}
    with Image.open(out / f"{word}.png") as figure:
        assert figure.size[0] > 300
    about = json.loads((out / f"{word}.json").read_text())
    assert about["options"]["data"] == str(pictures)
    assert about["options"]["weights"].keys() == {name}
    assert "torch" in about["versions"]
    assert f"wrote {out / word}.csv" in capsys.readouterr().out
    assert not list(out.glob("*.partial"))


def test_provenance_says_what_was_brought_and_how_it_was_matched(ckpt, tmp_path):
    folder, out = tmp_path / "brought", tmp_path / "out"
    for digit in "3210987654":
        (folder / digit).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(folder / digit / "a.png")
    Image.new("RGB", (32, 32), "red").save(folder / "7" / "b.png")
    (folder / "7" / "list.txt").write_text("")

    def intake(word, *options):
        given = ["--ckpt", ckpt, "--data", str(folder), "--out", str(out), "--overwrite"]
        assert main([word, *given, *options]) == 0
        return json.loads((out / f"{word.replace('-', '_')}.json").read_text())["intake"]

    found = intake("evaluate")
    assert (found["images"], found["classes"]) == (11, 10)
    assert found["images_per_class"] == {"least": 1, "most": 2}
    assert ["7/list.txt" in note for note in found["notes"]] == [True]
    assert found["matched"].keys() == {"tiny"}
    assert "numbers" in found["matched"]["tiny"]
    assert "position" in intake("evaluate", "--classes", "position")["matched"]["tiny"]
    (folder / "7").rename(folder / "seven")
    assert intake("energy-rank")["matched"] == {"tiny": None}  # which needs no labels


def test_two_checkpoints_of_one_name_are_told_apart(tiny, tmp_path):
    for place in ("x", "y"):
        save(tiny, tmp_path / place / "same")
    specs = [str(tmp_path / place / "same") for place in ("x", "y")]
    assert main(["energy-rank", "--ckpt", *specs, "--limit", "4", "--out", str(tmp_path)]) == 0
    assert set(pd.read_csv(tmp_path / "energy_rank.csv")["model"]) == {"x/same", "y/same"}


OWN = """
import torch
from torch import nn

class Own(nn.Module):
    image_size = 16

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.core = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        for _ in range(3):
            tokens = self.core(tokens)
        return self.head(tokens.mean(1))

def fails():
    raise ValueError("no")
"""


def test_a_model_of_ones_own_at_two_sizes(tmp_path, capfd, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    specs = ["own.py:Own", "own.py:Own@size=24", "module:own.Own@loop=core"]
    assert main(["evaluate", "--ckpt", *specs[:2], "--limit", "6", "--out", "out"]) == 0
    frame = pd.read_csv("out/evaluate.csv")
    assert set(frame["model"]) == {"own.Own", "own.Own@size=24"}
    weights = json.loads(Path("out/evaluate.json").read_text())["options"]["weights"]
    assert len(set(weights.values())) == 1  # no parameter depends on the size
    assert main(["evaluate", "--ckpt", specs[2], "--limit", "6", "--out", "named"]) == 0
    named = pd.read_csv("named/evaluate.csv")
    assert named["loss"].iloc[0] == frame["loss"].iloc[0]
    assert "fails() raised ValueError at" in error_of(capfd, ["evaluate", "--ckpt", "own.py:fails"])
    assert "given twice" in error_of(capfd, ["evaluate", "--ckpt", "own.py:Own", "./own.py:Own"])
    message = error_of(capfd, ["early-exit", "train", "--ckpt", "own.py:Own"])
    assert "takes a BViT or a VisionTransformer of timm" in message


def test_a_stacked_vit_by_its_timm_name(tmp_path, pictures):
    arguments = [
        "--ckpt",
        "timm:vit_tiny_patch16_224@random",
        "--data",
        str(pictures),
        "--out",
        str(tmp_path),
        "--limit",
        "2",
    ]
    assert main(["pointing-game", *arguments]) == 0
    frame = pd.read_csv(tmp_path / "pointing_game.csv")
    assert frame["step"].max() == 12
    assert set(frame["model"]) == {"vit_tiny_patch16_224@random"}


def test_the_set_with_masks_and_a_random_stacked_vit(real, tmp_path):
    data = real("coco_seg_s")
    arguments = [
        "--ckpt",
        "timm:vit_base_patch16_224@random",
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--limit",
        "6",
    ]
    assert main(["pointing-game", *arguments]) == 0
    frame = pd.read_csv(tmp_path / "pointing_game.csv")
    assert len(frame) == 12 * (12 + 3)
    assert frame["chance"].between(0.02, 0.8).all()


def test_sweep_continues_and_refuses_other_options(ckpt, tmp_path, capfd):
    arguments = ["rank-sweep", "--ckpt", ckpt, "--limit", "10", "--out", tmp_path]
    assert main([*map(str, arguments), "--ranks", "4", "32"]) == 0
    path = tmp_path / "rank_sweep.csv"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert main([*map(str, arguments), "--ranks", "4", "32"]) == 0
    assert path.read_text() == whole
    other = ["rank-sweep", "--ckpt", ckpt, "--limit", "9", "--out", tmp_path]
    assert "made with other options (config.limit: 10 there, 9 now)" in error_of(capfd, other)
    assert "above the full rank" in error_of(capfd, [*other, "--ranks", "999", "--overwrite"])
    assert path.read_text() == whole
    assert main([*map(str, arguments), "--ranks", "8", "--batch-size", "3"]) == 0  # one rank more
    assert pd.read_csv(path)["rank"].tolist() == [4, 32, 8]
    assert main([*map(str, other), "--ranks", "8", "--overwrite"]) == 0
    assert pd.read_csv(path)["rank"].tolist() == [8]


def test_results_go_to_a_folder_of_the_question(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    for word in ("energy-rank", "rank-sweep"):
        assert main([word, "--ckpt", ckpt, "--limit", "4"]) == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "runs"}
    for word in ("energy_rank", "rank_sweep"):
        found = {path.name for path in Path("runs", word).iterdir()}
        assert found == {f"{word}.{suffix}" for suffix in ("csv", "json", "png")}
    assert main(["report"]) == 0
    page = html.unescape(Path("runs/report.html").read_text())
    assert all(question_of(word) in page for word in ("energy-rank", "rank-sweep"))


@pytest.mark.parametrize("word", EVERY)
def test_no_command_writes_beside_the_shipped_results_unasked(word):
    command, _ = find(word.split())
    for group in command.options.values():
        for field in fields(group):
            if field.name in ("out", "folder"):
                shown = str(field.default)
                assert field.default in (None, MISSING) or shown.split("/")[0] == "runs"


def test_a_table_of_other_options_is_replaced_only_when_asked(ckpt, tmp_path, capfd):
    arguments = ["evaluate", "--ckpt", ckpt, "--limit", "4", "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "evaluate.csv"
    first = path.read_text()
    assert main(arguments) == 0  # the same again
    assert path.read_text() == first
    other = [*arguments, "--limit", "6"]
    assert "config.limit: 4 there, 6 now" in error_of(capfd, other)
    assert path.read_text() == first
    assert main([*other, "--overwrite"]) == 0
    assert path.read_text() != first
    assert json.loads((tmp_path / "evaluate.json").read_text())["options"]["config"]["limit"] == 6


def test_a_damaged_table_is_one_line(ckpt, tmp_path, capfd):
    arguments = [
        "rank-sweep",
        "--ckpt",
        ckpt,
        "--limit",
        "6",
        "--out",
        tmp_path,
        "--ranks",
        "4",
        "8",
    ]
    assert main([*map(str, arguments)]) == 0
    path = tmp_path / "rank_sweep.csv"
    frame = pd.read_csv(path)
    whole = path.read_text()
    damages = {
        whole[:-9]: r"line 3 ",
        whole.replace(",8,", ",eight,"): "line 3, column rank: 'eight' is no number",
        frame.drop(columns="rank").to_csv(index=False): "lacks rank",
        frame.drop(columns="accuracy").to_csv(index=False): "lacks the columns accuracy",
    }
    for content, message in damages.items():
        path.write_text(content)
        assert message in error_of(capfd, arguments)
        assert path.read_text() == content
    for content in (*[*damages][:2], "model,rank\n"):
        path.write_text(content)
        assert "rank_sweep.csv" in error_of(capfd, ["report", tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_an_early_error_leaves_nothing(ckpt, tmp_path, capfd):
    out = tmp_path / "new"
    error_of(capfd, ["rank-sweep", "--ckpt", ckpt, "--ranks", "999", "--out", out])
    assert not out.exists()
    (tmp_path / "file").touch()
    message = error_of(capfd, ["energy-rank", "--ckpt", ckpt, "--out", tmp_path / "file" / "x"])
    assert "--out" in message
    assert "is not a folder that can be written to" in message


def test_data_list_names_every_set(capsys):
    assert main(["data", "list"]) == 0
    text = capsys.readouterr().out
    for name in ("digits-s", "cifar10", "cifar100", "imagenet", "imagenet-s", "folder"):
        assert name in text


def test_report_of_a_run(ckpt, tmp_path, capsys):
    main(["energy-rank", "--ckpt", ckpt, "--limit", "4", "--out", str(tmp_path / "run")])
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert question_of("energy-rank") in html.unescape(page)
    assert "data:image/png;base64," in page


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pointing-gam"], "no command 'pointing-gam', did you mean pointing-game? commands: fea"),
        (["zzz"], "no command 'zzz'; commands: features, pointing-game"),
        (["evaluate", "--ckpt"], "--ckpt needs one or more checkpoints"),
        (["energy-rank", "--data", "~nosuchuser/x"], "no user has the home folder that ~"),
        (["energy-rank", "--data", "folder:~nosuchuser"], "no user has the home folder that ~"),
        (
            ["early-exit", "--ckpt", "timm:bvit_small_patch16_224@random", "--exits", "nowhere"],
            "no exits at nowhere/exits.safetensors",
        ),
        (
            [
                "early-exit",
                "train",
                "--ckpt",
                "timm:bvit_small_patch16_224@random",
                "--exits",
                "12",
            ],
            "exits must be different steps of 1..11, got (12,)",
        ),
        (["pathways", "--ckpt", "timm:bvit_small_patch16_224@random"], "@masked"),
        (["pointing-game", "--ckpt", "nowhere"], "no checkpoint at nowhere"),
        (["pointing-game", "--ckpt", "timm:vit_bas"], "timm has no model 'vit_bas'"),
        (["evaluate", "--ckpt", "nowhere.py:make"], "no file at nowhere.py"),
        (["evaluate", "--ckpt", "module:nowhere.make"], "no module 'nowhere'"),
        (["evaluate", "--ckpt", "hf:nowhere"], "no config.json in nowhere"),
        (["evaluate", "--ckpt", "torchvision:vit"], "torchvision has no model 'vit'"),
        (
            ["train", "--recipe", "digits-s", "--set", "init=mine.py:make"],
            "code is run only where --ckpt names it",
        ),
        (["energy-rank", "--device", "cuda:9x"], "unknown device"),
        (
            ["energy-rank", "--device", "mps"],
            "unknown device 'mps'; devices: auto, cpu, cuda, cuda:N",
        ),
        (
            ["energy-rank", "--device", "meta"],
            "unknown device 'meta'; devices: auto, cpu, cuda, cuda:N",
        ),
        (["train", "--recipe", "digits-s", "--threads", "0"], "--threads takes 1 to 1,024, got 0"),
        (
            ["study", "steps", "--recipe", "digits-s", "--threads", "-1"],
            "--threads takes 1 to 1,024, got -1",
        ),
        (["energy-rank", "--energy", "2"], "energy must be in (0, 1], got 2.0"),
        (["energy-rank", "--data", "nothing-here"], "nothing-here"),
        (["energy-rank", "--limit", "0"], "limit must be >= 1, got 0"),
        (["report", "no-such-folder"], "no folder no-such-folder"),
        (["data"], "data takes list or export"),
        (["data", "export", "digits-s", "OUT", "--split", "valid"], "no split 'valid'"),
        (["train", "--recipe", "nope"], "no recipe 'nope'; shipped: cifar10, "),
        (["train", "--recipe", "digits-s", "--set", "lrr=3"], "unknown setting lrr"),
        (
            ["train", "--recipe", "cifar10", "--data", "cifar10:nowhere"],
            "cifar10: no folder nowhere",
        ),
        (
            ["train", "--recipe", "digits-s", "--set", "model.num_classes=7"],
            "num_classes is 7, the data has 10 classes",
        ),
        (["study", "depth"], "no study 'depth'; studies: blocks, heads, steps, width"),
        (["study", "steps", "--recipe", "nope"], "no recipe 'nope'; shipped: cifar10, "),
        (["train", "--recipe", "digits-s", "--set", "epochs=0"], "epochs must be >= 1, got 0"),
    ],
)
def test_one_line_and_exit_code_two(arguments, message, ckpt, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "energy-rank":
        arguments = [*arguments, "--ckpt", ckpt]
    assert message in error_of(capfd, arguments)
    assert not Path("runs").exists()


def test_the_devices_of_a_machine_with_two_gpus(monkeypatch):
    def device_of(wanted):
        with processes(wanted) as device:
            return device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = ["auto", "cuda", "cuda:1", "cpu", "cpu:0"]
    assert [device_of(wanted) for wanted in given] == ["cuda", "cuda", "cuda:1", "cpu", "cpu"]
    with pytest.raises(UserError, match="no cuda:9; devices: auto, cpu, cuda, cuda:0, cuda:1"):
        device_of("cuda:9")
    monkeypatch.setattr(
        os, "environ", {"WORLD_SIZE": "3", "LOCAL_RANK": "2"}
    )  # a process more than GPUs
    with pytest.raises(UserError, match="no cuda:2; devices"):
        device_of("auto")


def test_the_cause_of_a_stop_under_torchrun(monkeypatch, capfd):
    def stop(*args):
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("bvit_interp.cli.execute", stop)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = error_of(capfd, ["energy-rank"])
    assert message.endswith(
        "another process stopped, or this one: CUDA error: an illegal memory access"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["energy-rank"]) == 1
    with pytest.raises(RuntimeError, match="illegal"):
        main(["energy-rank", "--debug"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number >= 1, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number >= 1, got '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be a whole number >= 1, got '-1'"),
        ({"WORLD_SIZE": "9" * 40}, "WORLD_SIZE must be a whole number >= 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK must be a whole number >= 0, got 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be below WORLD_SIZE (2), got 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "99999"}, "MASTER_PORT must be in 0"),
    ],
)
def test_variables_of_torchrun_that_cannot_be(variables, message, ckpt, capfd, monkeypatch):
    if "RANK" in variables:
        variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", **variables}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in error_of(capfd, ["energy-rank", "--ckpt", ckpt, "--limit", "2"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("colour"), 1, "internal error in rank-sweep: KeyError: 'colour'; --debug shows"),
        (ZeroDivisionError(), 1, "internal error in rank-sweep: ZeroDivisionError"),
        (RuntimeError("a\nb " + "c" * 9000), 1, "internal error in rank-sweep: RuntimeError: a b"),
        (MemoryError("16 EiB"), 2, "error: rank-sweep: out of memory (16 EiB); take a smaller"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            2,
            "error: rank-sweep: out of memory (CUDA out of memory. Tried to); take",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "error: rank-sweep: out of memory (",
        ),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(error, code, said, tmp_path, capfd, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("bvit_interp.results.check_folder", fail)
    given = ["rank-sweep", "--limit", "2", "--out", str(tmp_path / "out")]
    assert main(given) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"bvit-interp: {said}")
    assert len(line) < 500
    assert not (tmp_path / "out").exists()
    with pytest.raises(type(error)):
        main([*given, "--debug"])


def number_options():
    """Every option of every command that takes a number: word, flag, and whether it is a float."""
    for word in EVERY:
        command, _ = find(word.split())
        for group in command.options.values():
            for name, kind in get_type_hints(group).items():
                flag = f"--{name.replace('_', '-')}"
                if re.search(r"\bfloat\b", str(kind)) and "Literal" not in str(kind):
                    yield word, flag, True
                elif re.search(r"\bint\b", str(kind)):
                    yield word, flag, False


# what a command asks for beside
NEEDED = {
    "train": ["--recipe", "digits-s"],
    "study": ["steps"],
    "prune": ["--recipe", "digits-s-pathways"],
    "tickets": ["--recipe", "tickets-digits-s"],
    "data export": ["digits-s", "OUT"],
}


@pytest.mark.parametrize(("word", "flag", "is_float"), sorted(set(number_options())))
def test_no_option_takes_a_number_beyond_reason(word, flag, is_float, capfd):
    command, _ = find(word.split())
    for value in ("nan", "inf", "-inf", "1e300") if is_float else ("1" + "0" * 30,):
        given = [*NEEDED.get(word, []), f"{flag}={value}"]
        with pytest.raises(UserError, match=flag[2:]):
            parse(command.word, command.text, command.options, given)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("energy-rank --q 3", "energy-rank: no option --q 3; options: --batch-size, "),
        ("energy-rank --limitt 3", "no option --limitt 3, did you mean --limit? options: --batch"),
        ("energy-rank --bach-size 3 --z", "--bach-size 3 --z, did you mean --batch-size? options"),
        ("energy-rank --overwrite=3", "no option 3; options: "),
        ("data export a b c", "data export: no option c; options: --limit, --split"),
        ("features --neurons x", "--neurons takes INT ... or auto; got 'x'"),
        ("features --tv-weight inf", "--tv-weight takes 0 to 1,000,000,000, got inf"),
        ("study steps --save-minutes -1", "--save-minutes takes 0 to 1,000,000, got -1.0"),
        ("train --recipe digits-s --save-minutes nan", "--save-minutes takes 0 to 1,000,000, got"),
        ("energy-rank --resize 1000000000000", "--resize takes 1 to 8,192, got 1000000000000"),
        ("train --recipe digits-s --seeds 1 -1", "--seeds takes 0 to 4,294,967,295, got -1"),
        ("energy-rank extra", "no option extra; options: "),
        ("energy-rank --limit x", "energy-rank: --limit takes INT; got 'x'"),
        ("energy-rank --limit", "--limit needs a value"),
        ("rank-sweep --ranks 4 b", "--ranks takes INT ...; got '4 b'"),
        ("rank-sweep --methods svd foo", "--methods takes svd, whitened, random; got 'foo'"),
        ("transfer --autocast=on", "transfer: --autocast takes off, bf16; got 'on'"),
        ("train", "train: missing --recipe; bvit-interp train --help"),
        ("data export", "data export: missing DATA and OUT; bvit-interp data export --help"),
        ("data export digits-s", "data export: missing OUT; bvit-interp data export --help"),
        ("data", "data takes list or export"),
        ("data lists", "data takes list or export"),
        ("train --recipe digits-s --set autocast=on", "autocast must be auto, bf16, off, got True"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_errors_of_usage_are_one_line(arguments, message, encoding, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    monkeypatch.setenv("COLUMNS", "40")  # however narrow the terminal
    assert main(arguments.split()) == 2
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("bvit-interp: error: ")
    assert message in printed[0]
    assert os.environ["COLUMNS"] == "40"


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no checkpoint"):
        main(["pointing-game", "--ckpt", "nowhere", "--debug"])


def test_broken_checkpoints(tiny, ckpt, tmp_path, capfd):
    def broken(name):
        shutil.copytree(ckpt, tmp_path / name)
        return tmp_path / name

    truncated = broken("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:1000])
    assert "truncated" in error_of(capfd, ["energy-rank", "--ckpt", truncated.parent])
    config = broken("config") / "config.json"
    config.write_text("{")
    assert "config.json: not JSON" in error_of(capfd, ["energy-rank", "--ckpt", config.parent])
    with torch.no_grad():
        tiny.head.bias[0] = torch.nan
    save(tiny, tmp_path / "nan")
    assert "head.bias holds NaN" in error_of(capfd, ["energy-rank", "--ckpt", tmp_path / "nan"])


def test_a_model_of_one_channel_is_one_line(make, tmp_path, capfd):
    spec = str(save(make(in_chans=1), tmp_path / "grey"))
    assert load(spec)(torch.zeros(1, 1, 32, 32)).shape == (1, 10)  # in Python it opens
    out = ["--out", tmp_path / "out"]
    for word in ("early-exit train", "transfer"):
        data = ["--data", "digits-s", "--ckpt", spec, "--limit", "4"]
        message = error_of(capfd, [*word.split(), *data, *out])
        assert f"{spec}: the model takes images of 1 channels, the data sets have 3" in message
    assert not (tmp_path / "out").exists()


def test_a_model_of_one_channel_classifies_images_in_grey(make, tmp_path):
    model = make(in_chans=1)
    model.pretrained_cfg |= {"mean": (0.4,), "std": (0.2,)}
    spec, out = str(save(model, tmp_path / "grey")), tmp_path / "out"
    arguments = ["--ckpt", spec, "--data", "digits-s", "--limit", "40", "--out", str(out)]
    assert main(["evaluate", *arguments]) == 0
    scenes, chosen = open_samples("digits-s"), evenly_spaced(len(open_samples("digits-s")), 40)
    read = [scenes.read(i) for i in chosen]
    grey = np.stack([np.array(Image.fromarray(image).convert("L")) for image, _, _ in read])
    with torch.no_grad():
        logits = model(torch.from_numpy((grey[:, None] / 255 - 0.4) / 0.2).float())
    labels = torch.tensor([label for _, label, _ in read])
    right = (logits.argmax(-1) == labels).float().mean().item()
    assert pd.read_csv(out / "evaluate.csv")["accuracy"][0] == pytest.approx(right)


def test_a_model_of_two_channels_is_one_line(make, tmp_path, capfd):
    spec, out = save(make(in_chans=2), tmp_path / "two"), tmp_path / "out"
    assert "2 channels" in error_of(capfd, ["evaluate", "--ckpt", spec, "--out", out])
    assert not out.exists()


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_a_pickle_with_code_is_never_run(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"model": Trap()}))
    assert "holds code" in error_of(
        capfd, ["energy-rank", "--ckpt", "timm:vit_tiny_patch16_224@trap.pth"]
    )
    assert not Path("sprung").exists()


def test_masks_and_images_that_do_not_belong_together(ckpt, pictures, tmp_path, capfd):
    arguments = ["pointing-game", "--ckpt", ckpt, "--data", pictures, "--out", tmp_path / "out"]
    arguments.append("--overwrite")
    image, other, *_ = sorted(pictures.glob("validation/*/*"))
    mask = pictures / "validation-segmentation" / image.parent.name / f"{image.stem}.png"
    content = image.read_bytes()

    image.write_bytes(content[: len(content) // 2])
    assert image.name in error_of(capfd, arguments)
    assert main([*map(str, arguments), "--skip-corrupt"]) == 0
    assert pd.read_csv(tmp_path / "out" / "pointing_game.csv")["n"].max() <= 23
    image.write_bytes(content)

    whole = mask.read_bytes()
    Image.new("RGB", (7, 5)).save(mask)
    assert "the mask is 7 x 5 pixels, its image 32 x 32" in error_of(capfd, arguments)
    mask.unlink()
    assert "without" in error_of(capfd, arguments)
    mask.write_bytes(whole)
    image.unlink()
    assert "without" in error_of(capfd, arguments)
    shutil.rmtree(pictures / "validation")
    (pictures / "validation").mkdir()
    assert str(pictures) in error_of(capfd, arguments)
    assert other


def test_classes_of_another_model(ckpt, pictures, tmp_path, capfd):
    spec = "timm:vit_tiny_patch16_224@random"
    assert "do not match the model's 1000" in error_of(
        capfd, ["rank-sweep", "--ckpt", spec, "--out", tmp_path]
    )


def test_a_full_disk_leaves_the_old_table(ckpt, tmp_path, capfd, monkeypatch):
    arguments = ["energy-rank", "--ckpt", ckpt, "--limit", "4", "--out", str(tmp_path)]
    assert main(arguments) == 0
    before = (tmp_path / "energy_rank.csv").read_bytes()

    def full(self, path, *args, **kwargs):
        Path(path).write_text("half a ta")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    other = [*arguments, "--energy", "0.5", "--overwrite"]
    assert "No space left on device" in error_of(capfd, other)
    assert (tmp_path / "energy_rank.csv").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))


def test_interrupt_keeps_finished_rows(ckpt, tmp_path, capfd, monkeypatch):
    original, calls = Table.append, []

    def append(table, row):
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(table, row)

    monkeypatch.setattr(Table, "append", append)
    arguments = [
        "rank-sweep",
        "--ckpt",
        ckpt,
        "--limit",
        "5",
        "--ranks",
        "2",
        "4",
        "8",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 130
    assert "what was saved is kept" in capfd.readouterr().err
    assert pd.read_csv(tmp_path / "rank_sweep.csv")["rank"].tolist() == [2, 4]
    assert main(arguments) == 0
    assert pd.read_csv(tmp_path / "rank_sweep.csv")["rank"].tolist() == [2, 4, 8]


# ---- commands that are written down ----


def written_commands():
    """The commands of the Makefile and of README and docs, as lists of arguments."""
    root = Path(__file__).resolve().parents[1]
    makefile = (root / "Makefile").read_text().replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+) := (.*)$", makefile, re.MULTILINE))
    for line in re.findall(r"^\t\$\(BIN\)/bvit-interp (.*)$", makefile, re.MULTILINE):
        while "$(" in line:
            line = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], line)
        yield "Makefile", line
    for path in (root / "README.md", *(root / "docs").glob("*.md")):
        for line in re.findall(r"^\s*bvit-interp (\w.*)$", path.read_text(), re.MULTILINE):
            yield path.name, line.partition("#")[0].strip()
        for line in re.findall(r"`bvit-interp ([^`]+)`", path.read_text()):
            if "WORD" not in line and "--" in line:  # a bare word is prose
                yield path.name, line


@pytest.mark.parametrize(("page", "line"), sorted(set(written_commands())))
def test_commands_that_are_written_down_are_commands(page, line):
    command, arguments = find(line.split())
    parse(command.word, command.text, command.options, arguments)


@pytest.mark.slow
def test_demo_answers_every_question_in_an_empty_folder(tmp_path):
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "checkpoints").symlink_to(root / "checkpoints")
    found = subprocess.run(
        [SCRIPT, "demo", "--limit", "12", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    out = tmp_path / "out"
    assert {path.stem for path in out.glob("*.csv")} == set(ANALYSES)
    assert all((out / f"{word}.png").is_file() for word in ANALYSES)
    assert (out / "report.html").is_file()


def test_a_checkpoint_spelled_in_two_ways_is_given_twice(ckpt, capfd):
    other = f"{Path(ckpt).parent}/../{Path(ckpt).parent.name}/{Path(ckpt).name}"
    assert "given twice" in error_of(capfd, ["evaluate", "--ckpt", ckpt, other, "--limit", "4"])
