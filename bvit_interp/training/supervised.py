"""Supervised training: AdamW, linear warm-up, cosine to zero, clipping, one process.

Small on purpose: enough for digits-s on two cores. Scenes of the next epoch are rendered in a
thread while this one trains. Weights and `history.csv` are written after every epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import nn
from tqdm import tqdm

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError, choices
from bvit_interp.models import checkpoint
from bvit_interp.models.bvit import BViT
from bvit_interp.training.recipe import Recipe

COLUMNS = {
    "epoch": "passes done, from 1",
    "loss": "mean training cross-entropy of the epoch, nats",
    "accuracy": "share of test images classified right, 0..1",
    "test_loss": "mean test cross-entropy, nats",
    "hardness": "share of photographs and distractors in the training scenes, 0..1",
    "lr": "learning rate at the end of the epoch",
    "grad_norm": "mean norm of the gradient before clipping",
    "images_per_second": "training throughput",
}
TEST_IMAGES = 2000
Images = tuple[np.ndarray, np.ndarray]


def render(scenes: DigitScenes) -> Images:
    """All scenes in memory: images ``(n, 32, 32, 3)`` uint8 and labels ``(n,)``."""
    images, labels, _ = zip(*(scenes.read(i) for i in range(len(scenes))), strict=True)
    return np.stack(images), np.array(labels)


def train(recipe: Recipe, out: Path, device: str = "cpu") -> BViT:
    """Train the recipe's model and leave a checkpoint folder in `out`; returns the model in eval mode."""
    if recipe.data != "digits-s":
        raise UserError(f"recipe: data must be digits-s, got {recipe.data!r}")
    torch.manual_seed(recipe.seed)
    order = np.random.default_rng(recipe.seed)
    model = _start(recipe).to(device)
    forward = _prepare(model, recipe, device)
    optimizer = torch.optim.AdamW(_weight_decay_groups(model, recipe.weight_decay), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    history: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as renderer:
        test = renderer.submit(render, DigitScenes("test", length=TEST_IMAGES)).result()
        upcoming = renderer.submit(render, _scenes(recipe, 0))
        for epoch in range(recipe.epochs):
            images, labels = upcoming.result()
            if epoch + 1 < recipe.epochs:
                upcoming = renderer.submit(render, _scenes(recipe, epoch + 1))
            began = time.perf_counter()
            row = _epoch(forward, model, optimizer, schedule, (images, labels), recipe, order, device, epoch)
            seconds = time.perf_counter() - began
            history.append(
                {"epoch": epoch + 1, **row, **evaluate(model, test, device), "hardness": recipe.hardness(epoch),
                 "lr": schedule.get_last_lr()[0], "images_per_second": len(labels) / seconds}
            )  # fmt: skip
            table = pd.DataFrame(history)[list(COLUMNS)]
            checkpoint.save(
                model, out, card=_card(out.name, recipe, table), about={"accuracy": history[-1]["accuracy"]}
            )
            table.to_csv(out / "history.csv", index=False, float_format="%.6g")
    model.eval()
    return model


@torch.inference_mode()
def evaluate(model: nn.Module, images: Images, device: str = "cpu", batch_size: int = 250) -> dict[str, float]:
    """Accuracy and cross-entropy of a model in full precision on images in memory."""
    was_training = model.training
    model.eval()
    logits = torch.cat([model(batch) for batch, _ in _batches(model, images, batch_size, device)])
    model.train(was_training)
    target = torch.as_tensor(images[1], device=device)
    return {
        "accuracy": (logits.argmax(1) == target).float().mean().item(),
        "test_loss": F.cross_entropy(logits, target).item(),
    }


def _epoch(
    forward: Callable[[torch.Tensor], torch.Tensor], model: BViT, optimizer: torch.optim.Optimizer,
    schedule: Any, images: Images, recipe: Recipe, order: np.random.Generator, device: str, epoch: int,
) -> dict[str, float]:  # fmt: skip
    model.train()
    losses: list[float] = []
    norms: list[float] = []
    steps = len(images[1]) // recipe.batch_size
    shuffled = order.permutation(len(images[1]))[: steps * recipe.batch_size]
    batches = _batches(model, (images[0][shuffled], images[1][shuffled]), recipe.batch_size, device)
    bar = tqdm(batches, total=steps, desc=f"epoch {epoch + 1}/{recipe.epochs}", leave=False)
    for batch, target in bar:
        loss = F.cross_entropy(forward(batch).float(), target)
        if not torch.isfinite(loss):
            where = f"epoch {epoch + 1}, step {len(losses) + 1}"
            raise UserError(f"the loss is {loss.item()} in {where}; the weights of epoch {epoch} are kept")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    return {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms))}


def _start(recipe: Recipe) -> BViT:
    """The model before its first step."""
    arguments = dict(recipe.model)
    name = str(arguments.pop("name"))
    try:
        model = timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(f"recipe: cannot make the model {name} ({given}): {reason}") from error
    if not isinstance(model, BViT):
        raise UserError(f"recipe: {recipe.model['name']} is not a BViT")
    if recipe.positions == "sincos":
        grid = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
        model.pos_embed.data[0, 1:] = grid
    if recipe.init is not None:
        weights = checkpoint.load(recipe.init).state_dict()
        own = model.state_dict()
        misfits = [key for key in weights if key not in own or own[key].shape != weights[key].shape]
        if misfits:
            raise UserError(f"recipe: {recipe.init} does not fit the model: {choices(misfits)}")
        model.load_state_dict(weights, strict=False)
    model.pretrained_cfg |= {"crop_pct": 1.0, "label_names": list(DigitScenes.classes)}
    return model


def _scenes(recipe: Recipe, epoch: int) -> DigitScenes:
    n = recipe.images_per_epoch
    return DigitScenes("train", length=n, start=epoch * n, hardness=recipe.hardness(epoch))


def _prepare(model: BViT, recipe: Recipe, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The training forward: autocast and, if asked for, the one shared block compiled."""
    precise = recipe.autocast == "off"
    if not precise and torch.device(device).type == "cpu":
        for block in model.blocks.children():  # fused SDPA's bf16 backward is ten times slower on a CPU
            block.attn.fused_attn = False
    if recipe.compile:
        for block in model.blocks.children():
            block.compile()

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=not precise):
            return model(images)

    return forward


def _batches(model: nn.Module, images: Images, batch_size: int, device: str) -> Any:
    """Normalised batches ``(B, 3, H, W)`` and labels ``(B,)``, in order."""
    mean = torch.tensor(model.pretrained_cfg["mean"], device=device).view(3, 1, 1) * 255
    std = torch.tensor(model.pretrained_cfg["std"], device=device).view(3, 1, 1) * 255
    for begin in range(0, len(images[1]), batch_size):
        pixels = torch.as_tensor(images[0][begin : begin + batch_size], device=device).permute(0, 3, 1, 2)
        yield (pixels.float() - mean) / std, torch.as_tensor(images[1][begin : begin + batch_size], device=device)


def _lr_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(recipe.total_steps - recipe.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _weight_decay_groups(model: BViT, weight_decay: float) -> list[dict[str, Any]]:
    free = model.no_weight_decay()
    decayed = {name for name, p in model.named_parameters() if p.ndim > 1 and name not in free}
    return [
        {"params": [p for name, p in model.named_parameters() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]


def _card(name: str, recipe: Recipe, history: pd.DataFrame) -> str:
    """The model card: what it is, how it was made, what it scores and is good for."""
    last = history.iloc[-1]
    images = int(last["epoch"]) * recipe.images_per_epoch
    changed = " ".join(f"{key}={value}" for key, value in asdict(recipe).items() if key != "model")
    model = ", ".join(f"{key} {value}" for key, value in recipe.model.items())
    return f"""# {name}

{model}.

- Data: {recipe.data}, {images:,} fresh training scenes; scored on {TEST_IMAGES:,} test scenes, whose handwritten
  digits and photographs the training never shows.
- Test accuracy: {100 * last["accuracy"]:.1f} % (raw weights, float32), cross-entropy {last["test_loss"]:.3f}, after
  epoch {int(last["epoch"])} of {recipe.epochs}. Per epoch: `history.csv`.
- Recipe: {changed}.
- Throughput in training: {last["images_per_second"]:.0f} images/s in the last epoch.
- Good for: demos and tests of the toolkit. It says nothing about natural images.
- Open: `bvit_interp.load("{name}")`, or `timm.create_model("local-dir:{name}", pretrained=True)` after
  `import bvit_interp`.
"""
