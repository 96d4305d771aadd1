"""How the user names a checkpoint: ``SOURCE[@VERSION][@loop=PATH][@size=N]...``.

The source is a path, or begins with a word: ``timm:NAME``, ``torchvision:NAME``, ``hf:FOLDER``,
``module:package.module.factory``, ``FILE.py:factory``. What follows an ``@`` says which weights are
meant, which module is the block of the loop, the size of the images, and which tokens are patches:
``@prefix=KIND,...`` and ``@grid=ROWSxCOLUMNS``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bvit_interp.errors import CheckpointError

WEIGHTS, EMA, CONFIG, CARD = "model.safetensors", "ema.safetensors", "config.json", "README.md"
AVERAGED, MASKED, RANDOM = "@ema", "@masked", "random"
Kind = Literal["path", "timm", "torchvision", "hf", "module", "python"]
_WORDS: tuple[Kind, ...] = ("timm", "torchvision", "hf", "module")
_PYTHON = re.compile(r"(?P<file>.+\.py)(?::(?P<factory>[^:]*))?")
_OPTIONS = {
    "loop": "PATH",
    "size": "N",
    "prefix": "KIND,...",
    "grid": "ROWSxCOLUMNS",
}
"""Option after the source -> how its value is written."""
_OPTION = re.compile(r"(?P<before>.+)@(?P<key>\w+)=(?P<value>[^@]*)", re.DOTALL)


@dataclass(frozen=True)
class Spec:
    """A checkpoint as the user wrote it.

    Attributes
    ----------
    text : all of it.
    kind : where the model comes from.
    name : the path; the name in timm or torchvision; the folder; the name of the factory's module;
        the Python file.
    factory : the factory in that module or file.
    file : weights file to use in place of the model's own weights; "" for its own.
    random : whether the weights are random, from a fixed seed.
    version : "@ema" or "@masked", or "".
    loop : path of the block of the loop, or None.
    size : rows and columns of the images, or None for the model's own.
    prefix : kinds of the tokens before the patches, or None if the model tells them.
    grid : rows and columns of patches, or None if the model tells them.
    """

    text: str
    kind: Kind
    name: str
    factory: str = ""
    file: str = ""
    random: bool = False
    version: str = ""
    loop: str | None = None
    size: tuple[int, int] | None = None
    prefix: tuple[str, ...] | None = None
    grid: tuple[int, int] | None = None


def parse(text: str) -> Spec:
    """Read a spec. A path that exists is taken whole, also with an ``@`` in it.

    Raises
    ------
    CheckpointError
        For an unknown option, an option without a valid value, and code without the name of a
        factory.
    """
    source, options = text, dict[str, str]()
    while not Path(source).exists() and (found := _OPTION.fullmatch(source)):
        source = found["before"]
        options[found["key"]] = found["value"]
    if unknown := [key for key in options if key not in _OPTIONS]:
        listed = ", ".join(f"@{key}={value}" for key, value in _OPTIONS.items())
        raise CheckpointError(f"{text}: no option @{unknown[0]}=; options: {listed}")
    if options.get("loop") == "":
        raise CheckpointError(f"{text}: @loop= needs the path of a module")
    given: dict[str, Any] = dict(options)
    for key in {"size", "grid"}.intersection(options):
        given[key] = _pair(text, key, options[key])
    if "prefix" in options:
        given["prefix"] = tuple(filter(None, options["prefix"].split(",")))

    word, colon, rest = source.partition(":")
    kind = next((known for known in _WORDS if colon and word == known), None)
    if kind in ("timm", "torchvision"):
        name, _, weights = rest.partition("@")
        random = weights == RANDOM
        file, version = ("", "") if random else _split(weights)
        return Spec(text, kind, name, "", file, random, version, **given)
    if kind == "module":
        module, _, factory = rest.rpartition(":" if ":" in rest else ".")
        if not module or not factory:
            raise CheckpointError(f"{text}: say module:package.module.factory")
        return Spec(text, kind, module, factory, **given)
    if kind == "hf":
        return Spec(text, kind, rest, **given)
    if (python := _PYTHON.fullmatch(source)) and not Path(source).is_dir():
        if not python["factory"]:
            raise CheckpointError(f"{text}: say which function makes the model: FILE.py:factory")
        return Spec(text, "python", python["file"], python["factory"], **given)
    name, version = _split(source)
    return Spec(text, "path", name, version=version, **given)


def display_name(spec: str | Path) -> str:
    """Short name of a checkpoint for tables and figures.

    It is the name of the folder (with @ema or @masked), of the model in timm or torchvision, or of
    the module or file and its factory. A chosen image size is part of it; other options are not.
    """
    found = parse(str(spec))
    if found.kind in ("timm", "torchvision"):
        name = found.text.partition(":")[2]
        for key in _OPTIONS:
            name = name.partition(f"@{key}=")[0]
    elif found.kind in ("module", "python"):
        last = found.name.rpartition(".")[2] if found.kind == "module" else Path(found.name).stem
        name = f"{last}.{found.factory}"
    else:
        name = Path(found.name).resolve().name + found.version
    if found.size is None:
        return name
    rows, columns = found.size
    return f"{name}@size={rows}" if rows == columns else f"{name}@size={rows}x{columns}"


def versions(spec: str | Path) -> list[str]:
    """The spec, and after it ``FOLDER@ema`` if it is a folder with averaged weights beside the raw
    ones."""
    found = parse(str(spec))
    path = Path(found.name)
    plain = found.kind == "path" and not found.version and path.is_dir()
    if not plain or not (path / EMA).is_file():
        return [found.text]
    options = found.text[len(found.name) :] if found.text.startswith(found.name) else ""
    return [found.text, f"{found.name.rstrip('/')}{AVERAGED}{options}"]


def location(spec: str) -> str:
    """The spec with an absolute path: the same for every spelling of one path."""
    found = parse(spec)
    if found.kind in ("timm", "torchvision", "module"):
        return spec
    return spec.replace(found.name, str(Path(found.name).resolve()), 1)


def _split(text: str) -> tuple[str, str]:
    """The path, and "@ema", "@masked" or "" after it; a path that exists is taken whole."""
    for version in (AVERAGED, MASKED):
        if text.endswith(version) and not Path(text).exists():
            return text.removesuffix(version), version
    return text, ""


def _pair(text: str, key: str, value: str) -> tuple[int, int]:
    """Rows and columns of the text N or ROWSxCOLUMNS."""
    numbers = value.split("x")
    if len(numbers) > 2 or not all(each.isdecimal() and int(each) for each in numbers):
        unit = "pixels" if key == "size" else "patches"
        raise CheckpointError(f"{text}: @{key}= is N or ROWSxCOLUMNS in {unit}, got {value!r}")
    return int(numbers[0]), int(numbers[-1])
