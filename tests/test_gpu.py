"""On a GPU: the CPU's tables, and batches that halve when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.analyses import energy_rank, pointing_game, rank_sweep
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Loader, run_in_halves
from bvit_interp.probes.probe import Probe

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
