"""Lists the data sets."""

from __future__ import annotations

from bvit_interp.cli.options.data import Listing
from bvit_interp.data import catalog


def run(listing: Listing) -> None:
    """Print a line per data set."""
    for row in catalog.listing():
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
