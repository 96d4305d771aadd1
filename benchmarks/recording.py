"""Cost of recording: time relative to the plain forward, and memory kept; also of other tools.

    python benchmarks/recording.py [--sizes 224 448] [--batch 4] [--rounds 7]
        [--device cpu] [--out FILE]
    python benchmarks/recording.py --device cuda        224 px, batch 256, bf16

Every round times each way once, in a new random order, so that drift affects all ways equally.
Ratios are medians over rounds of paired times. "Kept" is the memory per image that the result still
holds after the forward pass.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timing
import timm
import torch

from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.probes.saliency import attention
from bvit_interp.vocabulary import SITES

Way = Callable[[torch.Tensor], Any]
PLAIN, OTHER = "plain forward", "TransformerLens plain forward (another model)"
BESIDE, GOAL = "bvit_interp: CLS attention beside the logits", 1.05


def ways(size: int, device: str) -> dict[str, Way]:
    """The ways that are timed: name -> function of images."""
    torch.manual_seed(0)
    model = (
        timm.create_model("bvit_base_patch16_224", img_size=size)
        .to(device, timing.dtype_of(device))
        .eval()
    )
    probe = Probe(model, max_bytes=2**36)
    found: dict[str, Way] = {
        PLAIN: lambda x: (model(x), None)[1],
        BESIDE: lambda x: probe.run(x, "pattern", tokens="cls")[1]["pattern"],
        "bvit_interp: pointing game (maps alone)": lambda x: attention(probe, x),
        "bvit_interp: full patterns": lambda x: probe.run(x, "pattern")[1]["pattern"],
        "bvit_interp: every site": lambda x: [*probe.run(x, list(SITES))[1]._tensors.values()],
    }
    return found | _attention_extract(model) | _transformer_lens(size, device)


def _attention_extract(model: Any) -> dict[str, Way]:
    from timm.utils import AttentionExtract

    view = unroll(model)
    for block in view.blocks:  # with fused attention it finds no attention, or fails
        block.attn.fused_attn = False
    extract = AttentionExtract(view, method="hook")
    return {"timm AttentionExtract on the unroll": lambda x: [*extract(x).values()]}


def _transformer_lens(size: int, device: str) -> dict[str, Way]:
    """A random HookedTransformer of the same size, because TransformerLens cannot load the ViT."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return {}
    tokens = (size // 16) ** 2 + 1
    config = HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_ctx=tokens,
        d_head=64,
        n_heads=12,
        d_mlp=3072,
        act_fn="gelu",
        d_vocab=1000,
        attention_dir="bidirectional",
        device=device,
        dtype=timing.dtype_of(device),
    )
    model = HookedTransformer(config).eval()

    def ids(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), tokens, dtype=torch.long, device=device)

    return {
        OTHER: lambda x: (model(ids(x)), None)[1],
        "TransformerLens patterns": lambda x: [
            *model.run_with_cache(ids(x), names_filter=lambda name: "pattern" in name)[1].values()
        ],
        "TransformerLens everything": lambda x: [*model.run_with_cache(ids(x))[1].values()],
    }


def kept_bytes(result: Any) -> int:
    """Bytes of all distinct storages of a result."""
    tensors = result if isinstance(result, list) else [] if result is None else [result]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def measure(size: int, batch: int, rounds: int, device: str) -> list[str]:
    """Rows of the table at one image size, and whether the goal was met."""
    images = torch.randn(batch, 3, size, size, device=device, dtype=timing.dtype_of(device))
    kept, able, notes = {}, {}, []
    with torch.inference_mode():
        # one by one, because some may need too much memory
        for name, way in ways(size, device).items():
            try:
                kept[name] = kept_bytes(way(images)) / batch
                able[name] = partial(way, images)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                notes.append(f"{name}: out of memory at {size} px, batch {batch}")
        times = timing.paired(able, rounds, device, warm=2 if timing.is_cuda(device) else 0)
    rows = []
    for name, own in times.items():
        ratio = timing.ratio(own, times[OTHER if name.startswith("Trans") else PLAIN])
        each = 1e3 * statistics.median(own) / batch
        rows.append(
            f"| {size} | {name} | {each:.{0 if each > 10 else 3}f} | {ratio:.2f} |"
            f" {kept[name] / 1e6:.2f} |"
        )
    goal = timing.verdict(
        f"CLS rows beside the logits, {size} px",
        timing.ratio(times[BESIDE], times[PLAIN]),
        GOAL,
        at_most=True,
    )
    return [*rows, "", goal, *notes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="image sizes, px (224 448; on a GPU 224)"
    )
    parser.add_argument("--batch", type=int, help="images per call (4; on a GPU 256)")
    parser.add_argument("--rounds", type=int, help="rounds (7; on a GPU 15)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    sizes, batch, rounds = (
        ([224], 256, 15) if timing.is_cuda(options.device) else ([224, 448], 4, 7)
    )
    sizes, batch, rounds = options.sizes or sizes, options.batch or batch, options.rounds or rounds
    precision = str(timing.dtype_of(options.device)).removeprefix("torch.")
    lines = [
        f"{timing.machine(options.device)}; {precision}, batch {batch}, median of {rounds} rounds"
    ]
    for size in sizes:
        lines += [
            "",
            "| px | way | ms per image | time / plain forward | MB kept per image |",
            "|---|---|---|---|---|",
        ]
        lines += measure(size, batch, rounds, options.device)
    timing.report(lines, options.out)


if __name__ == "__main__":
    main()
