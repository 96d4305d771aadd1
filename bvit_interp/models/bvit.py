"""bViT: a Vision Transformer whose blocks are applied again and again.

`BViT` is timm's `VisionTransformer` with `num_blocks` distinct blocks applied in turn for
`num_steps` rounds. One block for twelve rounds is bViT-B, twelve blocks for one round are the
matched ViT-B, and 2 x 6, 3 x 4, ... are the hybrids between them.

bViT: "Investigating single-block recurrence in Vision Transformers",
https://arxiv.org/abs/2605.10661: section 3 (eq. 1-6 are the model, eq. 9 is the time embedding),
section 4 (registers), appendix C (distillation) and appendix D (memory). The paper does not give
the order of a hybrid's blocks. Here they cycle (B1 B2 B1 B2 ...); `order="repeat"` gives B1 B1 ...
B2 B2. The model is built on `timm.models.vision_transformer` and keeps its names of modules and
state-dict keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import PatchDropout, RmsNorm, resample_abs_pos_embed
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models import vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from bvit_interp.models.memory import (
    Gradient,
    Kind,
    Memory,
    MemoryBlock,
    MemorySteps,
    UnrolledSteps,
    calls_of,
)
from bvit_interp.models.steps import Order, Steps, TimedBlock


class BViT(VisionTransformer):
    """Vision Transformer of `num_blocks` blocks applied for `num_steps` rounds.

    Pre-norm blocks with RMSNorm (weight only), biases on qkv, proj, fc1 and fc2, exact GELU, no
    drop-path. The number of steps T is ``num_blocks * num_steps``, the applications of a block.

    Parameters
    ----------
    num_blocks : number of distinct blocks, >= 1.
    num_steps : number of rounds over the blocks, >= 1.
    order : "cycle" or "repeat", for hybrids.
    step_embed : add a learned e_t after every step (bViT-TE), or before the block in a model with a
        memory. It is initialised to zero (our choice).
    reg_tokens : number of registers between CLS and patches. They have no position and are dropped
        at read-out (bViT-R has 4).
    memory : None, or what is remembered beside the state: "latent" (bViT-fl), "state" or "block"
        (bViT-sc).
    inner_updates, interval, memory_gradient : options of the memory, see
        `bvit_interp.models.memory.Memory`.
    **kwargs : as in timm's `VisionTransformer` (img_size, patch_size, in_chans, num_classes,
        embed_dim, num_heads, dynamic_img_size, ...).

    References
    ----------
    arXiv 2605.10661, eq. 1-6 and 9, appendix D; parameter counts in its Tables 1-3.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    reg_token: nn.Parameter | None
    dist_token: nn.Parameter

    def __init__(
        self,
        *,
        num_blocks: int = 1,
        num_steps: int = 12,
        order: Order = "cycle",
        step_embed: bool = False,
        reg_tokens: int = 0,
        memory: Kind | None = None,
        inner_updates: int | None = None,
        interval: int | None = None,
        memory_gradient: Gradient | None = None,
        norm_layer: Callable[..., nn.Module] | str | None = None,
        **kwargs: Any,
    ) -> None:
        if num_blocks < 1 or num_steps < 1:
            raise ValueError(
                f"num_blocks and num_steps must be >= 1, got {num_blocks} and {num_steps}"
            )
        if order not in ("cycle", "repeat"):
            raise ValueError(f"order must be 'cycle' or 'repeat', got {order!r}")
        if "depth" in kwargs:
            raise ValueError("a BViT has no depth: give num_blocks and num_steps")
        block: Any = TimedBlock if step_embed else Block
        of_memory = (inner_updates, interval, memory_gradient)
        if memory is not None:
            block = partial(MemoryBlock, memory=Memory(memory, *of_memory))
        elif of_memory != (None, None, None):
            raise ValueError(
                "inner_updates, interval and memory_gradient belong to a memory: give memory too"
            )
        super().__init__(
            depth=num_blocks, norm_layer=norm_layer or RmsNorm, block_fn=block, **kwargs
        )
        if not self.has_class_token or self.no_embed_class or self.pos_embed is None:
            raise ValueError("a BViT has a CLS token with a position (eq. 1)")
        steps = num_blocks * num_steps
        like_cls: dict[str, Any] = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        table = nn.Parameter(torch.zeros(steps, self.embed_dim, **like_cls)) if step_embed else None
        container = Steps if memory is None else MemorySteps
        self.blocks = container(list(self.blocks), steps, order, num_steps, table)
        self.feature_info = [
            {**self.feature_info[0], "module": f"blocks.{i}"} for i in range(steps)
        ]
        # prefix tokens with a position: CLS, and a distillation token
        self.num_positioned = self.num_prefix_tokens
        if reg_tokens:  # timm would give registers a position, or take it from CLS
            registers = torch.empty(1, reg_tokens, self.embed_dim, **like_cls).normal_(std=1e-6)
            self.reg_token = nn.Parameter(registers)
            self.num_reg_tokens = reg_tokens
            self.num_prefix_tokens += reg_tokens
        if isinstance(self.patch_drop, PatchDropout):
            self.patch_drop.num_prefix_tokens = self.num_prefix_tokens

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Token sequence z_0 = [CLS + E_0; registers; patches + E_1..N], ``(B, 1 + R + N, D)`` (eq.
        1).

        A distillation token and its position come after CLS.
        """
        pos_embed, first = self.pos_embed, self.num_positioned
        if self.dynamic_img_size:  # patches come as (B, H, W, D)
            pos_embed = resample_abs_pos_embed(
                pos_embed,
                new_size=x.shape[1:3],
                old_size=self.patch_embed.grid_size,
                num_prefix_tokens=first,
            )
            x = x.flatten(1, 2)
        prefix = [self.cls_token + pos_embed[:, :1]]
        if first > 1:
            prefix.append(self.dist_token + pos_embed[:, 1:2])
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        tokens = [token.expand(x.shape[0], -1, -1) for token in prefix]
        return self.pos_drop(torch.cat([*tokens, x + pos_embed[:, first:]], dim=1))

    def forward_features(
        self,
        x: Float[Tensor, "batch channels height width"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch tokens embed"]:
        """Final tokens RMSNorm(z_T), ``(B, tokens, D)``, of images ``(B, C, H, W)``."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        unmasked = attn_mask is None and not is_causal
        masks = {} if unmasked else {"attn_mask": attn_mask, "is_causal": is_causal}
        # checkpoint_seq passes no mask on, so a masked pass is not checkpointed, as in timm
        if self.grad_checkpointing and unmasked:
            # checkpoint_seq would run each stored block once if it got the Sequential itself, as
            # timm gives it; re-entrant checkpoints would cut the gradient through a memory, which
            # is not one of their arguments
            x = checkpoint_seq(list(calls_of(self.blocks)), x, use_reentrant=False)
        else:
            for block in calls_of(self.blocks):
                x = block(x, **masks)
        return self.norm(x)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm: the states z_t after the chosen steps."""
        model = self
        # timm calls the items of `blocks`, which here need the memory of a run
        if isinstance(self.blocks, UnrolledSteps):
            model = copy.copy(self)
            model.__dict__["blocks"] = list(self.blocks.run())
        return super(BViT, model).forward_intermediates(*args, **kwargs)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change image or patch size in place, resampling the position embedding."""
        with _WithoutRegisters(self):
            super().set_input_size(img_size=img_size, patch_size=patch_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "reg_token", "blocks.step_embed"}


class DistilledBViT(BViT, VisionTransformerDistilled):
    """A `BViT` with a distillation token after CLS and a second head (DeiT; appendix C of the
    paper).

    The parts of DeiT come from `timm.models.deit`: the token with its own position, `head_dist`
    and the forward. The forward gives the mean of both heads' logits ``(B, classes)``. In training
    after ``set_distilled_training(True)`` it gives (logits, logits of the distillation head), each
    ``(B, classes)``.

    Parameters
    ----------
    **kwargs : as in `BViT`; without `fc_norm`, and with token pooling only.

    References
    ----------
    Touvron et al. (2021), https://arxiv.org/abs/2012.12877. The distilled bViT-B has 770,536 more
    parameters than bViT-B, and costs 33.87 GFLOPs.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("fc_norm") or kwargs.get("global_pool", "token") != "token":
            raise ValueError(
                "a distilled model reads its two tokens behind the final norm: no fc_norm, no"
                " global_pool"
            )
        super().__init__(**kwargs)


class _WithoutRegisters:
    """While timm resamples positions, lets it count only the prefix tokens that have a position:
    registers have none."""

    def __init__(self, model: BViT) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.prefix, self.model.num_prefix_tokens = (
            self.model.num_prefix_tokens,
            self.model.num_positioned,
        )

    def __exit__(self, *exception: object) -> None:
        self.model.num_prefix_tokens = self.prefix


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: BViT) -> dict[str, Tensor]:
    """timm's filter for pretrained weights, which resamples positions. It does not count registers,
    which have no position."""
    with _WithoutRegisters(model):
        return timm_vit.checkpoint_filter_fn(state_dict, model)


# ---- registered with timm ------------------------------------------------------------------------

_SIZES = {  # Table 1: width, heads, steps of the recurrent model = blocks of the matched stack
    "small": (384, 6, 12),
    "base": (768, 12, 12),
    "large": (1024, 16, 24),
}
_FACTORY_ARGS = {
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "features_only",
    "device",
    "dtype",
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "te_": {"step_embed": True},
    "reg4_": {"reg_tokens": 4},
    "fl_": {"memory": "latent"},
    "sc_": {"memory": "state"},
    "distilled_": {},
}


def _class_of(name: str) -> type[BViT]:
    return DistilledBViT if "_distilled_" in name else BViT


def _cfg(name: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head" if _class_of(name) is BViT else ("head", "head_dist"),
    }


def _entrypoint(name: str, **defaults: Any) -> Callable[..., BViT]:
    def create(pretrained: bool = False, **kwargs: Any) -> BViT:
        feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
        model = build_model_with_cfg(
            _class_of(name),
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg,
            **{**defaults, **kwargs},
        )
        given = {key: value for key, value in kwargs.items() if key not in _FACTORY_ARGS}
        model.model_args = given  # type: ignore[assignment]
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    return create


def _models() -> dict[str, dict[str, Any]]:
    """Name -> constructor arguments of every registered model."""
    models = {}
    for size, (width, heads, steps) in _SIZES.items():
        shape = {"patch_size": 16, "embed_dim": width, "num_heads": heads}
        for infix, extra in _VARIANTS.items():
            recurrent = {**shape, "num_blocks": 1, "num_steps": steps}
            models[f"bvit_{size}_{infix}patch16_224"] = {**recurrent, **extra}
        for infix in ("", "distilled_"):
            models[f"vit_rms_{size}_{infix}patch16_224"] = {
                **shape,
                "num_blocks": steps,
                "num_steps": 1,
            }
    return models


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _models()})
for _name, _defaults in _models().items():
    globals()[_name] = register_model(_entrypoint(_name, **_defaults))
