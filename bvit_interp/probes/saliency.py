"""Where a step looks: one map over the patches for each image, step and head.

`attention` is the CLS row of each head; `rollout` multiplies head-averaged attention with the
residual up to the step (Abnar & Zuidema, 2020); `gradient-x-activation` and `integrated-gradients`
(Sundararajan et al., 2017) attribute the predicted class's logit to the tokens that enter the step,
with captum on the tied unroll. At the last step gradient-x-activation is zero on every patch (there
a patch acts through a norm that ignores its length, so x . df/dx = 0; not where a memory is added
to the state there): read that step of it as noise. captum's LayerGradCam is not offered: it sums
tokens and is wrong for a ViT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bvit_interp.errors import MissingExtra
from bvit_interp.probes.probe import Probe

INTEGRATION_STEPS = 16


def attention(probe: Probe, images: Tensor) -> Tensor:
    """CLS attention of every step and head on the patches ``(B, T, H, P)``; the last step ends
    after q and k."""
    with torch.inference_mode():
        pattern = probe.record(images, "pattern", tokens="cls")["pattern"]
    return pattern[..., probe.num_prefix_tokens :]


def rollout(probe: Probe, images: Tensor) -> Tensor:
    """Attention rollout up to each step ``(B, T, 1, P)``."""
    with torch.inference_mode():
        cache = probe.record(images, "pattern")
        rows: list[Tensor] = []
        mixed: Tensor | None = None
        for step in cache.steps("pattern"):
            heads_mean = cache["pattern", step].mean(1)
            layer = 0.5 * heads_mean + 0.5 * torch.eye(heads_mean.shape[-1], device=images.device)
            mixed = layer if mixed is None else layer @ mixed
            cls, _ = probe.rows("cls", mixed.shape[-1])  # a UserError where there is none
            rows.append(mixed[:, cls, probe.num_prefix_tokens :])
    return torch.stack(rows, dim=1)


def gradient_x_activation(probe: Probe, images: Tensor) -> Tensor:
    """Gradient times activation of the tokens entering each step, summed over width ``(B, T, 1,
    P)``."""
    return _attributed(probe, images, "LayerGradientXActivation", [list(probe.model.blocks)], {})


def integrated_gradients(probe: Probe, images: Tensor) -> Tensor:
    """Integrated gradients from the mean-colour image to the tokens entering each step ``(B, T, 1,
    P)``."""
    options = {"n_steps": INTEGRATION_STEPS, "internal_batch_size": images.shape[0]}
    # a step at a time: captum replaces a layer's input along the path, which cuts off the layers
    # before it
    return _attributed(probe, images, "LayerIntegratedGradients", list(probe.model.blocks), options)


METHODS: dict[str, Callable[[Probe, Tensor], Tensor]] = {
    "attention": attention,
    "rollout": rollout,
    "gradient-x-activation": gradient_x_activation,
    "integrated-gradients": integrated_gradients,
}


def _attributed(
    probe: Probe, images: Tensor, method: str, layers: list[Any], options: dict[str, Any]
) -> Tensor:
    """captum's `method` at the input of every layer (one, or a list that shares a pass), ``(B, T,
    1, P)``."""
    try:
        from captum import attr
    except ImportError:
        raise MissingExtra("captum", "attribution") from None
    options = {**options, "attribute_to_layer_input": True}
    tokens: list[Any] = []
    with torch.enable_grad():
        predicted = probe(images).argmax(-1)
        for layer in layers:
            found = getattr(attr, method)(probe.model, layer).attribute(
                images, target=predicted, **options
            )
            tokens += found if isinstance(layer, list) else [found]
    maps = [t[0] if isinstance(t, tuple) else t for t in tokens]
    return torch.stack([t.sum(-1)[:, probe.num_prefix_tokens :] for t in maps], dim=1)[
        :, :, None
    ].detach()
