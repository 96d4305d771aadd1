"""Times against a clock that the test makes tick; memory on a GPU."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.cost import Config, measure
from bvit_interp.analyses.cost.timing import interleaved_times, peak_memory, random_pixels
from bvit_interp.errors import UserError


def test_times_are_of_the_timed_turns_alone(tiny, stacked, monkeypatch):
    """The r-th forward pass of the first model takes r s, of the second 100 + r s."""
    clock, sizes = [0.0], []
    ticks = {id(tiny): itertools.count(), id(stacked): itertools.count(100)}

    def tick(model, args, _):
        sizes.append(len(args[0]))
        clock[0] += next(ticks[id(model)])

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with tiny.register_forward_hook(tick), stacked.register_forward_hook(tick):
        seconds = interleaved_times([tiny, stacked], 3, warm_up=2, runs=4)
    assert seconds.tolist() == [[2, 3, 4, 5], [102, 103, 104, 105]]
    assert sizes == [3] * 12


def test_pixels_are_the_same_at_every_call(tiny):
    pixels = random_pixels(tiny, 5)
    assert pixels.shape == (5, 3, 32, 32)
    assert torch.equal(pixels, random_pixels(tiny, 5))
    assert random_pixels(tiny.bfloat16(), 1).dtype == torch.bfloat16


def test_no_gpu_memory_on_a_cpu(tiny):
    assert math.isnan(peak_memory(tiny, 2))


def test_a_number_of_images_that_is_no_number_is_refused(tiny):
    with pytest.raises(TypeCheckError):
        random_pixels(tiny, "2")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu(tiny, digits, monkeypatch):
    model = tiny.cuda()
    weights = sum(p.numel() * 4 for p in model.parameters()) / 1e9
    small, large = (
        measure({"m": model}, digits, Config(runs=3, batch_size=b)).iloc[0] for b in (1, 512)
    )
    assert weights < small["peak_memory"] < large["peak_memory"]
    assert torch.cuda.get_device_name() in small["device"]

    def full(self, x, attn_mask=None):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(model), "forward", full)
    with pytest.raises(UserError, match="out of GPU memory with 4 images"):
        peak_memory(model, 4)
