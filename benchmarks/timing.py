"""Timing in paired rounds in random order, on a CPU or a GPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Way = Callable[[], Any]


def is_cuda(device: str) -> bool:
    """Whether `device` is a GPU."""
    return torch.device(device).type == "cuda"


def dtype_of(device: str) -> torch.dtype:
    """bf16 on a GPU, as in the trainer; float32 on a CPU, as in the analyses."""
    return torch.bfloat16 if is_cuda(device) else torch.float32


def machine(device: str) -> str:
    """The GPU or the number of CPU threads, and the version of torch."""
    where = (
        torch.cuda.get_device_name(device)
        if is_cuda(device)
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return f"{where}, torch {torch.__version__}"


def wait(device: str) -> None:
    """Wait until the GPU has finished its work."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def seconds(
    way: Way, device: str, calls: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds per call, as the mean of `calls` calls."""
    wait(device)
    began = clock()
    for _ in range(calls):
        way()
    wait(device)
    return (clock() - began) / calls


def paired(
    ways: Mapping[str, Way],
    rounds: int,
    device: str,
    *,
    warm: int = 1,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every way in every round; each round has a new random order."""
    for way in ways.values():
        for _ in range(warm):
            way()
    wait(device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            times[name].append(seconds(ways[name], device, calls, clock))
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio of paired times."""
    return statistics.median(mine / other for mine, other in zip(times, base, strict=True))


def verdict(name: str, value: float, goal: float, *, at_most: bool = False) -> str:
    """A line that says whether a goal was met."""
    met = value <= goal if at_most else value >= goal
    form = ",.0f" if goal > 100 else ".3f"
    sign, verdict = "<=" if at_most else ">=", "met" if met else "not met"
    return f"{name}: {value:{form}} (goal {sign} {goal:{form}}: {verdict})"


def report(lines: Sequence[str], out: Path | None) -> None:
    """Print the lines and write them to `out`."""
    print("\n".join(lines))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n")
