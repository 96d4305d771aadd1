"""Opens a model that a function of the user's own code makes.

Importing a module and running a file runs what is in them. That happens only for a spec that names
them, never for a file that another spec leads to.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from bvit_interp.errors import CheckpointError, choices
from bvit_interp.models.checkpoint.specs import Spec

Result = TypeVar("Result")


def open_own(spec: Spec) -> nn.Module:
    """The model that the factory returns when it is called without arguments.

    A factory that is itself a module is returned as it is. Random weights that are drawn on the CPU
    are the same at every call.

    Raises
    ------
    CheckpointError
        For a file, module or factory that does not exist or raises an error, and for a result that
        is not a module of torch.
    """
    if spec.kind == "python":
        path = Path(spec.name)
        if not path.is_file():
            raise CheckpointError(f"{spec.text}: no file at {path}")
        folder, where = path.resolve().parent, spec.name
    else:
        path, folder, where = None, Path.cwd(), f"module {spec.name}"
    with _importable(folder), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs too
        module = _imported(spec) if path is None else _executed(spec, path)
        made = _attribute(module, spec, where)
        if not isinstance(made, nn.Module):
            made = _guarded(made, f"{spec.factory}()", spec)
    if not isinstance(made, nn.Module):
        raise CheckpointError(
            f"{spec.text}: {spec.factory}() returned {type(made).__name__}, not a torch.nn.Module"
        )
    return made


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's code import what lies beside it."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _imported(spec: Spec) -> ModuleType:
    """The module; a missing one and one that fails to import another get different messages."""
    importlib.invalidate_caches()
    try:
        return importlib.import_module(spec.name)
    except ModuleNotFoundError as error:
        if error.name and f"{spec.name}.".startswith(f"{error.name}."):
            raise CheckpointError(f"{spec.text}: no module {error.name!r}") from error
        raise _failed(error, f"import {spec.name}", spec) from error
    except (Exception, SystemExit) as error:
        raise _failed(error, f"import {spec.name}", spec) from error


def _executed(spec: Spec, path: Path) -> ModuleType:
    """A Python file as a module of its own."""
    name = f"_bvit_interp_{abs(hash(path.resolve())):x}_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # the name ends in .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look up their module
    loader = found.loader
    try:
        _guarded(lambda: loader.exec_module(module), path.name, spec)
    except CheckpointError:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, spec: Spec, where: str) -> Any:
    value: Any = module
    for part in spec.factory.split("."):
        if not hasattr(value, part):
            own = [
                name
                for name, each in vars(module).items()
                if callable(each) and getattr(each, "__module__", "") == module.__name__
            ]
            listed = f"; it has {choices(own)}" if own else ""
            raise CheckpointError(f"{spec.text}: no {spec.factory!r} in {where}{listed}")
        value = getattr(value, part)
    if not callable(value):
        raise CheckpointError(
            f"{spec.text}: {spec.factory} is of type {type(value).__name__}, no function"
        )
    return value


def _guarded(call: Callable[[], Result], what: str, spec: Spec) -> Result:
    """The result of the user's code; an error that it raises becomes one line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise _failed(error, what, spec) from error


def _failed(error: BaseException, what: str, spec: Spec) -> CheckpointError:
    """One line that names the file and line of the user's code."""
    reason = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    own = [frame for frame in own if not frame.filename.startswith("<frozen")]
    named = [frame for frame in own if _is_users(frame.filename, spec)] or own[-1:]
    place = f" at {named[-1].filename}:{named[-1].lineno}" if named else ""
    if isinstance(error, SyntaxError):
        reason, place = str(error.msg), f" at {error.filename}:{error.lineno}"
    return CheckpointError(f"{spec.text}: {what} raised {type(error).__name__}{place}: {reason}")


def _is_users(filename: str, spec: Spec) -> bool:
    """Whether a frame is in the file or package that the spec names."""
    if spec.kind == "python":
        return Path(filename).resolve() == Path(spec.name).resolve()
    module = sys.modules.get(spec.name)
    file = getattr(module, "__file__", None)
    root = spec.name.partition(".")[0]
    return filename == file or f"/{root}/" in filename or filename.endswith(f"/{root}.py")
