"""Adam under masks: with everything kept, and per weight on its own batches."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from bvit_interp.training.pruning.masked_adam import MaskedAdam


@pytest.mark.parametrize("scale", [1.0, 3e-8])  # of the second, eps is as large as the gradient
def test_adam_with_everything_kept_is_torchs(scale):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    mine = MaskedAdam([{"params": [ours], "weight_decay": 0.1}], lr=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        ours.grad = scale * torch.randn(2, 3)
        theirs.grad = ours.grad.clone()
        mine.step({})
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_adam_of_a_weight_is_adam_on_the_batches_that_keep_it():
    """Two weights of one tensor, kept in turn: each ends where an AdamW that saw only its own
    batches ends."""
    gradients = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    ours = nn.Parameter(torch.ones(2))
    mine = MaskedAdam([{"params": [ours], "weight_decay": 0.1}], lr=0.1)
    for j, gradient in enumerate(gradients):
        ours.grad = gradient.clone()
        mine.step({ours: torch.arange(2) == j % 2})
    for i in range(2):
        alone = nn.Parameter(torch.ones(1))
        reference = torch.optim.AdamW([alone], lr=0.1, weight_decay=0.1)
        for gradient in gradients[i::2]:
            alone.grad = gradient[i : i + 1].clone()
            reference.step()
        torch.testing.assert_close(ours[i : i + 1], alone)


def test_nothing_decays_unless_asked_and_a_parameter_without_a_gradient_stays():
    ours, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = MaskedAdam([{"params": [ours, idle]}], lr=0.1)
    ours.grad = torch.zeros(3)
    optimizer.step({})
    assert torch.equal(ours, torch.ones(3))
    assert torch.equal(idle, torch.ones(3))


def test_a_mask_of_numbers_is_refused():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(TypeCheckError):
        MaskedAdam([{"params": [parameter]}], lr=0.1).step({parameter: torch.ones(3)})
