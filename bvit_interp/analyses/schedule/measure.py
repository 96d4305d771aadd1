"""Changed schedules of steps, decoding of the step, and removal of the step.

Ours; not in bViT (arXiv 2605.10661), whose eq. 9 adds a time embedding and whose Fig. 8 runs on
past T. There are three experiments:

- `schedule`: the steps in another order, each with what is its own (its row of the time embedding,
  the refresh of a memory; in a stack its block). `skip` t, `repeat` t twice, `swap` t with t + 1,
  `delay` (steps d + 1..T from z_0), `lag` and `lead` (T steps, each d behind or ahead), `fixed`
  (every step is step t), `mean_embedding` (every step adds the mean row), `reverse`, `twice` (1..T
  twice), `run` (1..S) and `replace` (step s in place of step t). A plain bViT has one function for
  all steps, so only their number matters: to skip any step is to run T - 1 steps, to repeat any
  step is to run T + 1, and a swap changes nothing. In a stack this is the layer swap of Sun et al.
  (2024, "Transformer layers as painters", arXiv 2407.09298);
- `decoding`: a linear discriminant of the step on single tokens, fitted to some images and tested
  on others, from the state (`raw`), from z / ||z|| (`direction`) or from log ||z|| alone (`norm`).
  `pair_accuracy` is a forced choice: which of two states of a token belongs to which step. Null: a
  guess;
- `removal`: after step t the step is removed from the state of every token, and the model runs on.
  `subspace` replaces the component along the differences of the steps' mean states (T - 1
  dimensions) by its mean over the steps; `mean` subtracts only the deviation of the step's own
  mean. Both leave the steps equal means, where no linear decoder beats a constant (Belrose et al.,
  2023, arXiv 2306.03819); `decoding` checks this with a new decoder, fitted to other images. Nulls:
  `random_subspace` of as many dimensions; `random_scaled`, the same with every token moved as far
  as by `subspace` (so past the mean, which harms more); `random_shift`, as far as `mean`.

Cost: for T = 12 a scored image takes 33 forwards of a plain bViT, 69 of a model with a time
embedding or a stack, 72 more for the matrix; any other image takes one. 2400 images of 32 px, 240
of them scored, of three models of width 128 took 411 s on one core. Estimated from the number of
forwards, not measured: 80 s for the default on 1000 images and one bViT, 2 PFLOP on ImageNet.
Expected: none published. A plain bViT can only read its state; a model with a time embedding counts
if wrong rows harm it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.schedule import COLUMNS, Config
from bvit_interp.analyses.schedule.outcomes import Outcomes
from bvit_interp.analyses.schedule.schedules import (
    Plan,
    Run,
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
from bvit_interp.data.samples import Samples, spread
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.stepping import State, answer, proceed, states
from bvit_interp.models.unroll import run_on
from bvit_interp.probes.probe import Probe

_DECODED_AFTER = ("subspace", "mean")  # removals after which the step is decoded again
_LEARNED = ("fit", "refit")  # roles of the images that decoders are fitted to
Decoder = tuple[str, str]
"""Kind of token, and what is read: one of `FEATURES`, or the state after a removal."""


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Changed schedules, the decoded step, and runs from states without the step.

    Parameters
    ----------
    models : name -> model; all see each image in the same two passes.
    data : labelled images, at least 6.

    Returns
    -------
    A table of `COLUMNS`; without `replace` for a model whose steps are all the same function.
    """
    roles = _roles(len(data), config)
    subjects = {name: _Subject(model, config) for name, model in models.items()}
    learned = {name: _FirstPass(subject) for name, subject in subjects.items()}

    def learn(batch: ModelBatch) -> _Learned:
        return subjects[batch.model].learn(batch, roles)

    for name, batch in stream(models, data, config, learn, progress="schedule", labels=True):
        learned[name].update(batch)
    fitted = {name: learned[name].fit(config) for name in models}
    tested = {name: _SecondPass(subjects[name], fitted[name]) for name in models}

    def test(batch: ModelBatch) -> _Tested | None:
        scored = _of_role(batch, roles["test"])
        return subjects[batch.model].test(scored, fitted[batch.model]) if len(scored) else None

    text = "schedule: held-out images"
    for name, outcome in stream(models, data, config, test, progress=text, labels=True):
        if outcome is not None:
            tested[name].update(outcome)
    rows = [
        {"model": name, "trained_steps": subject.trained, **row}
        for name, subject in subjects.items()
        for row in _rows(subject, learned[name], fitted[name], tested[name])
    ]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "other_step", "n"), "Int64"))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of the normal and the longer runs, of the decoded step, and of removals half
    way."""
    shown = frame["variant"].isin(["normal", "run", "mean_embedding"])
    shown |= frame["variant"].isin(["raw", "norm"]) & frame["step"].isna()
    half_way = (frame["experiment"] == "removal") & (frame["step"] == frame["trained_steps"] // 2)
    shown |= frame["variant"].isin(["subspace", "random_scaled"]) & half_way
    return frame[shown & (frame["metric"] == "accuracy")].drop(columns="metric")


def _roles(length: int, config: Config) -> dict[str, set[int]]:
    """Positions of the images of each role.

    `fit` and `refit`: decoders are fitted to them, before and after a removal; `test`: scored;
    `matrix`: scored for the matrix too.
    """
    positions = spread(length, config.limit)
    n = len(positions)
    if n < 6:
        raise UserError(f"the step is decoded on held-out images: at least 6 are needed, got {n}")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed)).tolist()
    scored = min(config.n_scored, n // 2)
    refit = (scored + 2 * n) // 3
    ends = {
        "matrix": (0, min(config.n_matrix, scored)),
        "test": (0, scored),
        "fit": (scored, refit),
        "refit": (refit, n),
    }
    return {
        role: {positions[i] for i in shuffled[begin:end]} for role, (begin, end) in ends.items()
    }


def _of_role(batch: ModelBatch, positions: set[int]) -> ModelBatch:
    """The images of the batch at these positions of the data set."""
    return batch.take(torch.tensor([i in positions for i in batch.index.tolist()]))


@dataclass(frozen=True)
class _Learned:
    """What the first pass computes from a batch.

    Attributes
    ----------
    outcomes, matrix : logits ``(K, B, C)`` of the schedules and labels ``(B,)``, where the batch
        has images of the role.
    states : states of all steps, by the role of the images.
    """

    outcomes: tuple[Tensor, Tensor] | None
    matrix: tuple[Tensor, Tensor] | None
    states: dict[str, list[State]]


@dataclass(frozen=True)
class _Fitted:
    """What is fitted to the images of the first pass.

    Attributes
    ----------
    decoders : by token and what they read.
    removals : for each step, by token and name.
    norms : mean norm of the state at each step (geometric), by token.
    """

    decoders: dict[Decoder, LinearDiscriminant]
    removals: list[dict[str, dict[str, Removal]]]
    norms: dict[str, list[float]]


@dataclass(frozen=True)
class _Tested:
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


class _Subject:
    """A model, its schedules and its kinds of token.

    Attributes
    ----------
    trained : T.
    view : the unroll, long enough for all schedules.
    plans, matrix : schedules that are run on the scored images and on those of the matrix; the
        first is the normal run.
    """

    def __init__(self, model: VisionTransformer, config: Config) -> None:
        self.trained = len(model.blocks)
        if self.trained < 2:
            raise UserError("a model of one step has none to exchange: at least 2 steps are needed")
        self.view = run_on(model, max(self.trained, *config.runs, 0))
        self.device = next(self.view.parameters()).device
        self.tokens = Probe(self.view).kinds()
        possible = {
            run: steps
            for run, steps in schedules(self.trained, config.runs, config.shifts).items()
            if max(steps) <= len(self.view.blocks)
        }
        self.plans = [Plan(self.view, possible)]
        mean = with_mean_embedding(model)
        if mean is not None:
            self.plans.append(Plan(mean, {Run("mean_embedding"): possible[Run("normal")]}))
        differ = len(set(same_steps(self.view)[: self.trained])) > 1
        pairs = substitutions(self.trained) if differ and config.n_matrix else {}
        self.matrix = [Plan(self.view, pairs)] if pairs else []

    def learn(self, batch: ModelBatch, roles: Mapping[str, set[int]]) -> _Learned:
        """Logits after every schedule, and the states that are learned from."""
        parts = {role: _of_role(batch, roles[role]) for role in _LEARNED}
        return _Learned(
            outcomes=_logits(self.plans, _of_role(batch, roles["test"])),
            matrix=_logits(self.matrix, _of_role(batch, roles["matrix"])),
            states={
                role: list(self._states(part.images)) for role, part in parts.items() if len(part)
            },
        )

    def test(self, batch: ModelBatch, fitted: _Fitted) -> _Tested:
        """Decode the step from every state, and run on from the state without it."""
        logits, distance = [], []
        scores: dict[Decoder, list[Tensor]] = {key: [] for key in fitted.decoders}
        for state in self._states(batch.images):
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
                after = proceed(self.view, State(tokens, state.step, state.memory), self.trained)
                logits.append(answer(self.view, after))
                moved = (tokens - state.tokens).norm(dim=-1) / state.tokens.norm(dim=-1)
                distance.append(moved.double().mean(1))
        return _Tested(
            logits=torch.stack(logits),
            normal=answer(self.view, state),
            labels=batch.labels,
            distance=torch.stack(distance, dim=1),
            scores={
                key: decoding_scores(torch.stack(values, dim=2)) for key, values in scores.items()
            },
        )

    def _states(self, images: Tensor) -> Iterator[State]:
        """The states after steps 1..T."""
        return itertools.islice(states(self.view, images, self.trained), 1, None)


def _logits(plans: list[Plan], batch: ModelBatch) -> tuple[Tensor, Tensor] | None:
    """Logits after every schedule, and labels; None without schedules or images."""
    if not plans or not len(batch):
        return None
    return torch.cat([plan.logits(batch.images) for plan in plans]), batch.labels


class _FirstPass:
    """Outcomes of the schedules, and sums that decoders and removals are fitted to.

    All states lie on the model's device from the start, because a process without images takes part
    in the gather too.
    """

    def __init__(self, subject: _Subject) -> None:
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

    def update(self, batch: _Learned) -> None:
        """Add what was computed from a batch."""
        for metric, found in ((self.outcomes, batch.outcomes), (self.matrix, batch.matrix)):
            if found is not None:
                logits, labels = found
                metric.update(logits, logits[0], labels)
        for role, by_step in batch.states.items():
            for state, ((kind, name, wanted), moments) in itertools.product(
                by_step, self.moments.items()
            ):
                if wanted == role:
                    tokens = state.tokens[:, self.subject.tokens[kind]]
                    moments.update(feature(tokens, name), state.step)

    def fit(self, config: Config) -> _Fitted:
        """Decoders and removals from the sums of all processes; the same in every process."""
        sums = {key: moments.compute() for key, moments in self.moments.items()}
        decoders: dict[Decoder, LinearDiscriminant] = {
            (kind, name): LinearDiscriminant(found, config.ridge)
            for (kind, name, role), found in sums.items()
            if role == "fit"
        }
        removals = [
            {
                kind: fit_removals(sums[kind, "raw", "fit"], (config.seed, step, i))
                for i, kind in enumerate(self.subject.tokens)
            }
            for step in range(1, self.subject.trained + 1)
        ]
        for kind, name in itertools.product(self.subject.tokens, _DECODED_AFTER):
            after = removals[0][kind][name].applied_to(sums[kind, "raw", "refit"])
            decoders[kind, name] = LinearDiscriminant(after, config.ridge)
        norms = {
            kind: sums[kind, "norm", "fit"].means[:, 0].exp().tolist()
            for kind in self.subject.tokens
        }
        return _Fitted(decoders, removals, norms)


class _SecondPass:
    """Outcomes of the runs without the step, distances, and scores of the decoders."""

    def __init__(self, subject: _Subject, fitted: _Fitted) -> None:
        changed = subject.trained * len(REMOVALS)
        self.outcomes = Outcomes(changed, subject.view.num_classes).to(subject.device)
        self.distance = MeanCI(changed).to(subject.device)
        self.scores = {
            key: MeanCI(subject.trained + 1, 3).to(subject.device) for key in fitted.decoders
        }

    def update(self, batch: _Tested) -> None:
        """Add what was computed from a batch."""
        self.outcomes.update(batch.logits, batch.normal, batch.labels)
        self.distance.update(batch.distance)
        for key, values in batch.scores.items():
            self.scores[key].update(values)


def _rows(
    subject: _Subject, learned: _FirstPass, fitted: _Fitted, tested: _SecondPass
) -> Iterator[dict[str, Any]]:
    """All rows of a model; every process takes part."""
    removals = [Run(name, t) for t in range(1, subject.trained + 1) for name in REMOVALS]
    yield from _outcome_rows("schedule", _runs(subject.plans), learned.outcomes)
    yield from _outcome_rows("schedule", _runs(subject.matrix), learned.matrix)
    yield from _outcome_rows("removal", removals, tested.outcomes)
    distances = tested.distance.compute()
    for i, run in enumerate(removals):
        columns = {key: values[i].item() for key, values in distances.items()}
        yield {"experiment": "removal", **run._asdict(), "metric": "distance", **columns}
    yield from _embedding_rows(subject, fitted.norms)
    yield from _decoding_rows(subject.trained, tested.scores)


def _runs(plans: list[Plan]) -> list[Run]:
    return [run for plan in plans for run in plan.runs]


def _outcome_rows(experiment: str, runs: list[Run], outcomes: Outcomes) -> Iterator[dict[str, Any]]:
    for metric, found in (outcomes.compute() if runs else {}).items():
        for run, columns in zip(runs, found, strict=True):
            yield {"experiment": experiment, **run._asdict(), "metric": metric, **columns}


def _embedding_rows(
    subject: _Subject, norms: Mapping[str, list[float]]
) -> Iterator[dict[str, Any]]:
    """Length of each row of the time embedding, relative to the norm of the state."""
    table = getattr(subject.view.blocks[0], "step_embed", None)
    lengths = [] if table is None else table.detach().double().norm(dim=1).tolist()
    for kind, by_step in norms.items():
        for t, (length, norm) in enumerate(zip(lengths, by_step, strict=False), start=1):
            yield {
                "experiment": "schedule",
                "variant": "embedding",
                "tokens": kind,
                "step": t,
                "metric": "length",
                "value": length / norm,
            }


def _decoding_rows(trained: int, scores: Mapping[Decoder, MeanCI]) -> Iterator[dict[str, Any]]:
    nulls = {
        "accuracy": 1 / trained,
        "step_error": trained**2 // 4 / trained,  # of always the middle step
        "pair_accuracy": 0.5,
    }
    for (kind, name), mean in scores.items():
        columns = mean.compute()
        for i, (j, metric) in itertools.product(range(trained + 1), enumerate(nulls)):
            yield {
                "experiment": "decoding",
                "variant": name,
                "tokens": kind,
                "step": i + 1 if i < trained else None,
                "metric": metric,
                **{key: values[i, j].item() for key, values in columns.items()},
                "null": nulls[metric],
            }
