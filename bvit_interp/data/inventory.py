"""What a data set holds, and what was left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Any

from bvit_interp.data.files import escaped, say
from bvit_interp.data.samples import Samples
from bvit_interp.errors import choices


class Notes(list[str]):
    """Lines on what was done with a data set's files; each is said on stderr, once."""

    def add(self, line: str) -> None:
        """Keep a line and say it."""
        self.append(line)
        say(line)

    def left_out(self, names: Sequence[str], where: object, why: str) -> None:
        """Keep and say how many files of a folder are not used and why, with some names."""
        if names:
            some = choices(map(escaped, names), 3)
            self.add(f"{escaped(where)}: left out {count(names, 'file')} ({why}): {some}")


def about(samples: Samples) -> dict[str, Any]:
    """Numbers of images and classes, images per class where the labels are known, and the notes."""
    told: dict[str, Any] = {"images": len(samples), "classes": len(samples.classes)}
    labels = getattr(samples, "labels", None)
    if labels is None and (files := getattr(samples, "files", None)) is not None:
        labels = [label for label, _ in files]
    if labels is not None:
        per_class = [0] * len(samples.classes)
        for label in labels:
            per_class[int(label)] += 1
        told["images_per_class"] = {"least": min(per_class), "most": max(per_class)}
    return told | {"notes": list(getattr(samples, "notes", ()))}


def count(things: Sized, what: str) -> str:
    """A number of things: "1 file", "2 files"."""
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def unique(names: Iterable[str]) -> str | None:
    """The first name that comes twice, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
