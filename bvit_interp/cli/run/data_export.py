"""Writes a data set with masks as files."""

from __future__ import annotations

from bvit_interp.cli.options.data import Export
from bvit_interp.data import catalog


def run(export: Export) -> None:
    """Write the images and masks."""
    samples = catalog.open_samples(export.samples, export.split)
    written = catalog.export(samples, export.out, export.limit)
    print(f"wrote {written} images and masks to {export.out}")
