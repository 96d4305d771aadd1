"""Writes the page of a folder of results."""

from __future__ import annotations

from bvit_interp.cli.options.report import Report
from bvit_interp.report import page


def run(report: Report) -> None:
    """Write the page."""
    print(f"wrote {page.write(report.folder, report.out)}")
