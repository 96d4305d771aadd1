"""Model FLOPs utilisation: what a model needs over what the machine can, both by hand."""

from __future__ import annotations

import itertools
import resource

import pytest
import torch

from bvit_interp.training.loop import throughput

# width 32, 17 tokens, 12 steps, patches of 8: multiply-adds x 2
BLOCK = 2 * 17 * 12 * 32**2 + 2 * 2 * 17**2 * 32
FLOPS = 2 * 16 * (3 * 8 * 8) * 32 + 12 * BLOCK + 2 * 32 * 10


def test_utilisation_by_hand(make, monkeypatch):
    asked = []
    monkeypatch.setattr(throughput, "peak_flops", lambda *given: asked.append(given) or 1e9)
    found = throughput.utilisation(make(), 50.0, "cpu", torch.bfloat16)
    assert found == pytest.approx(3 * FLOPS * 50 / 1e9)
    assert asked == [("cpu", torch.bfloat16)]
    dropping = make(patch_drop_rate=0.25)
    assert throughput.utilisation(dropping, 50.0, "cpu", torch.bfloat16) == pytest.approx(
        0.75 * found
    )


def test_peak_is_the_best_of_several_products(monkeypatch):
    ticks = itertools.accumulate(itertools.cycle([0.0, 0.5, 0.0, 0.25, 0.0, 1.0]))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(ticks))
    measured = throughput.peak_flops.__wrapped__("cpu", torch.float32)
    assert measured == pytest.approx(2 * 1024**3 / 0.25)


def test_peak_of_this_machine_is_plausible_and_measured_once():
    first = throughput.peak_flops("cpu", torch.float32)
    assert 1e8 < first < 1e14
    assert throughput.peak_flops("cpu", torch.float32) == first


def test_memory_is_in_gigabytes():
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert throughput.peak_memory("cpu") == pytest.approx(kilobytes * 1024 / 1e9, rel=0.05)
