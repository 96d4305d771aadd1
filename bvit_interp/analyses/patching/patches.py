"""Activation patching across time: a site of step t holds what it was at step s, of the same or of
another run.

Activation patching (interchange interventions, causal tracing: Vig et al., 2020, "Investigating
gender bias in language models using causal mediation analysis"; Meng et al., 2022, "Locating and
editing factual associations in GPT"; practice: Heimersheim and Nanda, 2024, "How to use and
interpret activation patching") puts what one run holds at a place into the same place of another.
Where steps are applications of one block, places of different steps compare too. All sources s of a
target t go through the steps that are left in one batch, from a kept state (`State.repeated`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.metrics.statistics import Z_95
from bvit_interp.models.memory import MemorySteps, UnrolledSteps
from bvit_interp.models.stepping import State, advance, answer, embed, proceed
from bvit_interp.models.steps import Steps
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.cache import unit_index
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import Address, Tokens, axes_of, check_site, check_steps

Corruption = Literal["shuffle", "noise"]


class Patches:
    """Every step's site of one run put into every step of another.

    Parameters
    ----------
    model : a `BViT`, any timm `VisionTransformer`, or an unroll of one.
    site : what is moved; "resid_post" is the state z_t. A memory (bViT-fl, bViT-sc) stays the
        receiver's.
    tokens : of which tokens; the others stay the receiver's. Of scores and pattern, query tokens.
    unit : one head, neuron or channel of the site; None for all of it.
    steps : the steps s and t, from 1; None for all.

    Attributes
    ----------
    steps : the S steps, in order.
    whole : whether the patch replaces all that the steps to come depend on, so that the receiver
        does not matter.
    tied : whether besides all steps are one and the same map F: cell (s, t) is then the answer at
        step s + T - t of a longer run of the donor, ``F^(T-t)(z_s)``, and all cells come from one
        such run.
    """

    def __init__(
        self,
        model: VisionTransformer,
        site: str = "resid_post",
        tokens: Tokens = "all",
        unit: int | None = None,
        steps: tuple[int, ...] | None = None,
    ) -> None:
        self.probe = Probe(model)
        self.view = self.probe.model
        self.site, self.unit = check_site(site), unit
        self.steps = sorted(check_steps(steps, self.probe.num_steps))
        for step in self.steps:
            self.probe.address(Address(site, step, unit))
        count = self.probe.num_prefix_tokens + self.probe.grid[0] * self.probe.grid[1]
        self.count, self.rows = count, self.probe.rows(tokens, count)[0]
        everything = site == "resid_post" and unit is None and len(range(count)[self.rows]) == count
        self.whole = everything and not isinstance(model.blocks, (MemorySteps, UnrolledSteps))
        self.tied = self.whole and _one_map(model)
        self._longer = (
            unroll(model, self.steps[-1] - self.steps[0] + self.probe.num_steps)
            if self.tied
            else None
        )

    def logits(self, receiver: Tensor, donor: Tensor) -> Tensor:
        """Logits ``(S, S, B, C)`` of images `receiver` ``(B, 3, H, W)`` patched from the runs of
        images `donor`.

        Axis 0 is the step s a patch is taken from, axis 1 the step t it is put into.
        """
        if self._longer is not None:
            return self._along(self._longer, donor)
        values = self.values(donor)
        before, columns = embed(self.view, receiver), []
        for step in range(1, self.probe.num_steps + 1):
            after = advance(self.view, before)
            if step in self.steps:
                columns.append(self._column(step, before, after, values))
            before = after
        return torch.stack(columns, dim=1)

    def values(self, images: Tensor) -> Tensor:
        """What is moved, ``(S, B, ...)``: the site of every step with its chosen tokens and
        unit."""
        cache = self.probe.record(images, self.site, self.steps, self.rows)
        index = ... if self.unit is None else unit_index(self.site, self.unit)
        return torch.stack([cache[self.site, step][index] for step in self.steps])

    def _column(self, step: int, before: State, after: State, values: Tensor) -> Tensor:
        """Logits ``(S, B, C)`` of all sources put into one step, from its states in the receiver's
        run."""
        new = values.flatten(0, 1)
        if self.site == "resid_post":  # nothing of the step itself need run again
            state = after.repeated(len(values))
            index = ... if self.unit is None else unit_index(self.site, self.unit)
            tokens = state.tokens.clone()
            tokens[index] = self._put(tokens[index], new)
            state = replace(state, tokens=tokens)
        else:
            with self.probe.edit(
                {Address(self.site, step, self.unit): lambda old, _: self._put(old, new)}
            ):
                state = advance(self.view, before.repeated(len(values)))
        return answer(self.view, proceed(self.view, state)).unflatten(0, (len(values), -1))

    def _put(self, old: Tensor, new: Tensor) -> Tensor:
        """`old` with the chosen tokens of `new`; the heads' axis is before that of queries unless
        one head is given."""
        patched = old.clone()
        queries = "Q" in axes_of(self.site) and self.unit is None
        patched[(slice(None), slice(None), self.rows) if queries else (slice(None), self.rows)] = (
            new
        )
        return patched

    def _along(self, longer: VisionTransformer, donor: Tensor) -> Tensor:
        """The cells of one map, from a run past the last step: those of one shift t - s are the
        same."""
        state, last = embed(longer, donor), self.probe.num_steps
        wanted = {s + last - t for s in self.steps for t in self.steps}
        answers: dict[int, Tensor] = {}
        for step in range(1, max(wanted) + 1):
            state = advance(longer, state)
            if step in wanted:
                answers[step] = answer(longer, state)
        return torch.stack(
            [torch.stack([answers[s + last - t] for t in self.steps]) for s in self.steps]
        )


def _one_map(model: VisionTransformer) -> bool:
    """Whether every step of the model is the same function: one block, no time embedding."""
    blocks = model.blocks
    return (
        isinstance(blocks, Steps)
        and len(list(blocks.children())) == 1
        and blocks.step_embed is None
    )


class Recovered(Metric):
    """A ratio of means over images: how much of a whole was gained, with a 95 % interval by the
    delta method.

    A mean of the images' own ratios would be ruled by images whose whole is near zero.

    Parameters
    ----------
    *shape : of the numbers gained by one image.

    Returns
    -------
    ``compute``: `value` = mean gained / mean whole, `low` and `high` ``= value -+ 1.96 sd(gained -
    value whole) / (sqrt(n) |mean whole|)``, each of `shape`, nan below two images or for a whole of
    zero; `n` images.

    References
    ----------
    Cochran (1977), Sampling techniques, ch. 6 (ratio estimators).
    """

    full_state_update = False
    count: Tensor
    gained: Tensor
    whole: Tensor
    gained_square: Tensor
    product: Tensor
    whole_square: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("gained", "whole", "gained_square", "product", "whole_square"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gained: Tensor, whole: Tensor) -> None:
        """Add a batch: gained ``(B, *shape)``, whole ``(B, *shape)`` or broadcast to it."""
        gained = gained.double()
        whole = whole.double().expand_as(gained)
        if not (torch.isfinite(gained).all() and torch.isfinite(whole).all()):
            raise UserError("logits hold NaN or infinite values")
        self.count += len(gained)
        self.gained += gained.sum(0)
        self.whole += whole.sum(0)
        self.gained_square += gained.square().sum(0)
        self.product += (gained * whole).sum(0)
        self.whole_square += whole.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """The ratios over all images, on the CPU."""
        ratio = torch.where(self.whole != 0, self.gained / self.whole, torch.nan)
        residual = (
            self.gained_square - 2 * ratio * self.product + ratio.square() * self.whole_square
        ).clamp(min=0)
        half = Z_95 * (residual * self.count / (self.count - 1)).sqrt() / self.whole.abs()
        half = torch.where(self.count > 1, half, torch.nan)
        found = {"value": ratio, "low": ratio - half, "high": ratio + half, "n": self.count.long()}
        return {key: tensor.cpu() for key, tensor in found.items()}


def corrupt(
    images: Tensor, index: Tensor, grid: tuple[int, int], kind: Corruption, seed: int = 0
) -> Tensor:
    """Images without what they show, each always in the same way.

    Parameters
    ----------
    images, index : ``(B, 3, H, W)``, normalised, and their places in the data set ``(B,)``.
    grid : rows and columns of patches.
    kind : shuffle (the patches in a random order: what is in them stays, where it is does not) or
        noise (standard Gaussian noise is added: one standard deviation of the pixels over the data
        the model was trained on).
    seed : with an image's place, of its corruption.

    Returns
    -------
    ``(B, 3, H, W)``.
    """
    made = []
    for image, place in zip(images, index.tolist(), strict=True):
        rng = np.random.default_rng((seed, place))
        if kind == "noise":
            noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
            made.append(image + torch.from_numpy(noise).to(image))
            continue
        order = torch.from_numpy(rng.permutation(grid[0] * grid[1]))
        tiles = (
            image.unflatten(2, (grid[1], -1))
            .unflatten(1, (grid[0], -1))
            .permute(1, 3, 0, 2, 4)
            .flatten(0, 1)
        )
        shuffled = (
            tiles[order].unflatten(0, grid).permute(2, 0, 3, 1, 4)
        )  # (3, rows, height, columns, width)
        made.append(shuffled.flatten(3, 4).flatten(1, 2))
    return torch.stack(made)
