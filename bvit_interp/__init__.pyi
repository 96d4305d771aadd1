from .models.bvit import BViT as BViT
from .models.checkpoint import load as load
from .models.checkpoint import save as save
from .models.families import register_block as register_block
from .models.from_timm import from_timm as from_timm
from .models.unroll import unroll as unroll
from .probes.probe import Probe as Probe

__version__: str
