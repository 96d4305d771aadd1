"""Optimised images: a toy whose optimum is known, rising activations, seeds, chunks and memory."""

from __future__ import annotations

import math
import sys

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

from bvit_interp.analyses.features import maximise as module
from bvit_interp.analyses.features.augmentations import AugmentationSequence
from bvit_interp.analyses.features.maximise import maximise, maximise_in_chunks, total_variation
from bvit_interp.analyses.features.neurons import NeuronActivations
from bvit_interp.analyses.features.recipe import Recipe
from bvit_interp.errors import MissingExtra, UserError
from bvit_interp.models.unroll import unroll

PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_the_model_keeps_its_gradients_flags_and_weights(any_model):
    any_model.blocks.requires_grad_(False)  # flags of both kinds
    flags = {name: p.requires_grad for name, p in any_model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    activations = NeuronActivations(any_model, *PLAIN)
    maximise(activations, torch.tensor([1]), torch.tensor([2]), Recipe(iterations=2))
    assert {name: p.requires_grad for name, p in any_model.named_parameters()} == flags
    assert len(set(flags.values())) == 2
    assert all(p.grad is None for p in any_model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    assert not any(p.requires_grad for p in activations.model.parameters())
    own = {p.data_ptr() for p in any_model.parameters()}
    assert {p.data_ptr() for p in activations.model.parameters()} <= own  # no copy of the weights


def test_total_variation_against_a_loop():
    images = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    expected = np.zeros(2)
    for k, c in np.ndindex(2, 3):
        x = images[k, c].numpy()
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            squares = 0.0
            for i, j in np.ndindex(5, 4):
                if i + down < 5 and 0 <= j + right < 4:
                    squares += (x[i + down, j + right] - x[i, j]) ** 2
            expected[k] += math.sqrt(squares) / 3
    np.testing.assert_allclose(total_variation(images), expected, rtol=1e-12)
    assert total_variation(torch.ones(3, 4, 4)) == 0


@pytest.fixture
def linear(make):
    """A model whose neurons at step 1 are linear in every patch: no attention, no norm, no GELU."""
    model = make(num_steps=2)
    (block,) = model.blocks.children()
    block.norm2, block.mlp.act = nn.Identity(), nn.Identity()
    nn.init.zeros_(block.attn.proj.weight)
    return model


def test_a_linear_neuron_drives_every_pixel_to_its_bound(linear):
    """Colour shift and noise keep the sign of each pixel's weight, which says where the optimum
    is."""
    (block,) = linear.blocks.children()
    kernel = torch.einsum("d,dchw->chw", block.mlp.fc1.weight[9], linear.patch_embed.proj.weight)
    expected = (kernel > 0).float().repeat(1, 4, 4)
    activations, recipe = (
        NeuronActivations(linear, MEAN, STD),
        Recipe(iterations=40, jitter=0, tv_weight=0),
    )
    start, (image,) = maximise(activations, torch.tensor([9]), torch.tensor([1]), recipe)
    assert torch.equal(image, expected)
    # the shift moves the weights about: no pixel has a sign of its own
    _, (moved,) = maximise(
        activations,
        torch.tensor([9]),
        torch.tensor([1]),
        Recipe(iterations=40, jitter=4, tv_weight=0),
    )
    assert not torch.equal(moved, expected)
    assert 0.3 < start.mean() < 0.7


def test_before_gelu_a_silent_neuron_is_found(make):
    """Far below 0 GELU is flat: Ghiasi's ascent stays there, the one before GELU leaves it."""
    model, pair = make(num_steps=2), (torch.tensor([9]), torch.tensor([1]))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[9] = -9
    activations, reached = NeuronActivations(model, *PLAIN), {}
    for site in ("mlp_post", "mlp_pre"):
        start, image = maximise(activations, *pair, Recipe(iterations=40, tv_weight=0, site=site))
        reached[site] = activations(image, *pair, "mlp_pre") - activations(
            start[None], *pair, "mlp_pre"
        )
    assert reached["mlp_pre"] > 0.5
    assert abs(reached["mlp_post"]) < 0.5 * reached["mlp_pre"]


def test_total_variation_alone_flattens(linear):
    activations = NeuronActivations(linear, *PLAIN)
    _, (image,) = maximise(
        activations, torch.tensor([9]), torch.tensor([1]), Recipe(iterations=60, tv_weight=1e6)
    )
    start, (free,) = maximise(
        activations, torch.tensor([9]), torch.tensor([1]), Recipe(iterations=60, tv_weight=0)
    )
    assert total_variation(image) < 0.2 * total_variation(start) < total_variation(free)


@pytest.mark.parametrize("kind", ["pixel", "fourier"])
def test_the_activation_rises(tiny, kind):
    """Beyond what the start image has, for every pair, in the mean over colour shifts; the images
    are pictures."""
    if kind == "fourier":
        pytest.importorskip("lucent")
    activations, neurons, steps = (
        NeuronActivations(tiny, MEAN, STD),
        torch.tensor([5, 5, 72]),
        torch.tensor([1, 4, 2]),
    )
    start, images = maximise(
        activations, neurons, steps, Recipe(iterations=60, parametrisation=kind)
    )
    assert start.shape == (3, 32, 32)
    assert images.shape == (3, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    fresh = AugmentationSequence(Recipe(n_copies=64, seed=9), (32, 32)).draw(
        399
    )  # colours not seen, no noise
    with torch.no_grad():
        before, after = (
            torch.stack(
                [activations(views, neurons, steps) for views in fresh(these).unbind(1)]
            ).mean(0)
            for these in (start.expand_as(images), images)
        )
    assert (after > before + 0.05).all()


@pytest.mark.parametrize("kind", ["pixel", "fourier"])
def test_a_pair_does_not_depend_on_the_others(make, kind):
    if kind == "fourier":
        pytest.importorskip("lucent")
    activations, recipe = (
        NeuronActivations(make().double(), MEAN, STD),
        Recipe(iterations=5, parametrisation=kind),
    )
    neurons, steps = torch.tensor([5, 5, 72, 5]), torch.tensor([3, 1, 2, 3])
    _, together = maximise(activations, neurons, steps, recipe)
    tolerance = 1e-8 if kind == "pixel" else 1e-4  # lucent computes in float32
    for i in range(3):
        _, (alone,) = maximise(activations, neurons[i : i + 1], steps[i : i + 1], recipe)
        assert torch.allclose(together[i], alone.to(together), atol=tolerance)
    assert torch.allclose(
        together[0], together[3], atol=tolerance
    )  # the same start and augmentations
    assert (together[0] - together[1]).abs().max() > 0.01


def test_the_seed_decides_and_the_global_generators_are_left_alone(tiny):
    activations, pair = NeuronActivations(tiny, *PLAIN), (torch.tensor([5]), torch.tensor([2]))
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  the one to protect
    first, second, other = (
        maximise(activations, *pair, Recipe(iterations=3, seed=seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    if "lucent" in sys.modules:
        maximise(activations, *pair, Recipe(iterations=1, parametrisation="fourier"))
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_under_no_grad_and_on_an_unroll_of_more_steps(tiny):
    activations = NeuronActivations(unroll(tiny, steps=14), *PLAIN)
    with torch.no_grad():
        start, (image,) = maximise(
            activations, torch.tensor([5]), torch.tensor([14]), Recipe(iterations=1)
        )
    assert not torch.equal(start, image)


def test_chunks_give_the_images_of_one_batch(tiny):
    activations, recipe = NeuronActivations(tiny, *PLAIN), Recipe(iterations=2)
    neurons, steps = torch.arange(5), torch.tensor([3, 1, 2, 1, 4])
    start, whole = maximise(activations, neurons, steps, recipe)
    parts = list(maximise_in_chunks(activations, neurons, steps, recipe, 2, "test"))
    assert [part for part, _, _ in parts] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert all(torch.equal(begun, start) for _, begun, _ in parts)
    assert torch.allclose(torch.cat([images for *_, images in parts]), whole, atol=1e-3)
    assert list(maximise_in_chunks(activations, neurons[:0], steps[:0], recipe, 2, "test")) == []


def test_out_of_memory_halves_the_images(tiny, monkeypatch):
    activations, recipe, sizes = NeuronActivations(tiny, *PLAIN), Recipe(iterations=1), []
    neurons, steps = torch.arange(5), torch.tensor([3, 1, 2, 1, 4])
    start, whole = maximise(activations, neurons, steps, recipe)

    def scarce(activations, neurons, *rest, plain=module._maximise):
        sizes.append(len(neurons))
        if len(neurons) > limit:
            raise torch.OutOfMemoryError
        return plain(activations, neurons, *rest)

    monkeypatch.setattr(module, "_maximise", scarce)
    limit = 2
    begun, images = maximise(activations, neurons, steps, recipe)
    assert sizes == [5, 2, 3, 1, 2]
    assert torch.equal(begun, start)
    assert torch.allclose(images, whole, atol=1e-3)
    limit = 0
    with pytest.raises(UserError, match="a single|one image of 8 copies"):
        maximise(activations, neurons[:1], steps[:1], recipe)


def test_the_fourier_start_is_lucents_image_of_small_random_numbers(make):
    param = pytest.importorskip("lucent.optvis.param")
    activations = NeuronActivations(make(num_steps=1), *PLAIN)
    recipe = Recipe(iterations=1, n_copies=1, parametrisation="fourier", seed=3)
    start, _ = maximise(activations, torch.tensor([0]), torch.tensor([1]), recipe)
    (spectrum,), render = param.image(32, 32, batch=1)
    generator = torch.Generator().manual_seed(3)
    spectrum.data[0] = 0.01 * torch.randn(3, 32, 17, 2, generator=generator)
    torch.testing.assert_close(start, render().detach().cpu()[0])


def test_without_lucent(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lucent", None)
    monkeypatch.setitem(sys.modules, "lucent.optvis", None)
    with pytest.raises(
        MissingExtra, match=r"torch-lucent is not installed: pip install 'bvit-interp\[viz\]'"
    ):
        maximise(
            NeuronActivations(tiny, *PLAIN),
            torch.tensor([0]),
            torch.tensor([1]),
            Recipe(parametrisation="fourier"),
        )


def test_one_iteration_by_hand(make):
    """Adam's first step is the learning rate against the sign of the gradient of the loss."""
    model = make(num_steps=2).double()
    activations = NeuronActivations(model, *PLAIN)
    recipe = Recipe(iterations=1, n_copies=2, lr=0.01, tv_weight=3.0, activation_weight=0.5)
    pair = torch.tensor([9]), torch.tensor([2])
    start, (image,) = maximise(activations, *pair, recipe)
    uniform = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(start, uniform.double())
    pixels = start.clone().requires_grad_()
    copies = AugmentationSequence(recipe, (32, 32)).draw(0)(pixels[None])[0]
    fired = activations(copies, torch.tensor([9, 9]), torch.tensor([2, 2])).mean()
    variation = 5e-4 * 3.0 * 224 / 32 * total_variation(copies).mean()
    (gradient,) = torch.autograd.grad(variation - 0.5 * fired, [pixels])
    expected = (start - 0.01 * gradient / (gradient.abs() + 1e-8)).clamp(0, 1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-9)


def test_wrong_shapes_are_refused(tiny):
    activations = NeuronActivations(tiny, *PLAIN)
    with pytest.raises(jaxtyping.TypeCheckError):
        maximise(activations, torch.tensor([1, 2]), torch.tensor([1]), Recipe(iterations=1))
    with pytest.raises(jaxtyping.TypeCheckError):
        total_variation(torch.rand(4, 4))
