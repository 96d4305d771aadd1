"""Programs written into the weights of one block.

A `Program` names the channels of the state, and lists heads and neurons that read and write them;
some act only at given steps. `compile_program` makes a `BViT` that executes it, so that every
analysis can be tested on a model whose answer is known:

    program = Program(
        steps=4,
        channels=("seen",),
        neurons=(Neuron(reads={"1": 9.0}, writes={"seen": 1 / 9}, steps={2, 3}),),
        logits=({"seen": 1.0}, {"seen": -1.0}),
    )
    model = compile_program(program)  # its first logit is 1 after step 2 and 2 after step 3

How it works (our construction; after appendix A.1 of arXiv 2605.10661 and Saunshi et al. 2025,
arXiv 2502.17416):

- **Norms.** A channel holds a constant A that is large beside all others. RMSNorm then divides by
  almost the same number everywhere, its weight multiplies by that number, and the block reads the
  state itself, up to a factor of ``1 - |z|^2 / 2 A^2``.
- **Steps.** T channels of every token but the register hold a one-hot of the step. Two neurons per
  step move it on, by a ramp that is flat at both ends, so that its derivative is zero.
- **Gates.** A neuron that is off has its preactivation lowered by `SHUT`. A head that is off
  attends only to the register, a token whose values are zero (the dummy token of the appendix).
- **Linear maps** are exact in two neurons: ``gelu(x) - gelu(-x) = x``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor

from bvit_interp.models.bvit import BViT

Reads = Mapping[str, float]
ONE = "1"
"""Reads a constant: the bias."""
ANCHOR = 2.0**14  # A: the error of the norm is below rounding for |z| up to 5
SHUT = 40.0  # gelu(-40 + x) is 0 in float32 for x below 25
_RAMP = 10.0  # gelu(10) is 10 and gelu(-10) is 0 in float32


@dataclass(frozen=True)
class Neuron:
    """A neuron of the FFN, in every token except the register.

    Parameters
    ----------
    reads : channel -> its weight in the preactivation; `ONE` is the bias.
    writes : channel -> the weight with which the GELU of the preactivation is added to it.
    steps : steps at which it acts, from 1; None means all.
    """

    reads: Reads
    writes: Reads
    steps: Collection[int] | None = None


@dataclass(frozen=True)
class Head:
    """An attention head.

    Parameters
    ----------
    scores : pairs (reads of the query's token, reads of the key's token); the score is the sum of
        their products. The register is never attended to.
    values : pairs (reads of the key's token, writes into the query's token).
    steps : steps at which it acts, from 1; None means all. At others it attends only to the
        register, and writes nothing.
    """

    scores: Sequence[tuple[Reads, Reads]]
    values: Sequence[tuple[Reads, Reads]]
    steps: Collection[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a block does, step by step.

    Every program also has the channels `ONE` (a constant), "step:1" to "step:T" (a one-hot of the
    step that runs), "cls" and "patch" (1 in tokens of that kind). None of them may be written. The
    program's own heads and neurons do not change the register.

    Parameters
    ----------
    steps : number of steps T.
    channels : names of the program's own channels, which start at 0 in every token.
    heads, neurons : what reads and writes the channels.
    patches : channel -> filter ``(3, p, p)``. Its output on a patch is the channel's start value
        in the token of the patch.
    cls : channel -> start value in CLS.
    logits : for each class, channel -> weight, read in CLS after the last step.
    anchor : the constant A.
    """

    steps: int
    channels: Sequence[str]
    heads: Sequence[Head] = ()
    neurons: Sequence[Neuron] = ()
    patches: Mapping[str, Tensor] = field(default_factory=dict)
    cls: Reads = field(default_factory=dict)
    logits: Sequence[Reads] = ()
    anchor: float = ANCHOR


def compile_program(program: Program, image_size: int = 32, patch_size: int = 4) -> BViT:
    """The bViT that executes a program, with one register, in eval mode.

    Its images are not normalised (mean 0, standard deviation 1).

    Raises
    ------
    ValueError
        For a channel that is unknown, given twice or may not be written, or a step outside 1..T.
    """
    return _Compiler(program).model(image_size, patch_size)


class _Compiler:
    """Makes rows and columns of one block's weights from the names of channels."""

    def __init__(self, program: Program) -> None:
        self.program = program
        counters = [f"step:{t}" for t in range(1, program.steps + 1)]
        names = ["anchor", "register", "cls", "patch", *counters, *program.channels]
        self.at = {name: i for i, name in enumerate(names)}
        if len(self.at) < len(names) or ONE in self.at:
            raise ValueError(f"channels must have names of their own, once each: {names}")
        self.constant = {*names} - {*program.channels}
        self.num_heads = max(len(program.heads), 1)
        needed = [max(len(head.scores) + 1, len(head.values)) for head in program.heads]
        self.head_dim = max([-(-len(names) // self.num_heads), *needed])
        self.width = self.num_heads * self.head_dim

    def reads(self, reads: Reads) -> tuple[Tensor, float]:
        """Weights ``(width,)`` and bias that read these channels."""
        row = torch.zeros(self.width)
        for name, weight in reads.items():
            if name != ONE:
                row[self._index(name)] += weight
        return row, reads.get(ONE, 0.0)

    def writes(self, writes: Reads) -> Tensor:
        """Weights ``(width,)`` that write these channels."""
        column = torch.zeros(self.width)
        for name, weight in writes.items():
            if name in self.constant:
                raise ValueError(f"the channel {name} cannot be written")
            column[self._index(name)] += weight
        return column

    def off(self, steps: Collection[int] | None) -> Tensor:
        """Weights ``(width,)`` that read 1 at the steps at which a head or neuron is off."""
        every = range(1, self.program.steps + 1)
        if steps is not None and not set(steps) <= set(every):
            raise ValueError(f"steps must be in 1..{self.program.steps}, got {sorted(steps)}")
        shut = [f"step:{t}" for t in every if steps is not None and t not in steps]
        return self.reads(dict.fromkeys(shut, 1.0))[0]

    def _index(self, name: str) -> int:
        if name not in self.at:
            raise ValueError(f"no channel {name!r}; channels: {', '.join(self.at)}")
        return self.at[name]

    def model(self, image_size: int, patch_size: int) -> BViT:
        program = self.program
        hidden = 2 * (program.steps - 1) + len(program.neurons)
        model: Any = timm.create_model(
            "bvit_small_patch16_224",
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=self.width,
            num_heads=self.num_heads,
            num_steps=program.steps,
            mlp_ratio=max(4, -(-hidden // self.width)),
            num_classes=len(program.logits),
            reg_tokens=1,
            pretrained_cfg_overlay={"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0},
        ).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False).zero_()
        block = model.blocks[0]
        for norm in (block.norm1, block.norm2, model.norm):
            norm.weight.fill_(program.anchor / self.width**0.5)
        self._embed(model)
        self._attention(block.attn)
        self._ffn(block.mlp)
        for i, logit in enumerate(program.logits):
            model.head.weight[i], model.head.bias[i] = self.reads(logit)
        return model.requires_grad_(True)

    def _embed(self, model: Any) -> None:
        start = {"anchor": self.program.anchor, "step:1": 1.0}
        model.cls_token[0, 0] = self.reads({**start, "cls": 1.0})[0] + self.writes(self.program.cls)
        model.pos_embed[0, 1:] = self.reads({**start, "patch": 1.0})[0]
        # without the step, which values may read: they are zero here
        model.reg_token[0, 0] = self.reads({"anchor": self.program.anchor, "register": 1.0})[0]
        for name, weights in self.program.patches.items():
            model.patch_embed.proj.weight[self._index(name)] = weights

    def _attention(self, attn: Any) -> None:
        query, key, value = (
            part.view(self.num_heads, self.head_dim, self.width)
            for part in attn.qkv.weight.view(3, self.width, self.width)
        )
        query_bias, key_bias, _ = attn.qkv.bias.view(3, self.num_heads, self.head_dim)
        sharp = self.head_dim**0.5  # attention divides by it
        register = self.reads({"register": 1.0})[0]
        for h, head in enumerate(self.program.heads):
            for j, (of_query, of_key) in enumerate(head.scores):
                weights, bias = self.reads(of_query)
                query[h, j], query_bias[h, j] = sharp * weights, sharp * bias
                key[h, j], key_bias[h, j] = self.reads(of_key)
            off = self.off(head.steps) + register
            query[h, -1] = sharp * 4 * SHUT * off
            query_bias[h, -1] = -sharp * 2 * SHUT
            key[h, -1] = register
            for j, (of_key, writes) in enumerate(head.values):
                # a constant is read from the tokens that are not the register
                weights, bias = self.reads(of_key)
                value[h, j] = weights + self.reads({"cls": bias, "patch": bias})[0]
                attn.proj.weight[:, h * self.head_dim + j] = self.writes(writes)

    def _ffn(self, mlp: Any) -> None:
        for i in range(2 * (self.program.steps - 1)):
            t, second = 1 + i // 2, i % 2
            # the ramp: gelu(4 R s - 2 R) - gelu(4 R s - 3 R) is 0 for s = 0 and R for s = 1
            mlp.fc1.weight[i], _ = self.reads({f"step:{t}": 4 * _RAMP})
            mlp.fc1.bias[i] = -(2 + second) * _RAMP
            sign = -1 if second else 1
            mlp.fc2.weight[self.at[f"step:{t}"], i] = -sign / _RAMP
            mlp.fc2.weight[self.at[f"step:{t + 1}"], i] = sign / _RAMP
        for i, neuron in enumerate(self.program.neurons, 2 * (self.program.steps - 1)):
            weights, bias = self.reads(neuron.reads)
            shut = self.off(neuron.steps)
            if not self.constant.isdisjoint(neuron.reads) or ONE in neuron.reads:
                shut = shut + self.reads({"register": 1.0})[0]  # its own channels are 0 there
            mlp.fc1.weight[i], mlp.fc1.bias[i] = weights - SHUT * shut, bias
            mlp.fc2.weight[:, i] = self.writes(neuron.writes)
