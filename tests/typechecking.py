"""The type checker of the test run: every call into the package is checked against its types."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int passes as a float
