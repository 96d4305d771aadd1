"""The lottery: masks found from the first weights, and subnetworks trained under them, each
training kept once done.

Algorithms 1 and 2 of Routing the Lottery (arXiv 2601.22141) for the methods of `tickets.py`. Every
draw is a function of the seed, the subset, the round and the batch, and a training leaves its file
whole or not at all: one that was killed runs again and ends the same.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError, choices
from bvit_interp.models.masks import FILE, Masks
from bvit_interp.models.unroll import unroll
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.augment import Augmentation
from bvit_interp.training.loop.draws import drawn_for
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning import routing, subsets
from bvit_interp.training.pruning import ticket_table as rows_of
from bvit_interp.training.pruning.by_step import smallest_off
from bvit_interp.training.pruning.routing import Batches, Places, Subnets
from bvit_interp.training.pruning.subsets import Part, Pool
from bvit_interp.training.pruning.ticket_plan import TicketPlan, schedule

TABLE, TRAININGS, SUBSETS, WEIGHTS = (
    "tickets.csv",
    "trainings.csv",
    "subsets.csv",
    "model.safetensors",
)
EXTRACTED, TRAINED = "extraction", "subnets"  # folders
FIRST = "first.safetensors"
_EXTRACT, _RETRAIN, _DRAW, _REWIND = 0, 1, 2, 3  # what is drawn for


def pruned_to(masks: Masks, weights: Mapping[str, Tensor], sparsity: float) -> Masks:
    """The masks with the share `sparsity` of each one's weights pruned, those of least magnitude
    over all layers.

    Parameters
    ----------
    masks : K masks of equal numbers of weights.
    weights : name -> ``(K, *shape)``.
    sparsity : in 0..1, at least what they have.
    """
    size = sum(mask[0].numel() for mask in masks.values())
    left = round(size * (1 - sparsity))
    if not left:
        raise UserError(f"sparsity {sparsity} leaves none of the {size} weights of a mask")
    return smallest_off(masks, weights, 1 - left / int(masks.flat(0).sum()))


class Lottery:
    """Data, first weights, and what was found and trained so far in `out`.

    Parameters
    ----------
    recipe, tickets, out, device, overwrite : as in `tickets.run`.
    """

    def __init__(
        self, recipe: Recipe, tickets: TicketPlan, out: Path, device: str, overwrite: bool
    ) -> None:
        _check(recipe)
        self.recipe, self.tickets, self.out, self.device = recipe, tickets, out, device
        samples, scored = open_samples(recipe.data, "train"), open_samples(recipe.data)
        there = [
            [getattr(kind, name, None) for name in ("root", "split")] for kind in (samples, scored)
        ]
        if there[0] == there[1]:
            raise UserError(
                f"recipe: {recipe.data} has nothing to score on beside its training images"
            )
        classes = tickets.classes or tuple(samples.classes)
        self.train, self.test = (
            Pool(samples, classes, recipe.images_per_epoch),
            Pool(scored, classes, tickets.limit),
        )
        self.by_class = tickets.by.startswith("class")
        self.partition = _partition(tickets, self.train, self.test, recipe.seed, device)
        self.names = [part.name for part in self.partition.parts]
        self.init = routing.build(recipe, self.train, device)
        self.places = routing.places_of(self.init, tickets.by == "class-step")
        self.rounds = schedule(tickets.sparsity, tickets.rate)
        self.found: dict[str, dict[int, Masks]] = {}
        seen = routing.seen_by(self.init, samples)
        self.view, self.geometry = Augmentation(recipe, seen), Geometry.of(seen, scored)
        batches = [
            -(-len(part.own) // routing.own_images(part, recipe.batch_size))
            for part in self.partition.parts
        ]
        self.passes = (
            max(batches) * tickets.retrain_epochs
        )  # batches of each subset: M of Algorithm 2 an epoch
        belongs = subsets.table(self.partition, self.train, self.test)
        parts = hashlib.sha256(belongs.to_csv().encode()).hexdigest()[:16]
        options = {
            "recipe": recipe.resume_key(),
            **tickets.resume_key(),
            "images": feed.fingerprint(samples),
            "parts": parts,
        }
        self.trainings = results.Table(out / TRAININGS, options, overwrite)
        if overwrite:
            (out / TABLE).unlink(missing_ok=True)
        elif (out / TABLE).exists() and not self.trainings.rows:
            raise UserError(
                f"{out} holds {TABLE} and no {TRAININGS}: give another --out or --overwrite"
            )
        results.write_table(belongs, out / SUBSETS)
        self.bar = tqdm(desc=out.name, unit="step", total=self._steps())
        self._rewind()

    def _rewind(self) -> None:
        """Train the first weights, or read them; masks are sought from there, and subnetworks
        trained."""
        path, steps = self.out / EXTRACTED / FIRST, self.tickets.rewind
        keys = {"method": "all", "purpose": "rewind", "round": 0, "part": 0}
        if self.trainings.has(**keys) and path.is_file():
            self.bar.update(steps)
            load_model(self.init, str(path))
        elif steps:
            masks = self.masks("imp", 0)
            _, about = self._trained(
                self.init, self._parts("imp"), masks, self._places("imp"), (_REWIND, 0, 0), steps
            )
            self.init.cpu()
            with results.replacing(path) as temporary:
                save_model(self.init, str(temporary))
            self.trainings.append({**keys, "subset": rows_of.ALL, **about})

    def masks(self, method: str, number: int) -> Masks:
        """The masks of a method after round `number`, those of subset k in rows k R to k R + R -
        1."""
        family = "rtl" if method == "multi" else method
        found = self.found.setdefault(family, {})
        if number not in found and number == 0:
            shapes = dict(self.init.named_parameters())
            rows = len(self._parts(method)) * self._rows(method)
            found[0] = Masks(
                {
                    name: torch.ones(rows, *shapes[name].shape, dtype=torch.bool)
                    for name in self.places
                }
            )
        elif number not in found:
            before, rows = self.masks(method, number - 1), self._rows(method)
            each = [
                self._extracted(family, k, part, _rows_of(before, k, rows), number)
                for k, part in enumerate(self._parts(method))
            ]
            found[number] = _joined(each)
        return found[number]

    def _extracted(self, family: str, k: int, part: Part, masks: Masks, number: int) -> Masks:
        """Algorithm 1 for one subset and round: train from the first weights, prune the
        smallest."""
        sparsity = self.rounds[number - self.first][0]
        if family == "random":
            with drawn_for(self.recipe.seed, _DRAW, k, number):
                return pruned_to(
                    masks, {name: torch.rand(mask.shape) for name, mask in masks.items()}, sparsity
                )
        path = self.out / EXTRACTED / family / f"round-{number:02d}" / f"{k:02d}.safetensors"
        keys = {"method": family, "purpose": "extract", "round": number, "part": k}
        steps = self.tickets.iterations * (len(self.names) if family == "imp" else 1)
        if self.trainings.has(**keys) and path.is_file():
            self.bar.update(steps)
            return Masks.load(path, self.init)
        places, apart = self._places(family), masks.count > 1
        module = routing.untied(self.init) if apart else copy.deepcopy(self.init)
        subnets, about = self._trained(module, [part], masks, places, (_EXTRACT, k, number), steps)
        own = dict(subnets.module.named_parameters(remove_duplicate=False))
        weights = {
            name: torch.stack([own[at].detach().cpu() for at in of]) for name, of in places.items()
        }
        pruned = pruned_to(masks, weights, sparsity)
        pruned.save(path, self.init)
        self.trainings.append({**keys, "subset": part.name, **about})
        return pruned

    def subnets(self, method: str, number: int) -> list[Subnets]:
        """Algorithm 2: the models of a method trained under its masks of round `number`, one but
        for multi."""
        masks, parts, rows = self.masks(method, number), self._parts(method), self._rows(method)
        if method != "multi":
            return [self._retrained(method, 0, rows_of.ALL, parts, masks, number)]
        return [
            self._retrained(method, k, part.name, [part], _rows_of(masks, k, rows), number)
            for k, part in enumerate(parts)
        ]

    def _retrained(
        self, method: str, i: int, name: str, parts: Sequence[Part], masks: Masks, number: int
    ) -> Subnets:
        model = copy.deepcopy(self.init).to(self.device)
        module = unroll(model) if self._rows(method) > 1 else model  # type: ignore[arg-type]
        folder = self.out / TRAINED / method / f"round-{number:02d}" / f"{i:02d}"
        keys = {"method": method, "purpose": "retrain", "round": number, "part": i}
        steps = self.passes * (len(self.names) if method == "imp" else len(parts))
        if self.trainings.has(**keys) and (folder / WEIGHTS).is_file():
            self.bar.update(steps)
            load_model(model, str(folder / WEIGHTS))
            return Subnets(module, self._places(method), masks, [part.output for part in parts])
        subnets, about = self._trained(
            module, parts, masks, self._places(method), (_RETRAIN, i, number), steps
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
        places: Places,
        key: tuple[int, ...],
        steps: int,
    ) -> tuple[Subnets, dict[str, float]]:
        subnets = Subnets(module.to(self.device), places, masks, [part.output for part in parts])
        batches = Batches(self.recipe, self.train, parts, self.view, key, steps)
        loss = routing.train(subnets, batches, self.recipe, self.device, self.bar.update)
        return subnets, {"steps": steps, "images": steps * self.recipe.batch_size, "loss": loss}

    def rows(self, method: str, number: int) -> list[dict[str, Any]]:
        """The rows of a method and round for the table: of the masks, and at a target of the
        answers."""
        names = [
            part.name for part in self._parts(method)
        ]  # imp's only one is called as the row of all
        of_masks = rows_of.mask_rows(
            self.masks(method, number), self._rows(method), names, separate=method == "multi"
        )
        found = {(row["subset"], row["layer"]): row for row in of_masks}
        whole = found[rows_of.ALL, rows_of.ALL]
        steps = 0 if method == "random" else number * self.tickets.iterations
        if self.rounds[number - self.first][1]:
            steps += self.passes
            shared = {column: whole[column] for column in ("sparsity", "parameters", "ratio")}
            for row in self._scores(method, number):
                found.setdefault((row["subset"], rows_of.ALL), dict(shared)).update(row)
        whole["train_images"] = (
            steps * len(self.names) + self.tickets.rewind
        ) * self.recipe.batch_size
        keys = {"method": method, "by": self.tickets.by, "round": number, "seed": self.recipe.seed}
        return [keys | row for row in found.values()]

    def _scores(self, method: str, number: int) -> list[dict[str, Any]]:
        subnets = self.subnets(method, number)
        truth = F.one_hot(torch.from_numpy(self.test.labels), len(self.test.classes)).bool()
        said, named = self._said(method, subnets)
        rows = rows_of.score_rows(said, truth, self.partition.of_test, self.names)
        rows[-1]["accuracy"] = float((named == torch.from_numpy(self.test.labels)).double().mean())
        rows[-1]["chance"] = float(truth.double().mean(0).max())
        if method in ("rtl", "random"):
            swapped = rows_of.score_rows(
                self._said(method, subnets, shift=1)[0], truth, self.partition.of_test, self.names
            )
            for row, other in zip(rows, swapped, strict=True):
                row["swapped"] = other["balanced_accuracy"]
        return rows

    def _said(
        self, method: str, subnets: Sequence[Subnets], shift: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Was each test image said to be of each class, ``(n, C)`` bool, and the class named for it
        ``(n,)``."""
        count = len(self._parts(method))
        routes = [(subnets[0], k, (k + shift) % count) for k in range(count)]
        if method == "multi":
            routes = [(own, 0, 0) for own in subnets]
        answer = routing.answers(routes, self.test, self.geometry, self.device)
        if self.by_class and method != "imp":
            return (answer > 0).T, answer.argmax(0)
        own = (
            torch.from_numpy(self.partition.of_test)
            if len(answer) > 1
            else torch.zeros(len(self.test)).long()
        )
        named = answer[own, torch.arange(len(self.test))].long()
        return F.one_hot(named, len(self.test.classes)).bool(), named

    def emptied(self, method: str, number: int) -> list[str]:
        """Layers that a mask leaves without a weight, as ``blocks.0.attn.proj for cat``."""
        names = [part.name for part in self._parts(method)]
        return rows_of.empty_layers(self.masks(method, number), self._rows(method), names)

    @property
    def first(self) -> int:
        """Number of the first round: 0 if dense networks are wanted too."""
        return 0 if self.rounds[0][0] == 0 else 1

    def _parts(self, method: str) -> tuple[Part, ...]:
        return (subsets.whole(self.train),) if method == "imp" else self.partition.parts

    def _places(self, method: str) -> Places:
        return {name: (name,) for name in self.places} if method == "imp" else self.places

    def _rows(self, method: str) -> int:
        return len(next(iter(self._places(method).values())))

    def _steps(self) -> int:
        """Steps of all trainings."""
        methods, count = self.tickets.methods, len(self.names)
        families = len({"rtl" if method == "multi" else method for method in methods} - {"random"})
        pruned, targets = (
            sum(s > 0 for s, _ in self.rounds),
            sum(target for _, target in self.rounds),
        )
        steps = pruned * families * self.tickets.iterations + targets * len(methods) * self.passes
        return self.tickets.rewind + count * steps


def _rows_of(masks: Masks, k: int, rows: int) -> Masks:
    """The masks of subset k."""
    return Masks({name: mask[k * rows : (k + 1) * rows] for name, mask in masks.items()})


def _joined(each: Sequence[Masks]) -> Masks:
    return Masks({name: torch.cat([own[name] for own in each]) for name in each[0]})


def _partition(
    tickets: TicketPlan, train: Pool, test: Pool, seed: int, device: str
) -> subsets.Partition:
    if tickets.column is not None:
        return subsets.by_column(train, test, tickets.column)
    if tickets.features is not None:
        return subsets.by_cluster(
            train, test, tickets.features, tickets.algorithm, tickets.clusters, seed, device
        )
    return subsets.by_class(train, test)


def _check(recipe: Recipe) -> None:
    """Refuse what these trainings do not do, rather than pass over it."""
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
