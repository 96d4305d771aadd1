"""The device and the processes that a command runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

import bvit_interp.models  # noqa: F401  registers the models with timm
from bvit_interp.cli.world import check_torchrun, local_rank, world_size
from bvit_interp.errors import UserError, choices


@contextmanager
def processes(device: str, threads: int | None = None) -> Iterator[str]:
    """The device of this process, with `threads` CPU threads; under torchrun, with its process
    group open.

    Raises
    ------
    UserError
        For fewer threads than one, a device that is unknown or not there, or variables of torchrun
        that are wrong.
    """
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads must be >= 1, got {threads}")
        torch.set_num_threads(threads)
    device = _device(device)
    if device != "cpu":
        # torch's default rounds the factors of convolutions to 10 bits, unlike a CPU
        torch.backends.cudnn.allow_tf32 = False
    if world_size() == 1:
        yield device
        return
    on_cuda = device != "cpu"
    if on_cuda:
        device = _device(f"cuda:{local_rank()}")
    check_torchrun()
    if on_cuda:
        torch.cuda.set_device(device)
    # tables are gathered on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _device(wanted: str) -> str:
    """`wanted` as cpu, cuda or cuda:N, if this machine has it."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device: torch.device | None = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {wanted!r}; devices: auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; devices: auto, cpu")
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device.index is not None and wanted not in present:
        raise UserError(
            f"this machine has no {wanted}; devices: auto, cpu, cuda, {choices(present)}"
        )
    return wanted
