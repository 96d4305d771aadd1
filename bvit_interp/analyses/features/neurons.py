"""Activations of chosen neurons at chosen steps, differentiable in the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import State, advance, embed
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.probes.sites import Step
from bvit_interp.vocabulary import check_step


class _Recorded(Exception):
    """The neurons are recorded: the rest of the step is not needed."""


class NeuronActivations:
    """One neuron per image, each at a step of its own; an image is computed up to that step.

    Parameters
    ----------
    model : a `BViT`, a timm `VisionTransformer`, or an unroll of one. It does not change: the
        activations come from a tied unroll whose parameters share its storage and have no gradient.
    mean, std : of the model's normalisation, per channel of an image in 0..1.
    """

    def __init__(self, model: Model, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model = _without_gradients(unroll(model))
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self._steps = [Step(block) for block in self.model.blocks]
        self.num_steps, self.num_neurons = len(self._steps), Probe(self.model).num_neurons

    def check(self, neuron: int, step: int) -> int:
        """The step counted from 1, or a UserError that names the valid neurons or steps."""
        if not 0 <= neuron < self.num_neurons:
            raise UserError(f"no neuron {neuron}; neurons: 0..{self.num_neurons - 1}")
        return check_step(step, self.num_steps)

    def __call__(
        self,
        images: Float[Tensor, "batch 3 height width"],
        neurons: Int[Tensor, " batch"],
        steps: Int[Tensor, " batch"],
        site: str = "mlp_post",
    ) -> Float[Tensor, " batch"]:
        """Mean of each image's neuron over the patches, on the model's device.

        CLS and registers are left out.

        Parameters
        ----------
        images : in 0..1, before the model's normalisation.
        neurons : neuron of each image, from 0.
        steps : step of each image, from 1.
        site : "mlp_post" or "mlp_pre".
        """
        parameter = next(self.model.parameters())
        images = images.to(parameter)
        neurons, steps = neurons.to(parameter.device), steps.to(parameter.device)
        normalised = (images - self._mean.to(images)) / self._std.to(images)
        # the images of the last steps first: those that leave are a slice at the end
        order = steps.argsort(descending=True, stable=True)
        neurons, last_steps = neurons[order], steps[order].tolist()
        state = embed(self.model, normalised[order])
        activations: list[Tensor] = []
        for step in range(1, max(last_steps) + 1):
            count, staying = len(state.tokens), sum(last > step for last in last_steps)
            if staying < count:
                leaving = self._record(state[staying:], neurons[staying:count], site)
                activations.insert(0, leaving)
                state = state[:staying]
            if staying:
                state = advance(self.model, state)
        return torch.cat(activations)[order.argsort()]

    def _record(self, state: State, neurons: Tensor, site: str) -> Tensor:
        """The neurons in the step after `state`; the step ends as soon as they are recorded."""
        recorded: list[Tensor] = []

        def keep(activations: Tensor) -> None:
            index = neurons[:, None, None].expand(-1, activations.shape[1], 1)
            recorded.append(activations.gather(-1, index)[..., 0])
            raise _Recorded

        patches = slice(self.model.num_prefix_tokens, None)
        handle = self._steps[state.step].record(site, patches, keep)
        try:
            advance(self.model, state)
        except _Recorded:
            return recorded[0].mean(1)
        finally:
            handle.remove()
        raise UserError("the step ended without its neurons; is a block replaced?")


def _without_gradients(unrolled: Model) -> Model:
    """The unroll itself, with parameters of the same storage that have no gradient."""
    frozen: dict[int, nn.Parameter] = {}
    for module in unrolled.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                copy = nn.Parameter(parameter.detach(), requires_grad=False)
                module._parameters[name] = frozen.setdefault(id(parameter), copy)
    return unrolled
