"""What does a model cost: parameters, FLOPs, and time on this machine?

Parameters and FLOPs are counted from shapes and are exact. Times are measured on random pixels; the
models take turns, so that a machine that slows down slows all of them alike. No image is read.
There is no null: the counts are exact, and quartiles show how much a time varies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `cost`. No image is read: of the options for images only `batch_size` has an
    effect, on the throughput."""

    runs: int = 100
    """Number of timed forward passes of one image per model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and pixels while timed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs < 1:
            raise UserError(f"runs must be >= 1, got {self.runs}")


COLUMNS = {
    "model": "checkpoint",
    "parameters": "number of parameters; those that several steps share count once",
    "backbone": "number of parameters outside the head: the paper's count for fine-tuning",
    "embedding": "number of parameters of the patch embedding, positions and prefix tokens",
    "blocks": "number of parameters of the blocks, with time embeddings",
    "norm": "number of parameters of the norms outside the blocks",
    "head": "number of parameters of the classifiers",
    "steps": "number of applications of a block",
    "gflops": "10^9 FLOPs per image, without QK^T and AV as in the paper; empty where not known",
    "gflops_attention": "10^9 FLOPs per image including QK^T and AV",
    "latency_ms": "median time of a forward pass of one image, ms",
    "latency_low": "lower quartile of that time, ms",
    "latency_high": "upper quartile of that time, ms",
    "latency_ratio": "median over turns of the time relative to the first model's in the same turn",
    "throughput": "images per second in batches; median of three batches",
    "peak_memory": "GPU memory of the weights and of a batch's activations, GB; empty on a CPU",
    "runs": "number of timed forward passes of one image",
    "batch_size": "images per batch",
    "image_size": "height x width of the input, pixels",
    "device": "device of the model",
    "threads": "number of CPU threads of torch",
    "dtype": "data type of weights and pixels",
}
QUICK: dict[str, Any] = {"runs": 2}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
