"""What does a model cost: parameters, FLOPs, and time on this machine?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the cost; those of reading images have no effect, but for `batch_size`, of the
    throughput."""

    runs: int = 100
    """Timed forward passes of one image, a model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and pixels while timed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs < 1:
            raise UserError(f"runs must be >= 1, got {self.runs}")


COLUMNS = {
    "model": "checkpoint",
    "parameters": "number of parameters; what several steps share counts once",
    "backbone": "of these, outside the head: what the paper counts as trained in fine-tuning",
    "embedding": "of these, in patch embedding, positions and the tokens beside the patches",
    "blocks": "in the blocks, with time embeddings",
    "norm": "in the norms outside the blocks",
    "head": "in the classifiers",
    "steps": "applications of a block",
    "gflops": "10^9 FLOPs of an image, without QK^T and AV as in the paper; none where not known",
    "gflops_attention": "the same with QK^T and AV",
    "latency_ms": "median time of a forward pass of one image, ms",
    "latency_low": "lower quartile of it",
    "latency_high": "upper quartile of it",
    "latency_ratio": "median over turns of the time by the first model's in the same turn",
    "throughput": "images a second in batches: the median of three",
    "peak_memory": "GPU memory of weights and of a batch's activations, GB; none on a CPU",
    "runs": "timed forward passes of one image",
    "batch_size": "images in a batch",
    "image_size": "height x width of the input, pixels",
    "device": "where it ran",
    "threads": "CPU threads of torch",
    "dtype": "type of weights and pixels",
}


__getattr__, __dir__, __all__ = attach(__name__)
