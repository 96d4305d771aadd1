"""On a GPU: the CPU's tables and numbers, runs beside each other, and batches that halve when
memory runs out.

Without one, ``BVIT_GPU_TESTS_ON`` runs the same lines on the CPU: ``cpu`` as they are,
``pretended`` on the device of `devices.py`, ``rounded`` with another machine's rounding, to which
the tolerances here are set.

TF32: torch leaves it off for matrix products and on for cuDNN's convolutions, where it moves the
patch embedding in the fourth digit. It is off here, so that what is compared is the same
arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torchmetrics import MeanMetric

sys.path.append(str(Path(__file__).parent))

from devices import Pretended, Rounded
from tiny_runs import VARIANTS, table, turned

from bvit_interp.analyses import ANALYSES, step_accuracy
from bvit_interp.data import digits
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Loader
from bvit_interp.data.options import LoaderOptions
from bvit_interp.data.stream import stream
from bvit_interp.models import adapters, masks
from bvit_interp.models.adapters import Adapted, Spec
from bvit_interp.models.checkpoint import load, save
from bvit_interp.models.exits import Exits, run_with_exits
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.results import read_table
from bvit_interp.training.adapting import exits as exiting
from bvit_interp.training.loop import supervised
from bvit_interp.training.loop import trainer as run_trainer
from bvit_interp.training.loop.recipe import Recipe

ON = os.environ.get("BVIT_GPU_TESTS_ON", "cuda")
DEVICE = "cpu" if ON in ("cpu", "rounded") else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
    pytest.mark.filterwarnings("default"),  # of a driver or of cuBLAS: shown, not raised
]
on_a_gpu_alone = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="only a GPU runs out of its memory"
)


def there() -> AbstractContextManager[object]:
    """What holds while something is computed on the device."""
    return {"pretended": Pretended, "rounded": Rounded}.get(ON, nullcontext)()


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 and later have a second way to say it
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        yield
        torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def scenes() -> DigitScenes:
    return DigitScenes("test", length=60)


@pytest.mark.parametrize("word", ANALYSES)
def test_the_gpu_gives_the_table_of_the_cpu(word, make, scenes, tmp_path):
    """Numbers to a hundredth of themselves, or 2e-4: ten times what a rounding of 1e-6 in every
    operation moves them by. Counts, names and ranks exactly; at most one cell of fifty, or four,
    may have turned with one image that stands between two answers."""
    wanted = table(word, make(num_steps=4), scenes, tmp_path / "cpu")
    with there():
        found = table(word, make(num_steps=4).to(DEVICE), scenes, tmp_path / "gpu")
    cells = turned(found, wanted, rtol=1e-2, atol=2e-4)
    print(f"{word}: {len(cells)} of {wanted.size} cells turned")
    assert len(cells) <= max(4, wanted.size / 50), cells.to_string(max_rows=40)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_through_an_analysis_too(variant, make, scenes, tmp_path):
    word, options, needed = VARIANTS[variant]
    if needed:
        pytest.importorskip(needed)
    wanted = table(word, make(num_steps=4), scenes, tmp_path / "cpu", **options)
    with there():
        found = table(word, make(num_steps=4).to(DEVICE), scenes, tmp_path / "gpu", **options)
    cells = turned(found, wanted, rtol=1e-2, atol=2e-4)
    assert len(cells) <= max(4, wanted.size / 50), cells.to_string(max_rows=40)


BF16 = {
    "trajectories": 0.3,
    "selectivity": 0.1,
    "patching": 0.2,
    "evaluate": 0.3,
    "rank_sweep": 0.3,
    "pointing_game": 0.1,
}
"""Analysis -> share of its cells that may be further from those of float32 than a tenth and 0.05;
of the others one of twenty, while on a CPU at most one of fifty is. PCA turns its axes, units
change their ranks, what is recovered is a ratio of small differences, and in a table of few rows an
image that turns is many cells."""


@pytest.mark.parametrize("word", ANALYSES)
def test_under_autocast_every_table_is_there(word, make, scenes, tmp_path):
    """bfloat16 keeps three digits: the same rows, as many numbers, and most of them near those of
    float32."""
    if word == "cost":
        with there():
            found = table(word, make(num_steps=4).to(DEVICE), scenes, tmp_path, dtype="bfloat16")
        assert (found["latency_ms"] > 0).all()
        return
    wanted = table(word, make(num_steps=4), scenes, tmp_path / "cpu")
    with there(), torch.autocast(DEVICE, torch.bfloat16):
        found = table(word, make(num_steps=4).to(DEVICE), scenes, tmp_path / "gpu")
    cells = turned(found, wanted, rtol=0.1, atol=0.05)
    print(f"{word}: {len(cells)} of {wanted.size} cells further than a tenth")
    assert len(cells) <= BF16.get(word, 0.05) * wanted.size, cells.to_string(max_rows=40)


# ---- models and probes ---------------------------------------------------------------------------


def close(found: torch.Tensor, wanted: torch.Tensor, atol: float = 2e-4) -> None:
    """Equal within float32's rounding over a run of at most 12 steps."""
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.detach().cpu(), wanted.detach(), rtol=1e-3, atol=atol)


def test_a_model_and_its_unroll_are_bit_equal(any_model, images):
    wanted = any_model(images)
    with there():
        model, images = any_model.to(DEVICE), images.to(DEVICE)
        view = unroll(model)
        close(view(images), wanted)
        if ON != "rounded":
            assert torch.equal(view(images), model(images))
        view(images).sum().backward()
        assert all(
            one is other for one, other in zip(view.parameters(), model.parameters(), strict=True)
        )
        assert all(p.grad is None or p.grad.device.type == DEVICE for p in model.parameters())


def test_recordings_are_those_of_the_cpu(any_model, images):
    sites = ["resid_post", "pattern", "mlp_post", "z"]
    logits, wanted = Probe(any_model).run(images, sites)
    with there():
        model, images = any_model.to(DEVICE), images.to(DEVICE)
        found_logits, found = Probe(model).run(images, sites)
        close(found_logits, logits)
        if ON != "rounded":
            assert torch.equal(found_logits, model(images))
            assert torch.equal(
                Probe(model).record(images, "mlp_post", tokens="cls")["mlp_post", 2],
                found["mlp_post", 2][:, 0],
            )
        for place in wanted:
            close(found[place], wanted[place], atol=1e-3)


def test_edits_are_those_of_the_cpu(any_model, images):
    def halve(activation, address):
        return activation / 2

    def shift(activation, address):
        return activation + torch.arange(activation.shape[1], device=activation.device).view(
            1, -1, *[1] * (activation.ndim - 2)
        )

    edits = {"z[1]:1": halve, ("mlp_post", 2): halve, "resid_post[3]": shift}
    probe = Probe(any_model)
    with probe.edit(edits):
        wanted = probe(images)
    with there():
        probe = Probe(any_model.to(DEVICE))
        with probe.edit(edits) as fired:
            close(probe(images.to(DEVICE)), wanted)
        assert set(fired.values()) == {1}


def test_collected_metrics_are_those_of_the_cpu(tiny, scenes):
    def collected(model):
        batches = Loader(scenes, [Geometry.of(model, scenes)], batch_size=8, limit=20)
        return Probe(model).collect(
            batches, {"resid_mid": MeanMetric()}, steps=[1, 5], progress=False
        )["resid_mid"]

    wanted = collected(tiny)
    with there():
        close(collected(tiny.to(DEVICE)), wanted)


@pytest.mark.parametrize("baked", [True, False])
def test_masked_models_are_those_of_the_cpu(any_model, images, tmp_path, baked):
    generator = torch.Generator().manual_seed(0)
    full = masks.full(any_model)
    of = masks.Masks(
        {n: torch.rand(m.shape, generator=generator) < 0.6 for n, m in full.items()}, full.blocks
    )
    wanted = masks.masked(any_model, of, baked=baked)(images)
    with there():
        model = any_model.to(DEVICE)
        view = masks.masked(model, of, baked=baked)
        close(view(images.to(DEVICE)), wanted)
        of.save(tmp_path / masks.FILE, model)
        again = masks.Masks.load(tmp_path / masks.FILE, model)
        assert again.fingerprint() == of.fingerprint()
        if not baked:
            view(images.to(DEVICE)).sum().backward()
        on_device = masks.Masks({name: mask.to(DEVICE) for name, mask in of.items()}, of.blocks)
        assert on_device.fingerprint() == of.fingerprint()
        assert on_device.union()["qkv"].device.type == DEVICE


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_images_leave_where_they_do_on_the_cpu(any_model, images, threshold, tmp_path):
    exits, generator = (
        Exits((1, 2), any_model.embed_dim, any_model.num_classes),
        torch.Generator().manual_seed(0),
    )
    for parameter in exits.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    images = images.repeat(4, 1, 1, 1) * torch.linspace(0.2, 2, 16).view(-1, 1, 1, 1)
    wanted, left = run_with_exits(unroll(any_model), exits, images, threshold)
    exits.save(tmp_path / "exits.safetensors", any_model, {})
    with there():
        model = any_model.to(DEVICE)
        exits = Exits.load(tmp_path / "exits.safetensors", model)
        found, found_left = run_with_exits(unroll(model), exits, images.to(DEVICE), threshold)
        close(found, wanted)
        assert found_left.tolist() == left.tolist()


@pytest.mark.parametrize("mode", ["probe", "te", "full", "lora-qv", "lora-ffn"])
def test_adapters_are_those_of_the_cpu(tiny, images, tmp_path, mode):
    def adapted(model):
        made = Adapted(model, Spec(mode=mode, rank=2), ["a", "b", "c"], seed=3)
        with torch.no_grad():
            for i, tensor in enumerate(made.trained.values()):
                tensor.add_(0.01 * (i + 1))
        return made

    wanted = adapted(tiny)
    with there():
        found = adapted(tiny.to(DEVICE))
        close(found.view(images.to(DEVICE)), wanted.view(images.to("cpu")))
        found.view(images.to(DEVICE)).sum().backward()
        assert all(tensor.grad.device.type == DEVICE for tensor in found.trained.values())
        close(found.merged()(images.to(DEVICE)), wanted.view(images))
        found.save(tmp_path / adapters.FILE)
        close(adapters.load(tmp_path, tiny)(images.to(DEVICE)), wanted.view(images))


def test_a_checkpoint_of_a_gpu_opens_on_either(tiny, images, tmp_path):
    wanted = tiny(images)
    with there():
        save(tiny.to(DEVICE), tmp_path / "saved")
        close(load(tmp_path / "saved", DEVICE)(images.to(DEVICE)), wanted)
        on_cpu = load(tmp_path / "saved")
        assert next(on_cpu.parameters()).device.type == "cpu"
        torch.testing.assert_close(on_cpu(images), wanted, rtol=1e-3, atol=2e-4)


# ---- training ------------------------------------------------------------------------------------


def test_exits_are_trained_as_on_the_cpu(tiny, tmp_path):
    """Batches are drawn on the CPU; Adam turns a gradient near zero by its sign, so weights agree
    to a few steps."""
    data = DigitScenes("train", length=32)
    plan = exiting.Plan(exits=(3, 6), epochs=2, images_at_once=8, batch_size=8)
    wanted = exiting.train(tiny, data, plan, tmp_path / "cpu")
    with there():
        found = exiting.train(tiny.to(DEVICE), data, plan, tmp_path / "gpu")
        for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
            close(one, other, atol=5e-3)


def test_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Also from the CPU's generator alone, and within rounding: kernels on a GPU add in any
    order."""
    recipe = Recipe(
        model={
            "name": "bvit_small_patch16_224",
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 64,
            "num_heads": 2,
            "num_steps": 3,
            "num_classes": 10,
            "patch_drop_rate": 0.25,
        },
        data="digits-s",
        epochs=2,
        images_per_epoch=64,
        batch_size=16,
        crop="padded",
        mixup=0.2,
        warmup_epochs=1,
    )
    if ON in ("pretended", "rounded"):
        pytest.skip("see test_devices.py")
    monkeypatch.setitem(digits.LENGTHS, "test", 40)
    for name, often in (("_CHECKED_EVERY", 1), ("_LOOK", 0.0)):
        monkeypatch.setattr(supervised, name, often, raising=False)
    undisturbed = supervised.train(recipe, tmp_path / "undisturbed", DEVICE)
    step = run_trainer.Trainer._step

    def dying(trainer, *batch):
        if trainer.run.done == 6:
            raise KeyboardInterrupt
        return step(trainer, *batch)

    monkeypatch.setattr(run_trainer.Trainer, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        supervised.train(recipe, tmp_path / "run", DEVICE, save_minutes=0)
    monkeypatch.setattr(run_trainer.Trainer, "_step", step)
    resumed = supervised.train(recipe, tmp_path / "run", DEVICE, save_minutes=0)
    for one, other in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    history = read_table(tmp_path / "run" / "history.csv")
    if ON == "cuda":
        assert (history["memory"] > 0).all() and history["mfu"].between(0, 1).all()
    assert next(load(tmp_path / "run@ema").parameters()).device.type == "cpu"


# ---- a GPU that is shared, and one that is full --------------------------------------------------


@pytest.mark.skipif(ON in ("pretended", "rounded"), reason="other processes do not pretend")
def test_two_processes_share_the_gpu(tiny, tmp_path):
    """NCCL takes one process a GPU, so these are two runs that know nothing of each other."""
    folder = save(tiny, tmp_path / "tiny")
    words = ("step-accuracy", "dynamics", "energy-rank")

    def start(name):
        given = ["--ckpt", str(folder), "--limit", "41", "--batch-size", "8", "--device", DEVICE]
        commands = [[0, [word, *given, "--out", str(tmp_path / name)]] for word in words]
        command = [
            sys.executable,
            str(Path(__file__).with_name("commands.py")),
            json.dumps(commands),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1", "RANK": "0"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    running = {name: start(name) for name in ("one", "other")}
    for name, process in running.items():
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, f"{name}: {error[-2000:]}"
    for word in (word.replace("-", "_") for word in words):
        one, other = (read_table(tmp_path / name / f"{word}.csv") for name in running)
        cells = turned(one, other, rtol=1e-5, atol=1e-6)
        assert cells.empty, cells.to_string()


@on_a_gpu_alone
def test_a_batch_too_large_is_halved(tiny):
    data = DigitScenes("test", length=8)
    sizes = []

    # what is free depends on the tests beside this one
    whole = torch.cuda.get_device_properties(0).total_memory

    def hungry(batch):
        torch.empty(2 * whole if len(batch) > 2 else 1, dtype=torch.uint8, device="cuda")
        sizes.append(len(batch))

    list(stream({"m": tiny}, data, LoaderOptions(batch_size=8), hungry, progress="test"))
    assert sizes == [2, 2, 2, 2]


@on_a_gpu_alone
def test_a_table_is_the_same_when_memory_runs_out(make, monkeypatch):
    """64 images of 197 tokens and 1,536 neurons take 77 MB a tensor; with 128 MB to spare they go
    in parts."""
    model = make(img_size=224, patch_size=16, embed_dim=384, num_heads=6, num_steps=2).to(DEVICE)
    data = DigitScenes("test", length=64)
    wanted = step_accuracy.measure({"m": model}, data, step_accuracy.Config(batch_size=8))
    emptied, empty = [], torch.cuda.empty_cache
    empty()
    whole = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (emptied.append(1), empty()))
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 128 * 2**20) / whole)
    try:
        found = step_accuracy.measure({"m": model}, data, step_accuracy.Config(batch_size=64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert emptied
    cells = turned(found, wanted, rtol=1e-2, atol=2e-4)
    assert len(cells) <= max(4, wanted.size / 50), cells.to_string()


def test_nothing_turns_tf32_on(tiny, images):
    """Matrix products keep float32; a convolution agrees with the CPU's to six digits once cuDNN's
    TF32 is off."""
    assert torch.get_float32_matmul_precision() == "highest"
    wanted = tiny.patch_embed(images)
    with there():
        found = tiny.to(DEVICE).patch_embed(images.to(DEVICE))
        torch.testing.assert_close(found.detach().cpu(), wanted.detach(), rtol=1e-5, atol=1e-5)
