"""Activation maximisation against Probe's activations, gradients written by hand, and a toy whose
optimum is known."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from bvit_interp.analyses.features import maximise as module
from bvit_interp.analyses.features.maximise import (
    Augmentation,
    Neurons,
    Recipe,
    Stream,
    maximise,
    maximise_in_chunks,
    total_variation,
)
from bvit_interp.errors import MissingExtra, UserError
from bvit_interp.probes.probe import Probe

PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


# ---- one neuron an image, at its own step ----------------------------------------------------------------


def test_at_one_step_it_is_the_probes_mlp_post_exactly(any_model, images):
    of, probe, neurons = (
        Neurons(any_model, *PLAIN),
        Probe(any_model),
        torch.tensor([0, 5, 100, 127]),
    )
    for step in range(1, probe.num_steps + 1):
        with torch.no_grad():
            mlp_post = probe.record(images, "mlp_post", step, tokens="patches")["mlp_post", step]
            found = of(images, neurons, torch.full((4,), step))
        assert mlp_post.shape[1] == 16  # CLS, distillation token and registers left out
        assert torch.equal(found, mlp_post[torch.arange(4), :, neurons].mean(1))


def test_steps_mixed_in_a_batch(any_model, images):
    of, probe = Neurons(any_model, *PLAIN), Probe(any_model)
    neurons, steps = torch.tensor([3, 7, 11, 100]), torch.tensor([2, probe.num_steps, 1, 2])
    with torch.no_grad():
        found = of(images, neurons, steps)
        every = probe.record(images, "mlp_post", tokens="patches")["mlp_post"]
    expected = every[torch.arange(4), steps - 1, :, neurons].mean(1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_neuron_before_gelu(any_model, images):
    of, probe, neurons = (
        Neurons(any_model, *PLAIN),
        Probe(any_model),
        torch.tensor([0, 5, 100, 127]),
    )
    with torch.no_grad():
        mlp_pre = probe.record(images, "mlp_pre", 2, tokens="patches")["mlp_pre", 2]
        found = of(images, neurons, torch.full((4,), 2), "mlp_pre")
    assert torch.equal(found, mlp_pre[torch.arange(4), :, neurons].mean(1))


def test_the_models_normalisation_comes_first(tiny, images):
    neurons, steps = torch.tensor([3, 7, 11, 100]), torch.tensor([2, 12, 1, 2])
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        found = Neurons(tiny, MEAN, STD)(images, neurons, steps)
        assert torch.equal(found, Neurons(tiny, *PLAIN)(normalised, neurons, steps))


def test_an_image_is_computed_up_to_its_step_and_no_further(tiny, images, monkeypatch):
    sizes = []

    def counted(model, state, advance=module.advance):
        sizes.append((state.step + 1, len(state.tokens)))
        return advance(model, state)

    monkeypatch.setattr(module, "advance", counted)
    Neurons(tiny, *PLAIN)(images, torch.zeros(4, dtype=torch.long), torch.tensor([3, 1, 5, 3]))
    assert sizes == [
        (1, 1),
        (1, 3),
        (2, 3),
        (3, 2),
        (3, 1),
        (4, 1),
        (5, 1),
    ]  # the leaving ones, then the others


def test_gradients_are_those_of_the_whole_forward_by_hand(tiny, images, by_hand):
    neurons, steps = torch.tensor([3, 7, 11, 100]), torch.tensor([2, 12, 1, 6])
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    sites = by_hand.run(tiny, theirs, [tiny.blocks[0]] * 12)
    sum(
        sites[t]["mlp_post"][i, 1:, f].mean()
        for i, (f, t) in enumerate(zip(neurons, steps, strict=True))
    ).backward()
    (found,) = torch.autograd.grad(Neurons(tiny, *PLAIN)(ours, neurons, steps).sum(), [ours])
    assert torch.allclose(found, theirs.grad, atol=1e-5)
    assert theirs.grad.abs().amax((1, 2, 3)).min() > 1e-4


def test_the_model_keeps_its_gradients_flags_and_weights(any_model):
    any_model.blocks.requires_grad_(False)  # flags of both kinds
    flags = {name: p.requires_grad for name, p in any_model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    of = Neurons(any_model, *PLAIN)
    maximise(of, torch.tensor([1]), torch.tensor([2]), Recipe(iterations=2))
    assert {name: p.requires_grad for name, p in any_model.named_parameters()} == flags
    assert len(set(flags.values())) == 2
    assert all(p.grad is None for p in any_model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    assert not any(p.requires_grad for p in of.model.parameters())
    own = {p.data_ptr() for p in any_model.parameters()}
    assert {p.data_ptr() for p in of.model.parameters()} <= own  # no copy of the weights


def test_what_is_not_there(tiny):
    of = Neurons(tiny, *PLAIN)
    assert of.check(127, -1) == 12
    with pytest.raises(UserError, match=r"no neuron 128; neurons: 0\.\.127"):
        of.check(128, 1)
    with pytest.raises(UserError, match=r"no step 13; steps: 1\.\.12"):
        of.check(0, 13)


# ---- the augmentations -------------------------------------------------------------------------------------


def test_an_augmentation_by_hand():
    images = torch.rand(2, 3, 5, 6)
    mean, spread, noise = torch.rand(4, 3, 1, 1), 1 + torch.rand(4, 3, 1, 1), torch.rand(4, 3, 5, 6)
    views = Augmentation(mean, spread, noise, (2, -1))(images)
    assert views.shape == (2, 4, 3, 5, 6)
    for k, c in np.ndindex(2, 4):
        moved = ((images[k] - mean[c]) / spread[c] + noise[c]).numpy()
        moved = np.roll(np.roll(moved, 2, axis=1), -1, axis=2)
        np.testing.assert_allclose(views[k, c], moved, rtol=1e-6)


def test_the_stream_has_the_distributions_and_the_schedule():
    recipe = Recipe(iterations=400)
    stream = Stream(recipe, (32, 32))
    draws = [stream.draw(i) for i in range(400)]
    mean = torch.stack([draw.mean for draw in draws])
    logs = torch.stack([draw.spread for draw in draws]).log()
    assert mean.shape == (400, 8, 3, 1, 1)
    for uniform in (mean, logs):  # U(-1, 1): bounds, mean 0, standard deviation 1 / sqrt 3
        assert -1 <= uniform.min() < -0.99
        assert 0.99 < uniform.max() <= 1
        assert abs(uniform.mean()) < 0.03
        assert abs(uniform.std() - 3**-0.5) < 0.02
    scales = torch.tensor([0.5 * (399 - i) / 400 for i in range(399)])
    unit = torch.stack([draw.noise for draw in draws[:-1]]) / scales.view(-1, 1, 1, 1, 1)
    assert abs(unit.mean()) < 0.03
    assert abs(unit.std() - 1) < 0.03
    assert (
        abs(unit[:100].std() - unit[-100:].std()) < 0.1
    )  # the schedule, not the draws, brings it down
    assert not draws[-1].noise.any()
    shifts = {number for draw in draws for number in draw.shift}
    assert shifts == set(range(-5, 6))  # 32 px at 224 px: 5 at 32 px


def test_noise_a_pixel_and_a_given_jitter():
    draw = Stream(Recipe(noise="pixel", jitter=0), (6, 5)).draw(0)
    assert draw.noise.shape == (8, 3, 6, 5)
    assert draw.noise[0, 0].unique().numel() == 30
    assert draw.shift == (0, 0)
    assert Stream(Recipe(), (224, 224)).jitter == 32


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


# ---- optimising ----------------------------------------------------------------------------------------


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
    of, recipe = Neurons(linear, MEAN, STD), Recipe(iterations=40, jitter=0, tv=0)
    start, (image,) = maximise(of, torch.tensor([9]), torch.tensor([1]), recipe)
    assert torch.equal(image, expected)
    # the shift moves the weights about: no pixel has a sign of its own
    _, (moved,) = maximise(
        of, torch.tensor([9]), torch.tensor([1]), Recipe(iterations=40, jitter=4, tv=0)
    )
    assert not torch.equal(moved, expected)
    assert 0.3 < start.mean() < 0.7


def test_before_gelu_a_silent_neuron_is_found(make):
    """Far below 0 GELU is flat: Ghiasi's ascent stays there, the one before GELU leaves it."""
    model, pair = make(num_steps=2), (torch.tensor([9]), torch.tensor([1]))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[9] = -9
    of, reached = Neurons(model, *PLAIN), {}
    for site in ("mlp_post", "mlp_pre"):
        start, image = maximise(of, *pair, Recipe(iterations=40, tv=0, site=site))
        reached[site] = of(image, *pair, "mlp_pre") - of(start[None], *pair, "mlp_pre")
    assert reached["mlp_pre"] > 0.5
    assert abs(reached["mlp_post"]) < 0.5 * reached["mlp_pre"]


def test_total_variation_alone_flattens(linear):
    of = Neurons(linear, *PLAIN)
    _, (image,) = maximise(of, torch.tensor([9]), torch.tensor([1]), Recipe(iterations=60, tv=1e6))
    start, (free,) = maximise(of, torch.tensor([9]), torch.tensor([1]), Recipe(iterations=60, tv=0))
    assert total_variation(image) < 0.2 * total_variation(start) < total_variation(free)


@pytest.mark.parametrize("kind", ["pixel", "fourier"])
def test_the_activation_rises(tiny, kind):
    """Beyond what the start image has, for every pair, in the mean over colour shifts; the images
    are pictures."""
    if kind == "fourier":
        pytest.importorskip("lucent")
    of, neurons, steps = Neurons(tiny, MEAN, STD), torch.tensor([5, 5, 72]), torch.tensor([1, 4, 2])
    start, images = maximise(of, neurons, steps, Recipe(iterations=60, image=kind))
    assert start.shape == (3, 32, 32)
    assert images.shape == (3, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    fresh = Stream(Recipe(copies=64, seed=9), (32, 32)).draw(399)  # colours not seen, no noise
    with torch.no_grad():
        before, after = (
            torch.stack([of(views, neurons, steps) for views in fresh(these).unbind(1)]).mean(0)
            for these in (start.expand_as(images), images)
        )
    assert (after > before + 0.05).all()


@pytest.mark.parametrize("kind", ["pixel", "fourier"])
def test_a_pair_does_not_depend_on_the_others(make, kind):
    if kind == "fourier":
        pytest.importorskip("lucent")
    of, recipe = Neurons(make().double(), MEAN, STD), Recipe(iterations=5, image=kind)
    neurons, steps = torch.tensor([5, 5, 72, 5]), torch.tensor([3, 1, 2, 3])
    _, together = maximise(of, neurons, steps, recipe)
    tolerance = 1e-8 if kind == "pixel" else 1e-4  # lucent computes in float32
    for i in range(3):
        _, (alone,) = maximise(of, neurons[i : i + 1], steps[i : i + 1], recipe)
        assert torch.allclose(together[i], alone.to(together), atol=tolerance)
    assert torch.allclose(
        together[0], together[3], atol=tolerance
    )  # the same start and augmentations
    assert (together[0] - together[1]).abs().max() > 0.01


def test_the_seed_decides_and_the_global_generators_are_left_alone(tiny):
    of, pair = Neurons(tiny, *PLAIN), (torch.tensor([5]), torch.tensor([2]))
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  the one to protect
    first, second, other = (
        maximise(of, *pair, Recipe(iterations=3, seed=seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    if "lucent" in sys.modules:
        maximise(of, *pair, Recipe(iterations=1, image="fourier"))
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_under_no_grad_and_on_an_unroll_of_more_steps(tiny):
    from bvit_interp.models.unroll import unroll

    of = Neurons(unroll(tiny, steps=14), *PLAIN)
    with torch.no_grad():
        start, (image,) = maximise(of, torch.tensor([5]), torch.tensor([14]), Recipe(iterations=1))
    assert not torch.equal(start, image)


def test_chunks_give_the_images_of_one_batch(tiny):
    of, recipe = Neurons(tiny, *PLAIN), Recipe(iterations=2)
    neurons, steps = torch.arange(5), torch.tensor([3, 1, 2, 1, 4])
    start, whole = maximise(of, neurons, steps, recipe)
    parts = list(maximise_in_chunks(of, neurons, steps, recipe, 2, "test"))
    assert [part for part, _, _ in parts] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert all(torch.equal(begun, start) for _, begun, _ in parts)
    assert torch.allclose(torch.cat([images for *_, images in parts]), whole, atol=1e-3)
    assert list(maximise_in_chunks(of, neurons[:0], steps[:0], recipe, 2, "test")) == []


def test_out_of_memory_halves_the_images(tiny, monkeypatch):
    of, recipe, sizes = Neurons(tiny, *PLAIN), Recipe(iterations=1), []
    neurons, steps = torch.arange(5), torch.tensor([3, 1, 2, 1, 4])
    start, whole = maximise(of, neurons, steps, recipe)

    def scarce(of, neurons, *rest, plain=module._maximise):
        sizes.append(len(neurons))
        if len(neurons) > limit:
            raise torch.OutOfMemoryError
        return plain(of, neurons, *rest)

    monkeypatch.setattr(module, "_maximise", scarce)
    limit = 2
    begun, images = maximise(of, neurons, steps, recipe)
    assert sizes == [5, 2, 3, 1, 2]
    assert torch.equal(begun, start)
    assert torch.allclose(images, whole, atol=1e-3)
    limit = 0
    with pytest.raises(UserError, match="a single|one image of 8 copies"):
        maximise(of, neurons[:1], steps[:1], recipe)


def test_without_lucent(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lucent", None)
    monkeypatch.setitem(sys.modules, "lucent.optvis", None)
    with pytest.raises(
        MissingExtra, match=r"torch-lucent is not installed: pip install 'bvit-interp\[viz\]'"
    ):
        maximise(
            Neurons(tiny, *PLAIN), torch.tensor([0]), torch.tensor([1]), Recipe(image="fourier")
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"copies": 0}, "copies must be >= 1, got 0"),
        ({"jitter": -1}, "jitter must be >= 0, got -1"),
        ({"tv": -0.1}, "tv must be >= 0, got -0.1"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"weight": math.nan}, "weight must be > 0, got nan"),
        ({"noise": "salt"}, "noise must be one of channel, pixel, got 'salt'"),
        ({"site": "z"}, "site must be one of mlp_post, mlp_pre, got 'z'"),
        ({"image": "jpeg"}, "image must be one of pixel, fourier, got 'jpeg'"),
    ],
)
def test_recipes_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Recipe(**options)
