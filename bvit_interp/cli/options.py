"""What every command shares: reading its options, and the device and processes it runs on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import tyro

from bvit_interp.errors import UserError, choices


def parse(options: Any, word: str, given: list[str], description: str | None = None) -> Any:
    """The command's options from its arguments; a value that is refused becomes one line, as
    everywhere."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return _tyro(options, word, given, description)
    except SystemExit as stopped:
        cause = stopped.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:  # a value that its Config refuses: one line, as everywhere
            raise cause from None
        sys.stderr.write(printed.getvalue())
        raise


def _tyro(options: Any, word: str, given: list[str], description: str | None) -> Any:
    return tyro.cli(
        options,
        args=given,
        prog=f"bvit-interp {word}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def gathered(given: list[str], flag: str) -> list[str]:
    """`--ckpt A --ckpt B` as `--ckpt A B`: a repeated flag would otherwise replace the earlier
    one."""
    values: list[str] = []
    rest: list[str] = []
    position: int | None = None
    taking = False
    for argument in given:
        if argument == flag or argument.startswith(f"{flag}="):
            position = len(rest) if position is None else position
            taking = argument == flag
            values += [] if taking else [argument.partition("=")[2]]
        elif taking and not argument.startswith("--"):
            values.append(argument)
        else:
            taking = False
            rest.append(argument)
    return rest if position is None else [*rest[:position], flag, *values, *rest[position:]]


@contextmanager
def processes(device: str, threads: int | None = None) -> Iterator[str]:
    """The device of this process, with `threads` CPU threads; under torchrun, with its process
    group open.

    Raises
    ------
    UserError
        For fewer threads than one, or a device that is unknown or not there.
    """
    import torch
    import torch.distributed as dist

    import bvit_interp.models.bvit  # noqa: F401  registers the models with timm

    if threads is not None:
        if threads < 1:
            raise UserError(f"threads must be >= 1, got {threads}")
        torch.set_num_threads(threads)
    device = _device(device)
    if (
        device != "cpu"
    ):  # torch's default rounds what convolutions multiply to 10 bits; a CPU's tables would differ
        torch.backends.cudnn.allow_tf32 = False
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    on_cuda = device != "cpu"
    if on_cuda:
        device = _device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    )  # tables are gathered on the CPU
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _device(wanted: str) -> str:
    """`wanted` as cpu, cuda or cuda:N, if this machine has it."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {wanted!r}; devices: auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; devices: auto, cpu")
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device.index is not None and wanted not in there:
        raise UserError(f"this machine has no {wanted}; devices: auto, cpu, cuda, {choices(there)}")
    return wanted
