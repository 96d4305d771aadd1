"""Adapt a model to another data set, and score it beside nulls.

It trains a probe, a time embedding, a low-rank update or all weights. Section 4.3, Table 4 and
appendix H of bViT (arXiv 2605.10661). The paper gives: AdamW, cross-entropy, 40 epochs, batches of
128 for CIFAR and 64 otherwise, linear warm-up over 5 epochs and a cosine, a new linear head, rank
8, three runs. The rest is our choice, because the paper does not give it: learning rates and weight
decays (`transfer_plan.DEFAULTS`), alpha 16, a warm-up of an eighth of shorter runs, no
augmentation, no clipping. An adapter that is active at chosen steps only is our addition.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp import results
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.options import LoaderOptions
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models import checkpoint
from bvit_interp.models.adapters import FILE, Adapted, Spec
from bvit_interp.models.bvit import BViT
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import is_unrolled
from bvit_interp.training.adapting import tuning
from bvit_interp.training.adapting.probe import (
    Features,
    exact_accuracy,
    feature_batches,
    with_random_weights,
)
from bvit_interp.training.adapting.transfer_data import trained_class, training_images
from bvit_interp.training.adapting.transfer_plan import LOW_RANK, Plan
from bvit_interp.training.adapting.tuning import STATE
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.feed import Share
from bvit_interp.training.loop.recipe import Recipe

KEYS = {
    "model": "checkpoint from which the transfer starts",
    "data": "data set",
    "backbone": "trained, or random: the null, the same architecture with random weights",
    "mode": "what is trained: probe, te, full, lora-qv or lora-ffn",
    "steps": "steps at which a low-rank update is active: all, none, or step(s) t",
    "rank": "rank of a low-rank update; 0 in the other modes",
    "epochs": "number of training epochs",
    "n_train": "number of training images",
    "seed": "random seed of the head, the adapter and the order of images",
    "weights": "16 hex digits of the checkpoint's weights",
    "images": "16 hex digits of the training images",
}
COLUMNS = KEYS | {
    "trainable_parameters": "number of trained parameters without the new head",
    "head_parameters": "number of parameters of the new head",
    "train_loss": "mean training loss of the last epoch, nats",
    "accuracy": "share of test images classified correctly after the last epoch, 0..1",
    "low": "lower end of the accuracy's 95 % Wilson interval over images",
    "high": "upper end of that interval",
    "n": "number of test images",
    "chance": "the null: share of the most frequent test class, 0..1",
    "exact_accuracy": "for a probe, accuracy of logistic regression (L2, C = 1) solved to its"
    " optimum on the same features; empty in the other modes",
}
TABLE = "transfer.csv"


class Transfer:
    """One model adapted to one data set: what its runs share.

    Parameters
    ----------
    name : name of the model, for the table.
    model : the base. It does not change; everything runs on its device.
    data : name of the data set, for the table and the default batch size.
    train, test : labelled images.
    plan : how to adapt it.
    out : folder of `transfer.csv` and of one folder per run.
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
                "transfer starts from a model's own weights: give the model, not an unroll or"
                " masked view of it"
            )
        self.name, self.model, self.data, self.plan, self.out = name, model, data, plan, out
        self.rank, self.world = results.rank_and_world()
        self.specs = specs(plan, model)
        self.train, self.test = training_images(train, plan.n_train), test
        self.classes = tuple(train.classes)
        self.trained_class = trained_class(test, self.classes)
        self.device = device_of(model)
        self.geometry = Geometry.of(model, self.train, plan.resize)
        self.keys = {
            "model": name,
            "data": data,
            "weights": results.weights_hash(model),
            "images": feed.fingerprint(self.train),
            "epochs": plan.epochs,
            "n_train": len(self.train),
        }
        self._features: dict[int | None, tuple[Features, Features, float]] = {}

    def runs(self) -> Iterator[tuple[dict[str, Any], Spec, int]]:
        """Keys, spec and seed of every run, in order."""
        for seed in self.plan.seeds:
            for spec in self.specs:
                yield self._run_keys(spec, seed, "trained"), spec, seed
            if self.plan.random_baseline:
                probe = Spec(mode="probe")
                yield self._run_keys(probe, seed, "random"), probe, seed

    def _run_keys(self, spec: Spec, seed: int, backbone: str) -> dict[str, Any]:
        return self.keys | {
            "backbone": backbone,
            "mode": spec.mode,
            "steps": _steps_text(spec),
            "rank": spec.rank if spec.mode in LOW_RANK else 0,
            "seed": seed,
        }

    def folder(self, keys: dict[str, Any]) -> Path:
        """Folder of a run; a hash distinguishes runs whose other words are equal."""
        shown = "-".join(str(keys[key]) for key in ("model", "data", "mode", "steps", "seed"))
        digest = hashlib.sha256(repr(sorted(keys.items())).encode()).hexdigest()[:6]
        return self.out / re.sub(r"[^\w.]+", "-", f"{shown}-{digest}").lower()

    def run(self, keys: dict[str, Any], spec: Spec, seed: int, merge: bool) -> dict[str, Any]:
        """Train, score and save one run; a row of `COLUMNS`."""
        is_random = keys["backbone"] == "random"
        base = with_random_weights(self.model, seed) if is_random else self.model
        adapted = Adapted(base, spec, self.classes, seed)
        recipe = tuning.recipe_of(self.plan, spec.mode, seed, self.data, len(self.train))
        if recipe.batch_size % self.world:
            raise UserError(
                f"train-batch {recipe.batch_size} is not divisible by {self.world} processes"
            )
        exact = math.nan
        if spec.mode == "probe":
            loss, scores, exact = self._probe(adapted, recipe, seed if is_random else None)
        else:
            loss, scores = self._tune(adapted, recipe, keys)
        if self.rank == 0 and not is_random:
            self._save(adapted, keys, scores["accuracy"], merge)
        low, high = wilson_interval(round(scores["accuracy"] * scores["n"]), scores["n"])
        values = {
            "trainable_parameters": adapted.count(),
            "head_parameters": adapted.head_count(),
            "train_loss": loss,
            "accuracy": scores["accuracy"],
            "low": low,
            "high": high,
            "n": scores["n"],
            "chance": scores["chance"],
            "exact_accuracy": exact,
        }
        return {column: {**keys, **values}[column] for column in COLUMNS}

    def _save(self, adapted: Adapted, keys: dict[str, Any], accuracy: float, merge: bool) -> None:
        folder = self.folder(keys)
        about = {"accuracy": accuracy, "data": self.data, "seed": keys["seed"]}
        adapted.save(folder / FILE, about)
        if merge:
            card = (
                f"# {folder.name}\n\n{self.name} adapted to {self.data} by {keys['mode']}:"
                f" accuracy {accuracy:.4f}.\n"
            )
            merged = cast("BViT", adapted.merged())
            checkpoint.save(merged, folder / "merged", card, {**keys, **about})

    def _probe(
        self, adapted: Adapted, recipe: Recipe, random_seed: int | None
    ) -> tuple[float, dict[str, Any], float]:
        """Train a head on features that are computed once.

        Returns
        -------
        The loss, the scores, and the accuracy of the exact solver.
        """
        train, test, exact = self.features(random_seed, adapted)
        model: Any = adapted.model
        loss = tuning.fit(
            model.head,
            adapted,
            lambda epoch: feature_batches(train, recipe, epoch),
            len(self.train),
            recipe,
        )
        if hasattr(model, "head_dist"):
            # the mean of two equal heads is one head on the mean of both tokens
            model.head_dist.load_state_dict(model.head.state_dict())
        share = slice(self.rank, None, self.world)
        with torch.inference_mode():
            return loss, self._score([(model.head(test[0][share]), test[1][share])]), exact

    def _tune(
        self, adapted: Adapted, recipe: Recipe, keys: dict[str, Any]
    ) -> tuple[float, dict[str, Any]]:
        """Train the model on images, or continue from its state; returns loss and scores."""

        def batches(number: int) -> Iterator[Share]:
            epoch = feed.Epoch(recipe, self.train, lambda image, _: self.geometry(image)[0], number)
            return feed.batches(epoch, 0, recipe.workers, pin=self.device.type == "cuda")

        loss = tuning.fit(
            adapted.view,
            adapted,
            batches,
            len(self.train),
            recipe,
            self.folder(keys) / STATE,
            {**keys, **self.plan.options()},
        )
        return loss, self._score(self._logits(adapted.view))

    def _score(self, logits_and_labels: Iterable[Share]) -> dict[str, Any]:
        metric = Classification(len(self.classes)).to(self.device)
        for logits, labels in logits_and_labels:
            metric.update(logits, labels)
        return metric.compute()

    def features(
        self, random_seed: int | None, adapted: Adapted
    ) -> tuple[Features, Features, float]:
        """Features of all training and test images, and the accuracy of the exact solver.

        They are computed once per backbone: the trained one (None) and those of random seeds.
        """
        if random_seed not in self._features:
            every_class = torch.arange(len(self.classes))
            train = self._compute_features(adapted.model, self.train, every_class, None)
            test = self._compute_features(
                adapted.model, self.test, self.trained_class, self.plan.limit
            )
            self._features[random_seed] = (train, test, exact_accuracy(train, test))
        return self._features[random_seed]

    def _compute_features(
        self,
        model: VisionTransformer,
        samples: Samples,
        class_index: Tensor,
        limit: int | None,
    ) -> Features:
        """The input of the head and the label of every image, on the model's device."""

        def compute(batch: ModelBatch) -> tuple[Tensor, Tensor]:
            features = model.forward_head(model.forward_features(batch.images), pre_logits=True)
            labels = class_index[batch.data_labels.cpu()]
            return batch.index, torch.cat([features.float().cpu(), labels[:, None]], 1)

        rows = PerImage()
        models, options = {self.name: model}, self._reading(limit)
        for _, (index, row) in stream(models, samples, options, compute, progress="features"):
            rows.update(index, row)
        table = rows.compute()[1]
        return table[:, :-1].float().to(self.device), table[:, -1].long().to(self.device)

    def _logits(self, view: VisionTransformer) -> Iterator[Share]:
        """Logits and labels of this process's share of the test images."""

        def compute(batch: ModelBatch) -> Share:
            labels = self.trained_class[batch.data_labels.cpu()]
            return view(batch.images), labels.to(self.device)

        models, options = {self.name: view}, self._reading(self.plan.limit)
        for _, share in stream(models, self.test, options, compute, progress="test"):
            yield share

    def _reading(self, limit: int | None) -> LoaderOptions:
        """Options for reading images: test images are resized like the training images."""
        options = {name: getattr(self.plan, name) for name in asdict(LoaderOptions())}
        return LoaderOptions(**options | {"limit": limit, "resize": self.geometry.resize})


def specs(plan: Plan, model: VisionTransformer) -> list[Spec]:
    """What is trained, mode after mode; all of it is checked before the first run."""
    listed = []
    for mode in plan.mode:
        chosen: list[tuple[int, ...] | None] = [None]
        if mode in LOW_RANK and plan.steps:
            chosen = [tuple(sorted({*plan.steps}))]
        elif mode in LOW_RANK and plan.sweep_steps:
            chosen += [(), *((t,) for t in range(1, len(model.blocks) + 1))]
        listed += [
            Spec(
                mode=mode,
                steps=steps,
                rank=plan.rank,
                alpha=plan.alpha,
                train_final_norm=plan.train_final_norm,
            )
            for steps in chosen
        ]
    for spec in listed:
        spec.check(model)
    return listed


def run(transfer: Transfer, *, overwrite: bool = False, merge: bool = False) -> pd.DataFrame:
    """Train and score the missing runs and return the table, one row of `COLUMNS` per run.

    The table is written after each run.

    Parameters
    ----------
    transfer : the model, the data set and the plan.
    overwrite : start the table again. By default it continues: rows of other models, data sets,
        modes, seeds and steps are kept, and a run that was killed continues after its last epoch.
    merge : also write each adapted model as an ordinary checkpoint folder.
    """
    table = results.Table(transfer.out / TABLE, transfer.plan.options(), overwrite)
    if merge:
        for spec in transfer.specs:  # before the first run, not after it
            Adapted(transfer.model, spec, transfer.classes).check_merges()
    if overwrite and transfer.rank == 0:
        for keys, _, _ in transfer.runs():
            (transfer.folder(keys) / STATE).unlink(missing_ok=True)
    if transfer.world > 1:
        dist.barrier()  # no process may continue from a state that is about to be deleted
    for keys, spec, seed in transfer.runs():
        if not table.has(**keys):
            table.append(transfer.run(keys, spec, seed, merge))
        if transfer.rank == 0:  # also of a run that was killed behind its row
            (transfer.folder(keys) / STATE).unlink(missing_ok=True)
    return pd.DataFrame(table.rows)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds, one row per choice of the other keys.

    The deviation divides by n - 1.
    """
    keys = [key for key in KEYS if key != "seed"]
    grouped = frame.groupby(keys, sort=False)
    table = grouped["accuracy"].agg(["mean", "std", "count"])
    table.columns = ["accuracy", "deviation", "seeds"]
    first = grouped[["trainable_parameters", "n", "chance"]].first()
    return table.join(first).join(grouped[["exact_accuracy"]].mean()).reset_index()


def _steps_text(spec: Spec) -> str:
    """The column `steps`; it contains a word, so that it is read back from a CSV as text."""
    if spec.mode not in LOW_RANK:
        return "none" if spec.mode == "probe" else "all"
    if spec.steps is None:
        return "all"
    if not spec.steps:
        return "none"
    word = "step" if len(spec.steps) == 1 else "steps"
    return f"{word} {' '.join(map(str, spec.steps))}"
