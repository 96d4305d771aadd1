"""Effect of ablating single units, at one step or all steps.

All ablated variants of a step are one batch, which starts at the state before that step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bvit_interp.metrics.checks import check_finite
from bvit_interp.models.stepping import State, answer, proceed, states
from bvit_interp.probes.ablate import ablate
from bvit_interp.probes.probe import Edit, Key, Probe

Unit = tuple[str, int]
"""Site (z or mlp_post) and number of a unit."""
Variants = Mapping[str, Bool[Tensor, "variants _"]]
"""Site -> the units that each variant keeps."""
Fill = Mapping[str, Float[Tensor, "steps tokens *unit"]]
"""Site -> what an ablated unit becomes at each step and token."""


@dataclass(frozen=True)
class AblationEffects:
    """Effects of ablating V units on the answers to a batch.

    Attributes
    ----------
    hits : 1 where the model without ablation is right, otherwise 0.
    changes : changes of accuracy, and of the true class's logit minus the mean logit, when a unit
        is ablated at step 1, ..., T, and at every step.
    """

    hits: Float[Tensor, " batch"]
    changes: Float[Tensor, "batch 2 steps_and_all variants"]


def ablation_effects(
    probe: Probe,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    units: Sequence[Unit],
    fill: Fill | None,
) -> AblationEffects:
    """Effect of ablating each of some units.

    Parameters
    ----------
    images, labels : normalised, and in the classes of the model; on its device.
    units : site and number of each.
    fill : mean activations by site; None to ablate to zero.
    """
    variants = single_units(probe, units, images.device)
    clean, *ablated = (
        _scores(logits, labels) for logits in ablated_logits(probe, images, variants, fill)
    )
    changes = (torch.stack(ablated) - clean).permute(3, 1, 0, 2)  # from (T + 1, 2, V, B)
    return AblationEffects(clean[0, 0], changes)


def single_units(
    probe: Probe, units: Sequence[Unit], device: torch.device | str = "cpu"
) -> dict[str, Bool[Tensor, "variants _"]]:
    """Masks of variants that each keep all units but one."""
    sizes = {"mlp_post": probe.num_neurons, "z": probe.num_heads}
    variants = {
        site: torch.ones(len(units), size, dtype=torch.bool, device=device)
        for site, size in sizes.items()
    }
    for row, (site, unit) in enumerate(units):
        variants[site][row, unit] = False
    return variants


def ablated_logits(
    probe: Probe,
    images: Float[Tensor, "batch 3 height width"],
    variants: Variants,
    fill: Fill | None,
) -> Iterator[Float[Tensor, "variants batch classes"]]:
    """Logits with units ablated.

    Parameters
    ----------
    images : normalised, on the model's device.
    variants : the units that each of V variants keeps.
    fill : what the other units become; None for zero.

    Yields
    ------
    Logits ``(V, B, C)``: without ablation (V = 1), then ablated at step 1, ..., T, then at every
    step.
    """
    before = list(states(probe.model, images))
    yield answer(probe.model, before[-1])[None]
    count = len(next(iter(variants.values())))
    for step in range(1, probe.num_steps + 1):
        yield _logits_from(probe, before[step - 1].repeated(count), [step], variants, fill)
    every_step = range(1, probe.num_steps + 1)
    yield _logits_from(probe, before[0].repeated(count), every_step, variants, fill)


def _logits_from(
    probe: Probe, start: State, steps: Sequence[int], variants: Variants, fill: Fill | None
) -> Tensor:
    """Logits ``(V, B, C)`` of a run that goes on from `start`, with units ablated at `steps`."""
    edits: dict[Key, Edit] = {
        (site, step): ablate(keep, None if fill is None else fill[site][step - 1])
        for step in steps
        for site, keep in variants.items()
    }
    with probe.edit(edits):
        logits = answer(probe.model, proceed(probe.model, start))
    return logits.unflatten(0, (len(next(iter(variants.values()))), -1))


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Hits, and the true class's logit minus the mean, ``(2, V, B)`` from logits ``(V, B, C)``."""
    check_finite(logits, "logits")
    true_logits = logits.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
    hits = (logits.argmax(-1) == labels).to(logits.dtype)
    return torch.stack([hits, true_logits - logits.mean(-1)]).double()
