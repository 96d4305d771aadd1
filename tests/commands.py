"""One of one or two processes that run commands in order: `RANK=0 python commands.py [[PORT, [WORD,
...]], ...]`."""

from __future__ import annotations

import json
import os
import sys

from bvit_interp.cli import main

for port, command in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)  # a process group of its own for every command
    if code := main(command):
        sys.exit(code)
