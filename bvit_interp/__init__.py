"""Follow heads and neurons through the steps of a recurrent Vision Transformer.

The names below are loaded on first use. The models are registered with timm when
`bvit_interp.models` is first imported, so by any of them.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
