"""Early exits trained: all at once, on CLS states that the frozen model computes once.

Appendix B of bViT (arXiv 2605.10661), eq. 10: with the correctly (P) and the wrongly (N) classified
images of a batch and the confidence c = max softmax, ``L_e = CE + 1 / (|P| |N|) sum_{i in P} sum_{j
in N} sigma((c_j - c_i) / tau)``, the second term zero where P or N is empty; the loss is the mean
over exits. Printed: Adam, 50 epochs. Ours, where the paper is silent: learning rate 1e-3 to zero by
a cosine, batches of 256, tau = 1, exits after steps 6, 8 and 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.exits import FILE, Exits, check_exits
from bvit_interp.models.stepping import advance, embed
from bvit_interp.models.unroll import unroll
from bvit_interp.training.adapting.exit_plan import Plan
from bvit_interp.training.loop.feed import fingerprint

HISTORY, STATES = "exits_history.csv", "exits_states.pt"
COLUMNS = {
    "epoch": "passes over the cached states, from 1",
    "loss": "mean training loss, nats",
    "exit": "step the exit reads, all for their mean",
    "top1": "share of the training states classified right over the epoch, 0..1",
}


def train(
    model: VisionTransformer, data: Samples, plan: Plan, out: Path, overwrite: bool = False
) -> Exits:
    """Train exits for a frozen model and write `exits.safetensors` and their history to `out`.

    Parameters
    ----------
    model : not changed.
    data : labelled training images; each is run once, without augmentation. The states are kept in
        `out` until the exits are written, so that a killed run does not compute them again.
    out : the folder.
    """
    steps = check_exits(plan.exits, model)
    if (out / FILE).exists() and not overwrite:
        raise UserError(f"{out} holds exits already: give another --out or --overwrite")
    states, labels = cached_states(model, data, steps, plan, out)
    if len(labels.unique()) < 2:
        raise UserError("the training images are all of one class: nothing to tell apart")
    exits, history = fit(
        states, labels, steps, model.num_classes, plan, str(next(model.parameters()).device)
    )
    if results.rank_and_world()[0] == 0:
        exits.save(out / FILE, model, {"plan": asdict(plan), "images": len(labels)})
        results.write_table(history, out / HISTORY)
        (out / STATES).unlink(missing_ok=True)
    return exits


def cached_states(
    model: VisionTransformer, data: Samples, steps: tuple[int, ...], plan: Plan, out: Path
) -> tuple[Tensor, Tensor]:
    """CLS after each of `steps` ``(n, E, D)`` float32, and the model's labels ``(n,)``; from `out`
    if there."""
    about = {
        "weights": results.weights_hash(model),
        "steps": list(steps),
        "data": fingerprint(data),
        "limit": plan.limit,
        "resize": plan.resize,
    }
    path = out / STATES
    if path.is_file():
        found = torch.load(path, map_location="cpu", weights_only=True)
        if found["about"] == about:
            return found["states"], found["labels"]
    classes, view, rows = label_map(data, model), unroll(model), PerImage()
    device = next(model.parameters()).device
    loader, geometries = plan.loader(data, {"model": model}, "states")

    def run(part: Any) -> tuple[Tensor, Tensor]:
        state, kept = embed(view, part.views[geometries["model"]][0].to(device)), []
        while state.step < steps[-1]:
            state = advance(view, state)
            if state.step in steps:
                kept.append(state.tokens[:, 0])
        return part.index, torch.cat(
            [torch.stack(kept, 1).flatten(1).cpu(), classes[part.labels][:, None]], 1
        )

    with torch.inference_mode():
        for batch in loader:
            for index, row in run_in_halves(run, batch):
                rows.update(index, row)
    table = rows.compute()[1]
    states, labels = table[:, :-1].float().unflatten(1, (len(steps), -1)), table[:, -1].long()
    if results.rank_and_world()[0] == 0:
        with results.replacing(path) as temporary:
            torch.save({"about": about, "states": states, "labels": labels}, temporary)
    return states, labels


def fit(
    states: Tensor,
    labels: Tensor,
    steps: tuple[int, ...],
    classes: int,
    plan: Plan,
    device: str = "cpu",
) -> tuple[Exits, pd.DataFrame]:
    """Exits fitted to states ``(n, E, D)`` and labels ``(n,)``, and a row of `COLUMNS` for every
    epoch and exit."""
    exits = Exits(steps, states.shape[-1], classes).to(device)
    adam = torch.optim.Adam(exits.parameters(), lr=plan.lr)
    each = -(-len(labels) // plan.images_at_once)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=plan.epochs * each)
    generator, rows = torch.Generator().manual_seed(plan.seed), list[Mapping[str, Any]]()
    for epoch in tqdm(
        range(1, plan.epochs + 1), desc="exits", disable=results.rank_and_world()[0] > 0
    ):
        hits, total = torch.zeros(len(steps)), 0.0
        for chosen in torch.randperm(len(labels), generator=generator).split(plan.images_at_once):
            target, logits = labels[chosen].to(device), exits(states[chosen].to(device))
            loss = objective(logits, target, plan)
            adam.zero_grad()
            loss.backward()
            adam.step()
            cosine.step()
            hits += (logits.argmax(-1) == target[:, None]).sum(0).cpu()
            total += loss.item() * len(chosen)
        found = {"all": hits.mean()} | dict(zip(map(str, steps), hits, strict=True))
        rows += [
            {
                "epoch": epoch,
                "loss": total / len(labels),
                "exit": step,
                "top1": float(n) / len(labels),
            }
            for step, n in found.items()
        ]
    return exits.eval(), pd.DataFrame(rows)[list(COLUMNS)]


def objective(logits: Tensor, labels: Tensor, plan: Plan) -> Tensor:
    """The mean of ``L_e`` over exits, of logits ``(B, E, C)``."""
    targets = labels[:, None].expand(-1, logits.shape[1])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if plan.loss == "ce":
        return loss
    terms = [parting(logits[:, e], labels, plan.temperature) for e in range(logits.shape[1])]
    return loss + torch.stack(terms).mean()


def parting(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The second term of eq. 10 for one exit: how often a wrong answer is surer than a right one,
    made smooth.

    Which images are right has no gradient; their confidences do. Zero where all answers are right,
    or all wrong.
    """
    right = (logits.argmax(-1) == labels).detach()
    confidence = logits.softmax(-1).amax(-1)
    if right.all() or not right.any():
        return confidence.sum() * 0
    gaps = confidence[~right][None, :] - confidence[right][:, None]
    return (gaps / temperature).sigmoid().mean()
