"""Training of early exits: all at once, on CLS states computed once.

Appendix B of bViT (arXiv 2605.10661), eq. 10: with the correctly (P) and the wrongly (N) classified
images of a batch and the confidence c = max softmax, ``L_e = CE + 1 / (|P| |N|) sum_{i in P} sum_{j
in N} sigma((c_j - c_i) / tau)``; the second term is zero where P or N is empty, and the loss is the
mean over exits. The paper prints Adam and 50 epochs. Ours, where the paper is silent: learning rate
1e-3, falling to zero along a cosine, batches of 256, tau = 1, exits after steps 6, 8 and 10.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError, first_line
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models import tensor_file
from bvit_interp.models.exits import FILE, Exits, check_exits
from bvit_interp.models.stepping import device_of, states
from bvit_interp.models.unroll import unroll
from bvit_interp.training.adapting.exit_plan import Plan
from bvit_interp.training.loop.feed import fingerprint

HISTORY = "exits_history.csv"
_log = logging.getLogger(__name__)
STATES = "exits_states.pt"
COLUMNS = {
    "epoch": "passes over the cached states, from 1",
    "loss": "mean training loss, nats",
    "exit": "step that the exit reads, or all for the mean over exits",
    "top1": "share of the training states classified correctly over the epoch, 0..1",
}


def train(
    model: VisionTransformer, data: Samples, plan: Plan, out: Path, overwrite: bool = False
) -> Exits:
    """Train exits for a frozen model and write their history and `exits.safetensors` to `out`.

    A call that was stopped goes on, and one that was finished is not repeated.

    Parameters
    ----------
    model : not changed.
    data : labelled training images; each is run once, without augmentation. The states are kept in
        `out` until the exits are written, so that a run that was stopped does not compute them
        again.
    out : the folder.

    Raises
    ------
    UserError
        For a folder that has other exits, without `overwrite`, or in which another process writes,
        and for images that are all of one class.
    """
    steps = check_exits(plan.exits, model)
    first = results.rank_and_world()[0] == 0
    about = {"plan": asdict(plan), "data": fingerprint(data)}
    if (out / FILE).exists() and not overwrite:
        if not _is_of(out / FILE, model, about):
            raise UserError(f"{out} holds exits already: give another --out or --overwrite")
        if first:
            (out / STATES).unlink(missing_ok=True)
        return Exits.load(out / FILE, model)
    if first:
        out.mkdir(parents=True, exist_ok=True)
    _lock = results.locked(out)  # until the end of this function
    cls_states, labels = cached_states(model, data, steps, plan, out)
    if len(labels.unique()) < 2:
        raise UserError("the training images are all of one class: nothing to learn")
    exits, history = fit(cls_states, labels, steps, model.num_classes, plan, str(device_of(model)))
    if first:
        (out / FILE).unlink(missing_ok=True)  # that of an earlier training
        results.write_table(history, out / HISTORY)
        exits.save(out / FILE, model, {**about, "images": len(labels)})  # says that all is there
        (out / STATES).unlink(missing_ok=True)
    return exits


def _is_of(path: Path, model: VisionTransformer, about: Mapping[str, Any]) -> bool:
    """Whether a file holds the exits of a training of this model, by this plan, on this data."""
    any_number = {"batch_size": None, "workers": None}
    wanted = {
        "weights": results.weights_hash(model),
        "data": about["data"],
        "plan": json.loads(json.dumps(about["plan"] | any_number)),
    }
    try:
        found = tensor_file.read(path, "exits")[0]
        made_with = found | {"plan": found["plan"] | any_number}
    except tensor_file.UNREADABLE:
        return False
    return wanted.items() <= made_with.items()


def cached_states(
    model: VisionTransformer, data: Samples, steps: tuple[int, ...], plan: Plan, out: Path
) -> tuple[Float[Tensor, "images exits width"], Int[Tensor, " images"]]:
    """CLS after each of `steps`, float32, and the labels in the model's classes; read from `out` if
    they are there."""
    about = {
        "weights": results.weights_hash(model),
        "steps": list(steps),
        "data": fingerprint(data),
        "limit": plan.limit,
        "resize": plan.resize,
    }
    path = out / STATES
    if path.is_file() and (stored := _stored(path, about, model)) is not None:
        return stored
    view, per_image = unroll(model), PerImage()

    def record(batch: ModelBatch) -> tuple[Tensor, Tensor]:
        recorded = [
            state.tokens[:, 0].cpu()
            for state in states(view, batch.images, until=steps[-1])
            if state.step in steps
        ]
        labels = batch.labels[:, None].cpu()
        return batch.index, torch.cat([torch.stack(recorded, 1).flatten(1), labels], 1)

    for _, (index, numbers) in stream(
        {"model": model}, data, plan, record, progress="states", labels=True
    ):
        per_image.update(index, numbers)
    table = per_image.compute()[1]
    cls_states = table[:, :-1].float().unflatten(1, (len(steps), -1))
    labels = table[:, -1].long()
    if results.rank_and_world()[0] == 0:
        with results.replacing(path) as temporary:
            torch.save({"about": about, "states": cls_states, "labels": labels}, temporary)
    return cls_states, labels


def _stored(
    path: Path, about: Mapping[str, Any], model: VisionTransformer
) -> tuple[Tensor, Tensor] | None:
    """States and labels of an earlier, interrupted call; None, to make them again, where the file
    is damaged or of something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["about"] != about:
            return None
        cls_states, labels = content["states"], content["labels"]
        fits = (
            cls_states.dtype == torch.float32
            and cls_states.shape == (len(labels), len(about["steps"]), model.embed_dim)
            and labels.dtype == torch.int64
            and labels.ndim == 1
            and 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes
            and bool(cls_states.isfinite().all())
        )
    except Exception as error:  # torch raises one of many, depending on the damage
        _log.warning("%s: not a file of states (%s); made again", path, first_line(error))
        return None
    if not fits:
        _log.warning("%s: states of another model or of other classes; made again", path)
        return None
    return cls_states, labels


def fit(
    cls_states: Float[Tensor, "images exits width"],
    labels: Int[Tensor, " images"],
    steps: tuple[int, ...],
    classes: int,
    plan: Plan,
    device: str = "cpu",
) -> tuple[Exits, pd.DataFrame]:
    """Exits fitted to states and labels, and a row of `COLUMNS` for every epoch and exit."""
    exits = Exits(steps, cls_states.shape[-1], classes).to(device)
    adam = torch.optim.Adam(exits.parameters(), lr=plan.lr)
    batches = -(-len(labels) // plan.images_at_once)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=plan.epochs * batches)
    generator = torch.Generator().manual_seed(plan.seed)
    rows: list[dict[str, Any]] = []
    silent = results.rank_and_world()[0] > 0
    for epoch in tqdm(range(1, plan.epochs + 1), desc="exits", disable=silent):
        hits, total = torch.zeros(len(steps)), 0.0
        for chosen in torch.randperm(len(labels), generator=generator).split(plan.images_at_once):
            target, logits = labels[chosen].to(device), exits(cls_states[chosen].to(device))
            loss = objective(logits, target, plan)
            adam.zero_grad()
            loss.backward()
            adam.step()
            cosine.step()
            hits += (logits.argmax(-1) == target[:, None]).sum(0).cpu()
            total += loss.item() * len(chosen)
        hits_of = {"all": hits.mean()} | dict(zip(map(str, steps), hits, strict=True))
        shared = {"epoch": epoch, "loss": total / len(labels)}
        rows += [
            shared | {"exit": exit_, "top1": float(count) / len(labels)}
            for exit_, count in hits_of.items()
        ]
    return exits.eval(), pd.DataFrame(rows)[list(COLUMNS)]


def objective(
    logits: Float[Tensor, "batch exits classes"], labels: Int[Tensor, " batch"], plan: Plan
) -> Float[Tensor, ""]:
    """The mean of ``L_e`` over exits."""
    targets = labels[:, None].expand(-1, logits.shape[1])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if plan.loss == "ce":
        return loss
    terms = [
        pairwise_auroc_loss(logits[:, e], labels, plan.temperature) for e in range(logits.shape[1])
    ]
    return loss + torch.stack(terms).mean()


def pairwise_auroc_loss(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """The second term of eq. 10 for one exit: a smooth share of pairs in which a wrong prediction
    is more confident than a correct one.

    Which predictions are correct has no gradient; their confidences do. The term is zero where all
    predictions are correct, or all are wrong.
    """
    correct = (logits.argmax(-1) == labels).detach()
    confidence = logits.softmax(-1).amax(-1)
    if correct.all() or not correct.any():
        return confidence.sum() * 0
    gaps = confidence[~correct][None, :] - confidence[correct][:, None]
    return (gaps / temperature).sigmoid().mean()
