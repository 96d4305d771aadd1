"""How each step attends: entropy, distance and masses of its pattern, and rollout, one full pattern
at a time.

The pattern of a step is reduced in its hook and forgotten: B x H x N x N numbers at once however
many steps there are, with one N x N matrix an image for rollout. Fused attention stays on and the
output is untouched. Of a model with a memory this is the step's own block, not its inner updates.

Attention distance: Dosovitskiy et al. (2021, https://arxiv.org/abs/2010.11929), Raghu et al. (2021,
https://arxiv.org/abs/2108.08810). Rollout: Abnar & Zuidema (2020,
https://arxiv.org/abs/2005.00928).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples
from bvit_interp.errors import DataError, UserError
from bvit_interp.probes.probe import Probe
from bvit_interp.probes.saliency import attention
from bvit_interp.vocabulary import TOKEN_WORDS, Address


@dataclass(frozen=True)
class Attended:
    """The attention of a batch, reduced; float64.

    Parameters
    ----------
    statistics : name -> ``(B, T, H)``: those of `statistics`.
    maps : CLS row on the patches ``(B, T, H, P)``; None without a CLS token.
    rollout : CLS row of the rollout up to each step, on all tokens ``(B, T, N)``; None without a
        CLS token.
    """

    statistics: dict[str, Tensor]
    maps: Tensor | None
    rollout: Tensor | None


def token_groups(probe: Probe) -> dict[str, slice]:
    """The kinds of token a model has (cls, dist, reg, patches), and where they lie among its
    tokens."""
    count = probe.num_prefix_tokens + probe.grid[0] * probe.grid[1]
    groups = {}
    for word in TOKEN_WORDS:
        try:
            groups[word] = probe.rows(word, count)[0]
        except UserError:  # the model has no such token
            continue
    groups.pop("all")
    return groups


def statistics(probe: Probe) -> list[str]:
    """Names of what `attend` computes for each step and head.

    - ``distance``: mean over patch queries of the distance to the keys, weighted by attention among
      patches, patches;
    - ``entropy``: of the CLS row over all keys, nats;
    - ``cls_on_KIND``: attention of CLS that falls on that kind of token, 0..1; they add up to 1;
    - ``patches_on_cls``: attention that a patch query pays to CLS, mean over patches, 0..1.
    """
    groups = token_groups(probe)
    of_cls = ["entropy", *(f"cls_on_{kind}" for kind in groups), "patches_on_cls"]
    return ["distance", *(of_cls if "cls" in groups else [])]


def uniform(probe: Probe, statistic: str, step: int = 1) -> float:
    """What attention that is the same for all N tokens gives: the null of each of `statistics`.

    And of ``rollout_entropy``, up to `step`: the rollout is (I / 2 + J / 2)^t = I / 2^t + (1 - 1 /
    2^t) J, where every entry of J is 1 / N.
    """
    groups = token_groups(probe)
    tokens = groups["patches"].stop
    if statistic == "distance":
        return float(metrics.grid_distances(probe.grid).mean())
    if statistic == "entropy":
        return math.log(tokens)
    if statistic == "rollout_entropy":
        row = torch.full((tokens,), (1 - 0.5**step) / tokens, dtype=torch.float64)
        row[0] += 0.5**step
        return float(metrics.entropy(row))
    of = groups["cls" if statistic == "patches_on_cls" else statistic.removeprefix("cls_on_")]
    return (of.stop - of.start) / tokens


def attend(probe: Probe, images: Tensor) -> Attended:
    """Run images ``(B, C, H, W)`` of the model's size and reduce the pattern of every step.

    Raises
    ------
    UserError
        For NaN in a pattern, images of another size, and a model whose attention is normed or gated
        before its projection.
    """
    groups = token_groups(probe)
    distances = metrics.grid_distances(probe.grid).to(images.device, torch.float32)
    found: list[dict[str, Tensor]] = []
    maps: list[Tensor] = []
    rollout: list[Tensor] = []
    mixed: Tensor | None = None

    def reduce(pattern: Tensor, address: Address) -> None:
        nonlocal mixed
        pattern = pattern.float()
        if pattern.shape[-1] != groups["patches"].stop:
            raise UserError(
                f"images of the model's size give {groups['patches'].stop} tokens, got {pattern.shape[-1]}"
            )
        if not torch.isfinite(pattern).all():
            raise UserError(
                f"attention of step {address.step} holds NaN: the model's activations overflow"
            )
        found.append(_of_step(pattern, groups, distances))
        if "cls" in groups:
            mixed = rolled_out(pattern, mixed)
            maps.append(pattern[:, :, groups["cls"].start, groups["patches"]].double())
            rollout.append(mixed[:, groups["cls"].start].double())

    with (
        torch.inference_mode(),
        probe.edit({("pattern", t): reduce for t in range(1, probe.num_steps + 1)}),
    ):
        probe(images)
    return Attended(
        {name: torch.stack([step[name] for step in found], dim=1) for name in statistics(probe)},
        torch.stack(maps, dim=1) if maps else None,
        torch.stack(rollout, dim=1) if rollout else None,
    )


def rolled_out(pattern: Tensor, before: Tensor | None) -> Tensor:
    """Rollout up to a step: ``(0.5 A + 0.5 I)`` of the heads' mean A, times the rollout `before`
    it.

    Parameters
    ----------
    pattern : ``(B, H, N, N)``; its rows add up to 1, so those of the mixture do.
    before : rollout up to the step before ``(B, N, N)``; None before the first.
    """
    mixture = 0.5 * pattern.mean(1)
    mixture.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return mixture if before is None else mixture @ before


def _of_step(pattern: Tensor, groups: dict[str, slice], distances: Tensor) -> dict[str, Tensor]:
    """`statistics` of one step ``(B, H)``, float64, from its pattern ``(B, H, N, N)``."""
    patches = groups["patches"]
    among = pattern[:, :, patches, patches]
    # a patch that leaves nothing on patches has no distance
    found = {"distance": ((among * distances).sum(-1) / among.sum(-1)).double().nanmean(-1)}
    if "cls" in groups:
        cls = groups["cls"].start
        row = pattern[:, :, cls].double()
        found["entropy"] = metrics.entropy(row)
        found |= {f"cls_on_{kind}": row[..., keys].sum(-1) for kind, keys in groups.items()}
        found["patches_on_cls"] = pattern[:, :, patches, cls].double().mean(-1)
    return found


def example_maps(
    probe: Probe, data: Samples, places: list[int], geometry: Geometry, skip_corrupt: bool = False
) -> dict[str, np.ndarray]:
    """CLS maps of chosen images, for pictures.

    Parameters
    ----------
    places : positions in the data set.
    skip_corrupt : leave out images that cannot be read.

    Returns
    -------
    `index` ``(n,)``, `image` as the model sees it ``(n, height, width, 3)`` uint8, `maps` ``(n, T,
    H, rows, columns)`` float32.

    Raises
    ------
    DataError
        For an image that cannot be read, or none that can.
    """
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (geometry.mean, geometry.std))
    index, images, maps = [], [], []
    for i in places:
        try:
            pixels, _ = geometry(data.read(i)[0])
        except DataError:
            if skip_corrupt:
                continue
            raise
        index.append(i)
        images.append(((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0))
        device = next(probe.model.parameters()).device
        maps.append(
            attention(probe, pixels[None].to(device))[0].unflatten(-1, probe.grid).float().cpu()
        )
    if not index:
        raise DataError(f"none of the {len(places)} example images can be read")
    return {
        "index": np.array(index),
        "image": torch.stack(images).numpy(),
        "maps": torch.stack(maps).numpy(),
    }
