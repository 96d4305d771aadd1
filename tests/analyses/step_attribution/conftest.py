"""Terms of a gradient small enough for loops."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.analyses.step_attribution.untied import LAYERS, Layout


@pytest.fixture
def small():
    """Five steps of two blocks, one of them applied once: layout, halves ``(2, 5, 28)``, weights.

    4 weights per layer, 2 heads, 2 neurons.
    """
    generator = torch.Generator().manual_seed(3)
    layers = {layer: slice(4 * i, 4 * i + 4) for i, layer in enumerate(LAYERS[:-1])}
    heads, neurons = torch.full((28,), 2), torch.full((28,), 2)
    heads[:16], neurons[16:24] = torch.arange(16) % 2, torch.arange(8) // 2 % 2
    layout = Layout((0, 0, 1, 0, 0), (), (), layers, heads, neurons, 24)
    scales = torch.tensor([3.0, 1, 1, 2, 1])[:, None]
    halves = torch.randn(2, 5, 28, generator=generator).double() * scales
    return layout, halves, torch.randn(2, 28, generator=generator).double()
