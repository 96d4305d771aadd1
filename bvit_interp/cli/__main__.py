"""`python -m bvit_interp.cli WORD ...`, as torchrun wants it."""

import sys

from bvit_interp.cli import main

sys.exit(main())
