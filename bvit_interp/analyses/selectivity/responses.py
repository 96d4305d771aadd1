"""What the neurons and heads of every step answer to the images of each class, and what ablating
them does.

A unit is a neuron of the FFN or a head. Its answer to an image is one number a step: of a neuron
the mean of `mlp_post` over the patches, of a head the mean over the patches of the norm of `z`. Its
profile at a step is the mean answer to each class. All is streamed as sums; the inner updates of a
memory are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.options import LoaderOptions
from bvit_interp.data.samples import Samples, spread
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.metrics.streaming.top_images import TopList
from bvit_interp.models.stepping import State, advance, answer, embed, proceed
from bvit_interp.probes.ablate import SITES_OF_UNITS, SiteMeans, ablate
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import Address

HALVES = 2
_FRAME = (1.0, 0.0, 1.0)  # magenta, seldom in a photograph


@dataclass(frozen=True)
class Watched:
    """What a batch shows of every unit of a kind.

    Attributes
    ----------
    values, patches : answers ``(B, T, U)``, and the patch where the unit is strongest (row by row
        from 0).
    firing : share of the patches where a neuron is above 0 ``(B, T, U)``; None of heads, whose
        norms always are.
    totals : the site itself, summed over the batch ``(T, N, ...)`` float64.
    """

    values: Tensor
    patches: Tensor
    firing: Tensor | None
    totals: Tensor


def watch(probe: Probe, images: Tensor) -> dict[str, Watched]:
    """Every neuron and head at every step, of normalised images ``(B, 3, height, width)``; by
    kind."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {
        kind: [] for kind in SITES_OF_UNITS
    }

    def look(kind: str, strength: Tensor, site: Tensor) -> None:
        patches = strength[:, probe.num_prefix_tokens :]
        fired = (patches > 0).to(patches.dtype).mean(1)
        seen[kind].append(
            (patches.mean(1), patches.argmax(1), fired, site.sum(0, dtype=torch.float64))
        )

    def at_neurons(mlp_post: Tensor, _: Address) -> None:
        look("neuron", mlp_post, mlp_post)

    def at_heads(z: Tensor, _: Address) -> None:
        look("head", z.norm(dim=-1), z)

    at = {"neuron": at_neurons, "head": at_heads}
    edits = {
        (site, t): at[kind]
        for t in range(1, probe.num_steps + 1)
        for kind, site in SITES_OF_UNITS.items()
    }
    with torch.inference_mode(), probe.edit(edits):
        probe(images.to(next(probe.model.parameters()).device))
    found = {}
    for kind, steps in seen.items():
        values, patches, firing = (
            torch.stack([step[i] for step in steps], dim=1) for i in range(3)
        )
        totals = torch.stack([step[3] for step in steps])
        found[kind] = Watched(values, patches, firing if kind == "neuron" else None, totals)
    return found


def named(name: str, model: VisionTransformer, units: Sequence[str]) -> list[tuple[str, int]]:
    """Kind and number of units written as `mlp_post:374` or `z:2`, or a UserError with the model's
    name and units."""
    kinds, probe, found = {site: kind for kind, site in SITES_OF_UNITS.items()}, Probe(model), []
    for text in units:
        site, _, unit = text.partition(":")
        try:
            probe.address(f"{site}[1]:{unit}")
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        found.append((kinds[site], int(unit)))
    return found


def drawn(probe: Probe, count: int, seed: int) -> list[tuple[str, int]]:
    """`count` random units of each kind."""
    rng = np.random.default_rng(seed)
    sizes = {"neuron": probe.num_neurons, "head": probe.num_heads}
    return [
        (kind, int(unit)) for kind, size in sizes.items() for unit in rng.permutation(size)[:count]
    ]


class Profiles(Metric):
    """Sums of every unit's answers by class, for each half of the images, and by random group.

    Parameters
    ----------
    classes, steps, units : C, T, U; there are as many random groups as classes.

    Returns
    -------
    ``compute``: on the CPU, float64: `total` ``(3, C, T, U)`` and `count` ``(3, C)`` of the first
    half by class, the second half by class, and all images by group; `squares` ``(T, U)`` of all.

    Raises
    ------
    UserError
        For values that are not finite.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    squares: Tensor

    def __init__(self, classes: int, steps: int, units: int) -> None:
        super().__init__()
        parts = HALVES + 1
        shapes = {
            "total": (parts, classes, steps, units),
            "count": (parts, classes),
            "squares": (steps, units),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, labels: Tensor, halves: Tensor, groups: Tensor) -> None:
        """Add answers ``(B, T, U)`` of images of these classes, halves (0 or 1) and groups, each
        ``(B,)`` int64."""
        if not torch.isfinite(values).all():
            raise UserError("activations hold NaN or infinite values")
        values, classes = values.double(), self.count.shape[1]
        for rows in (halves * classes + labels, HALVES * classes + groups):
            rows = rows.to(values.device)
            self.total.flatten(0, 1).index_add_(0, rows, values)
            self.count.flatten().index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
        self.squares += values.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """`total`, `count` and `squares`."""
        return {"total": self.total.cpu(), "count": self.count.cpu(), "squares": self.squares.cpu()}


class Biographies:
    """What is streamed of every neuron and head of a model: `Profiles`, `SiteMeans`, a `TopList`,
    firing rates.

    Parameters
    ----------
    probe : the model; the states lie on its device from the start, also in a process that sees no
        image.
    classes : C.
    top : images kept a unit and step.
    """

    def __init__(self, probe: Probe, classes: int, top: int) -> None:
        self.probe = probe
        device = next(probe.model.parameters()).device
        self.profiles, self.fill, self.top = (
            dict[str, Profiles](),
            dict[str, SiteMeans](),
            dict[str, TopList](),
        )
        for kind, places in _places(probe).items():
            units = (probe.num_steps, places[2])
            self.profiles[kind] = Profiles(classes, *units).to(device)
            self.fill[kind] = SiteMeans(*places).to(device)
            self.top[kind] = TopList(*units, top).to(device)
        self.firing = MeanCI(probe.num_steps, probe.num_neurons).to(device)

    def update(
        self,
        seen: Mapping[str, Watched],
        labels: Tensor,
        halves: Tensor,
        groups: Tensor,
        index: Tensor,
    ) -> None:
        """Add what `watch` saw of images of these classes, halves, random groups and positions in
        the data set."""
        for kind, of in seen.items():
            self.profiles[kind].update(of.values, labels, halves, groups)
            self.fill[kind].update(of.totals, len(labels))
            self.top[kind].update(of.values, of.patches, index)
            if of.firing is not None:
                self.firing.update(of.firing)


def watch_all(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    reading: LoaderOptions,
    top: int,
    seed: int = 0,
) -> dict[str, Biographies]:
    """One pass over the images for all models; the halves and groups of the images are drawn from
    `seed`.

    Raises
    ------
    UserError
        For fewer than two images.
    """
    places = spread(len(data), reading.limit)
    if len(places) < HALVES:
        raise UserError(
            f"the images are divided into halves: at least 2 are needed, got {len(places)}"
        )
    seen = {
        name: Biographies(Probe(model), len(data.classes), top) for name, model in models.items()
    }
    lots = torch.zeros(len(data), dtype=torch.int64)
    lots[places] = torch.from_numpy(np.random.default_rng(seed).permutation(len(places)))
    loader, geometries = reading.loader(data, models, "selectivity")
    for batch in loader:
        for name, of in seen.items():
            parts = run_in_halves(
                lambda part, p=of.probe, g=geometries[name]: (part, watch(p, part.views[g][0])),
                batch,
            )
            for part, units in parts:
                lot = lots[part.index]
                of.update(
                    units, part.labels, lot % HALVES, lot // HALVES % len(data.classes), part.index
                )
    return seen


def sheet(
    images: Sequence[Sequence[int]],
    patches: Sequence[Sequence[int]],
    grid: tuple[int, int],
    data: Samples,
    geometry: Geometry,
) -> np.ndarray:
    """Pixels ``(height, width, 3)`` uint8 of rows of images, by their numbers, a frame around one
    patch of each.

    An image of number -1 is left out.
    """
    plain = replace(geometry, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rows = []
    for numbers, places in zip(images, patches, strict=True):
        row = []
        for number, place in zip(numbers, places, strict=True):
            if number >= 0:
                view = plain(data.read(number)[0], None)[0].permute(1, 2, 0).numpy().copy()
                _frame(view, divmod(place, grid[1]), grid)
                row.append(view)
        rows.append(np.concatenate(row, axis=1))
    return (255 * np.concatenate(rows).clip(0, 1)).round().astype(np.uint8)


def _frame(view: np.ndarray, patch: tuple[int, int], grid: tuple[int, int]) -> None:
    """Draw a frame around a patch ``(row, column)`` of an image ``(height, width, 3)``, into its
    neighbours' pixels."""
    size, width = (view.shape[0] // grid[0], view.shape[1] // grid[1]), max(1, view.shape[0] // 64)
    begins = [place * side for place, side in zip(patch, size, strict=True)]
    outer = tuple(
        slice(max(0, b - width), b + side + width) for b, side in zip(begins, size, strict=True)
    )
    inner = tuple(slice(b, b + side) for b, side in zip(begins, size, strict=True))
    kept = view[inner].copy()
    view[outer] = _FRAME
    view[inner] = kept


class Effects:
    """What ablating each of some units does to a model's answers, over images.

    Parameters
    ----------
    seen : the model, and what its units are on average.
    units : kind and number of each.
    classes : the model's class of every class of the data, of `label_map`.
    zero : ablate to zero, not to the mean of the step and token.

    Attributes
    ----------
    change : `MeanCI` ``(2, T + 1, V)`` of accuracy, and of the true class's logit less the mean
        logit: ablated at step 1, ..., T, and at every step.
    hits : `MeanCI` ``(1,)``, accuracy of the model as it is.
    """

    def __init__(
        self, seen: Biographies, units: Sequence[tuple[str, int]], classes: Tensor, zero: bool
    ) -> None:
        self.probe, self.classes = seen.probe, classes
        device = next(self.probe.model.parameters()).device
        sizes = {"neuron": self.probe.num_neurons, "head": self.probe.num_heads}
        self.keep = {
            kind: torch.ones(len(units), size, dtype=torch.bool, device=device)
            for kind, size in sizes.items()
        }
        for v, (kind, unit) in enumerate(units):
            self.keep[kind][v, unit] = False
        self.fill = None if zero else {kind: of.compute().float() for kind, of in seen.fill.items()}
        self.change = MeanCI(2, self.probe.num_steps + 1, len(units)).to(device)
        self.hits = MeanCI(1).to(device)

    def update(self, batch: Batch, geometry: Geometry) -> None:
        """Add the images of a batch."""
        labels = self.classes[batch.labels].to(self.change.device)
        with torch.inference_mode():
            clean, *ablated = (
                self._scores(logits, labels)
                for logits in ablations(self.probe, batch.views[geometry][0], self.keep, self.fill)
            )
            changes = (torch.stack(ablated) - clean).permute(3, 1, 0, 2)  # from (T + 1, 2, V, B)
        self.hits.update(clean[0, 0, :, None])
        self.change.update(changes)

    def _scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Hits, and the true class's logit less the mean, ``(2, V, B)`` of logits ``(V, B, C)``."""
        if not torch.isfinite(logits).all():
            raise UserError("logits hold NaN or infinite values")
        true = logits.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
        hits = (logits.argmax(-1) == labels).to(logits.dtype)
        return torch.stack([hits, true - logits.mean(-1)]).double()


def ablate_all(
    seen: Mapping[str, Biographies],
    units: Mapping[str, Sequence[tuple[str, int]]],
    models: Mapping[str, VisionTransformer],
    data: Samples,
    reading: LoaderOptions,
    zero: bool,
) -> dict[str, Effects]:
    """The effects of every model's units, in one pass over the images."""
    effects = {
        name: Effects(of, units[name], label_map(data, models[name]), zero)
        for name, of in seen.items()
    }
    loader, geometries = reading.loader(data, models, "selectivity, ablation")
    for batch in loader:
        for name, of in effects.items():
            run_in_halves(lambda part, of=of, g=geometries[name]: of.update(part, g), batch)
    return effects


def ablations(
    probe: Probe, images: Tensor, keep: Mapping[str, Tensor], fill: Mapping[str, Tensor] | None
) -> Iterator[Tensor]:
    """Answers with units ablated, all variants of a step in one batch that starts at the state
    before it.

    Parameters
    ----------
    images : ``(B, 3, height, width)``, normalised.
    keep : kind -> ``(V, U)`` bool, the units each variant keeps.
    fill : kind -> ``(T, N, ...)`` what the others become; None for zero.

    Yields
    ------
    Logits ``(V, B, C)``: nothing ablated (V = 1), then ablated at step 1, ..., T, then at every
    step.
    """
    states = [embed(probe.model, images.to(next(probe.model.parameters()).device))]
    for _ in probe.model.blocks:
        states.append(advance(probe.model, states[-1]))
    yield answer(probe.model, states[-1])[None]
    count = len(next(iter(keep.values())))
    for t in range(1, probe.num_steps + 1):
        yield _ablated(probe, states[t - 1].repeated(count), [t], keep, fill)
    yield _ablated(probe, states[0].repeated(count), range(1, probe.num_steps + 1), keep, fill)


def _ablated(
    probe: Probe,
    before: State,
    steps: list[int] | range,
    keep: Mapping[str, Tensor],
    fill: Mapping[str, Tensor] | None,
) -> Tensor:
    """Logits ``(V, B, C)`` of a run that goes on from `before`, its units ablated at `steps`."""
    edits = {
        (SITES_OF_UNITS[kind], t): ablate(kept, None if fill is None else fill[kind][t - 1])
        for t in steps
        for kind, kept in keep.items()
    }
    with probe.edit(edits):
        logits = answer(probe.model, proceed(probe.model, before))
    return logits.unflatten(0, (len(next(iter(keep.values()))), -1))


def _places(probe: Probe) -> dict[str, tuple[int, ...]]:
    """The shape ``(T, N, U, ...)`` of each kind's site over all steps."""
    count = (probe.num_steps, probe.num_prefix_tokens + math.prod(probe.grid))
    heads = (*count, probe.num_heads, int(probe.model.blocks[0].attn.head_dim))
    return {"head": heads, "neuron": (*count, probe.num_neurons)}
