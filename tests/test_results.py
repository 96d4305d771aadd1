"""Files appear whole or not at all, tables go on where they stopped, hashes follow the weights."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bvit_interp import results
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll

# ---- whole or not at all -------------------------------------------------------------------------


def test_replacing_takes_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second"):
        with results.replacing(path) as temporary:
            assert temporary.parent == path.parent  # a rename within one file system
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("on purpose"),
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
@pytest.mark.parametrize("old", [None, "old"])
def test_an_exception_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)

    def write_half():
        with results.replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)) as raised:
        write_half()
    assert raised.value is error
    assert [file.name for file in tmp_path.iterdir()] == (["a.txt"] if old else [])
    assert not old or path.read_text() == "old"


def test_a_disk_that_fills_while_a_table_is_written(tmp_path, monkeypatch):
    path, written = tmp_path / "a.csv", Path.open
    results.write_table(pd.DataFrame({"a": [1]}), path)

    def full(self, *args, **kwargs):
        with written(self, "w") as file:
            file.write("a\n1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda frame, target, **_: full(target))
    with pytest.raises(OSError, match="No space left"):
        results.write_table(pd.DataFrame({"a": [1, 2]}), path)
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_floats_read_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.normal(size=300) * 10.0 ** rng.integers(-300, 300, 300),
            [0.1, 1 / 3, math.pi, 5e-324, sys.float_info.max, -0.0, math.nan, math.inf],
        ]
    )
    path = tmp_path / "a.csv"
    results.write_table(pd.DataFrame({"name": 'x, "y"\nz', "value": values}), path)
    read = results.read_table(path)
    assert list(read.columns) == ["name", "value"]  # no index column
    assert read["value"].to_numpy().tobytes() == values.tobytes()
    with path.open(newline="") as file:
        by_python = [float(row["value"] or "nan") for row in csv.DictReader(file)]
    assert np.array(by_python).tobytes() == values.tobytes()
    assert set(read["name"]) == {'x, "y"\nz'}


def test_a_table_never_lies_beside_the_options_of_another(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    results.write_result(pd.DataFrame({"a": [1]}), {"options": {"limit": 1}}, path)
    assert path.read_text() == "a\n1\n"
    replace = Path.replace

    def stopped_after(n, done):
        def renamed(self, target):
            if len(done) == n:
                raise KeyboardInterrupt
            done.append(target)
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", renamed)
        with pytest.raises(KeyboardInterrupt):
            results.write_result(pd.DataFrame({"a": [2]}), {"options": {"limit": 2}}, path)

    for n in (0, 1):
        stopped_after(n, [])
        about = json.loads(path.with_suffix(".json").read_text())["options"]
        assert not path.exists()
        assert about == {"limit": n + 1}
        assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_json_is_indented_and_knows_paths(tmp_path):
    results.write_json({"a": 1, "path": Path("x/y")}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1,\n  "path": "x/y"\n}\n'


# ---- tables that go on ---------------------------------------------------------------------------

OPTIONS = {
    "analysis": "rank_sweep",
    "ranks": (4, 8),
    "data": Path("digits-s"),
    "config": {"seed": 0},
}


def test_a_table_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "sweep.csv"
    table = results.Table(path, OPTIONS)
    assert table.rows == []
    assert not path.exists()
    rows = [
        {"model": "b", "rank": rank, "accuracy": accuracy}
        for rank, accuracy in ((4, 0.1 + 0.2), (8, 1 / 3))
    ]
    for i, row in enumerate(rows):
        table.append(row)
        assert len(pd.read_csv(path)) == i + 1  # on disk as soon as it is finished
    again = results.Table(path, dict(OPTIONS))
    assert again.rows == rows
    assert again.has(model="b", rank=8)
    assert again.has(rank=4)
    assert not again.has(model="b", rank=16)
    assert not again.has(model="c", rank=8)
    again.append({"model": "b", "rank": 16, "accuracy": 0.5})
    assert pd.read_csv(path)["rank"].tolist() == [4, 8, 16]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sweep.csv", "sweep.json"]


@pytest.mark.parametrize("name", ["007", "12", "1e3", "null", "NA", "nan", "True", "a,b", "ü"])
def test_a_model_is_found_again_by_its_name(tmp_path, name):
    results.Table(tmp_path / "a.csv", OPTIONS).append(
        {"model": name, "rank": 4, "accuracy": math.nan}
    )
    again = results.Table(tmp_path / "a.csv", OPTIONS)
    assert again.has(model=name, rank=4)
    assert math.isnan(again.rows[0]["accuracy"])


def test_a_table_need_not_name_models(tmp_path):
    results.Table(tmp_path / "a.csv", OPTIONS).append({"step": 3, "value": 0.25})
    assert results.Table(tmp_path / "a.csv", OPTIONS).rows == [{"step": 3, "value": 0.25}]


def test_a_table_of_other_options_is_refused_and_left(tmp_path):
    path = tmp_path / "a.csv"
    results.Table(path, OPTIONS).append({"rank": 4})
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    other = {
        "analysis": "rank_sweep",
        "ranks": (4, 16),
        "data": Path("digits-s"),
        "limit": 100,
        "config": {"seed": 1},
    }
    with pytest.raises(UserError) as error:
        results.Table(path, other)
    message = str(error.value)
    assert str(path) in message
    assert "ranks: [4, 8] there, [4, 16] now" in message
    assert "config.seed: 0 there, 1 now" in message
    assert "limit: None there, 100 now" in message
    assert "analysis" not in message
    assert "data:" not in message
    assert "--overwrite" in message
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before


def test_a_table_is_replaced_by_one_of_its_options_only(tmp_path):
    path = tmp_path / "t.csv"
    results.refuse_other_options(path, {"limit": 3})  # none is there
    path.write_text("value\n1\n")
    with pytest.raises(UserError, match=r"t\.csv exists without its options; --overwrite"):
        results.refuse_other_options(path, {"limit": 3})
    results.write_json(
        {"options": {"limit": 3, "config": {"at": Path("a"), "by": 1}}}, tmp_path / "t.json"
    )
    results.refuse_other_options(path, {"limit": 3, "config": {"at": Path("a")}})
    with pytest.raises(UserError, match=r"other options \(config.at: 'a' there, 'b' now\)"):
        results.refuse_other_options(path, {"limit": 3, "config": {"at": Path("b")}})
    weights = {"options": {"weights": {"a": "1", "b": "2"}}}
    results.write_json(weights, tmp_path / "t.json")
    fewer = {"weights": {"a": "1"}}
    results.refuse_other_options(path, fewer)
    with pytest.raises(UserError, match=r"\(weights.b: '2' there, None now\)"):
        results.refuse_other_options(path, fewer, whole="weights")
    assert path.read_text() == "value\n1\n"


def test_overwrite_starts_again(tmp_path):
    path = tmp_path / "a.csv"
    results.Table(path, OPTIONS).append({"rank": 4})
    table = results.Table(path, {"other": True}, overwrite=True)
    assert table.rows == []
    assert pd.read_csv(path)["rank"].tolist() == [4]  # until there is something better
    table.append({"rank": 9})
    assert json.loads(path.with_suffix(".json").read_text()) == {"options": {"other": True}}
    assert pd.read_csv(path)["rank"].tolist() == [9]
    with pytest.raises(UserError, match="made with other options"):
        results.Table(path, OPTIONS)


@pytest.mark.parametrize(
    "about", [None, "", "{", "[]", "{}", '{"options": null}', '{"options": [1]}']
)
def test_a_table_without_its_options_is_refused(tmp_path, about):
    path = tmp_path / "a.csv"
    path.write_text("rank\n4\n")
    if about is not None:
        path.with_suffix(".json").write_text(about)
    with pytest.raises(UserError, match="exists without its options; --overwrite replaces it"):
        results.Table(path, OPTIONS)
    assert path.read_text() == "rank\n4\n"
    assert results.Table(path, OPTIONS, overwrite=True).rows == []


@pytest.mark.parametrize("content", ["", 'rank,b\n4\n"4,5,6', "rank\n4,5\n4,5,6\n"])
def test_a_table_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "a.csv"
    results.Table(path, OPTIONS).append({"rank": 4})
    path.write_text(content)
    with pytest.raises(UserError, match=r"a\.csv: not a table") as error:
        results.Table(path, OPTIONS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("model,value\nm,0.5\nm\n", r"not a table \(line 3 has 1 values for 2 columns\)"),
        ("model,value\nm,0.5,3\n", r"not a table \(line 2 has 3 values for 2 columns\)"),
        ("model,value\nm,0.5\nm,0.", r"not a table \(line 3 is cut off\)"),
        ("model,val", r"not a table \(line 1 is cut off\)"),
        ("model,value,value\nm,1,2\n", r"not a table \(column value is there twice\)"),
        ('model,value\nm,0.5\n"m\nx",high\n', r"line 4, column value: 'high' is no number"),
        ("model,n_fit\nm,3\nm,3\nm,many\n", r"line 4, column n_fit: 'many' is no number"),
        ("model,hit_low\nm,\nm,-\n", r"line 3, column hit_low: '-' is no number"),
        ('model,value\nm,"0.5\n', r"not a table \("),
        ("model,value\n\xff,1\n", r"not a table \("),
    ],
)
def test_a_wrong_line_is_named(tmp_path, content, wrong):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv: " + wrong) as error:
        results.read_table(path)
    assert "\n" not in str(error.value)


def test_separators_of_lines_within_a_name_are_no_lines(tmp_path):
    frame = pd.DataFrame(
        {"model": ["a\u2028b", "c\x0bd", "e\r\nf"], "value": [1.0, math.inf, -0.5]}
    )
    results.write_table(frame, tmp_path / "a.csv")
    pd.testing.assert_frame_equal(results.read_table(tmp_path / "a.csv"), frame, check_dtype=False)


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "a,b\n"])
def test_a_table_without_the_keys_is_refused_at_the_first_look(tmp_path, content):
    path = tmp_path / "a.csv"
    results.Table(path, OPTIONS).append({"model": "m", "rank": 4})
    path.write_text(content)
    with pytest.raises(
        UserError, match=r"a\.csv has other columns: it lacks model, rank; --overwrite"
    ):
        results.Table(path, OPTIONS).has(model="m", rank=4)
    assert not results.Table(path, OPTIONS, overwrite=True).has(model="m", rank=4)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("columns", "wrong"),
    [("rank", "lacks value"), ("rank,old", "lacks value and has the unknown old")],
)
def test_a_row_of_other_columns_is_not_mixed_in(tmp_path, columns, wrong):
    path = tmp_path / "a.csv"
    results.Table(path, OPTIONS).append(dict.fromkeys(columns.split(","), 4))
    before = path.read_bytes()
    table = results.Table(path, OPTIONS)
    with pytest.raises(UserError, match=rf"a\.csv has other columns: it {wrong}; --overwrite"):
        table.append({"rank": 8, "value": 0.5})
    assert path.read_bytes() == before
    assert not table.has(rank=8)


def test_provenance_beside_a_table_lets_it_go_on(tmp_path):
    path = tmp_path / "a.csv"
    results.Table(path, OPTIONS).append({"rank": 4})
    results.write_json(results.provenance(OPTIONS), path.with_suffix(".json"))
    assert results.Table(path, OPTIONS).has(rank=4)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "rank_and_world", lambda: (1, 2))
    table = results.Table(tmp_path / "a.csv", OPTIONS)
    table.append({"rank": 4})
    assert table.has(rank=4)
    assert list(tmp_path.iterdir()) == []


def test_one_process_is_rank_zero_of_one():
    assert results.rank_and_world() == (0, 1)


# ---- the folder ----------------------------------------------------------------------------------


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    results.check_folder(tmp_path / "new" / "folder")
    results.check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(
        UserError, match=r"--out .*x: .*file is not a folder that can be written to"
    ):
        results.check_folder(tmp_path / "file" / "x")


def test_permissions_that_promise_too_much(tmp_path, monkeypatch):
    """As root has it in /proc: nothing forbids to write there, and nothing can be written."""

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(UserError, match="is not a folder that can be written to"):
        results.check_folder(tmp_path / "x")


def test_no_shell_has_expanded_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out ~nosuchuser/x: ~ stands for no folder"):
        results.check_folder(Path("~nosuchuser/x"))
    assert list(tmp_path.iterdir()) == []


# ---- two runs in one folder ----------------------------------------------------------------------


def is_locked(folder):
    """Whether somebody holds the folder, as the kernel says."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@pytest.fixture
def other_run(tmp_path):
    """Another process, which has locked `tmp_path`."""
    holding = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", holding, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path, other_run):
    for begin in (
        results.locked,
        results.check_folder,
        lambda folder: results.Table(folder / "a.csv", OPTIONS),
    ):
        with pytest.raises(UserError, match="another run is writing to this folder") as error:
            begin(tmp_path)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    assert results.locked(tmp_path) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_lock_lasts_as_long_as_it_is_kept(tmp_path):
    lock = results.locked(tmp_path)
    assert is_locked(tmp_path)
    assert results.locked(tmp_path) is lock  # this process may come again
    del lock
    assert not is_locked(tmp_path)
    table = results.Table(tmp_path / "new" / "a.csv", OPTIONS)
    assert not (tmp_path / "new").exists()
    table.append({"rank": 4})
    again = results.Table(tmp_path / "new" / "a.csv", OPTIONS)
    del table
    assert is_locked(tmp_path / "new")
    del again
    assert not is_locked(tmp_path / "new")


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    lock = results.locked(tmp_path)
    child = os.fork()
    if child == 0:
        signal.pause()
    assert is_locked(tmp_path)
    del lock
    try:
        for _ in range(1000):  # until the child has come so far
            if not is_locked(tmp_path):
                break
        assert not is_locked(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert results.locked(tmp_path) is None
    results.Table(tmp_path / "a.csv", OPTIONS).append({"rank": 4})
    assert results.locked(tmp_path / "none") is None
    os.mkfifo(tmp_path / "pipe")
    assert results.locked(tmp_path / "pipe") is None


def test_only_the_first_process_locks(tmp_path, other_run, monkeypatch):
    monkeypatch.setattr(results, "rank_and_world", lambda: (1, 2))
    assert results.locked(tmp_path) is None


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    dead, alive, self = ended.pid, os.getppid(), os.getpid()
    inner = tmp_path / "pictures"
    (tmp_path / f".round-01.{dead}.partial").mkdir(parents=True)
    (tmp_path / f".round-01.{dead}.partial" / "file").touch()
    inner.mkdir()
    old = [
        tmp_path / f".a.csv.{dead}.partial",
        inner / f".b.png.{dead}.partial",
        tmp_path / f".huge.{10**20}.partial",
    ]
    kept = [
        *(tmp_path / f".a.csv.{process}.partial" for process in (alive, self)),
        tmp_path / f"a.{dead}.partial",
        tmp_path / ".a.csv.partial",
    ]
    young = tmp_path / f".young.csv.{dead}.partial"
    for path in (*old, *kept, young):
        path.touch()
    for path in (*old, *kept, tmp_path / f".round-01.{dead}.partial"):
        os.utime(path, (0, 0))
    results.check_folder(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, young}
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == {inner}


# ---- provenance ----------------------------------------------------------------------------------


def test_provenance_goes_into_json(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bvit-interp", "energy-rank", "--limit", "4"])
    about = results.provenance({"path": Path("a/b"), "steps": (1, 2), "nested": {"x": None}})
    assert json.loads(json.dumps(about)) == about
    assert about["options"] == {"path": "a/b", "steps": [1, 2], "nested": {"x": None}}
    assert about["command"] == "bvit-interp energy-rank --limit 4"
    monkeypatch.setattr(sys, "argv", ["/site/bvit_interp/cli/__main__.py", "energy-rank"])
    assert results.provenance({})["command"] == "bvit-interp energy-rank"
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["versions"]["numpy"] == np.__version__
    assert about["date"].endswith("+00:00")
    assert "cores" in about["machine"]


def test_a_library_that_is_not_there_is_left_out(monkeypatch):
    monkeypatch.setattr(results, "_LIBRARIES", ("numpy", "no-such-library"))
    assert list(results.provenance({})["versions"]) == ["numpy"]


def test_the_hash_follows_every_weight(any_model):
    before = results.weights_hash(any_model)
    assert len(before) == 16
    assert int(before, 16) >= 0
    assert results.weights_hash(any_model) == before
    for name, parameter in any_model.named_parameters():
        with torch.no_grad():
            last = parameter.view(-1)[-1:]
            kept = last.clone()
            last += 1e-3
            changed = results.weights_hash(any_model)
            last.copy_(kept)
        assert changed != before, name
    assert results.weights_hash(any_model) == before


def test_a_model_and_its_unroll_have_one_hash(any_model):
    expected = results.weights_hash(any_model)
    assert results.weights_hash(unroll(any_model)) == expected
    untied = unroll(any_model)
    fc1 = untied.blocks[-1].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach() + 1e-3)
    assert results.weights_hash(untied) != expected


def test_more_steps_are_the_same_weights(tiny, make):
    assert results.weights_hash(unroll(tiny, steps=24)) == results.weights_hash(tiny)
    repeated = make(num_blocks=2, num_steps=3, order="repeat")
    assert results.weights_hash(unroll(repeated)) == results.weights_hash(repeated)


def test_two_blocks_that_change_places_are_another_model(stacked):
    before = results.weights_hash(stacked)
    stacked.blocks[0].load_state_dict(
        {k: v.clone() for k, v in stacked.blocks[1].state_dict().items()}
    )
    assert results.weights_hash(stacked) != before


class Ordered(nn.Module):
    """The same named layers, registered in the order given."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            torch.manual_seed(ord(name))
            self.add_module(name, nn.Linear(3, 3))


def test_the_hash_knows_names_and_not_their_order():
    assert results.weights_hash(Ordered("abc")) == results.weights_hash(Ordered("cab"))
    swapped = Ordered("abc")
    swapped.a, swapped.b = swapped.b, swapped.a
    assert results.weights_hash(swapped) != results.weights_hash(Ordered("abc"))
    renamed = Ordered("ab")
    renamed.c = renamed.b  # the last in order still, by another name
    del renamed.b
    assert results.weights_hash(renamed) != results.weights_hash(Ordered("ab"))


def test_the_hash_of_transposed_halves_and_scalars():
    layer = Ordered("a")
    expected = results.weights_hash(layer)
    # equal values, other strides
    layer.a.weight = nn.Parameter(layer.a.weight.detach().T.contiguous().T)
    assert results.weights_hash(layer) == expected
    assert results.weights_hash(layer.bfloat16()) != expected
    layer.register_buffer("scale", torch.tensor(2.0))
    assert results.weights_hash(layer) != expected
