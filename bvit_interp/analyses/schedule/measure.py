"""Does the model count its steps or read its state: skipped, repeated, swapped and delayed steps, a
wrong clock?

Ours; not in bViT (arXiv 2605.10661), whose eq. 9 adds a time embedding and whose Fig. 8 runs on
past T. Three parts:

- `schedule`: the steps in another order, each with what is its own (its row of the time embedding,
  the refresh of a memory; in a stack its block). `skip` t, `repeat` t twice, `swap` t with t + 1,
  `delay` (the state waits at z_0 for d steps while the clock runs: steps d + 1..T), `lag` and
  `lead` (T steps, the clock d behind or ahead), `fixed` (every step is step t), `mean_row` (every
  step adds the mean row), `reverse`, `again` (1..T twice), `run` (1..S) and `put` (step s in the
  place of step t: the embedding of s at t). A plain bViT has one function for all steps, so only
  their number matters: skipping any is T - 1 of them, repeating any T + 1, a swap changes nothing.
  In a stack this is the layer swap of Sun et al. (2024, "Transformer layers as painters", arXiv
  2407.09298);
- `reading`: a linear discriminant of the step on single tokens, fitted to some images and tested on
  others, from the state (`raw`), from z / ||z|| (`direction`) or from log ||z|| alone (`norm`),
  which may give it away. `order` is a forced choice, which of two states of a token is of which
  step. Null: a guess;
- `removal`: after step t the state of every token is stripped of its step and runs on. `subspace`
  replaces the component along the differences of the steps' mean states (T - 1 dimensions) by its
  mean over the steps, `mean` takes only the own step's mean out; both leave the steps equal means,
  where no linear probe beats a constant (Belrose et al., 2023, arXiv 2306.03819): `reading` fits a
  new probe to fresh images and sees. Nulls: `random_subspace` of as many dimensions,
  `random_scaled` the same with every token moved as far as by `subspace` (so past the mean, which
  harms more), `random_shift` as far as `mean`.

Cost: for T = 12 a scored image takes 33 forwards of a plain bViT, 69 of a model with a time
embedding or a stack, 72 more for the matrix, any other image one. 2400 images of 32 px, 240 of them
scored, of three models of width 128 took 411 s on one core; by forwards, not measured: 80 s for the
default on 1000 images and one bViT, 2 PFLOP on ImageNet. Expected: none published. A plain bViT has
no clock but its state; one with a time embedding counts if wrong rows hurt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.schedule import COLUMNS, Config
from bvit_interp.analyses.schedule import schedules as schedule
from bvit_interp.analyses.schedule.schedules import (
    FEATURES,
    REMOVALS,
    Discriminant,
    Plan,
    Run,
    feature,
    judged,
    removals,
    removed,
    states,
)
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.samples import Samples, spread
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.stepping import State, answer, proceed
from bvit_interp.models.unroll import run_on
from bvit_interp.probes.probe import Probe

_STRIPPED = ("subspace", "mean")


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Changed schedules, the step read off the state, and states without it.

    Parameters
    ----------
    models : name -> model; all see each image in the same two passes.
    data : labelled images, at least 6.

    Returns
    -------
    A table of `COLUMNS`; no `put` for a model whose steps are all the same function.
    """
    roles = _roles(len(data), config)
    subjects = {
        name: _Subject(model, label_map(data, model), config) for name, model in models.items()
    }
    loader, geometries = config.loader(data, models, "schedule")
    for batch in loader:
        for name, subject in subjects.items():
            subject.learn(batch, geometries[name], roles)
    for subject in subjects.values():
        subject.fit()
    for batch in config.loader(data, models, "schedule: held-out images")[0]:
        for name, subject in subjects.items():
            subject.test(batch, geometries[name], roles["test"])
    rows = [
        {"model": name, "trained_steps": of.trained, **row}
        for name, of in subjects.items()
        for row in of.rows()
    ]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "other", "n"), "Int64"))


def _roles(length: int, config: Config) -> dict[str, set[int]]:
    """Places of the images that probes are fitted to, before and after a removal, that test, and of
    the matrix."""
    places = spread(length, config.limit)
    n = len(places)
    if n < 6:
        raise UserError(f"the step is read on held-out images: at least 6 are needed, got {n}")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed)).tolist()
    scored = min(config.scored, n // 2)
    ends = {"matrix": (0, min(config.matrix_images, scored)), "test": (0, scored)}
    ends |= {"fit": (scored, middle := (scored + 2 * n) // 3), "refit": (middle, n)}
    return {role: {places[i] for i in shuffled[begin:end]} for role, (begin, end) in ends.items()}


class _Subject:
    """A model, and everything that is measured of it."""

    def __init__(self, model: VisionTransformer, classes: Tensor, config: Config) -> None:
        self.trained, self.classes, self.config = len(model.blocks), classes, config
        if self.trained < 2:
            raise UserError("a model of one step has none to exchange: at least 2 steps are needed")
        self.view = run_on(model, max(self.trained, *config.runs, 0))
        self.device, count = next(self.view.parameters()).device, self.view.num_classes
        possible = schedule.schedules(self.trained, config.runs, config.shifts)
        within = {
            run: steps for run, steps in possible.items() if max(steps) <= len(self.view.blocks)
        }
        self.plans = [schedule.Plan(self.view, within)]
        if (mean := schedule.with_mean_row(model)) is not None:
            self.plans.append(
                schedule.Plan(mean, {schedule.Run("mean_row"): within[schedule.Run("normal")]})
            )
        differ = len({*schedule.same_steps(self.view)[: self.trained]}) > 1
        pairs = schedule.substitutions(self.trained) if differ and config.matrix_images else {}
        self.matrix = [schedule.Plan(self.view, pairs)] if pairs else []
        self.kinds = Probe(self.view).kinds()
        widths = {name: 1 if name == "norm" else self.view.embed_dim for name in schedule.FEATURES}
        keys = [(kind, name, "fit") for kind in self.kinds for name in widths]
        keys += [(kind, "raw", "refit") for kind in self.kinds]
        self.moments = {
            key: schedule.StepMoments(self.trained, widths[key[1]]).to(self.device) for key in keys
        }
        of_plans, of_matrix = (
            sum(len(plan.runs) for plan in plans) for plans in (self.plans, self.matrix)
        )
        variants = self.trained * len(schedule.REMOVALS)
        self.outcomes, self.of_matrix, self.removed = (
            schedule.Outcomes(runs, count).to(self.device)
            for runs in (of_plans, of_matrix, variants)
        )
        self.distance = MeanCI(variants).to(self.device)

    def _each(
        self, work: Callable[..., Any], batch: Batch, geometry: Any, places: set[int]
    ) -> Iterator[Any]:
        """`work` of images and classes of those of a batch that are at these places of the data
        set."""

        def run(part: Batch) -> Any:
            kept = torch.tensor([place in places for place in part.index.tolist()])
            images, labels = part.views[geometry][0][kept], self.classes[part.labels[kept]]
            with torch.inference_mode():
                return work(images.to(self.device), labels.to(self.device))

        if not places.isdisjoint(batch.index.tolist()):
            yield from run_in_halves(run, batch)

    # ---- first pass: schedules, and what is learnt -----------------------------------------------------

    def learn(self, batch: Batch, geometry: Any, roles: Mapping[str, set[int]]) -> None:
        """Run every schedule on a batch, and add up the states of those of its images that are
        learnt from."""
        for plans, outcomes, role in (
            (self.plans, self.outcomes, "test"),
            (self.matrix, self.of_matrix, "matrix"),
        ):
            if plans:  # the first schedule of either is the normal run

                def run(
                    images: Tensor, labels: Tensor, plans: list[Plan] = plans
                ) -> tuple[Tensor, Tensor]:
                    return torch.cat([plan.logits(images) for plan in plans]), labels

                for logits, labels in self._each(run, batch, geometry, roles[role]):
                    outcomes.update(logits, logits[0], labels)
        for role in ("fit", "refit"):
            for found in self._each(self._states, batch, geometry, roles[role]):
                for state, ((kind, name, of), moments) in itertools.product(
                    found, self.moments.items()
                ):
                    if of == role:
                        moments.update(feature(state.tokens[:, self.kinds[kind]], name), state.step)

    def _states(self, images: Tensor, _: Tensor) -> list[State]:
        return [*states(self.view, images, self.trained)]

    def fit(self) -> None:
        """The probes and the removals, from the sums of all processes; the same on every one."""
        ridge, seed = self.config.ridge, self.config.seed
        sums = {key: found.compute() for key, found in self.moments.items()}
        self.readers = {
            key[:2]: Discriminant(of_key, ridge) for key, of_key in sums.items() if key[2] == "fit"
        }
        self.removals = [
            {
                kind: removals(sums[kind, "raw", "fit"], (seed, step, i))
                for i, kind in enumerate(self.kinds)
            }
            for step in range(1, self.trained + 1)
        ]
        for kind, of_kind in self.removals[0].items():
            for name in _STRIPPED:
                self.readers[kind, name] = Discriminant(
                    of_kind[name].moved(sums[kind, "raw", "refit"]), ridge
                )
        self.norms = {
            kind: sums[kind, "norm", "fit"].means[:, 0].exp().tolist() for kind in self.kinds
        }
        self.readings = {key: MeanCI(self.trained + 1, 3).to(self.device) for key in self.readers}

    # ---- second pass: held-out images ------------------------------------------------------------------

    def test(self, batch: Batch, geometry: Any, places: set[int]) -> None:
        """Read the step of every state of the images at these places, and run on without it."""
        for outcomes, distance, read in self._each(self._test, batch, geometry, places):
            self.removed.update(*outcomes)
            self.distance.update(distance)
            for key, values in read.items():
                self.readings[key].update(values)

    def _test(
        self, images: Tensor, labels: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, dict[Any, Tensor]]:
        """What `Outcomes` takes of the V removals at every step, distances ``(B, T V)``, and each
        reader `judged`."""
        logits, distance = [], []
        read: dict[Any, list[Tensor]] = {key: [] for key in self.readers}
        for state in states(self.view, images, self.trained):
            own, changed = state.tokens, {name: torch.empty_like(state.tokens) for name in REMOVALS}
            for kind, rows in self.kinds.items():
                found = removed(own[:, rows], state.step, self.removals[state.step - 1][kind])
                for name in REMOVALS:
                    changed[name][:, rows] = found[name]
                for name in (*FEATURES, *_STRIPPED):
                    values = (
                        feature(found[name], "raw")
                        if name in found
                        else feature(own[:, rows], name)
                    )
                    read[kind, name].append(self.readers[kind, name](values))
            for tokens in changed.values():
                after = proceed(self.view, State(tokens, state.step, state.memory), self.trained)
                logits.append(answer(self.view, after))
                distance.append(((tokens - own).norm(dim=-1) / own.norm(dim=-1)).double().mean(1))
        scores = {key: judged(torch.stack(values, dim=2)) for key, values in read.items()}
        return (
            (torch.stack(logits), answer(self.view, state), labels),
            torch.stack(distance, dim=1),
            scores,
        )

    # ---- rows ------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of the model; every process takes part."""
        removals = [Run(name, t) for t in range(1, self.trained + 1) for name in REMOVALS]
        for part, runs, outcomes in (
            ("schedule", [run for plan in self.plans for run in plan.runs], self.outcomes),
            ("schedule", [run for plan in self.matrix for run in plan.runs], self.of_matrix),
            ("removal", removals, self.removed),
        ):
            for name, found in (outcomes.compute() if runs else {}).items():
                for run, row in zip(runs, found, strict=True):
                    yield {"part": part, **run._asdict(), "measure": name, **row}
        moved = self.distance.compute()
        for i, run in enumerate(removals):
            far = {key: values[i].item() for key, values in moved.items()}
            yield {"part": "removal", **run._asdict(), "measure": "distance", **far}
        table = getattr(self.view.blocks[0], "step_embed", None)
        lengths = [] if table is None else table.detach().double().norm(dim=1).tolist()
        for kind, norms in self.norms.items():
            about: dict[str, Any] = {
                "part": "schedule",
                "kind": "row",
                "tokens": kind,
                "measure": "length",
            }
            for t, (length, norm) in enumerate(zip(lengths, norms, strict=False), start=1):
                yield {**about, "step": t, "value": length / norm}
        nulls = {
            "accuracy": 1 / self.trained,
            "error": self.trained**2 // 4 / self.trained,
            "order": 0.5,
        }
        for (kind, name), metric in self.readings.items():
            columns = metric.compute()
            for i, (j, measure) in itertools.product(range(self.trained + 1), enumerate(nulls)):
                about = {
                    "part": "reading",
                    "kind": name,
                    "tokens": kind,
                    "step": i + 1 if i < self.trained else None,
                }
                values = {key: column[i, j].item() for key, column in columns.items()}
                yield {**about, "measure": measure, **values, "null": nulls[measure]}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracies: of the normal and the longer runs, of the step that is read, and of removals half
    way."""
    shown = frame["kind"].isin(["normal", "run", "mean_row"])
    shown |= frame["kind"].isin(["raw", "norm"]) & frame["step"].isna()
    half_way = (frame["part"] == "removal") & (frame["step"] == frame["trained_steps"] // 2)
    shown |= frame["kind"].isin(["subspace", "random_scaled"]) & half_way
    return frame[shown & (frame["measure"] == "accuracy")].drop(columns="measure")
