"""Models: the recurrent model, its tied unroll, checkpoints and cost.

Importing anything from here registers the models with timm.
"""

from bvit_interp.models import bvit as bvit
