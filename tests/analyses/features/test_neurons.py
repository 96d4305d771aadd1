"""Activations of chosen neurons against Probe's, and their gradients against a forward by hand."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from bvit_interp.analyses.features import neurons as module
from bvit_interp.analyses.features.neurons import NeuronActivations
from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe

PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_at_one_step_it_is_the_probes_mlp_post_exactly(any_model, images):
    activations, probe, neurons = (
        NeuronActivations(any_model, *PLAIN),
        Probe(any_model),
        torch.tensor([0, 5, 100, 127]),
    )
    for step in range(1, probe.num_steps + 1):
        with torch.no_grad():
            mlp_post = probe.record(images, "mlp_post", step, tokens="patches")["mlp_post", step]
            found = activations(images, neurons, torch.full((4,), step))
        assert mlp_post.shape[1] == 16  # CLS, distillation token and registers left out
        assert torch.equal(found, mlp_post[torch.arange(4), :, neurons].mean(1))


def test_steps_mixed_in_a_batch(any_model, images):
    activations, probe = NeuronActivations(any_model, *PLAIN), Probe(any_model)
    neurons, steps = torch.tensor([3, 7, 11, 100]), torch.tensor([2, probe.num_steps, 1, 2])
    with torch.no_grad():
        found = activations(images, neurons, steps)
        every = probe.record(images, "mlp_post", tokens="patches")["mlp_post"]
    expected = every[torch.arange(4), steps - 1, :, neurons].mean(1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_neuron_before_gelu(any_model, images):
    activations, probe, neurons = (
        NeuronActivations(any_model, *PLAIN),
        Probe(any_model),
        torch.tensor([0, 5, 100, 127]),
    )
    with torch.no_grad():
        mlp_pre = probe.record(images, "mlp_pre", 2, tokens="patches")["mlp_pre", 2]
        found = activations(images, neurons, torch.full((4,), 2), "mlp_pre")
    assert torch.equal(found, mlp_pre[torch.arange(4), :, neurons].mean(1))


def test_the_models_normalisation_comes_first(tiny, images):
    neurons, steps = torch.tensor([3, 7, 11, 100]), torch.tensor([2, 12, 1, 2])
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        found = NeuronActivations(tiny, MEAN, STD)(images, neurons, steps)
        assert torch.equal(found, NeuronActivations(tiny, *PLAIN)(normalised, neurons, steps))


def test_an_image_is_computed_up_to_its_step_and_no_further(tiny, images, monkeypatch):
    sizes = []

    def counted(model, state, advance=module.advance):
        sizes.append((state.step + 1, len(state.tokens)))
        return advance(model, state)

    monkeypatch.setattr(module, "advance", counted)
    NeuronActivations(tiny, *PLAIN)(
        images, torch.zeros(4, dtype=torch.long), torch.tensor([3, 1, 5, 3])
    )
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
    (found,) = torch.autograd.grad(
        NeuronActivations(tiny, *PLAIN)(ours, neurons, steps).sum(), [ours]
    )
    assert torch.allclose(found, theirs.grad, atol=1e-5)
    assert theirs.grad.abs().amax((1, 2, 3)).min() > 1e-4


def test_what_is_not_there(tiny):
    activations = NeuronActivations(tiny, *PLAIN)
    assert activations.check(127, -1) == 12
    with pytest.raises(UserError, match=r"no neuron 128; neurons: 0\.\.127"):
        activations.check(128, 1)
    with pytest.raises(UserError, match=r"no step 13; steps: 1\.\.12"):
        activations.check(0, 13)


def test_wrong_shapes_are_refused(tiny, images):
    activations, neurons, steps = NeuronActivations(tiny, *PLAIN), torch.arange(4), torch.ones(4)
    for wrong in ((images, neurons, steps), (images, neurons[:3], steps.long()), (images[0],) * 3):
        with pytest.raises(jaxtyping.TypeCheckError):
            activations(*wrong)
