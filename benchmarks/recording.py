"""What recording costs: time against the plain forward and memory kept alive, beside the peers installed.

    python benchmarks/recording.py [--sizes 224 448] [--batch 4] [--rounds 7] [--device cpu] [--out FILE]

Every round times each way once, in a new random order, so that drift hits all alike; ratios are medians over
rounds of paired times. "Kept" is what the result holds alive per image when the forward is over.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.probes.saliency import attention
from bvit_interp.vocabulary import SITES

Way = Callable[[torch.Tensor], Any]


def ways(size: int, device: str) -> dict[str, Way]:
    """What is timed: name -> function of images."""
    torch.manual_seed(0)
    model = timm.create_model("bvit_base_patch16_224", img_size=size).to(device).eval()
    probe = Probe(model, max_bytes=2**36)
    found: dict[str, Way] = {
        "plain forward": lambda x: (model(x), None)[1],
        "bvit_interp: CLS attention beside the logits": lambda x: probe.run(x, "pattern", tokens="cls")[1]["pattern"],
        "bvit_interp: pointing game (maps alone)": lambda x: attention(probe, x),
        "bvit_interp: full patterns": lambda x: probe.run(x, "pattern")[1]["pattern"],
        "bvit_interp: every site": lambda x: [*probe.run(x, list(SITES))[1]._tensors.values()],
    }
    return found | _attention_extract(model) | _transformer_lens(size, device)


def _attention_extract(model: Any) -> dict[str, Way]:
    from timm.utils import AttentionExtract

    view = unroll(model)
    for block in view.blocks:  # with fused attention it finds nothing, or fails
        block.attn.fused_attn = False
    extract = AttentionExtract(view, method="hook")
    return {"timm AttentionExtract on the unroll": lambda x: [*extract(x).values()]}


def _transformer_lens(size: int, device: str) -> dict[str, Way]:
    """TransformerLens has no ViT loader: a random HookedTransformer of the same width, depth and tokens."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return {}
    tokens = (size // 16) ** 2 + 1
    config = HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=tokens, d_head=64, n_heads=12, d_mlp=3072, act_fn="gelu", d_vocab=1000,
        attention_dir="bidirectional", device=device,
    )  # fmt: skip
    model = HookedTransformer(config).eval()

    def ids(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), tokens, dtype=torch.long, device=device)

    return {
        "TransformerLens plain forward (another model)": lambda x: (model(ids(x)), None)[1],
        "TransformerLens patterns": lambda x: [
            *model.run_with_cache(ids(x), names_filter=lambda name: "pattern" in name)[1].values()
        ],
        "TransformerLens everything": lambda x: [*model.run_with_cache(ids(x))[1].values()],
    }


def kept_bytes(result: Any) -> int:
    """Bytes of the distinct storages a result holds."""
    tensors = result if isinstance(result, list) else [] if result is None else [result]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(size: int, batch: int, rounds: int, device: str) -> list[str]:
    """Rows of the table at one image size."""
    images = torch.randn(batch, 3, size, size, device=device)
    timed = ways(size, device)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    kept = {}
    with torch.inference_mode():
        for name, way in timed.items():  # warm up
            kept[name] = kept_bytes(way(images)) / batch
        for _ in range(rounds):
            for name in random.sample(list(timed), len(timed)):
                began = time.perf_counter()
                timed[name](images)
                if device != "cpu":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, times in seconds.items():
        base = "TransformerLens plain forward (another model)" if name.startswith("Trans") else "plain forward"
        ratio = statistics.median(t / b for t, b in zip(times, seconds[base], strict=True))
        rows.append(
            f"| {size} | {name} | {1e3 * statistics.median(times) / batch:.0f} | {ratio:.2f} | {kept[name] / 1e6:.2f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], help="image sizes, px")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    lines = ["| px | way | ms an image | time / plain forward | MB kept an image |", "|---|---|---|---|---|"]
    for size in options.sizes:
        lines += measure(size, options.batch, options.rounds, options.device)
        print("\n".join(lines if size == options.sizes[0] else lines[-len(lines) // 2 :]))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
