"""Reading a command's options from its arguments."""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import copy
from dataclasses import dataclass, fields, make_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from bvit_interp.cli import ranges
from bvit_interp.errors import UserError, choices

_WIDE = "2000"  # columns: tyro wraps no line of an error


def parse(
    word: str, text: str, options: Mapping[str, type], arguments: Sequence[str]
) -> dict[str, Any]:
    """An instance of each group of options.

    Parameters
    ----------
    word : the command.
    text : what ``--help`` prints above the options.
    options : name of a group -> its dataclass.
    arguments : what follows the command. A list option that is given several times is gathered.

    Raises
    ------
    UserError
        For options that are unknown or missing, or values that are refused.
    SystemExit
        After ``--help``.
    """
    groups = [(name, _introduced(group, text)) for name, group in options.items()]
    together = make_dataclass("Options", groups, frozen=True)
    given = list(arguments)
    for flag in _list_flags(options):
        given = gathered(given, flag)
    asked = any(argument in ("-h", "--help") for argument in given)
    printed, shown = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(shown), _columns(None if asked else _WIDE):
            parsed: Any = tyro.cli(
                together,
                args=given,
                prog=f"bvit-interp {word}",
                description=" ",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stopped:
        if not stopped.code:
            usage, _, help_of_options = shown.getvalue().partition("\n\n")
            # tyro would join the lines of a description
            print(f"{usage}\n\n{_wrapped(text)}\n\n{help_of_options.lstrip()}", end="")
            raise
        raise _refusal(stopped, printed.getvalue(), word, options) from None
    groups_given = {name: group(**vars(getattr(parsed, name))) for name, group in options.items()}
    ranges.check(groups_given)
    return groups_given


def gathered(given: list[str], flag: str) -> list[str]:
    """`--ckpt A --ckpt B` as `--ckpt A B`; otherwise the last flag would replace the others."""
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


def _introduced(group: type, text: str) -> Any:
    """A group of options, without its docstring if that stands above the options already."""
    help_of_group = "" if _wrapped(group.__doc__ or "") == _wrapped(text) else group.__doc__
    return Annotated[_unchecked(group), tyro.conf.arg(help=help_of_group)]


def _unchecked(group: type) -> type:
    """A group whose defaults tyro takes as they are.

    mypy has checked them; to check a tuple or a union, tyro would import typeguard, a third of the
    time of ``--help``.
    """
    kinds = get_type_hints(group, include_extras=True)
    read = [(option.name, _read_as(kinds[option.name]), copy(option)) for option in fields(group)]
    return make_dataclass(group.__name__, read, bases=(group,), frozen=True, kw_only=True)


def _read_as(kind: Any) -> Any:
    """A type whose values are read as those of another, which tyro does not check."""
    if get_origin(_plain(kind)) is None:
        return kind
    known = tyro.constructors.PrimitiveTypeInfo.make(_plain(kind), set())
    spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(known)
    return Annotated[(object, spec, *getattr(kind, "__metadata__", ()))]


def _wrapped(text: str, width: int = 80) -> str:
    """Paragraphs, as wide as tyro's boxes."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(part, width, break_on_hyphens=False) for part in paragraphs)


def _flags(options: Mapping[str, type]) -> dict[str, Any]:
    """Flag of each option -> its type, without what is given by position."""
    return {
        f"--{name.replace('_', '-')}": _plain(kind)
        for group in options.values()
        for name, kind in get_type_hints(group, include_extras=True).items()
        if name in {field.name for field in fields(group)}
        and tyro.conf.Positional not in getattr(kind, "__metadata__", ())
    }


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _list_flags(options: Mapping[str, type]) -> list[str]:
    return [flag for flag, kind in _flags(options).items() if _is_list(kind)]


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple or any(get_origin(part) is tuple for part in get_args(kind))


@contextmanager
def _columns(width: str | None) -> Iterator[None]:
    """The width of the terminal, for a moment; None leaves it."""
    before = os.environ.get("COLUMNS")
    if width is not None:
        os.environ["COLUMNS"] = width
    try:
        yield
    finally:
        if width is not None:
            os.environ.pop("COLUMNS")
            if before is not None:
                os.environ["COLUMNS"] = before


def _refusal(
    stopped: SystemExit, printed: str, word: str, options: Mapping[str, type]
) -> UserError:
    """Why the options were refused: the error of a dataclass, or tyro's in one line."""
    cause = stopped.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    if cause is not None:
        return cause
    return UserError(f"{word}: {_usage(_Box.of(printed), word, options)}")


@dataclass(frozen=True)
class _Box:
    """An error as tyro prints it: a title, what was wrong, and help of the argument."""

    title: str
    lines: list[str]
    help: list[str]

    @property
    def message(self) -> str:
        """What was wrong, in one line."""
        return " ".join(" ".join(self.lines).split())

    @classmethod
    def of(cls, printed: str) -> _Box:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
        first, *rest = plain.strip().splitlines() or [""]
        parts: list[list[str]] = [[]]
        for line in rest:
            text = line.strip("│|+ ")
            if text and not text.strip("─-╰╯"):
                parts.append([])
            else:
                parts[-1].append(text)
        # without UTF-8 a line stands below the title too
        message, *more = [part for part in parts if any(part)] or [[]]
        lines = [line for part in more for line in part]
        return cls(first.strip("╭╮─+- "), message, lines)


def _usage(box: _Box, word: str, options: Mapping[str, type]) -> str:
    """What was wrong and what would be right."""
    if match := re.match(r"Unrecognized options: (.*)", box.message):
        known = choices(sorted(_flags(options)), 60)
        likely = [hint[1] for line in box.help if (hint := re.match(r"(--[\w-]+)", line))]
        meant = f", did you mean {choices(dict.fromkeys(likely), 3)}?" if likely else ""
        given = match[1].replace(", ", " ")
        return f"no option {given}{meant or ';'} options: {known}"
    if match := re.match(r"invalid choice '(.*)' for argument '(.*)'\. .* \((.*)\)", box.message):
        value, flag, allowed = match.groups()
        return f"{flag} takes {allowed.replace(chr(39), '').strip(',')}; got {value!r}"
    if box.message.startswith("Missing from "):
        # each name stands on a line, its text below
        names = [match[1] for line in box.lines if (match := re.match(r"(--\S+|[A-Z]+$)", line))]
        return f"missing {' and '.join(names)}; bvit-interp {word} --help describes the options"
    if match := re.match(r"Missing value for argument '(.*)'\.", box.message):
        return f"{match[1]} needs a value"
    if match := re.match(r"Error parsing (\S+): (.*)", box.message):
        return _wrong_type(match[1], match[2], box.help)
    return f"{box.title}: {box.message}"


def _wrong_type(flag: str, reason: str, lines: list[str]) -> str:
    """A value of another type than the option's."""
    value = re.search(r"\['(.*?)'\]", reason) or re.search(r"'([^']*)'", reason)
    kinds = [line.removeprefix(f"{flag} ") for line in lines if line.startswith(f"{flag} ")]
    if not value or not kinds:
        return f"{flag}: {reason}"
    kind = re.sub(r"\[?(\w+) \[\w+ \.\.\.\]\]?", r"\1 ...", kinds[0].replace("{None}|", ""))
    said = value[1].replace("', '", " ")
    return f"{flag} takes {re.sub('[{}]', '', kind).replace('|', ' or ')}; got {said!r}"
