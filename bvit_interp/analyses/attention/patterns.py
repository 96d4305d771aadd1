"""Attention entropy, distance, shares and rollout of every step.

The attention pattern of a step is reduced in a hook and then freed: at any time one pattern is in
memory, B x H x N x N numbers, and for rollout one N x N matrix per image. Fused attention stays on
and the output of the model does not change. In a model with a memory the pattern is that of the
step's own block, not of its inner updates.

Attention distance: Dosovitskiy et al. (2021, https://arxiv.org/abs/2010.11929), Raghu et al. (2021,
https://arxiv.org/abs/2108.08810). Rollout: Abnar & Zuidema (2020,
https://arxiv.org/abs/2005.00928).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite
from bvit_interp.probes.probe import Probe
from bvit_interp.probes.saliency import rollout_step
from bvit_interp.vocabulary import Address


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of the attention of B images, float64."""

    metrics: dict[str, Float[Tensor, "batch steps heads"]]
    """Name -> value of each head; see `metric_names`."""
    maps: Float[Tensor, "batch steps heads patches"] | None
    """Attention of CLS on the patches; None without a CLS token."""
    rollout: Float[Tensor, "batch steps tokens"] | None
    """CLS row of the rollout up to each step, over all tokens; None without a CLS token."""


def metric_names(probe: Probe) -> list[str]:
    """Names of what `attention_statistics` computes for each step and head.

    - ``attention_distance``: mean distance between a patch and the patches it attends to, weighted
      by attention, in patches;
    - ``attention_entropy``: entropy of the CLS row over all tokens, nats;
    - ``cls_to_KIND``: attention of CLS on that kind of token, 0..1; they add up to 1;
    - ``patches_to_cls``: attention of a patch on CLS, mean over patches, 0..1.

    A model without a CLS token has the distance alone.
    """
    kinds = probe.kinds()
    if "cls" not in kinds:
        return ["attention_distance"]
    to_kinds = [f"cls_to_{kind}" for kind in kinds]
    return ["attention_distance", "attention_entropy", *to_kinds, "patches_to_cls"]


def uniform_value(probe: Probe, metric: str, step: int = 1) -> float:
    """Value of a metric for uniform attention, its null.

    Parameters
    ----------
    metric : one of `metric_names`, or ``rollout_entropy``: the entropy of the rollout up to `step`.
        With uniform attention the rollout is (I / 2 + J / 2)^t = I / 2^t + (1 - 1 / 2^t) J, where
        every entry of J is 1 / N.
    step : used for ``rollout_entropy`` alone.
    """
    kinds = probe.kinds()
    tokens = kinds["patches"].stop
    if metric == "attention_distance":
        return float(metrics.grid_distances(probe.grid).mean())
    if metric == "attention_entropy":
        return math.log(tokens)
    if metric == "rollout_entropy":
        row = torch.full((tokens,), (1 - 0.5**step) / tokens, dtype=torch.float64)
        row[0] += 0.5**step
        return float(metrics.entropy(row))
    keys = kinds["cls" if metric == "patches_to_cls" else metric.removeprefix("cls_to_")]
    return (keys.stop - keys.start) / tokens


def attention_statistics(
    probe: Probe, images: Float[Tensor, "batch channels height width"]
) -> AttentionStatistics:
    """Run images of the model's size and reduce the attention pattern of every step.

    Raises
    ------
    UserError
        For NaN in a pattern, images of another size, and a model whose attention is normed or gated
        before its projection.
    """
    kinds = probe.kinds()
    tokens = kinds["patches"].stop
    distances = metrics.grid_distances(probe.grid).to(images.device, torch.float32)
    by_step: list[dict[str, Tensor]] = []
    maps: list[Tensor] = []
    rollout: list[Tensor] = []
    mixed: Tensor | None = None

    def reduce(pattern: Tensor, address: Address) -> None:
        nonlocal mixed
        pattern = pattern.float()
        if pattern.shape[-1] != tokens:
            raise UserError(
                f"images of the model's size give {tokens} tokens, got {pattern.shape[-1]}"
            )
        check_finite(pattern, f"attention weights of step {address.step}")
        by_step.append(_reduce_step(pattern, kinds, distances))
        if "cls" in kinds:
            mixed = rollout_step(pattern, mixed)
            maps.append(pattern[:, :, kinds["cls"].start, kinds["patches"]].double())
            rollout.append(mixed[:, kinds["cls"].start].double())

    with (
        torch.inference_mode(),
        probe.edit({("pattern", step): reduce for step in range(1, probe.num_steps + 1)}),
    ):
        probe(images)
    return AttentionStatistics(
        {name: torch.stack([step[name] for step in by_step], 1) for name in metric_names(probe)},
        torch.stack(maps, dim=1) if maps else None,
        torch.stack(rollout, dim=1) if rollout else None,
    )


def _reduce_step(
    pattern: Float[Tensor, "batch heads tokens tokens"],
    kinds: dict[str, slice],
    distances: Float[Tensor, "patches patches"],
) -> dict[str, Float[Tensor, "batch heads"]]:
    """The metrics of one step, float64."""
    patches = kinds["patches"]
    among = pattern[:, :, patches, patches]
    # a patch without attention on patches has no distance
    mean_distances = (among * distances).sum(-1) / among.sum(-1)
    values = {"attention_distance": mean_distances.double().nanmean(-1)}
    if "cls" in kinds:
        cls = kinds["cls"].start
        row = pattern[:, :, cls].double()
        values["attention_entropy"] = metrics.entropy(row)
        values |= {f"cls_to_{kind}": row[..., keys].sum(-1) for kind, keys in kinds.items()}
        values["patches_to_cls"] = pattern[:, :, patches, cls].double().mean(-1)
    return values
