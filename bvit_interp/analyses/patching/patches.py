"""Activation patching: a site of step s put into step t.

Activation patching (interchange interventions, causal tracing: Vig et al., 2020, "Investigating
gender bias in language models using causal mediation analysis"; Meng et al., 2022, "Locating and
editing factual associations in GPT"; practice: Heimersheim and Nanda, 2024, "How to use and
interpret activation patching") replaces an activation of one run by that of another run. Where the
steps apply one block, activations of different steps compare too. All sources s of a target t go
through the remaining steps in one batch, from a kept state (`State.repeated`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.memory import MemorySteps, UnrolledSteps
from bvit_interp.models.stepping import State, advance, answer, proceed, states
from bvit_interp.models.steps import Steps
from bvit_interp.models.unroll import unroll, with_steps
from bvit_interp.probes.cache import unit_index
from bvit_interp.probes.probe import Edit, Key, Probe
from bvit_interp.vocabulary import Address, Tokens, axes_of, check_site, check_steps


class StepPatcher:
    """Puts a site of every step of one run into every step of another run.

    Parameters
    ----------
    model : any model that `unroll` takes, or an unroll. In a loop of another model, all that a step
        reads besides the state (injected input, earlier states) stays the receiver's.
    site : the patched site; "resid_post" is the state z_t. A memory (bViT-fl, bViT-sc) stays the
        receiver's.
    tokens : the patched tokens; the others stay the receiver's. For scores and pattern, query
        tokens.
    unit : one head, neuron or channel of the site; None for the whole site.
    steps : the steps s and t, from 1; None for all.

    Attributes
    ----------
    steps : the S steps, in order.
    num_tokens : all tokens N of a state.
    whole : whether the patch replaces everything that later steps depend on. The receiver then does
        not matter.
    tied : whether, besides, all steps are one map F. Cell (s, t) is then the answer after step
        s + T - t of a longer run of the donor, ``F^(T-t)(z_s)``, and one such run gives all cells.
    """

    def __init__(
        self,
        model: nn.Module,
        site: str = "resid_post",
        tokens: Tokens = "all",
        unit: int | None = None,
        steps: tuple[int, ...] | None = None,
    ) -> None:
        own = with_steps(model)
        self.probe = Probe(own)
        self.view = self.probe.model
        self.site, self.unit = check_site(site), unit
        self.steps = sorted(check_steps(steps, self.probe.num_steps))
        for step in self.steps:
            self.probe.address(Address(site, step, unit))
        self.num_tokens = self.probe.layout.num_tokens
        self._rows = self.probe.rows(tokens, self.num_tokens)[0]
        self._unit: Any = ... if unit is None else unit_index(site, unit)
        all_tokens = len(range(self.num_tokens)[self._rows]) == self.num_tokens
        reads_more = isinstance(self.view, CalledSteps) or isinstance(
            own.blocks, (MemorySteps, UnrolledSteps)
        )
        self.whole = site == "resid_post" and unit is None and all_tokens and not reads_more
        self.tied = self.whole and _is_one_map(own)
        self._longer: Model | None = None
        if self.tied:
            furthest = self.steps[-1] - self.steps[0] + self.probe.num_steps
            self._longer = unroll(own, furthest)

    def logits(
        self,
        receiver: Float[Tensor, "batch channels height width"],
        donor: Float[Tensor, "batch channels height width"],
        count_column: Callable[[], None] | None = None,
    ) -> Float[Tensor, "sources targets batch classes"]:
        """Logits of the receiver images' runs, patched from the donor images' runs.

        Parameters
        ----------
        receiver, donor : normalised images.
        count_column : called after each step t, unless the patcher is tied.

        Returns
        -------
        Axis 0 is the step s that a patch is taken from, axis 1 the step t that it is put into.
        """
        if self._longer is not None:
            return self._longer_run(self._longer, donor)
        patches = self.activations(donor)
        columns = []
        before: State | None = None
        for after in states(self.view, receiver):
            if before is not None and after.step in self.steps:
                columns.append(self._column(before, after, patches))
                if count_column is not None:
                    count_column()
            before = after
        return torch.stack(columns, dim=1)

    def activations(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "sources batch ..."]:
        """The patches: the chosen tokens and unit of the site at every step, ``(S, B, ...)``."""
        cache = self.probe.record(images, self.site, self.steps, self._rows)
        return torch.stack([cache[self.site, step][self._unit] for step in self.steps])

    def _column(
        self, before: State, after: State, patches: Float[Tensor, "sources batch ..."]
    ) -> Float[Tensor, "sources batch classes"]:
        """Logits of all sources put into one step, from the receiver's states around it."""
        new = patches.flatten(0, 1)

        def patch(old: Tensor, _: Address) -> Tensor:
            return self._put(old, new)

        if self.site == "resid_post":  # nothing inside the step needs to run again
            state = after.repeated(len(patches))
            tokens = state.tokens.clone()
            tokens[self._unit] = self._put(tokens[self._unit], new)
            state = replace(state, tokens=tokens)
        else:
            edits: dict[Key, Edit] = {Address(self.site, after.step, self.unit): patch}
            with self.probe.edit(edits):
                state = advance(self.view, before.repeated(len(patches)))
        return answer(self.view, proceed(self.view, state)).unflatten(0, (len(patches), -1))

    def _put(self, old: Tensor, new: Tensor) -> Tensor:
        """`old` with the chosen tokens of `new`."""
        patched = old.clone()
        # scores and pattern (B, H, Q, K) have heads before tokens, unless one head is given
        heads_first = "Q" in axes_of(self.site) and self.unit is None
        if heads_first:
            patched[:, :, self._rows] = new
        else:
            patched[:, self._rows] = new
        return patched

    def _longer_run(
        self, longer: Model, donor: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "sources targets batch classes"]:
        """The cells of one map, from a run past the last step; equal along each shift t - s."""
        last = self.probe.num_steps
        after = {(s, t): s + last - t for s in self.steps for t in self.steps}
        wanted = set(after.values())
        answers = {
            state.step: answer(longer, state)
            for state in states(longer, donor, until=max(wanted))
            if state.step in wanted
        }
        rows = [torch.stack([answers[after[s, t]] for t in self.steps]) for s in self.steps]
        return torch.stack(rows)


def _is_one_map(model: Model) -> bool:
    """Whether every step of the model is the same function: one block, no time embedding."""
    blocks = model.blocks
    return (
        isinstance(blocks, Steps)
        and len(list(blocks.children())) == 1
        and blocks.step_embed is None
    )
