"""Folds a stack of blocks into one (appendix A.1 of arXiv 2605.10661)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from bvit_interp.models.bvit import BViT
from bvit_interp.models.planted.program import (
    ANCHOR,
    ONE,
    SHUT,
    Head,
    Neuron,
    Program,
    Reads,
    compile_program,
)


def fold(stack: VisionTransformer, anchor: float = ANCHOR) -> BViT:
    """A bViT whose step t does what block t of a stack of L blocks does.

    Its one block holds all heads and neurons of the stack. At step t those of block t are on and
    the others are off, as in the appendix. Its state has the d channels of the stack, L channels
    for the step, and 4 more. timm's attention needs a width of heads x head dimension, so the state
    is padded with zeros.

    Parameters
    ----------
    stack : without norms (``norm_layer=nn.Identity``, the setting of the appendix), with timm's
        plain blocks and exact GELU.
    anchor : the constant A of the program. The error falls with its square, down to rounding.

    Raises
    ------
    ValueError
        For a stack of another kind.
    """
    source: Any = stack
    blocks = list(source.blocks)
    _check(stack, blocks)
    names = [f"x:{i}" for i in range(stack.embed_dim)]
    program = Program(
        steps=len(blocks),
        channels=names,
        heads=[head for t, block in enumerate(blocks, 1) for head in _heads(block, t, names)],
        neurons=[n for t, block in enumerate(blocks, 1) for n in _neurons(block, t, names)],
        patches=dict(zip(names, source.patch_embed.proj.weight.detach(), strict=True)),
        logits=_rows(source.head, names),
        anchor=anchor,
    )
    embed = source.patch_embed
    model = compile_program(program, embed.img_size[0], embed.patch_size[0])
    first = 4 + len(blocks)  # of the stack's channels
    with torch.no_grad():
        own = slice(first, first + len(names))
        model.cls_token[0, 0, own] = source.cls_token[0, 0] + source.pos_embed[0, 0]
        model.pos_embed[0, 1:, own] = source.pos_embed[0, 1:] + embed.proj.bias
    return model


def _check(stack: VisionTransformer, blocks: list[Any]) -> None:
    norms = [stack.norm_pre, stack.norm, stack.fc_norm]
    for block in blocks:
        if type(block) is not Block or not isinstance(block.mlp.act, nn.GELU):
            raise ValueError("a stack of timm's plain blocks with GELU is wanted")
        norms += [block.norm1, block.norm2, block.ls1, block.ls2]
        norms += [block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm]
    if not all(isinstance(norm, nn.Identity) for norm in norms):
        raise ValueError("a stack without norms is wanted: norm_layer=nn.Identity")
    if stack.num_prefix_tokens != 1 or stack.global_pool != "token":
        raise ValueError("a stack with a CLS token alone, read by the head, is wanted")


def _rows(linear: nn.Linear, names: list[str]) -> list[Reads]:
    """What each output of a linear layer reads."""
    return [
        {**dict(zip(names, weights.tolist(), strict=True)), ONE: bias.item()}
        for weights, bias in zip(linear.weight, linear.bias, strict=True)
    ]


def _columns(linear: nn.Linear, names: list[str]) -> list[Reads]:
    """What each input of a linear layer writes."""
    return [dict(zip(names, column.tolist(), strict=True)) for column in linear.weight.T]


def _heads(block: Any, step: int, names: list[str]) -> list[Head]:
    attn, size = block.attn, block.attn.head_dim
    rows, columns = _rows(attn.qkv, names), _columns(attn.proj, names)
    queries, keys, values = (rows[i * attn.attn_dim :][: attn.attn_dim] for i in range(3))
    heads = []
    for h in range(attn.num_heads):
        own = slice(h * size, (h + 1) * size)
        scores = [
            ({name: weight / size**0.5 for name, weight in query.items()}, key)
            for query, key in zip(queries[own], keys[own], strict=True)
        ]
        moves = list(zip(values[own], columns[own], strict=True))
        if h == 0:  # the bias of the projection: attention weights add up to 1
            moves.append(({ONE: 1.0}, dict(zip(names, attn.proj.bias.tolist(), strict=True))))
        heads.append(Head(scores, moves, {step}))
    return heads


def _neurons(block: Any, step: int, names: list[str]) -> list[Neuron]:
    mlp = block.mlp
    rows, columns = _rows(mlp.fc1, names), _columns(mlp.fc2, names)
    bias = {name: value / SHUT for name, value in zip(names, mlp.fc2.bias.tolist(), strict=True)}
    constant = Neuron({ONE: SHUT}, bias, {step})  # gelu(SHUT) is SHUT
    return [constant, *(Neuron(r, w, {step}) for r, w in zip(rows, columns, strict=True))]
