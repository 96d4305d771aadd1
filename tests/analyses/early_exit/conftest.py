"""Random exits, written for a model."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.models.exits import FILE, Exits


@pytest.fixture
def exits_of(tmp_path):
    """``exits_of(model, steps)``: random exits written for a model; their folder."""

    def write(model, steps=(1, 2), name="exits", scale=0.3):
        generator = torch.Generator().manual_seed(0)
        exits = Exits(steps, model.embed_dim, model.num_classes)
        for parameter in exits.parameters():
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        (tmp_path / name).mkdir()
        exits.save(tmp_path / name / FILE, model, {})
        return tmp_path / name

    return write
