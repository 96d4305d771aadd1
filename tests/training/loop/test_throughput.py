"""Utilisation, peak and precision against hand-computed values."""

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


@pytest.mark.parametrize(("bf16", "expected"), [(8.9, "bf16"), (9.1, "off"), (11.0, "off")])
def test_bf16_must_be_a_tenth_faster_without_the_first_try(monkeypatch, bf16, expected):
    """A step takes 10 s in float32; the first try takes 1 s, and does not count."""
    clock, calls = [0.0], {False: 0, True: 0}
    forward = throughput.Block.forward

    def timed(block, images):
        on = torch.is_autocast_enabled("cpu")
        calls[on] += 1
        clock[0] += 1.0 if calls[on] == 1 else bf16 if on else 10.0
        return forward(block, images)

    monkeypatch.setattr(throughput.Block, "forward", timed)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    assert throughput._faster_precision.__wrapped__("cpu") == expected
    assert calls == {False: 4, True: 4}


def test_on_a_cpu_attention_is_fused_in_float32_alone():
    shape = (2, 2, 5, 4)
    assert throughput.prefers_fused_attention("cpu", "off", shape)
    assert not throughput.prefers_fused_attention("cpu", "bf16", shape)
