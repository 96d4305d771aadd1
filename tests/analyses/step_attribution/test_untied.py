"""Terms of the gradient against autograd and finite differences, and the layout of weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import nn
from torch.nn.utils import prune

from bvit_interp.analyses.step_attribution.untied import Untied
from bvit_interp.errors import UserError
from bvit_interp.models import masks
from bvit_interp.models.masks import PLACES, Masks
from bvit_interp.models.unroll import unroll

LABELS = torch.tensor([1, 3, 3, 7])


def loss_of(model, images):
    return F.cross_entropy(model(images), LABELS, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_sum_to_autograds_gradient_of_the_stored_blocks(any_model, images, dtype):
    before = {name: value.clone() for name, value in any_model.state_dict().items()}
    untied = Untied(any_model, dtype)
    terms, layout = untied.gradients(images, LABELS), untied.layout
    whole = copy.deepcopy(any_model).to(dtype)
    loss_of(whole, images.to(dtype)).backward()
    stored = list(whole.blocks.children())
    assert terms.shape == (len(any_model.blocks), sum(p.numel() for p in untied.parameters[0]))
    assert [len(own) for own in layout.steps_of_blocks] == [
        len(any_model.blocks) // len(stored)
    ] * len(stored)
    for block, own in zip(stored, layout.steps_of_blocks, strict=True):
        wanted = torch.cat([block.get_parameter(name).grad.flatten() for name in layout.names])
        assert {n for n, _ in block.named_parameters()} == set(layout.names)
        torch.testing.assert_close(
            terms[own].sum(0), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item()
        )
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in any_model.parameters()
    )
    assert all(torch.equal(value, before[name]) for name, value in any_model.state_dict().items())


@pytest.mark.parametrize("kind", ["tiny", "tiny_te", "tiny_hybrid", "tiny_fl", "tiny_sc_block"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_term_is_the_change_of_the_loss_with_that_step_alone(request, images, kind, step):
    """Central differences along a random direction in the weights of one step, its inner updates
    with it."""
    model = request.getfixturevalue(kind)
    terms = Untied(model, torch.float64).gradients(images, LABELS)
    view = copy.deepcopy(unroll(model)).double()
    view.blocks[step - 1] = copy.deepcopy(view.blocks[step - 1])
    block, generator = view.blocks[step - 1], torch.Generator().manual_seed(step)
    names = Untied(model).layout.names
    direction = [
        torch.randn(block.get_parameter(n).shape, generator=generator).double() for n in names
    ]
    losses = []
    with torch.no_grad():
        for size in (1e-6, -2e-6):  # there, and from there to the other side
            for name, along in zip(names, direction, strict=True):
                block.get_parameter(name).add_(along, alpha=size)
            losses.append(loss_of(view, images.double()).item())
    wanted = (losses[0] - losses[1]) / 2e-6
    found = terms[step - 1] @ torch.cat([along.flatten() for along in direction])
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_the_layout_of_heads_and_neurons(tiny):
    """Width 32, 4 heads: rows and columns marked in the matrices themselves."""
    layout = Untied(tiny).layout
    block, width = tiny.blocks[0], 32
    neurons = block.mlp.fc1.weight.shape[0]
    for head in range(4):
        rows = range(8 * head, 8 * head + 8)
        marks = {name: torch.zeros_like(block.get_parameter(name)) for name in layout.names}
        for part in range(3):
            for row in rows:
                marks["attn.qkv.weight"][part * width + row] = 1
        for column in rows:
            marks["attn.proj.weight"][:, column] = 1
        assert torch.equal(
            torch.cat([m.flatten() for m in marks.values()]) == 1, layout.heads == head
        )
    for neuron in (0, 5, neurons - 1):
        marks = {name: torch.zeros_like(block.get_parameter(name)) for name in layout.names}
        marks["mlp.fc1.weight"][neuron], marks["mlp.fc2.weight"][:, neuron] = 1, 1
        assert torch.equal(
            torch.cat([m.flatten() for m in marks.values()]) == 1, layout.neurons == neuron
        )
    k = Untied(tiny).weights[0][layout.layers["k"]].view(width, width)
    assert torch.equal(k, block.attn.qkv.weight[width : 2 * width])
    vectors = sum(p.numel() for p in block.parameters() if p.ndim == 1)
    assert layout.layers["vectors"] == slice(layout.matrix_weights, layout.matrix_weights + vectors)


def test_masks_of_steps_are_those_of_a_masked_model(tiny_hybrid, images):
    untied, whole = Untied(tiny_hybrid), masks.full(tiny_hybrid)
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.rand(mask.shape, generator=generator) < 0.7 for name, mask in whole.items()
    }
    rows = torch.cat([drawn[name].flatten(1) for name in PLACES], 1)
    with torch.no_grad():
        with untied.pruned(rows):
            wanted = masks.masked(tiny_hybrid, Masks(drawn, whole.blocks))(images)
            torch.testing.assert_close(untied.model(images), wanted)
        with untied.pruned(rows[:2]):  # one for each of the two blocks
            cycled = Masks({name: mask[[0, 1] * 3] for name, mask in drawn.items()}, whole.blocks)
            wanted = masks.masked(tiny_hybrid, cycled)(images)
            torch.testing.assert_close(untied.model(images), wanted)
        with pytest.raises(RuntimeError, match="on purpose"), untied.pruned(rows):
            raise RuntimeError("on purpose")
        assert torch.equal(untied.model(images), tiny_hybrid(images))


def test_what_cannot_be_split_is_refused(tiny, stacked, make, images):
    pruned = copy.deepcopy(stacked)
    prune.random_unstructured(pruned.blocks[1].mlp.fc1, "weight", 0.5)
    with pytest.raises(
        UserError, match="step 2: gradients are split over blocks of qkv, proj, fc1 and fc2"
    ):
        Untied(pruned)
    uneven = copy.deepcopy(stacked)
    uneven.blocks[2] = make(name="vit_tiny_patch16_224", depth=3, mlp_ratio=2.0).blocks[2]
    with pytest.raises(UserError, match="the model's blocks differ in shape"):
        Untied(uneven)
    wider = copy.deepcopy(stacked)
    wider.blocks[1].extra = nn.Linear(3, 2)  # a matrix that belongs to no place
    with pytest.raises(UserError, match=r"step 2: .* this also has extra\.weight"):
        Untied(wider)
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="gradients hold NaN or infinite values"):
        Untied(broken).gradients(images, LABELS)


def test_wrong_shapes_are_refused(tiny, images):
    untied = Untied(tiny)
    with pytest.raises(TypeCheckError):
        untied.gradients(images, LABELS[:3])
    with pytest.raises(TypeCheckError), untied.pruned(torch.ones(4, dtype=torch.bool)):
        pass
