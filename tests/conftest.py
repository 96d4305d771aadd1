"""Fixtures for all tests: tiny models made by seed, images, and a reference written without the
package.

A fixture's model must come back without hooks; `no_hook_left_behind` asserts it after every test.
"""

from __future__ import annotations

import os

os.environ["MPLBACKEND"] = "Agg"  # before any test imports matplotlib

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from hypothesis import find
from hypothesis import strategies as st
from jaxtyping import install_import_hook
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent))
from typechecking import modules

install_import_hook(modules(), "typechecking.checked")  # before any test imports the package

import bvit_interp.models  # noqa: E402, F401  (registers the models with timm)

torch.set_num_threads(1)
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "num_classes": 10}
Change = Callable[[torch.Tensor], torch.Tensor]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture(scope="session", autouse=True)
def tables_of_unicode() -> None:
    """hypothesis builds them when the first text is drawn: before a test is timed."""
    find(st.text(min_size=1), bool)


def hooks_on(model: nn.Module) -> list[str]:
    """Where hooks are registered in a model: module.kind, and parameters with gradient hooks."""
    on_modules = [
        f"{name}.{kind}" for name, m in model.named_modules() for kind in HOOKS if getattr(m, kind)
    ]
    on_tensors = [name for name, p in model.named_parameters() if p._backward_hooks]
    return on_modules + on_tensors


def make_model(seed: int = 0, name: str = "bvit_small_patch16_224", **kwargs: Any) -> nn.Module:
    """A tiny model in eval mode whose every parameter is random, so that nothing is equal by being
    zero."""
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(name, **{**SIZE, **kwargs}).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in parameter_name else 0.15 * noise)
    return model


@pytest.fixture
def watched_models() -> list[nn.Module]:
    """The models that must be free of hooks when the test ends; a test may append its own."""
    return []


@pytest.fixture(autouse=True)
def no_hook_left_behind(watched_models: list[nn.Module]) -> Iterator[None]:
    yield
    left = [where for model in watched_models for where in hooks_on(model)]
    assert not left, f"hooks left behind: {left}"


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def make(watched_models: list[nn.Module]) -> Callable[..., nn.Module]:
    """``make(name=..., seed=..., **timm_arguments)``: a tiny watched model in eval mode."""

    def make_watched(**kwargs: Any) -> nn.Module:
        watched_models.append(make_model(**kwargs))
        return watched_models[-1]

    return make_watched


@pytest.fixture
def tiny(make: Callable[..., nn.Module]) -> nn.Module:
    """bViT: one block, 12 steps, width 32, 4 heads, 17 tokens, 10 classes."""
    return make()


@pytest.fixture
def tiny_te(make: Callable[..., nn.Module]) -> nn.Module:
    """The same with a random time embedding."""
    return make(name="bvit_small_te_patch16_224")


@pytest.fixture
def tiny_reg4(make: Callable[..., nn.Module]) -> nn.Module:
    """The same with four registers."""
    return make(name="bvit_small_reg4_patch16_224")


@pytest.fixture
def tiny_hybrid(make: Callable[..., nn.Module]) -> nn.Module:
    """Two blocks cycled for three rounds: 6 steps."""
    return make(num_blocks=2, num_steps=3)


@pytest.fixture
def tiny_fl(make: Callable[..., nn.Module]) -> nn.Module:
    """Fast latent of two inner updates, with a random time embedding: 4 steps, 12 applications."""
    return make(name="bvit_small_fl_patch16_224", num_steps=4, inner_updates=2, step_embed=True)


@pytest.fixture
def tiny_sc(make: Callable[..., nn.Module]) -> nn.Module:
    """Skip memory that keeps the state every second step: 5 steps."""
    return make(name="bvit_small_sc_patch16_224", num_steps=5, interval=2)


@pytest.fixture
def tiny_sc_block(make: Callable[..., nn.Module]) -> nn.Module:
    """Skip memory updated by the block at steps 1 and 4 of 5, with a random time embedding."""
    return make(
        name="bvit_small_sc_patch16_224", memory="block", num_steps=5, interval=3, step_embed=True
    )


@pytest.fixture
def tiny_distilled(make: Callable[..., nn.Module]) -> nn.Module:
    """bViT with a distillation token, its head and two registers: 20 tokens, 6 steps."""
    return make(name="bvit_small_distilled_patch16_224", num_steps=6, reg_tokens=2)


@pytest.fixture
def stacked(make: Callable[..., nn.Module]) -> nn.Module:
    """A timm VisionTransformer of three blocks with LayerNorm."""
    return make(name="vit_tiny_patch16_224", depth=3)


MODELS = [
    "tiny",
    "tiny_te",
    "tiny_reg4",
    "tiny_hybrid",
    "tiny_fl",
    "tiny_sc",
    "tiny_sc_block",
    "tiny_distilled",
]


@pytest.fixture(params=[*MODELS, "stacked"])
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    """Each of the nine models in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def images() -> torch.Tensor:
    """Four random images, ``(4, 3, 32, 32)``."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def real() -> Callable[[str], Path]:
    """``real(name)``: the folder of a real data set, or the test is skipped."""

    def find(name: str) -> Path:
        beside = Path(__file__).resolve().parents[2] / "shared" / "data"
        root = Path(os.environ.get("BVIT_TEST_DATA") or beside)
        if not (root / name).is_dir():
            pytest.skip(f"no {root / name}; set BVIT_TEST_DATA to a folder with it")
        return root / name

    return find


@pytest.fixture
def by_hand() -> SimpleNamespace:
    """The reference: `tokens`, `block`, `run` and `logits` written out in elementary operations."""
    return SimpleNamespace(
        tokens=tokens_by_hand, block=block_by_hand, run=run_by_hand, logits=logits_by_hand
    )


def norm_by_hand(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last axis."""
    if getattr(norm, "bias", None) is None:
        return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        + norm.bias
    )


def block_by_hand(
    block: nn.Module, x: torch.Tensor, change: Change | None = None
) -> dict[str, torch.Tensor]:
    """One pre-norm block on tokens ``(B, N, D)``, every site of it; `change` replaces its
    neurons."""
    batch, tokens, width = x.shape
    heads = block.attn.num_heads
    qkv = norm_by_hand(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = (
        part.reshape(batch, tokens, heads, -1).transpose(1, 2) for part in qkv.split(width, dim=-1)
    )
    exponentials = (q @ k.transpose(-2, -1) / (width // heads) ** 0.5).exp()
    pattern = exponentials / exponentials.sum(-1, keepdim=True)
    z = (pattern @ v).transpose(1, 2).reshape(batch, tokens, width)
    resid_mid = x + z @ block.attn.proj.weight.T + block.attn.proj.bias
    mlp_pre = norm_by_hand(resid_mid, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    mlp_post = mlp_pre * 0.5 * (1 + torch.erf(mlp_pre / 2**0.5))
    mlp_post = mlp_post if change is None else change(mlp_post)
    resid_post = resid_mid + mlp_post @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return {
        "resid_pre": x,
        "pattern": pattern,
        "resid_mid": resid_mid,
        "mlp_pre": mlp_pre,
        "mlp_post": mlp_post,
        "resid_post": resid_post,
    }


def tokens_by_hand(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """z_0: CLS and a distillation token with their positions, registers without, then patches with
    theirs."""
    kernel, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    size = kernel.shape[-1]
    cut = F.unfold(images, size, stride=size).transpose(1, 2)  # (B, N, C * p * p)
    prefix = (
        [model.cls_token, model.dist_token] if hasattr(model, "dist_token") else [model.cls_token]
    )
    patches = cut @ kernel.flatten(1).T + bias + model.pos_embed[:, len(prefix) :]
    prefix = [token + model.pos_embed[:, i : i + 1] for i, token in enumerate(prefix)]
    prefix += [] if model.reg_token is None else [model.reg_token]
    return torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)


def run_by_hand(
    model: nn.Module,
    images: torch.Tensor,
    blocks: list[nn.Module],
    step_embed: torch.Tensor | None = None,
    changes: dict[int, Change] | None = None,
    states: dict[int, torch.Tensor] | None = None,
) -> list[dict[str, Any]]:
    """The sites of every step; entry 0 holds z_0 as "resid_post".

    `blocks` names the block of each step, `changes` the steps (from 1) whose neurons are replaced,
    `states` the z_t that are replaced on their way into the next step. With a memory, "resid_pre"
    is what the block reads and "inner" holds the sites of the inner updates.
    """
    sites: list[dict[str, Any]] = [{"resid_post": tokens_by_hand(model, images)}]
    plan, memory = getattr(blocks[0], "memory", None), torch.zeros(())
    for t, block in enumerate(blocks, start=1):
        z, change = (states or {}).get(t - 1, sites[-1]["resid_post"]), (changes or {}).get(t)
        embed = torch.zeros(()) if step_embed is None else step_embed[min(t, len(step_embed)) - 1]
        inner = []
        if plan is None:
            sites.append(block_by_hand(block, z, change))
            sites[-1]["resid_post"] = sites[-1]["resid_post"] + embed
        else:
            if plan.kind == "latent":
                for _ in range(plan.inner_updates):
                    inner.append(block_by_hand(block, memory + z + embed))
                    memory = inner[-1]["resid_post"]
            elif (t - 1) % plan.interval == 0:
                if plan.kind == "block":
                    inner.append(block_by_hand(block, memory + z))
                memory = inner[-1]["resid_post"] if inner else z
            sites.append(block_by_hand(block, z + memory + embed, change))
        sites[-1]["inner"] = inner
    return sites


def logits_by_hand(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Head on the normalised CLS row (eq. 5); of a distilled model the mean of both heads."""
    logits = norm_by_hand(z[:, 0], model.norm) @ model.head.weight.T + model.head.bias
    if not hasattr(model, "head_dist"):
        return logits
    return (
        logits + norm_by_hand(z[:, 1], model.norm) @ model.head_dist.weight.T + model.head_dist.bias
    ) / 2
