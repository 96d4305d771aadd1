"""bvit_interp: follow heads and neurons through the steps of a recurrent Vision Transformer.

Importing the package registers its models with timm.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The command line loads torch only when a command needs it, so that its help answers at once.
if Path(sys.argv[0]).name != "bvit-interp":
    from bvit_interp.models.bvit import BViT
    from bvit_interp.models.checkpoint import load, save
    from bvit_interp.models.unroll import unroll
    from bvit_interp.probes.probe import Probe

    __all__ = ["BViT", "Probe", "load", "save", "unroll"]
