"""The correct answers for `tools.py`, computed by a loop over the block."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

STEPS, STEP = 12, 5
TARGETS = torch.tensor([0, 1])
GROUPS = torch.arange(128) // 32  # neurons ablated together


def loop(model, images, blocks=None, change=None):
    """Neurons ``mlp_post``, attention and output of every step, and the logits.

    `blocks` has the block of each step. `change` maps a step (from 1) to a function of its neurons.
    """
    blocks = blocks or [model.get_submodule("blocks.0")] * STEPS
    z = model._pos_embed(model.patch_embed(images))
    neurons, patterns, outputs = [], [], []
    for t, block in enumerate(blocks, start=1):
        normed = block.norm1(z)
        q, k, _ = block.attn.qkv(normed).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * block.attn.head_dim**-0.5
        middle = z + block.attn(normed)
        act = nn.functional.gelu(block.mlp.fc1(block.norm2(middle)))
        act = change[t](act) if change and t in change else act
        z = middle + block.mlp.fc2(act)
        neurons.append(act)
        patterns.append(scores.softmax(-1))
        outputs.append(z)
    return neurons, patterns, outputs, model.forward_head(model.norm(z))


def score(model, images, **kwargs):
    """Target logits ``(B,)``."""
    return loop(model, images, **kwargs)[3].gather(1, TARGETS[:, None])[:, 0]


def integrated_gradients(model, images, t, points):
    """Integrated gradients of the target logit at the neurons of step t, from a black image."""
    end = loop(model, images)[0][t - 1].detach()
    start = loop(model, torch.zeros_like(images))[0][t - 1].detach()
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total = torch.zeros_like(end)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        here = (start + float(node) * (end - start)).requires_grad_()
        value = score(model, images, change={t: lambda _, here=here: here}).sum()
        total += float(weight) * torch.autograd.grad(value, here)[0]
    return total * (end - start)


def gradient(model, images, t):
    """Neurons of step t, and the gradient of the target logit with respect to them."""
    here = loop(model, images)[0][t - 1].detach().requires_grad_()
    value = score(model, images, change={t: lambda _: here}).sum()
    return here.detach(), torch.autograd.grad(value, here)[0]


def conductance(model, images, t, points):
    """Gradient times change of the neurons of step t, summed over images from black to full."""
    nodes = (np.polynomial.legendre.leggauss(points + 1)[0] + 1) / 2
    seen = [gradient(model, float(node) * images, t) for node in nodes]
    return sum(g * (after - before) for (before, g), (after, _) in itertools.pairwise(seen))


def ablation(model, images, steps):
    """Decrease of the target logit if a group of neurons is zero at `steps`, ``(B, groups)``."""
    clean = score(model, images)
    falls = []
    for group in GROUPS.unique():
        keep = (group != GROUPS).float()
        change = dict.fromkeys(steps, lambda act, keep=keep: act * keep)
        falls.append(clean - score(model, images, change=change))
    return torch.stack(falls, dim=1)
