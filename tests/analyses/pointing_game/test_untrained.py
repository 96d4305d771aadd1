"""A model with random weights is of the same shape and has nothing of the trained one."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import prune

from bvit_interp import unroll
from bvit_interp.analyses.pointing_game.untrained import untrained


def test_every_matrix_is_drawn_and_the_model_stays(any_model, images):
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    random_state = torch.get_rng_state()
    twin, again, other = (untrained(any_model, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(any_model.state_dict()[name], tensor) for name, tensor in before.items())
    for name, drawn in twin.named_parameters():
        if drawn.ndim > 1:
            assert not torch.isclose(drawn, before[name]).float().mean() > 0.1, name
            assert not torch.equal(drawn, other.get_parameter(name)), name
            if drawn.numel() > 1000:
                assert 0.018 < drawn.std() < 0.022, name
        elif drawn.ndim == 1:
            assert (drawn == (0 if name.endswith("bias") else 1)).all(), name
        assert torch.equal(drawn, again.get_parameter(name))
    with torch.no_grad():
        assert torch.isfinite(twin(images)).all()
        assert not torch.allclose(twin(images), any_model(images))


def test_tied_steps_stay_tied_and_have_the_weights_of_the_loop(tiny, images):
    view = untrained(unroll(tiny))
    first, last = view.blocks[0].attn.qkv.weight, view.blocks[-1].attn.qkv.weight
    assert first is last
    with torch.no_grad():
        torch.testing.assert_close(view(images), untrained(tiny)(images))


def test_matrices_of_one_shape_differ(stacked):
    twin = untrained(stacked)
    assert not torch.equal(twin.blocks[0].attn.qkv.weight, twin.blocks[1].attn.qkv.weight)


def test_vectors_of_other_modules():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.scale = nn.Parameter(torch.ones(9)), nn.Parameter(torch.tensor(3.0))
            self.norm, self.gamma = nn.BatchNorm1d(4), nn.ParameterList([torch.zeros(4)])

    parts = Parts()
    parts.norm.running_mean.fill_(5)
    twin = untrained(parts)
    assert 0 < twin.token.abs().max() < 0.1
    assert twin.scale == 3
    assert (twin.norm.running_mean == 0).all()
    assert (parts.norm.running_mean == 5).all()
    assert (twin.gamma[0] == 1).all()


def test_a_pruned_model_stays_pruned(tiny, images):
    pruned = copy.deepcopy(tiny)
    prune.l1_unstructured(pruned.blocks[0].attn.proj, "weight", 0.5)
    with torch.no_grad():
        pruned(images)
        twin = untrained(pruned)
        twin(images)
    weight = twin.blocks[0].attn.proj.weight
    assert (weight == 0).float().mean() == 0.5
    assert not torch.equal(weight, pruned.blocks[0].attn.proj.weight)
