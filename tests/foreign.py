"""Tiny models that are not ours, as a user may write them: 32 px, 16 patches, width 32, 4 heads.

``foreign("encoder")`` gives one with random weights, in eval mode. Each says its image size alone;
the rest has to be found out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


class LoopedEncoder(nn.Module):
    """One `nn.TransformerEncoderLayer` five times; no CLS, the head reads the mean."""

    image_size = 32

    def __init__(self, num_classes: int = 10, steps: int = 5, norm_first: bool = True) -> None:
        super().__init__()
        self.steps = steps
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 16, 32))
        self.block = nn.TransformerEncoderLayer(
            32, 4, 64, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(32, num_classes)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT + self.positions
        for _ in range(self.steps):
            tokens = self.block(tokens)
        return self.head(tokens.mean(1))


class PreludeCoreCoda(nn.Module):
    """A prelude, three rounds of a core of two blocks that read the input anew, and a coda.

    A round reads the state, what the prelude made of the image, and a step embedding of its own.
    """

    image_size = 32

    def __init__(self, num_classes: int = 10, rounds: int = 3) -> None:
        super().__init__()
        self.rounds = rounds
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.prelude = nn.ModuleList([Block(32, 4), Block(32, 4)])
        self.mix = nn.Linear(64, 32)
        self.embeddings = nn.Parameter(torch.zeros(rounds, 32))
        self.core = nn.ModuleList([Block(32, 4), Block(32, 4)])
        self.coda = nn.ModuleList([Block(32, 4)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, num_classes)

    def enter(self, images):
        """What the prelude makes of the images, which every round reads."""
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        for block in self.prelude:
            tokens = block(tokens)
        return tokens

    def inject(self, state, entered, round_):
        """What the first core block of a round (from 0) reads."""
        return self.mix(torch.cat([state, entered], -1)) + self.embeddings[round_]

    def leave(self, state):
        """Logits of the coda and the head."""
        for block in self.coda:
            state = block(state)
        return self.head(self.norm(state)[:, 0])

    def forward(self, images):
        entered = self.enter(images)
        state = torch.zeros_like(entered)
        for i in range(self.rounds):
            state = self.inject(state, entered, i)
            for block in self.core:
                state = block(state)
        return self.leave(state)


class TwoState(nn.Module):
    """A fast and a slow state, as in TRM: one block updates the fast one twice, then the slow one,
    for two rounds."""

    image_size = 32

    def __init__(self, num_classes: int = 10, rounds: int = 2, updates: int = 2) -> None:
        super().__init__()
        self.rounds, self.updates = rounds, updates
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.net = Block(32, 4)
        self.slow, self.fast = (nn.Parameter(torch.zeros(1, 1, 32)) for _ in range(2))
        self.head = nn.Linear(32, num_classes)

    def enter(self, images):
        """The tokens that every update of the fast state reads."""
        tokens = self.patches(images).flatten(2).mT
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1)

    def forward(self, images):
        tokens = self.enter(images)
        slow, fast = self.slow.expand_as(tokens), self.fast.expand_as(tokens)
        for _ in range(self.rounds):
            for _ in range(self.updates):
                fast = self.net(fast + slow + tokens)
            slow = self.net(slow + fast)
        return self.head(slow[:, 0])


class LoopedTimm(VisionTransformer):
    """A timm model whose subclass applies its one block six times."""

    def __init__(self, num_classes: int = 10, loops: int = 6, **options: Any) -> None:
        super().__init__(**SMALL, depth=1, num_classes=num_classes, **options)
        self.loops = loops

    def forward_features(self, x, attn_mask=None, is_causal=False):
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for _ in range(self.loops):
            x = self.blocks[0](x)
        return self.norm(x)


SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4}


def _timm(name: str) -> Callable[..., nn.Module]:
    return lambda **options: timm.create_model(
        name, **{**SMALL, "depth": 3, "num_classes": 10, **options}
    )


def _torchvision(num_classes: int = 10) -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=num_classes)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "encoder": LoopedEncoder,
    "prelude": PreludeCoreCoda,
    "two_state": TwoState,
    "looped_timm": LoopedTimm,
    "eva02": _timm("eva02_base_patch14_224"),
    "dinov3": _timm("vit_small_patch16_dinov3"),
    "torchvision": _torchvision,
}
STEPS = {
    "encoder": 5,
    "prelude": 6,
    "two_state": 6,
    "looped_timm": 6,
    "eva02": 3,
    "dinov3": 3,
    "torchvision": 3,
}
"""How many steps each has."""


def foreign(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """A model of `MODELS` whose every parameter is random, so that nothing is equal by being
    zero."""
    generator = torch.Generator().manual_seed(seed)
    model = MODELS[kind](**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = ("norm" in name or "ln" in name) and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.15 * noise)
    return model


# ---- the same forwards written out, step by step -------------------------------------------------


def entry_by_hand(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """z_0: what the block of step 1 reads."""
    if isinstance(model, LoopedEncoder):
        return model.patches(images).flatten(2).mT + model.positions
    if isinstance(model, PreludeCoreCoda):
        entered = model.enter(images)
        return model.inject(torch.zeros_like(entered), entered, 0)
    if isinstance(model, TwoState):
        return model.fast + model.slow + model.enter(images)
    if isinstance(model, torchvision.models.VisionTransformer):
        tokens = model.conv_proj(images).flatten(2).mT
        tokens = torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], 1)
        return tokens + model.encoder.pos_embedding
    tokens = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(tokens[0] if isinstance(tokens, tuple) else tokens)


def step_by_hand(
    model: nn.Module, images: torch.Tensor, before: list[torch.Tensor]
) -> torch.Tensor:
    """z_t of what came before it, ``[z_0, ..., z_{t-1}]``."""
    t, tokens = len(before), before[-1]
    if isinstance(model, LoopedEncoder):
        return model.block(tokens)
    if isinstance(model, LoopedTimm):
        return model.blocks[0](tokens)
    if isinstance(model, PreludeCoreCoda):
        round_, which = divmod(t - 1, 2)
        if t > 1 and which == 0:
            tokens = model.inject(tokens, model.enter(images), round_)
        return model.core[which](tokens)
    if isinstance(model, TwoState):
        per_round = model.updates + 1
        round_, which = divmod(t - 1, per_round)
        slow = before[per_round * round_] if round_ else model.slow
        if t == 1:
            return model.net(tokens)
        if which == model.updates:
            return model.net(slow + tokens)
        fast = before[per_round * round_ - 1] if which == 0 else tokens
        return model.net(fast + slow + model.enter(images))
    if isinstance(model, torchvision.models.VisionTransformer):
        return model.encoder.layers[t - 1](tokens)
    rope = model._pos_embed(model.patch_embed(images))[1]
    return model.blocks[t - 1](tokens, rope=rope)


def answer_by_hand(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, were these tokens the last step's."""
    if isinstance(model, LoopedEncoder):
        return model.head(tokens.mean(1))
    if isinstance(model, PreludeCoreCoda):
        return model.leave(tokens)
    if isinstance(model, TwoState):
        return model.head(tokens[:, 0])
    if isinstance(model, torchvision.models.VisionTransformer):
        return model.heads(model.encoder.ln(tokens)[:, 0])
    return model.forward_head(model.norm(tokens))


def states_by_hand(
    model: nn.Module, images: torch.Tensor, put: dict[int, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """z_0, ..., z_T; `put` names states that are replaced on their way."""
    run = [entry_by_hand(model, images)]
    for t in range(STEPS[_KINDS.get(type(model), "eva02")] + 1):
        if t:
            run.append(step_by_hand(model, images, run))
        if put and t in put:
            run[t] = put[t]
    return run


_KINDS = {
    LoopedEncoder: "encoder",
    PreludeCoreCoda: "prelude",
    TwoState: "two_state",
    LoopedTimm: "looped_timm",
}
