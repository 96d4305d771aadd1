"""On a GPU: the CPU's tables, and batches that halve when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.analyses import energy_rank, pointing_game, rank_sweep
from bvit_interp.data import digits
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Loader, run_in_halves
from bvit_interp.models.checkpoint import load
from bvit_interp.probes.probe import Probe
from bvit_interp.results import read_table
from bvit_interp.training import supervised
from bvit_interp.training.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("analysis", [pointing_game, energy_rank, rank_sweep])
def test_the_gpu_gives_the_table_of_the_cpu(analysis, tiny):
    data = DigitScenes("test", length=60)
    on_cpu = analysis.measure({"m": tiny}, data, analysis.Config())
    on_gpu = analysis.measure({"m": tiny.cuda()}, data, analysis.Config())
    for column in on_cpu.columns:
        if on_cpu[column].dtype == np.float64:  # an arg-max may turn by rounding on one image of sixty
            np.testing.assert_allclose(on_gpu[column], on_cpu[column], atol=0.05, err_msg=column)


def test_recording_is_bit_equal(tiny, images):
    model, images = tiny.cuda(), images.cuda()
    assert torch.equal(Probe(model).run(images, ["pattern", "mlp_post"], tokens="cls")[0], model(images))


def test_a_batch_too_large_is_halved(tiny):
    data = DigitScenes("test", length=8)
    (batch,) = Loader(data, [Geometry.of(tiny, data)], batch_size=8)
    sizes = []

    def hungry(part):
        torch.empty(int(torch.cuda.mem_get_info()[0] * len(part) / 3), dtype=torch.uint8, device="cuda")
        sizes.append(len(part))

    run_in_halves(hungry, batch)
    assert sizes == [2, 2, 2, 2]


def test_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Also from the CPU's generator alone, and within rounding: kernels on a GPU add in any order."""
    recipe = Recipe(
        model={"name": "bvit_small_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2,
               "num_steps": 3, "num_classes": 10, "patch_drop_rate": 0.25},
        data="digits-s", epochs=2, images_per_epoch=64, batch_size=16, crop="padded", mixup=0.2, warmup_epochs=1,
    )  # fmt: skip
    monkeypatch.setitem(digits.LENGTHS, "test", 40)
    monkeypatch.setattr(supervised, "_CHECKED_EVERY", 1)
    undisturbed = supervised.train(recipe, tmp_path / "undisturbed", "cuda")
    step = supervised.Trainer._step

    def dying(trainer, *batch):
        if trainer.run.done == 6:
            raise KeyboardInterrupt
        return step(trainer, *batch)

    monkeypatch.setattr(supervised.Trainer, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        supervised.train(recipe, tmp_path / "run", "cuda", save_minutes=0)
    monkeypatch.setattr(supervised.Trainer, "_step", step)
    resumed = supervised.train(recipe, tmp_path / "run", "cuda", save_minutes=0)
    for one, other in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    table = read_table(tmp_path / "run" / "history.csv")
    assert (table["memory"] > 0).all() and table["mfu"].between(0, 1).all()
    assert next(load(tmp_path / "run@ema").parameters()).device.type == "cpu"
