"""Makes a `BViT` from a timm `VisionTransformer` of one block.

A looped model is often written as a timm `VisionTransformer` of depth one whose block is called
again and again, or as a stack of blocks that share their parameters. As a `BViT` it is saved,
trained, pruned and transferred like the models of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import get_act_layer, get_norm_layer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from bvit_interp.errors import UserError, choices
from bvit_interp.models.bvit import BViT
from bvit_interp.models.dry_run import dry, example_images

_NAME = "bvit_base_patch16_224"  # any name would do: the arguments are given
_NORMS = ("layernorm", "rmsnorm", "layernormfp32", "rmsnormfp32", "simplenorm")
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
_KEPT = ("mean", "std", "interpolation", "crop_pct", "label_names")


def from_timm(model: VisionTransformer, steps: int | None = None) -> BViT:
    """The `BViT` that applies the block of a timm `VisionTransformer` `steps` times.

    Its output is bit-equal to that of the timm model with its block in a loop, which is checked on
    two images. It has weights of its own. LayerScale, norms of queries and keys, registers, a norm
    before the blocks and other norms and activations are kept. Dropout and stochastic depth are
    not: they act only in training.

    Parameters
    ----------
    model : an instance of timm's class itself, with one block or with blocks that share all their
        parameters.
    steps : how often the block is applied; by default as often as the model has blocks that share
        their parameters.

    Raises
    ------
    UserError
        For a model that is not one block in a loop, or that has a part which a `BViT` lacks; the
        message gives the reason.
    """
    block = _only_block(model)
    if steps is None and len(model.blocks) == 1:
        raise UserError("the model has one block and does not say how often it runs: give steps")
    steps = len(model.blocks) if steps is None else steps
    if steps < 1:
        raise UserError(f"steps must be >= 1, got {steps}")
    arguments = {**_arguments(model, block), "num_blocks": 1, "num_steps": steps}
    made: Any = timm.create_model(_NAME, **arguments)
    if found := _difference(model, made):
        raise _refused(found)
    made.load_state_dict(_weights(model))
    first = next(model.parameters())
    made = made.to(first.device, first.dtype).train(model.training)
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    kept = {key: cfg[key] for key in _KEPT if cfg.get(key) is not None}
    made.pretrained_cfg = {**made.pretrained_cfg, **kept}
    if not _same_output(model, block, made):
        raise _refused("its output on two images is not that of the loop")
    return made


def _only_block(model: VisionTransformer) -> Any:
    """The block, if the model is timm's own and has one, or several around the same parameters."""
    if type(model) is not VisionTransformer:
        raise _refused(f"it is a {type(model).__name__}, whose forward may be different")
    blocks = list(model.blocks)
    shared = {tuple(id(each) for each in block.parameters()) for block in blocks}
    if len(shared) > 1:
        raise _refused(f"it has {len(shared)} blocks with parameters of their own")
    if type(blocks[0]) is not Block:
        raise _refused(f"its block is a {type(blocks[0]).__name__}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _refused(f"a hook on {name or 'it'} may change what it computes")
    if not model.has_class_token or model.pos_embed is None:
        raise _refused("it lacks a CLS token or position embeddings (eq. 1 of the paper)")
    return blocks[0]


def _arguments(model: Any, block: Any) -> dict[str, Any]:
    """The arguments that make a `BViT` like the model, as JSON values."""
    attention, mlp, patches = block.attn, block.mlp, model.patch_embed
    scaled = not isinstance(block.ls1, nn.Identity)
    arguments = {
        "img_size": list(patches.img_size),
        "patch_size": list(patches.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "num_heads": attention.num_heads,
        "mlp_ratio": mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": attention.qkv.bias is not None,
        "proj_bias": attention.proj.bias is not None,
        "qk_norm": _is_there(getattr(attention, "q_norm", None)),
        "scale_attn_norm": _is_there(getattr(attention, "norm", None)),
        "scale_mlp_norm": _is_there(getattr(mlp, "norm", None)),
        "init_values": 1.0 if scaled else None,  # the values come with the weights
        "pre_norm": _is_there(model.norm_pre),
        "final_norm": _is_there(model.norm) or _is_there(model.fc_norm),
        "fc_norm": _is_there(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "reg_tokens": model.num_reg_tokens,
        "norm_layer": _named(block.norm1, "norm", _NORMS, get_norm_layer),
    }
    if type(mlp.act) is not nn.GELU:  # the default
        arguments["act_layer"] = _named(mlp.act, "activation", _ACTIVATIONS, get_act_layer)
    return {key: value for key, value in arguments.items() if value is not None}


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _named(module: nn.Module, what: str, names: tuple[str, ...], find: Callable[..., Any]) -> str:
    """timm's name for the class of a module."""
    for name in names:
        if isinstance(module, find(name)) or find(name).__bases__ == (type(module),):
            return name
    raise _refused(f"its {what} is {type(module).__name__}; known are {choices(names)}")


def _difference(model: VisionTransformer, made: BViT) -> str:
    """The first module that differs between the two, or an empty string."""
    parts = {
        name: module
        for name, module in model.named_modules()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    }
    theirs = dict(made.named_modules())
    for name, module in parts.items():
        if not name or name == "blocks" or "drop" in name.rpartition(".")[2]:
            continue
        if name not in theirs:
            return f"a BViT has no {name}"
        other = theirs[name]
        if not isinstance(other, type(module)) and not isinstance(module, type(other)):
            return f"its {name} is {module}, in a BViT {other}"
        if module.extra_repr() != other.extra_repr():
            return f"its {name} is ({module.extra_repr()}), in a BViT ({other.extra_repr()})"
    own = {name for name in model.state_dict() if not name.startswith("blocks.")}
    if surplus := own - made.state_dict().keys():
        return f"a BViT has no {choices(sorted(surplus))}"
    return ""


def _weights(model: Any) -> dict[str, Tensor]:
    """The model's weights by the names of a `BViT`, whose registers have no position."""
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    }
    positions, registers = weights["pos_embed"], model.num_reg_tokens
    if model.no_embed_class:
        weights["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    elif registers:
        weights["reg_token"] = weights["reg_token"] + positions[:, 1 : 1 + registers]
        weights["pos_embed"] = torch.cat([positions[:, :1], positions[:, 1 + registers :]], 1)
    return weights


def _same_output(model: Any, block: nn.Module, made: BViT) -> bool:
    """Whether the `BViT` gives what the model gives with its block in a loop."""
    images = example_images(model)
    with dry(model), dry(made):
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for _ in range(len(made.blocks)):
            tokens = block(tokens)
        return torch.equal(model.forward_head(model.norm(tokens)), made(images))


def _refused(reason: str) -> UserError:
    return UserError(f"the model has no BViT with the same output: {reason}")
