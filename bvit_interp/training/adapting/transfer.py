"""Transfer to another data set: probe, time embedding, low-rank or full tuning, in one table with
its nulls.

Section 4.3, Table 4 and appendix H of bViT (arXiv 2605.10661). Printed: AdamW, cross-entropy, 40
epochs, batches of 128 for CIFAR and 64 else, linear warm-up over 5 epochs and a cosine, a new
linear head, rank 8, three runs. Ours, where the paper is silent: learning rates and weight decays
(`DEFAULTS`), alpha 16, the warm-up's share of shorter runs (an eighth), no augmentation, no
clipping; and beyond it the steps at which an adapter is active.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp import results
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Loader, run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError, choices
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models import checkpoint
from bvit_interp.models.adapters import FILE, PLACES, Adapted, Spec
from bvit_interp.models.unroll import is_unrolled
from bvit_interp.training.adapting import tuning
from bvit_interp.training.adapting.transfer_plan import Plan
from bvit_interp.training.adapting.tuning import STATE
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.feed import Share
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning.subsets import Pool

COLUMNS = {
    "model": "checkpoint the transfer starts from",
    "data": "data set",
    "backbone": "trained, or random: the null, the same architecture with fresh weights",
    "mode": "probe, te, full, lora-qv or lora-ffn",
    "steps": "steps at which a low-rank update is active: all, none, or step(s) t",
    "rank": "of a low-rank update; 0 in the other modes",
    "epochs": "passes over the training images",
    "train_images": "how many there are",
    "seed": "of the head, the adapter and the order of images",
    "weights": "16 hex digits of the checkpoint's weights",
    "images": "16 hex digits of the training set",
    "trainable": "trained parameters without the new head",
    "head": "parameters of the new head",
    "train_loss": "mean training loss of the last epoch, nats",
    "accuracy": "share of test images classified right after the last epoch, 0..1",
    "low": "lower end of its 95 % Wilson interval over images",
    "high": "upper end",
    "n": "test images",
    "chance": "the null: share of the most frequent test class, 0..1",
    "exact": "of a probe, accuracy of logistic regression solved on the same features (L2, C = 1); else empty",
}
KEYS = [*COLUMNS][: [*COLUMNS].index("trainable")]
TABLE = "transfer.csv"


class Chosen:
    """Training images of a `Pool`, as `Samples` that are the same in every epoch."""

    has_masks = False

    def __init__(self, pool: Pool) -> None:
        self.pool, self.classes, self.native_size = pool, pool.classes, pool.samples.native_size

    def __len__(self) -> int:
        return len(self.pool)

    def name(self, i: int) -> str:
        return self.pool.samples.name(int(self.pool.index[i]))

    def read(self, i: int) -> tuple[np.ndarray, int, None]:
        return self.pool.read(i), int(self.pool.labels[i]), None


def chosen(samples: Samples, limit: int | None) -> Chosen:
    """The training images; a set of one class, or with a class that has none of them, is
    refused."""
    if len(samples.classes) < 2:
        raise UserError(
            f"the data set has one class ({choices(samples.classes)}): nothing to tell apart"
        )
    pool = Pool(samples, samples.classes, limit)
    counts = np.bincount(pool.labels, minlength=len(samples.classes))
    if empty := [name for name, n in zip(samples.classes, counts, strict=True) if not n]:
        more = " (raise limit-train)" if limit is not None else ""
        raise UserError(f"no training image of {len(empty)} classes: {choices(empty)}{more}")
    return Chosen(pool)


def places_of(test: Samples, classes: tuple[str, ...]) -> Tensor:
    """The trained class of every class of the test set, ``(classes,)`` int64, by name."""
    if unknown := [name for name in test.classes if name not in classes]:
        raise UserError(
            f"the training images lack {len(unknown)} classes of the test set: {choices(unknown)}"
        )
    return torch.tensor([classes.index(name) for name in test.classes])


class Transfer:
    """One model taken to one data set: what its runs share.

    Parameters
    ----------
    name, model : of the table, and the base; it is not changed. Everything runs on its device.
    data : the data set's name, for the table and the default batch.
    train, test : labelled images.
    plan : how.
    out : folder of `transfer.csv` and of a folder for every run.
    """

    def __init__(
        self,
        name: str,
        model: VisionTransformer,
        data: str,
        train: Samples,
        test: Samples,
        plan: Plan,
        out: Path,
    ) -> None:
        if is_unrolled(model):
            raise UserError(
                "transfer starts from a model's own weights, not from an unroll or masked view of it"
            )
        self.name, self.model, self.data, self.plan, self.out = name, model, data, plan, out
        self.rank, self.world = results.rank_and_world()
        self.specs = specs(plan, model)
        self.train, self.test = chosen(train, plan.limit_train), test
        self.classes = tuple(train.classes)
        self.places = places_of(test, self.classes)
        self.device = next(model.parameters()).device
        self.keys = {
            "model": name,
            "data": data,
            "weights": results.weights_hash(model),
            "images": feed.fingerprint(self.train),
            "epochs": plan.epochs,
            "train_images": len(self.train),
        }
        self._features: dict[int | None, tuple[Share, Share, float]] = {}

    def runs(self) -> Iterator[tuple[dict[str, Any], Spec, int]]:
        """Keys, spec and seed of every run, in order."""
        for seed in self.plan.seeds:
            for spec in self.specs:
                own = {"backbone": "trained", "mode": spec.mode, "steps": _steps_text(spec)}
                rank = {"rank": spec.rank if spec.mode in PLACES else 0, "seed": seed}
                yield self.keys | own | rank, spec, seed
            if self.plan.random_baseline:
                null = {
                    "backbone": "random",
                    "mode": "probe",
                    "steps": "none",
                    "rank": 0,
                    "seed": seed,
                }
                yield self.keys | null, Spec(mode="probe"), seed

    def run(self, keys: dict[str, Any], spec: Spec, seed: int, merge: bool) -> dict[str, Any]:
        """One run: trained, scored, saved; a row of `COLUMNS`."""
        random = keys["backbone"] == "random"
        adapted = Adapted(
            tuning.untrained(self.model, seed) if random else self.model, spec, self.classes, seed
        )
        folder = self.out / _slug(keys)
        recipe = self.plan.recipe(spec.mode, seed, self.data, len(self.train))
        if recipe.batch_size % self.world:
            raise UserError(
                f"train-batch {recipe.batch_size} is not divisible by {self.world} processes"
            )
        if spec.mode == "probe":
            loss, scores, exact = self._probe(adapted, recipe, seed if random else None)
        else:
            (loss, scores), exact = self._tune(adapted, recipe, keys, folder / STATE), math.nan
        if self.rank == 0 and not random:
            accuracy = {"accuracy": scores["accuracy"], "data": self.data, "seed": seed}
            adapted.save(folder / FILE, accuracy)
            if merge:
                card = f"# {folder.name}\n\n{self.name} adapted to {self.data} by {spec.mode}: {scores['accuracy']:.4f}.\n"
                checkpoint.save(adapted.merged(), folder / "merged", card, {**keys, **accuracy})
        low, high = wilson_interval(round(scores["accuracy"] * scores["n"]), scores["n"])
        values = {
            "trainable": adapted.count(),
            "head": adapted.head_count(),
            "train_loss": loss,
            "accuracy": scores["accuracy"],
            "low": low,
            "high": high,
            "n": scores["n"],
            "chance": scores["chance"],
            "exact": exact,
        }
        return {column: ({**keys, **values})[column] for column in COLUMNS}

    def _probe(
        self, adapted: Adapted, recipe: Recipe, random: int | None
    ) -> tuple[float, dict[str, Any], float]:
        """A head fitted to what the frozen backbone gives, computed once; loss, scores and the
        exact solver's."""
        train, test, exact = self.features(random, adapted)
        head, kind = adapted.model.head, adapted.model
        loss = tuning.fit(
            head,
            adapted,
            lambda epoch: tuning.shares(train, recipe, epoch),
            len(self.train),
            recipe,
        )
        if hasattr(
            kind, "head_dist"
        ):  # the mean of two equal heads is one head of the mean of both tokens
            kind.head_dist.load_state_dict(head.state_dict())
        own = slice(self.rank, None, self.world)
        with torch.inference_mode():
            return loss, self._score([(head(test[0][own]), test[1][own])]), exact

    def _tune(
        self, adapted: Adapted, recipe: Recipe, keys: dict[str, Any], path: Path
    ) -> tuple[float, dict[str, Any]]:
        """The model itself trained on images, from the state in `path` if one is there; loss and
        scores."""
        geometry, pin = (
            Geometry.of(self.model, self.train, self.plan.resize),
            self.device.type == "cuda",
        )

        def batches(epoch: int) -> Iterator[Share]:
            of = feed.Epoch(recipe, self.train, lambda image, _: geometry(image)[0], epoch)
            return feed.batches(of, 0, recipe.workers, pin)

        about = {**keys, **self.plan.options()}
        loss = tuning.fit(adapted.view, adapted, batches, len(self.train), recipe, path, about)
        return loss, self._score(self._answers(adapted.view))

    def _score(self, answers: Iterable[Share]) -> dict[str, Any]:
        metric = Classification(len(self.classes)).to(self.device)
        for logits, labels in answers:
            metric.update(logits, labels)
        return metric.compute()

    def features(self, seed: int | None, adapted: Adapted) -> tuple[Share, Share, float]:
        """What the head reads of all training and test images, and the exact solver's accuracy;
        once a backbone."""
        if seed not in self._features:
            train = self._run_once(adapted.model, self.train, torch.arange(len(self.classes)), None)
            test = self._run_once(adapted.model, self.test, self.places, self.plan.limit)
            self._features[seed] = (train, test, tuning.exact_accuracy(train, test))
        return self._features[seed]

    def _run_once(
        self, model: VisionTransformer, samples: Samples, places: Tensor, limit: int | None
    ) -> Share:
        rows, geometry = PerImage(), Geometry.of(model, self.train, self.plan.resize)

        def run(part: Any) -> tuple[Tensor, Tensor]:
            images = part.views[geometry][0].to(self.device)
            read = model.forward_head(model.forward_features(images), pre_logits=True).float().cpu()
            return part.index, torch.cat([read, places[part.labels][:, None]], 1)

        with torch.inference_mode():
            for batch in self._loader(samples, geometry, limit, "features"):
                for index, row in run_in_halves(run, batch):
                    rows.update(index, row)
        table = rows.compute()[1]
        return table[:, :-1].float().to(self.device).clone(), table[:, -1].long().to(self.device)

    def _answers(self, view: VisionTransformer) -> Iterator[Share]:
        """Logits and labels of this process's share of the test images, batch by batch."""
        geometry = Geometry.of(self.model, self.train, self.plan.resize)
        for batch in self._loader(self.test, geometry, self.plan.limit, "test"):
            with torch.inference_mode():
                parts = run_in_halves(
                    lambda part: view(part.views[geometry][0].to(self.device)), batch
                )
            yield (
                torch.cat(parts),
                self.places[batch.labels].to(self.device),
            )  # not within: the mode would leak

    def _loader(
        self, samples: Samples, geometry: Geometry, limit: int | None, progress: str
    ) -> Loader:
        plan = self.plan
        return Loader(
            samples,
            [geometry],
            plan.batch_size,
            limit=limit,
            workers=plan.workers,
            skip_corrupt=plan.skip_corrupt,
            progress=progress,
        )


def run(transfer: Transfer, *, overwrite: bool = False, merge: bool = False) -> pd.DataFrame:
    """Train and score what the table lacks, and return it, a row of `COLUMNS` a run; it is written
    after each.

    Parameters
    ----------
    transfer : what is adapted to what.
    overwrite : start the table again. Without, one in the folder goes on: rows of other models,
        data sets, modes, seeds and steps are kept beside the new ones, and a run that was killed
        goes on after its last epoch.
    merge : write each adapted model as an ordinary checkpoint folder too.
    """
    table = results.Table(transfer.out / TABLE, transfer.plan.options(), overwrite)
    for spec in transfer.specs if merge else ():
        Adapted(
            transfer.model, spec, transfer.classes
        ).check_merges()  # before the first run, not after it
    for keys, _, _ in transfer.runs() if overwrite and transfer.rank == 0 else ():
        (transfer.out / _slug(keys) / STATE).unlink(missing_ok=True)
    if transfer.world > 1:
        dist.barrier()  # no process may take up what another is about to delete
    for keys, spec, seed in transfer.runs():
        if not table.has(**keys):
            table.append(transfer.run(keys, spec, seed, merge))
            if transfer.rank == 0:
                (transfer.out / _slug(keys) / STATE).unlink(missing_ok=True)
    return pd.DataFrame(table.rows)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (of n - 1) over the seeds, a row for each choice of the other
    keys."""
    keys = [key for key in KEYS if key != "seed"]
    grouped = frame.groupby(keys, sort=False)
    table = grouped["accuracy"].agg(["mean", "std", "count"])
    table.columns = ["accuracy", "deviation", "seeds"]
    first = grouped[["trainable", "n", "chance"]].first()
    return table.join(first).join(grouped[["exact"]].mean()).reset_index()


def specs(plan: Plan, model: VisionTransformer) -> list[Spec]:
    """What is trained, mode after mode; everything is checked before the first run."""
    listed = []
    for mode in plan.mode:
        chosen_steps: list[tuple[int, ...] | None] = [None]
        if mode in PLACES and plan.steps:
            chosen_steps = [tuple(sorted({*plan.steps}))]
        elif mode in PLACES and plan.sweep_steps:
            chosen_steps += [(), *((t,) for t in range(1, len(model.blocks) + 1))]
        listed += [
            Spec(
                mode=mode,
                steps=steps,
                rank=plan.rank,
                alpha=plan.alpha,
                train_final_norm=plan.train_final_norm,
            )
            for steps in chosen_steps
        ]
    for spec in listed:
        spec.check(model)
    return listed


def _steps_text(spec: Spec) -> str:
    """The column `steps`: a word in it keeps a CSV's column text."""
    if spec.mode not in PLACES:
        return "none" if spec.mode == "probe" else "all"
    if spec.steps is None:
        return "all"
    return (
        f"step{'s' * (len(spec.steps) > 1)} {' '.join(map(str, spec.steps))}"
        if spec.steps
        else "none"
    )


def _slug(keys: dict[str, Any]) -> str:
    """Name of a run's folder; the hash tells runs apart that differ in what it does not say."""
    said = "-".join(str(keys[key]) for key in ("model", "data", "mode", "steps", "seed"))
    rest = hashlib.sha256(repr(sorted(keys.items())).encode()).hexdigest()[:6]
    return re.sub(r"[^\w.]+", "-", f"{said}-{rest}").lower()
