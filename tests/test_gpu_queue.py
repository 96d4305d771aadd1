"""The GPU queue: order, time limit, what it leaves after every job, and putting it in place; a dry
run of all of it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, save

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
MIB = 2**20
WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1], 'made.txt').write_text({text!r})"


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_queue

    return gpu_queue


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_results

    return gpu_results


@pytest.fixture
def run(queue, tmp_path):
    """``run(*jobs, seconds=...)``: the rows of a run of stub jobs, which work in `tmp_path`."""

    def run_jobs(*jobs, **settings):
        entries = [{"seconds": 1, "leaves": ["*"], **job} for job in jobs]
        path = tmp_path / "queue.yaml"
        path.write_text(yaml.safe_dump({"jobs": entries}))
        given = {"seconds": 60, "grace": 1.0, "packing": 0.5, "device": "cpu", **settings}
        places = {"out": tmp_path / "out", "work": tmp_path / "work", "data": tmp_path / "data"}
        return queue.Queue(queue.read(path), queue.Settings(**places, **given)).run()

    return run_jobs


def job(name, code, **settings):
    return {"name": name, "command": ["{python}", "-c", code, "{out}"], **settings}


def writing(name, text="made", **settings):
    return job(name, WRITE.format(text=text), **settings)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def states(rows):
    return {row.job.name: row.state for row in rows}


def cli(*arguments, **options):
    given = {"capture_output": True, "text": True, "cwd": ROOT, **options}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], check=False, **given)


# the queue file


def test_the_queue_is_in_the_order_of_worth(queue):
    names = [entry.name for entry in queue.read(queue.QUEUE)]
    assert names[0] == "gpu-tests"
    assert all(name.startswith("bench-") for name in names[1:6])
    order = [
        "cifar10-d128",
        "cifar10",
        "imagenette",
        "imagenette-d128",
        "width",
        "shape",
        "variants",
        "pathways",
    ]
    assert [name for name in names if name in order] == order


def test_every_job_of_the_queue_can_start_in_a_run_of_its_own(queue):
    for entry in queue.read(queue.QUEUE):
        assert entry.seconds < 570 - queue.GRACE - queue.PACKING, entry.name
        assert entry.done and entry.collect, entry.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"secnds": 3}, "unknown setting secnds"),
        ({"seconds": 0}, "seconds must be"),
        ({"name": "a/b"}, "a name has"),
        ({"command": "{python} {place}"}, "no placeholder {place}"),
        ({"collect": {"made.txt": "../made.txt"}}, "no path below"),
        ({"leaves": []}, "leaves must be given"),
    ],
)
def test_a_wrong_queue_is_refused_in_one_line(run, change, said, queue):
    from gpu_results import GpuError

    with pytest.raises(GpuError, match=said) as error:
        run({**writing("a"), **change})
    assert "\n" not in str(error.value)


def test_two_jobs_of_one_name_are_refused(run, results):
    with pytest.raises(results.GpuError, match="two jobs are named a"):
        run(writing("a"), writing("a"))


# running


def test_jobs_run_in_order_and_leave_their_files(run, tmp_path, results):
    noted = f"open({str(tmp_path / 'order')!r}, 'a').write('{{}} ')"
    rows = run(*(job(name, noted.format(name)) for name in "cab"), writing("d"))
    assert (tmp_path / "order").read_text() == "c a b "
    assert {*states(rows).values()} == {"done"}
    assert results.read(tmp_path / "out").files["d/out/made.txt"] == b"made"
    listed = summary(tmp_path / "out")["jobs"]
    assert [(entry["name"], entry["state"], entry["estimate"]) for entry in listed][-1] == (
        "d",
        "done",
        1,
    )


def test_placeholders_are_filled_in(run, tmp_path, results):
    code = (
        "import sys, pathlib; pathlib.Path(sys.argv[1], 'words').write_text('|'.join(sys.argv[2:]))"
    )
    words = [
        "{python}",
        "-c",
        code,
        "{out}",
        "{device}",
        "{data}/cifar10",
        "{minutes}",
        "{recipes}",
    ]
    recipes = {"wide": {"extends": "cifar10", "model": {"embed_dim": 384}}}
    run({"name": "a", "command": words, "seconds": 30, "recipes": recipes})
    device, data, minutes, recipe = (
        results.read(tmp_path / "out").files["a/out/words"].decode().split("|")
    )
    assert (device, data) == ("cpu", f"{tmp_path}/data/cifar10")
    # less than twice the estimate
    assert float(minutes) == pytest.approx((58.5 - 15) / 60, abs=0.02)
    assert (
        Path(recipe).name == "wide.yaml"
        and yaml.safe_load(Path(recipe).read_text()) == recipes["wide"]
    )


def test_what_is_there_or_lacks_or_does_not_fit_is_skipped(run, tmp_path):
    rows = run(
        writing("there", done=["setup.cfg"]),
        writing("half-there", done=["setup.cfg", "no/such/file"]),
        writing("lacks", needs=["{data}/cifar10"]),
        writing("late", seconds=100),
        writing("small"),
        seconds=30,
    )
    assert states(rows) == {
        "there": "there",
        "half-there": "done",
        "lacks": "lacks",
        "late": "late",
        "small": "done",
    }
    assert not (tmp_path / "work" / "late").exists()
    assert "cifar10" in rows[2].why


def test_a_job_named_by_hand_runs_although_its_results_are_there(run):
    assert states(run(writing("there", done=["setup.cfg"]), again=True)) == {"there": "done"}


def test_a_job_that_fails_is_told_with_its_last_lines_and_the_next_one_runs(run, tmp_path):
    rows = run(job("bad", "print('before'); raise SystemExit('no such thing')"), writing("good"))
    assert states(rows) == {"bad": "failed", "good": "done"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "no such thing" in log and "exit code 1" in log


def test_a_program_that_is_not_there_fails(run):
    assert states(run({"name": "a", "command": ["no-such-program"]})) == {"a": "failed"}


def test_a_job_that_overruns_is_interrupted_and_what_it_wrote_is_kept(run, tmp_path, results):
    code = (
        "import pathlib, sys, time; out = pathlib.Path(sys.argv[1]); (out /"
        " 'early').write_text('1')\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: (out / 'late').write_text('2')"
    )
    rows = run(job("slow", code, limit=0.5), writing("next"))
    assert states(rows) == {"slow": "stopped", "next": "done"}
    assert {"slow/out/early", "slow/out/late"} <= set(results.read(tmp_path / "out").files)


def test_a_job_that_does_not_stop_is_killed_with_what_it_started(run, tmp_path, results):
    code = (
        "import pathlib, signal, subprocess, sys, time; signal.signal(signal.SIGINT,"
        " signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1], 'child').write_text(str(child.pid)); time.sleep(60)"
    )
    rows = run(job("deaf", code, limit=1), grace=0.3)
    assert states(rows) == {"deaf": "killed"}
    assert not is_alive(int(results.read(tmp_path / "out").files["deaf/out/child"]))


def test_no_job_runs_past_the_limit(run):
    began = time.monotonic()
    rows = run(job("a", "import time; time.sleep(60)"), writing("b"), seconds=3, grace=0.5)
    assert time.monotonic() - began < 3
    assert states(rows) == {"a": "stopped", "b": "late"}


def is_alive(pid):
    for _ in range(40):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.05)
    return True


def write_training(folder, epoch, epochs, weights=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"training": {"recipe": {"epochs": epochs}}}))
    (folder / "history.csv").write_text(f"epoch,top1\n{epoch}.0,0.5\n")
    for name, content in (weights or {}).items():
        (folder / name).write_bytes(content)


def test_a_training_that_stopped_by_itself_before_its_last_epoch_is_unfinished(queue, tmp_path):
    write_training(tmp_path / "a", 3, 3)
    write_training(tmp_path / "b", 2, 3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "state.pt").touch()
    assert queue.unfinished(tmp_path) == ["b: epoch 2 of 3", "c: no epoch was scored"]


def test_a_finished_job_is_kept_in_the_next_run_and_an_unfinished_one_goes_on(run, tmp_path):
    counted = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1], 'count');"
        "p.write_text(str(int(p.read_text()) + 1 if p.exists() else 1))"
    )
    slow = counted + "; import time; time.sleep(60)"
    run(job("whole", counted), job("part", slow, limit=0.7))
    rows = run(job("whole", counted), job("part", slow, limit=0.7))
    assert states(rows) == {"whole": "kept", "part": "stopped"}
    counts = [
        (tmp_path / "work" / name / "out" / "count").read_text() for name in ("whole", "part")
    ]
    assert counts == ["1", "2"]
    assert states(run(job("whole", counted + "; 1"))) == {"whole": "done"}  # another command


# what a run leaves


def weights(megabytes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return save(
        {
            "w": torch.randn(int(megabytes * MIB / 4), generator=generator),
            "mask": torch.ones(3, dtype=bool),
        }
    )


def test_a_test_report_leaves_without_the_machine(results, tmp_path):
    report = f'<suite hostname="box" tests="1"><case>{results.ROOT}/tests/a.py:3: x</case></suite>'
    (tmp_path / "junit.xml").write_text(report)
    package = results.Package(tmp_path / "out")
    assert package.add("a/out/junit.xml", tmp_path / "junit.xml")
    package.commit({"jobs": []}, "log")
    back = results.read(tmp_path / "out").files["a/out/junit.xml"]
    assert back == b'<suite tests="1"><case>tests/a.py:3: x</case></suite>'


def test_weights_go_across_shards_halved_and_come_back(results, tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(weights(5))
    package = results.Package(tmp_path / "out", shard=MIB, total=8 * MIB)
    assert package.add("a/out/ema.safetensors", tmp_path / "ema.safetensors")
    package.commit({"jobs": []}, "log")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.txt", "part-00.tar", "part-01.tar", "part-02.tar", "summary.json"]
    assert all(path.stat().st_size <= MIB for path in (tmp_path / "out").iterdir())
    back = load(results.read(tmp_path / "out").files["a/out/ema.safetensors"])
    own = load((tmp_path / "ema.safetensors").read_bytes())
    assert back["w"].dtype == torch.float16 and torch.equal(back["w"], own["w"].half())
    assert torch.equal(back["mask"], own["mask"])
    assert "float16" in summary(tmp_path / "out")["files"]["a/out/ema.safetensors"]["stored"]


def test_weights_beyond_float16_stay_as_they_are(results):
    content = save({"w": torch.tensor([1.0, 1e6])})
    assert results.halved(content) == (content, False)
    assert results.halved(save({"w": torch.tensor([1.0, float("nan")])}))[1]


def test_the_output_keeps_the_limits_of_the_machine(results):
    shards = -(-results.TOTAL // results.SHARD)
    # log, summary, and one of them while it is replaced
    assert results.SHARD <= 16 * MIB and shards + 3 <= 8
    assert results.TOTAL + 2 * results.MOST_LOG + MIB // 4 <= 64 * MIB


def test_the_least_worthy_files_stay_out_and_are_named(queue, results, tmp_path, monkeypatch):
    """Two unfinished trainings in 5 MiB: averaged weights of both, one's raw weights, no state."""
    monkeypatch.setattr(results, "TOTAL", 5 * MIB)
    monkeypatch.setattr(
        queue,
        "Package",
        lambda out, halve: results.Package(out, total=5 * MIB, shard=MIB, halve=halve),
    )
    entries = []
    for name in ("a", "b"):
        pattern = ["**/state.pt", "**/*.safetensors", "**/history.csv"]
        source = tmp_path / "source" / name
        content = {
            "ema.safetensors": weights(1.5),
            "model.safetensors": weights(1.5),
            "state.pt": bytes(3 * MIB),
        }
        write_training(source, 1, 2, content)
        entries.append(
            {
                **job(
                    name,
                    f"import shutil, sys; shutil.copytree({str(source)!r}, sys.argv[1] + '/run')",
                ),
                "seconds": 1,
                "leaves": pattern,
            }
        )
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump({"jobs": entries}))
    places = {name: tmp_path / name for name in ("out", "work", "data")}
    rows = queue.Queue(
        queue.read(tmp_path / "queue.yaml"), queue.Settings(**places, halve=False)
    ).run()
    assert states(rows) == {"a": "stopped", "b": "stopped"}
    packed = {name for name in results.read(tmp_path / "out").files if "/out/" in name}
    kinds = {
        name: {path.rpartition("/")[2] for path in packed if path.startswith(name)} for name in "ab"
    }
    assert kinds["a"] == {"history.csv", "ema.safetensors", "model.safetensors"}
    assert kinds["b"] == {"history.csv", "ema.safetensors"}
    left = summary(tmp_path / "out")["left_out"]
    assert set(left) == {"a/out/run/state.pt", "b/out/run/state.pt", "b/out/run/model.safetensors"}
    assert all("no room" in why for why in left.values())


def test_a_state_comes_back_where_there_is_room_and_only_of_an_unfinished_training(
    run, tmp_path, results
):
    for name, epoch in (("half", 1), ("whole", 2)):
        write_training(tmp_path / name, epoch, 2, {"state.pt": b"state"})
    copying = "import shutil, sys; shutil.copytree({!r}, sys.argv[1] + '/run')"
    run(
        *(
            job(name, copying.format(str(tmp_path / name)), leaves=["**/*"])
            for name in ("half", "whole")
        )
    )
    found = results.read(tmp_path / "out").files
    assert "half/out/run/state.pt" in found and "whole/out/run/state.pt" not in found


def test_files_of_others_in_the_output_folder_are_refused(run, tmp_path, results):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(results.GpuError, match=r"thesis\.tex"):
        run(writing("a"))


def test_an_append_that_was_cut_off_does_not_count(results, tmp_path):
    package = results.Package(tmp_path / "out", shard=2048)
    package.add_bytes("a/one", b"1" * 3000)
    package.commit({"jobs": []}, "")
    # killed in the middle of the next
    with (tmp_path / "out" / "part-01.tar").open("ab") as stream:
        stream.write(b"torn")
    assert set(results.read(tmp_path / "out").files) == {"a/one"}
    package.add_bytes("a/two", b"2" * 3000)
    package.commit({"jobs": []}, "")
    assert set(results.read(tmp_path / "out").files) == {"a/one", "a/two"}


def start_runner(tmp_path):
    """A runner whose second job goes on for a minute, and the process id of that job."""
    waits = (
        "import os, pathlib, sys, time;"
        " pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    entries = [
        {"seconds": 1, "leaves": ["*"], **entry}
        for entry in (writing("first"), job("second", waits, limit=50))
    ]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump({"jobs": entries}))
    arguments = [
        "--queue",
        tmp_path / "queue.yaml",
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path / "work",
    ]
    runner = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, text=True
    )
    pid = tmp_path / "work" / "second" / "out" / "pid"
    for _ in range(200):
        if pid.is_file() and pid.read_text():
            return runner, int(pid.read_text())
        time.sleep(0.05)
    raise AssertionError("the second job did not start")


def test_a_runner_that_is_killed_leaves_what_earlier_jobs_made(tmp_path, results):
    runner, pid = start_runner(tmp_path)
    runner.kill()
    runner.communicate()
    assert results.read(tmp_path / "out").files["first/out/made.txt"] == b"made"
    assert [entry["state"] for entry in summary(tmp_path / "out")["jobs"]] == ["done", "running"]
    assert not is_alive(pid)  # it does not hold the GPU


def test_a_runner_that_is_ended_packs_the_job_that_ran(tmp_path, results):
    runner, pid = start_runner(tmp_path)
    runner.send_signal(signal.SIGTERM)
    runner.communicate()
    assert runner.returncode == 130
    found = results.read(tmp_path / "out")
    assert {"first/out/made.txt", "second/out/pid"} <= set(found.files)
    assert [entry["state"] for entry in found.summary["jobs"]] == ["done", "stopped"]
    assert not is_alive(pid)


# putting in place


@pytest.fixture
def collecting(tmp_path, results):
    """``collecting(files, state=...)``: an output folder with these files of a job `a`; returns a
    function."""
    root = tmp_path / "repository"
    root.mkdir()

    def pack(files, state="done"):
        package = results.Package(tmp_path / "packed")
        for name, content in files.items():
            package.add_bytes(name, content)
        package.commit(
            {"jobs": [{"name": "a", "state": state, "seconds": 1.0, "estimate": 2.0}]}, ""
        )
        mapping = {"a": {"run": "checkpoints/run", "table.csv": "figures/table.csv"}}

        def collect(**options):
            return results.collect(
                tmp_path / "packed", root, root / "runs" / "work", mapping, **options
            )[1]

        return collect

    return pack


def test_files_are_put_in_place(collecting, tmp_path):
    files = {
        "a/out/run/history.csv": b"1",
        "a/out/table.csv": b"2",
        "a/job.log": b"3",
        "a/out/other": b"4",
        "a/out/run/state.pt": b"5",
    }
    collect, root = collecting(files), tmp_path / "repository"
    assert {placed.how for placed in collect()} == {"new"}
    assert (root / "checkpoints/run/history.csv").read_bytes() == b"1"
    assert (root / "figures/table.csv").read_bytes() == b"2"
    assert (root / "runs/work/a/job.log").read_bytes() == b"3"
    assert (root / "runs/work/a/out/other").read_bytes() == b"4"
    assert (root / "runs/work/a/out/run/state.pt").read_bytes() == b"5"
    assert {placed.how for placed in collect()} == {"same"}


@pytest.mark.parametrize("state", ["stopped", "failed", "killed", "running"])
def test_an_unfinished_job_goes_where_the_queue_goes_on_with_it(collecting, tmp_path, state):
    collecting({"a/out/table.csv": b"2"}, state)()
    assert not (tmp_path / "repository" / "figures").exists()
    assert (tmp_path / "repository/runs/work/a/out/table.csv").is_file()


def test_a_tracked_file_that_differs_is_not_replaced_unasked(collecting, tmp_path, results):
    root = tmp_path / "repository"
    (root / "figures").mkdir()
    (root / "figures/table.csv").write_text("mine")
    for command in (["init", "-q"], ["add", "figures/table.csv"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    collect = collecting({"a/out/run/history.csv": b"1", "a/out/table.csv": b"theirs"})
    with pytest.raises(results.GpuError, match="tracked by git and differs.*--overwrite"):
        collect()
    assert not (root / "checkpoints").exists()  # nothing was written
    collect(overwrite=True)
    assert (root / "figures/table.csv").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/out/../../../evil", "a/out/run/../../x", "a/.git/hooks/x"]
)
def test_a_path_that_leads_out_is_refused(collecting, tmp_path, results, name):
    with pytest.raises(results.GpuError, match="no file below its folder"):
        collecting({name: b"evil"})()
    assert not list((tmp_path / "repository").iterdir())


def test_links_are_refused(results, collecting, tmp_path):
    collect = collecting({})
    link = tarfile.TarInfo("a/out/run/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(link)
    (tmp_path / "packed" / "part-00.tar").write_bytes(made.getvalue())
    content = summary(tmp_path / "packed") | {
        "bytes": len(made.getvalue()),
        "sha256": hashlib.sha256(made.getvalue()).hexdigest(),
        "shards": ["part-00.tar"],
    }
    (tmp_path / "packed" / "summary.json").write_text(json.dumps(content))
    with pytest.raises(results.GpuError, match="no file below its folder"):
        collect()


def test_a_link_in_the_repository_that_leads_out_is_not_followed(collecting, tmp_path, results):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "repository" / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(results.GpuError, match="lies outside"):
        collecting({"a/out/table.csv": b"2"})()


@pytest.mark.parametrize("damage", ["changed", "short", "missing"])
def test_damaged_shards_are_refused(collecting, tmp_path, results, damage):
    collect, shard = collecting({"a/out/table.csv": b"2"}), tmp_path / "packed" / "part-00.tar"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content[:-1] + b"x" if damage == "changed" else content[:-512])
    with pytest.raises(
        results.GpuError, match="is missing" if damage == "missing" else "not those"
    ):
        collect()


def test_a_job_that_the_queue_does_not_know_is_refused(collecting, results):
    with pytest.raises(results.GpuError, match="no job 'b'"):
        collecting({"b/out/table.csv": b"2"})()


# the command line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--only", "nonsense", "--list"),
        ("collect", "no/such/folder"),
        ("--queue", "no.yaml", "--list"),
        ("--seconds", "0"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments):
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: error: ") and done.stderr.count("\n") == 1


def test_the_jobs_can_be_listed_and_chosen():
    assert len(cli("--list").stdout.splitlines()) > 10
    listed = cli(
        "--list", "--only", "cifar10", "gpu-tests", "--skip", "cifar10"
    ).stdout.splitlines()
    assert len(listed) == 1 and listed[0].startswith("gpu-tests")


def test_a_failed_job_is_exit_code_1_and_the_table_says_which(tmp_path):
    entries = [{"seconds": 1, "leaves": ["*"], **job("bad", "raise SystemExit(3)")}]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump({"jobs": entries}))
    done = cli(
        "--queue", tmp_path / "queue.yaml", "--out", tmp_path / "out", "--work", tmp_path / "work"
    )
    assert done.returncode == 1
    assert any(line.split()[:2] == ["bad", "failed"] for line in done.stdout.splitlines())


@pytest.mark.slow
def test_the_whole_queue_runs_dry_and_its_results_fall_into_place(tmp_path, queue, results):
    """Every command of the queue at tiny sizes on the CPU: nothing is tried on the GPU for the
    first time."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment["OMP_NUM_THREADS"] = "1"
    done = cli("--dry-run", "--out", tmp_path / "out", "--work", tmp_path / "work", env=environment)
    found = results.read(tmp_path / "out")
    failed = [entry for entry in found.summary["jobs"] if entry["state"] != "done"]
    assert not failed, (failed, (tmp_path / "out" / "log.txt").read_text())
    assert done.returncode == 0, done.stderr
    (tmp_path / "repository").mkdir()
    jobs = queue.read(queue.QUEUE)
    assert [entry["name"] for entry in found.summary["jobs"]] == [entry.name for entry in jobs]
    results.collect(
        tmp_path / "out",
        tmp_path / "repository",
        tmp_path / "repository/runs/gpu-work",
        {entry.name: entry.collect for entry in jobs},
    )
    for entry in jobs:  # so that a second run skips it
        assert all((tmp_path / "repository" / path).exists() for path in entry.done), entry.name
    histories = list((tmp_path / "repository" / "checkpoints").rglob("history.csv"))
    for path in histories:
        with path.open() as stream:
            assert [row["epoch"] for row in csv.DictReader(stream)][-1] in ("1", "4")
        assert (path.parent / "ema.safetensors").is_file() and (path.parent / "README.md").is_file()
    assert len(histories) >= 12 + 6
