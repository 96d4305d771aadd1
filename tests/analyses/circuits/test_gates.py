"""Gates against surgery on the weights, slopes against finite differences."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.circuits.fit import Fit
from bvit_interp.analyses.circuits.gates import Gates
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll


def scaled(model, shares, groups):
    """The model with its heads and groups of neurons scaled in weights of every step's own."""
    view = unroll(model)
    for block, share in zip(view.blocks, shares, strict=True):
        heads = block.attn.num_heads
        neurons = block.mlp.fc2.in_features
        columns = {
            "attn.proj": share[:heads].repeat_interleave(block.attn.proj.in_features // heads),
            "mlp.fc2": torch.stack([share[heads + i * groups // neurons] for i in range(neurons)]),
        }
        for name, column in columns.items():
            parent, _, last = name.partition(".")
            linear = copy.deepcopy(block.get_submodule(name))
            linear.weight = torch.nn.Parameter(linear.weight.detach() * column)
            setattr(getattr(block, parent), last, linear)
    return view


def random_gates(gates, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, gates.steps, gates.units, generator=generator) < 0.7


def test_closed_gates_are_columns_of_zeros(any_model, images):
    gates = Gates(any_model, 5)
    assert gates.units == gates.probe.num_heads + 5
    keep = random_gates(gates)
    with torch.no_grad():
        found = gates.logits(images, keep.float())
        for logits, shares in zip(found, keep, strict=True):
            expected = scaled(any_model, shares.float(), 5)(images)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_closed_gates_give_the_mean_over_the_fit_images(any_model, images):
    gates = Fit(Gates(any_model, 3), images, mean=True, batch_size=3).gates
    keep = random_gates(gates, 1)
    sites = ["z", "mlp_post"]
    heads, neurons = gates.probe.num_heads, gates.probe.num_neurons
    with torch.no_grad():
        _, clean = gates.probe.run(images, sites)

        def by_hand(activation, address):
            new = activation.clone()
            for unit in range(heads if address.site == "z" else neurons):
                place = unit if address.site == "z" else heads + unit * 3 // neurons
                if not keep[0, address.step - 1, place]:
                    new[:, :, unit] = clean[address.site, address.step].mean(0)[:, unit]
            return new

        with gates.probe.edit(
            {(site, t): by_hand for site in sites for t in range(1, gates.steps + 1)}
        ):
            expected = gates.probe(images)
        torch.testing.assert_close(
            gates.logits(images, keep.float())[0], expected, rtol=1e-3, atol=1e-4
        )


def test_open_gates_are_the_model(any_model, images):
    gates = Fit(Gates(any_model, 4), images, mean=True).gates
    with torch.no_grad():
        logits = gates.logits(images, torch.ones(2, gates.steps, gates.units))
        torch.testing.assert_close(
            logits, any_model(images).expand_as(logits), rtol=1e-5, atol=1e-5
        )


def test_slopes_are_finite_differences(make, images):
    """In float64: of the weights' columns scaled by 1 -+ 1e-5, image by image."""
    model, images = make(num_steps=3).double(), images.double()
    gates = Gates(model, 2)
    found = gates.slopes(images)
    assert found.shape == (4, 3, 6)
    answers = model(images).argmax(-1)
    with torch.no_grad():
        for t, unit in itertools.product(range(3), range(6)):
            ends = []
            for share in (1 + 1e-5, 1 - 1e-5):
                shares = torch.ones(3, 6, dtype=torch.float64)
                shares[t, unit] = share
                ends.append(
                    scaled(model, shares, 2)(images).log_softmax(-1)[torch.arange(4), answers]
                )
            assert torch.allclose(
                (ends[0] - ends[1]) / 2e-5, found[:, t, unit].double(), rtol=1e-3, atol=1e-6
            )


def test_gates_with_a_fill_leave_the_first_ones_as_they_are(tiny, images):
    gates = Gates(tiny, 4)
    keep = random_gates(gates, 1).float()
    with torch.no_grad():
        before = gates.logits(images, keep)
        filled = gates.with_fill({site: sums / 4 for site, sums in gates.sums(images).items()})
        assert not torch.allclose(filled.logits(images, keep), before, atol=1e-3)
        assert torch.equal(gates.logits(images, keep), before)
    with pytest.raises(ValueError, match="fill of z"):
        gates.with_fill({})


def test_what_cannot_be_done_is_refused(tiny, images):
    with pytest.raises(UserError, match="groups must be 1..128, the neurons of a step, got 129"):
        Gates(tiny, 129)
    gates = Gates(tiny, 128)
    assert gates.units == 132
    with pytest.raises(TypeCheckError):
        gates.logits(images, torch.ones(12, 132))  # the axis of variants is missing
    with pytest.raises(TypeCheckError):
        gates.slopes(images[0])
