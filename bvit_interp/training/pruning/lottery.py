"""The lottery: masks from the first weights, models trained under them.

Algorithms 1 and 2 of Routing the Lottery (arXiv 2601.22141), for the methods of `by_subset.py`.
Every random draw is a function of the seed, the subset, the round and the batch. A training writes
its file completely or not at all: one that was killed runs again, with the same result.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError, choices
from bvit_interp.models.masks import FILE, Masks
from bvit_interp.models.unroll import unroll
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.augment import Augmentation
from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning import routing, subsets
from bvit_interp.training.pruning.criteria import prune_to
from bvit_interp.training.pruning.subnetworks import (
    Subnets,
    WeightNames,
    build_model,
    input_settings,
    masked_weights,
    untie_steps,
)
from bvit_interp.training.pruning.subset_batches import Batches, images_of_part
from bvit_interp.training.pruning.subsets import Part, Pool
from bvit_interp.training.pruning.ticket_plan import TicketPlan, schedule
from bvit_interp.training.pruning.ticket_table import ALL

TABLE = "tickets.csv"
TRAININGS = "trainings.csv"
SUBSETS = "subsets.csv"
WEIGHTS = "model.safetensors"
FIRST = "first.safetensors"
EXTRACTED = "extraction"
"""Folder of the masks of each subset and round."""
TRAINED = "subnets"
"""Folder of the trained models."""

# what random numbers are drawn for
_EXTRACT = 0
_RETRAIN = 1
_DRAW = 2
_REWIND = 3


class Lottery:
    """Data, first weights, and the masks and models found so far.

    Parameters
    ----------
    recipe, plan, out, device, overwrite : as in `by_subset.run`.
    """

    def __init__(
        self, recipe: Recipe, plan: TicketPlan, out: Path, device: str, overwrite: bool
    ) -> None:
        _check(recipe)
        self.recipe = recipe
        self.plan = plan
        self.out = out
        self.device = device
        samples, scored = open_samples(recipe.data, "train"), open_samples(recipe.data)
        origins = [
            [getattr(split, name, None) for name in ("root", "split")]
            for split in (samples, scored)
        ]
        if origins[0] == origins[1]:
            raise UserError(
                f"recipe: {recipe.data} has nothing to score on beside its training images"
            )
        classes = plan.classes or tuple(samples.classes)
        self.train = Pool(samples, classes, recipe.images_per_epoch)
        self.test = Pool(scored, classes, plan.limit)
        self.by_class = plan.by.startswith("class")
        self.partition = _partition(plan, self.train, self.test, recipe.seed, device)
        self.names = [part.name for part in self.partition.parts]
        self.init = build_model(recipe, self.train, device)
        self.weight_names = masked_weights(self.init, plan.by == "class-step")
        self.rounds = schedule(plan.sparsity, plan.rate)
        self._masks: dict[str, dict[int, Masks]] = {}
        seen = input_settings(self.init, samples)
        self.view = Augmentation(recipe, seen)
        self.geometry = Geometry.of(seen, scored)
        batches = [
            -(-len(part.own) // images_of_part(part, recipe.batch_size))
            for part in self.partition.parts
        ]
        # batches of each subset in the retraining: M of Algorithm 2 per epoch
        self.passes = max(batches) * plan.retrain_epochs
        membership = subsets.membership(self.partition, self.train, self.test)
        options = {
            "recipe": recipe.resume_key(),
            **plan.resume_key(),
            "images": feed.fingerprint(samples),
            "parts": hashlib.sha256(membership.to_csv().encode()).hexdigest()[:16],
        }
        self.trainings = results.Table(out / TRAININGS, options, overwrite)
        if overwrite:
            (out / TABLE).unlink(missing_ok=True)
        elif (out / TABLE).exists() and not self.trainings.rows:
            raise UserError(
                f"{out} holds {TABLE} and no {TRAININGS}: give another --out or --overwrite"
            )
        results.write_table(membership, out / SUBSETS)
        self.bar = tqdm(desc=out.name, unit="step", total=self._steps())
        self._rewind()

    def _rewind(self) -> None:
        """Train the first weights for some steps, or read them.

        The search for masks and the training of subnetworks both start from these weights.
        """
        path, steps = self.out / EXTRACTED / FIRST, self.plan.rewind
        keys = {"method": "all", "purpose": "rewind", "round": 0, "subset_index": 0}
        if self.trainings.has(**keys) and path.is_file():
            self.bar.update(steps)
            load_model(self.init, str(path))
        elif steps:
            masks = self.masks("imp", 0)
            _, about = self._trained(
                self.init, self.parts("imp"), masks, self.names_of("imp"), (_REWIND, 0, 0), steps
            )
            self.init.cpu()
            with results.replacing(path) as temporary:
                save_model(self.init, str(temporary))
            self.trainings.append({**keys, "subset": ALL, **about})

    def masks(self, method: str, number: int) -> Masks:
        """The masks of a method after round `number`; those of subset k are rows k R to
        k R + R - 1."""
        family = "rtl" if method == "multi" else method
        found = self._masks.setdefault(family, {})
        if number not in found and number == 0:
            shapes = dict(self.init.named_parameters())
            rows = len(self.parts(method)) * self.masks_per_part(method)
            found[0] = Masks(
                {
                    name: torch.ones(rows, *shapes[name].shape, dtype=torch.bool)
                    for name in self.weight_names
                }
            )
        elif number not in found:
            before, rows = self.masks(method, number - 1), self.masks_per_part(method)
            each = [
                self._extracted(family, k, part, _masks_of_part(before, k, rows), number)
                for k, part in enumerate(self.parts(method))
            ]
            found[number] = _joined(each)
        return found[number]

    def _extracted(self, family: str, k: int, part: Part, masks: Masks, number: int) -> Masks:
        """Algorithm 1 for one subset and round: train from the first weights, prune the
        smallest."""
        sparsity = self.rounds[number - self.first][0]
        if family == "random":
            with seeded(self.recipe.seed, _DRAW, k, number):
                scores = {name: torch.rand(mask.shape) for name, mask in masks.items()}
            return prune_to(masks, scores, sparsity)
        path = self.out / EXTRACTED / family / f"round-{number:02d}" / f"{k:02d}.safetensors"
        keys = {"method": family, "purpose": "extract", "round": number, "subset_index": k}
        steps = self.plan.iterations * (len(self.names) if family == "imp" else 1)
        if self.trainings.has(**keys) and path.is_file():
            self.bar.update(steps)
            return Masks.load(path, self.init)
        names = self.names_of(family)
        module = untie_steps(self.init) if masks.count > 1 else copy.deepcopy(self.init)
        subnets, about = self._trained(module, [part], masks, names, (_EXTRACT, k, number), steps)
        trained = dict(subnets.module.named_parameters(remove_duplicate=False))
        weights = {
            weight: torch.stack([trained[name].detach().cpu() for name in listed])
            for weight, listed in names.items()
        }
        pruned = prune_to(masks, weights, sparsity)
        pruned.save(path, self.init)
        self.trainings.append({**keys, "subset": part.name, **about})
        return pruned

    def subnets(self, method: str, number: int) -> list[Subnets]:
        """Algorithm 2: the models of a method, trained under its masks of round `number`.

        This is one model, or one per subset for multi.
        """
        masks, parts = self.masks(method, number), self.parts(method)
        rows = self.masks_per_part(method)
        if method != "multi":
            return [self._retrained(method, 0, ALL, parts, masks, number)]
        return [
            self._retrained(method, k, part.name, [part], _masks_of_part(masks, k, rows), number)
            for k, part in enumerate(parts)
        ]

    def _retrained(
        self, method: str, i: int, name: str, parts: Sequence[Part], masks: Masks, number: int
    ) -> Subnets:
        model = copy.deepcopy(self.init).to(self.device)
        module = unroll(model) if self.masks_per_part(method) > 1 else model  # type: ignore[arg-type]
        folder = self.out / TRAINED / method / f"round-{number:02d}" / f"{i:02d}"
        keys = {"method": method, "purpose": "retrain", "round": number, "subset_index": i}
        steps = self.passes * (len(self.names) if method == "imp" else len(parts))
        if self.trainings.has(**keys) and (folder / WEIGHTS).is_file():
            self.bar.update(steps)
            load_model(model, str(folder / WEIGHTS))
            return Subnets(module, self.names_of(method), masks, [part.output for part in parts])
        subnets, about = self._trained(
            module, parts, masks, self.names_of(method), (_RETRAIN, i, number), steps
        )
        with results.replacing(folder / WEIGHTS) as temporary:
            save_model(model, str(temporary))
        masks.save(folder / FILE, model)
        self.trainings.append({**keys, "subset": name, **about})
        return subnets

    def _trained(
        self,
        module: nn.Module,
        parts: Sequence[Part],
        masks: Masks,
        names: WeightNames,
        key: tuple[int, ...],
        steps: int,
    ) -> tuple[Subnets, dict[str, float]]:
        subnets = Subnets(module.to(self.device), names, masks, [part.output for part in parts])
        batches = Batches(self.recipe, self.train, parts, self.view, key, steps)
        loss = routing.train(subnets, batches, self.recipe, self.device, self.bar.update)
        return subnets, {"steps": steps, "images": steps * self.recipe.batch_size, "loss": loss}

    @property
    def first(self) -> int:
        """Number of the first round: 0 if the dense networks are scored too."""
        return 0 if self.rounds[0][0] == 0 else 1

    def parts(self, method: str) -> tuple[Part, ...]:
        """The subsets that a method has masks for; imp has one mask for all images."""
        return (subsets.whole(self.train),) if method == "imp" else self.partition.parts

    def names_of(self, method: str) -> WeightNames:
        """The masked weights of a method."""
        return (
            {name: (name,) for name in self.weight_names} if method == "imp" else self.weight_names
        )

    def masks_per_part(self, method: str) -> int:
        """R, the number of masks per subset."""
        return len(next(iter(self.names_of(method).values())))

    def _steps(self) -> int:
        """Number of steps of all trainings together."""
        methods, count = self.plan.methods, len(self.names)
        families = len({"rtl" if method == "multi" else method for method in methods} - {"random"})
        pruned = sum(sparsity > 0 for sparsity, _ in self.rounds)
        targets = sum(target for _, target in self.rounds)
        steps = pruned * families * self.plan.iterations + targets * len(methods) * self.passes
        return self.plan.rewind + count * steps


def _masks_of_part(masks: Masks, k: int, rows: int) -> Masks:
    """The masks of subset k."""
    return Masks({name: mask[k * rows : (k + 1) * rows] for name, mask in masks.items()})


def _joined(parts: Sequence[Masks]) -> Masks:
    return Masks({name: torch.cat([masks[name] for masks in parts]) for name in parts[0]})


def _partition(
    plan: TicketPlan, train: Pool, test: Pool, seed: int, device: str
) -> subsets.Partition:
    if plan.column is not None:
        return subsets.by_column(train, test, plan.column)
    if plan.features is not None:
        return subsets.by_cluster(
            train, test, plan.features, plan.algorithm, plan.clusters, seed, device
        )
    return subsets.by_class(train, test)


def _check(recipe: Recipe) -> None:
    """Refuse settings that these trainings do not support."""
    asked = [
        name
        for name in ("mixup", "cutmix", "teacher", "compile", "grad_checkpointing")
        if getattr(recipe, name)
    ]
    if asked or recipe.accumulate > 1:
        raise UserError(
            f"recipe: tickets are trained without {choices(asked or ['accumulate'])}; switch it off"
        )
    if results.rank_and_world()[1] > 1:
        raise UserError("tickets are trained in one process")
