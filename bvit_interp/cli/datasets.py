"""The word `data`: list the data sets, or write one as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from bvit_interp.cli.options import parse
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataExport:
    """Write a data set with masks in ImageNet-S layout."""

    samples: tyro.conf.Positional[str]
    """Data set, as --data elsewhere."""
    out: tyro.conf.Positional[Path]
    """Folder to write, new or empty."""
    split: str | None = None
    """Its split; by default the one to evaluate on."""
    limit: int | None = None
    """Write this many images, spread evenly over the data set."""


@dataclass(frozen=True, kw_only=True)
class DataList:
    """List the data sets there are and where each is looked for."""


def data(given: list[str]) -> None:
    """`bvit-interp data list` and `bvit-interp data export`."""
    words = {"list": DataList, "export": DataExport}
    if not given or given[0] not in words:
        if given and given[0] in ("-h", "--help"):
            print(
                "\n".join(
                    f"  bvit-interp data {word:<8} {options.__doc__}"
                    for word, options in words.items()
                )
            )
            return
        raise UserError("data takes list or export: bvit-interp data list")
    options = parse(words[given[0]], f"data {given[0]}", given[1:])
    from bvit_interp.data import catalog

    if isinstance(options, DataList):
        for row in catalog.listing():
            print("  ".join(f"{key}: {value}" for key, value in row.items()))
        return
    written = catalog.export(
        catalog.open_samples(options.samples, options.split), options.out, options.limit
    )
    print(f"wrote {written} images and masks to {options.out}")
