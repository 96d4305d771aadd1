"""Saliency maps over the patches, for each image, step and head.

`attention` is the CLS row of each head. `rollout` multiplies the heads' mean attention, with the
residual, up to the step (Abnar & Zuidema, 2020). `gradient_x_activation` and
`integrated_gradients` (Sundararajan et al., 2017) attribute the predicted class's logit to the
tokens that enter the step, with captum on the tied unroll.

At the last step gradient x activation is zero on every patch: there a patch acts only through a
norm that ignores its length, so x . df/dx = 0. (A model that adds a memory to the state is an
exception.) A map that is zero except for rounding errors is set to zero, so that all its patches
are tied.
captum's LayerGradCam is not offered: it sums over tokens, which is wrong for a ViT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bvit_interp.errors import MissingExtra
from bvit_interp.probes.probe import Probe

INTEGRATION_STEPS = 16
Images = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch steps heads patches"]
OneMap = Float[Tensor, "batch steps 1 patches"]


def attention(probe: Probe, images: Images) -> Maps:
    """CLS attention on the patches at every step and head; the forward ends at the last pattern."""
    with torch.inference_mode():
        pattern = probe.record(images, "pattern", tokens="cls")["pattern"]
    return pattern[..., probe.num_prefix_tokens :]


def rollout(probe: Probe, images: Images) -> OneMap:
    """Attention rollout up to each step."""
    with torch.inference_mode():
        cache = probe.record(images, "pattern")
        rows: list[Tensor] = []
        mixed: Tensor | None = None
        for step in cache.steps("pattern"):
            mixed = rollout_step(cache["pattern", step], mixed)
            cls, _ = probe.rows("cls", mixed.shape[-1])  # a UserError where there is none
            rows.append(mixed[:, cls, probe.num_prefix_tokens :])
    return torch.stack(rows, dim=1)


def rollout_step(
    pattern: Float[Tensor, "batch heads tokens tokens"],
    before: Float[Tensor, "batch tokens tokens"] | None,
) -> Float[Tensor, "batch tokens tokens"]:
    """Rollout up to a step: ``(A + I) / 2`` of the heads' mean A, times the rollout `before` it.

    Parameters
    ----------
    pattern : attention of the step; each row adds up to 1.
    before : rollout up to the step before; None at the first step.
    """
    mixture = 0.5 * pattern.mean(1)
    mixture.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return mixture if before is None else mixture @ before


def gradient_x_activation(probe: Probe, images: Images) -> OneMap:
    """Gradient times activation of the tokens that enter each step, summed over the width."""
    return _attribute(probe, images, "LayerGradientXActivation", [list(probe.model.blocks)], {})


def integrated_gradients(probe: Probe, images: Images) -> OneMap:
    """Integrated gradients of the tokens that enter each step, from the image of mean colour."""
    options = {"n_steps": INTEGRATION_STEPS, "internal_batch_size": images.shape[0]}
    # one step at a time: captum replaces a layer's input along the path, which would cut off the
    # layers before it
    return _attribute(probe, images, "LayerIntegratedGradients", list(probe.model.blocks), options)


METHODS: dict[str, Callable[[Probe, Tensor], Tensor]] = {
    "attention": attention,
    "rollout": rollout,
    "gradient-x-activation": gradient_x_activation,
    "integrated-gradients": integrated_gradients,
}
USE_GRADIENTS = frozenset({"gradient-x-activation", "integrated-gradients"})
"""The methods that do not work under ``torch.inference_mode``."""


def _attribute(
    probe: Probe, images: Images, method: str, layers: list[Any], options: dict[str, Any]
) -> OneMap:
    """captum's `method` at the input of every layer; a list of layers shares one pass."""
    try:
        from captum import attr
    except ImportError:
        raise MissingExtra("captum", "attribution") from None
    options = {**options, "attribute_to_layer_input": True}
    attributions: list[Any] = []
    with torch.enable_grad():
        predicted = probe(images).argmax(-1)
        for layer in layers:
            attributed = getattr(attr, method)(probe.model, layer).attribute(
                images, target=predicted, **options
            )
            attributions += attributed if isinstance(layer, list) else [attributed]
    tokens = [each[0] if isinstance(each, tuple) else each for each in attributions]
    maps = [_sums(each[:, probe.num_prefix_tokens :]) for each in tokens]
    return torch.stack(maps, dim=1)[:, :, None].detach()


def _sums(terms: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch patches"]:
    """Sums over the width; 0 on a map whose sums are all rounding errors of their terms.

    In float32 the largest sum is 1e-7 of its terms at the last step, and 1e-2 or more at others.
    """
    sums, sizes = terms.sum(-1), terms.abs().sum(-1)
    is_map = sums.abs() > torch.finfo(terms.dtype).eps ** (2 / 3) * sizes
    return sums.where(is_map.any(-1, keepdim=True), 0)
