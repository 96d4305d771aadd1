"""Changed schedules, decoding and removal of the step, on one model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.analyses.schedule.outcomes import Outcomes
from bvit_interp.analyses.schedule.schedules import (
    Plan,
    Run,
    can_run,
    same_steps,
    schedules,
    substitutions,
    with_mean_embedding,
)
from bvit_interp.analyses.schedule.step_decoding import (
    FEATURES,
    LinearDiscriminant,
    StepMoments,
    decoding_scores,
    feature,
)
from bvit_interp.analyses.schedule.step_removal import (
    REMOVALS,
    Removal,
    fit_removals,
    without_step,
)
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import State, answer, device_of, proceed, states
from bvit_interp.models.unroll import run_on
from bvit_interp.probes.probe import Probe

_DECODED_AFTER = ("subspace", "mean")  # removals after which the step is decoded again
Decoder = tuple[str, str]
"""Kind of token, and what is read: one of `FEATURES`, or the state after a removal."""
Labelled = tuple[Tensor, Tensor]
"""Images or logits, and labels ``(B,)``."""


@dataclass(frozen=True)
class Learned:
    """What the first pass computes from a batch.

    Attributes
    ----------
    outcomes, matrix : logits ``(K, B, C)`` of the schedules and labels ``(B,)``, where the batch
        has images of the role.
    states : states of all steps, by the role of the images.
    """

    outcomes: Labelled | None
    matrix: Labelled | None
    states: dict[str, list[State]]


@dataclass(frozen=True)
class Fitted:
    """What is fitted to the images of the first pass.

    Attributes
    ----------
    decoders : by token and what they read.
    removals : for each step, by token and name.
    norms : geometric mean of the norm of the state at each step, by token.
    """

    decoders: dict[Decoder, LinearDiscriminant]
    removals: list[dict[str, dict[str, Removal]]]
    norms: dict[str, list[float]]


@dataclass(frozen=True)
class HeldOut:
    """What the second pass computes from a batch of B scored images, with V removals at T steps.

    Attributes
    ----------
    logits, normal, labels : ``(T V, B, C)``, ``(B, C)`` of the normal run, and ``(B,)``.
    distance : how far each removal moves the state, relative to its norm, ``(B, T V)``.
    scores : `decoding_scores` ``(B, T + 1, 3)`` of each decoder.
    """

    logits: Tensor
    normal: Tensor
    labels: Tensor
    distance: Tensor
    scores: dict[Decoder, Tensor]


class Subject:
    """A model, its schedules and its kinds of token.

    Parameters
    ----------
    runs, shifts : of `schedules`.
    matrix : whether to run every step in place of every other.

    Attributes
    ----------
    trained : T.
    view, device : the unroll, long enough for all schedules, and where it is.
    tokens : kind of token -> where it is.
    plans, matrix : schedules that are run on the scored images and on those of the matrix; the
        first is the normal run.
    """

    def __init__(
        self, model: Model, runs: Sequence[int], shifts: Sequence[int], matrix: bool
    ) -> None:
        self.trained = len(model.blocks)
        if self.trained < 2:
            raise UserError("a model of one step has none to exchange: at least 2 steps are needed")
        self.view = run_on(model, max(self.trained, *runs, 0))
        self.device = device_of(self.view)
        self.tokens = Probe(self.view).kinds()
        possible = {
            run: steps
            for run, steps in schedules(self.trained, runs, shifts).items()
            if can_run(self.view, steps)
        }
        self.plans = [Plan(self.view, possible)]
        mean = with_mean_embedding(model)
        if mean is not None:
            self.plans.append(Plan(mean, {Run("mean_embedding"): possible[Run("normal")]}))
        differ = len(set(same_steps(self.view)[: self.trained])) > 1
        pairs = substitutions(self.trained) if differ and matrix else {}
        if not all(can_run(self.view, steps) for steps in pairs.values()):
            pairs = {}
        self.matrix = [Plan(self.view, pairs)] if pairs else []

    def learn(self, parts: Mapping[str, Labelled]) -> Learned:
        """Logits after every schedule, and the states that are learned from.

        Parameters
        ----------
        parts : images and labels by role; a role without images is left out.
        """
        return Learned(
            outcomes=_logits(self.plans, parts.get("test")),
            matrix=_logits(self.matrix, parts.get("matrix")),
            states={
                role: list(self._states(parts[role][0]))
                for role in ("fit", "refit")
                if role in parts
            },
        )

    def test(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        fitted: Fitted,
    ) -> HeldOut:
        """Decode the step from every state, and run on from the state without it."""
        logits, distance = [], []
        scores: dict[Decoder, list[Tensor]] = {key: [] for key in fitted.decoders}
        for state in self._states(images):
            changed = {name: torch.empty_like(state.tokens) for name in REMOVALS}
            for kind, rows in self.tokens.items():
                tokens = state.tokens[:, rows]
                removed = without_step(tokens, state.step, fitted.removals[state.step - 1][kind])
                for name in REMOVALS:
                    changed[name][:, rows] = removed[name]
                read = {name: feature(tokens, name) for name in FEATURES}
                read |= {name: feature(removed[name], "raw") for name in _DECODED_AFTER}
                for name, values in read.items():
                    scores[kind, name].append(fitted.decoders[kind, name](values))
            for tokens in changed.values():
                after = proceed(self.view, replace(state, tokens=tokens), self.trained)
                logits.append(answer(self.view, after))
                moved = (tokens - state.tokens).norm(dim=-1) / state.tokens.norm(dim=-1)
                distance.append(moved.double().mean(1))
        return HeldOut(
            logits=torch.stack(logits),
            normal=answer(self.view, state),
            labels=labels,
            distance=torch.stack(distance, dim=1),
            scores={
                key: decoding_scores(torch.stack(values, dim=2)) for key, values in scores.items()
            },
        )

    def _states(self, images: Tensor) -> Iterator[State]:
        """The states after steps 1..T."""
        return itertools.islice(states(self.view, images, self.trained), 1, None)


class FirstPass:
    """Outcomes of the schedules, and sums that decoders and removals are fitted to.

    All states lie on the model's device from the start, because a process without images takes part
    in the gather too.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.outcomes, self.matrix = (
            Outcomes(sum(len(plan.runs) for plan in plans), subject.view.num_classes)
            for plans in (subject.plans, subject.matrix)
        )
        keys = [(kind, name, "fit") for kind in subject.tokens for name in FEATURES]
        keys += [(kind, "raw", "refit") for kind in subject.tokens]
        widths = dict.fromkeys(FEATURES, subject.view.embed_dim) | {"norm": 1}
        self.moments = {
            key: StepMoments(subject.trained, widths[key[1]]).to(subject.device) for key in keys
        }
        for metric in (self.outcomes, self.matrix):
            metric.to(subject.device)

    def update(self, batch: Learned) -> None:
        """Add what was computed from a batch."""
        for metric, scored in ((self.outcomes, batch.outcomes), (self.matrix, batch.matrix)):
            if scored is not None:
                logits, labels = scored
                metric.update(logits, logits[0], labels)
        for role, by_step in batch.states.items():
            for state, ((kind, name, wanted), moments) in itertools.product(
                by_step, self.moments.items()
            ):
                if wanted == role:
                    tokens = state.tokens[:, self.subject.tokens[kind]]
                    moments.update(feature(tokens, name), state.step)

    def fit(self, ridge: float, seed: int) -> Fitted:
        """Decoders and removals from the sums of all processes; the same in every process."""
        sums = {key: moments.compute() for key, moments in self.moments.items()}
        decoders: dict[Decoder, LinearDiscriminant] = {
            (kind, name): LinearDiscriminant(step_sums, ridge)
            for (kind, name, role), step_sums in sums.items()
            if role == "fit"
        }
        removals = [
            {
                kind: fit_removals(sums[kind, "raw", "fit"], (seed, step, i))
                for i, kind in enumerate(self.subject.tokens)
            }
            for step in range(1, self.subject.trained + 1)
        ]
        for kind, name in itertools.product(self.subject.tokens, _DECODED_AFTER):
            after = removals[0][kind][name].applied_to(sums[kind, "raw", "refit"])
            decoders[kind, name] = LinearDiscriminant(after, ridge)
        norms = {
            kind: sums[kind, "norm", "fit"].means[:, 0].exp().tolist()
            for kind in self.subject.tokens
        }
        return Fitted(decoders, removals, norms)


class SecondPass:
    """Outcomes of the runs without the step, distances, and scores of the decoders."""

    def __init__(self, subject: Subject, fitted: Fitted) -> None:
        changed = subject.trained * len(REMOVALS)
        self.outcomes = Outcomes(changed, subject.view.num_classes).to(subject.device)
        self.distance = MeanCI(changed).to(subject.device)
        self.scores = {
            key: MeanCI(subject.trained + 1, 3).to(subject.device) for key in fitted.decoders
        }

    def update(self, batch: HeldOut) -> None:
        """Add what was computed from a batch."""
        self.outcomes.update(batch.logits, batch.normal, batch.labels)
        self.distance.update(batch.distance)
        for key, values in batch.scores.items():
            self.scores[key].update(values)


def _logits(plans: list[Plan], part: Labelled | None) -> Labelled | None:
    """Logits after every schedule, and labels; None without schedules or images."""
    if not plans or part is None:
        return None
    images, labels = part
    return torch.cat([plan.logits(images) for plan in plans]), labels
