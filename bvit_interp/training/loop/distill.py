"""What a run minimises: cross-entropy, and with a teacher hard distillation.

DeiT (Touvron et al. 2021, https://arxiv.org/abs/2012.12877; appendix C of the paper): half the loss
is the class head's against the label, half the distillation head's against the teacher's decision
on the same, augmented and mixed, image. Labels are smoothed in the first half only.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision import models

from bvit_interp.errors import CheckpointError, UserError, choices
from bvit_interp.models import checkpoint
from bvit_interp.models.bvit import BViT
from bvit_interp.training.loop.recipe import Recipe

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Objective = Callable[[Output, torch.Tensor, torch.Tensor], torch.Tensor]
"""Output of the model, targets (labels ``(B,)`` or soft ``(B, C)``) and images -> mean loss,
nats."""


def objective(recipe: Recipe, model: BViT, device: str) -> Objective:
    """The recipe's loss; with a teacher, `model` is switched to giving both its heads.

    Raises
    ------
    UserError
        A teacher without a distilled model or with other classes, or a distilled model without a
        teacher.
    """

    def supervised(logits: Output, target: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        smoothing = (
            recipe.label_smoothing if target.ndim == 1 else 0.0
        )  # soft targets come smoothed
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)

    distilled = hasattr(model, "set_distilled_training")
    name = recipe.model["name"]
    if recipe.teacher is None:
        if distilled:
            raise UserError(f"recipe: {name} is distilled: give a teacher")
        return supervised
    if not distilled:
        raise UserError(f"recipe: a teacher needs a distilled model, {name} is none")
    teacher = Teacher(recipe.teacher, model).to(device)
    model.set_distilled_training(True)

    def distillation(logits: Output, target: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        from_label, from_teacher = logits
        decided = teacher(images)
        return 0.5 * supervised(from_label, target, images) + 0.5 * F.cross_entropy(
            from_teacher.float(), decided
        )

    return distillation


class Teacher(nn.Module):
    """A classifier that answers images normalised for the student with its class indices ``(B,)``.

    Parameters
    ----------
    spec : a checkpoint as `checkpoint.load` takes it, timm:NAME of any kind of model, or
        torchvision:NAME, each with its own weights.
    student : for the normalisation and number of classes.
    """

    def __init__(self, spec: str, student: BViT) -> None:
        super().__init__()
        self.model = _open(spec).eval().requires_grad_(False)
        cfg = getattr(self.model, "pretrained_cfg", None) or {}
        own = cfg.get("mean") or IMAGENET_DEFAULT_MEAN, cfg.get("std") or IMAGENET_DEFAULT_STD
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (student.pretrained_cfg["mean"], student.pretrained_cfg["std"], *own)
        )
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        height, width = student.patch_embed.img_size
        with torch.inference_mode():
            try:
                classes = self.model(torch.zeros(1, student.in_chans, height, width)).shape[1]
            except (RuntimeError, AssertionError, AttributeError, TypeError, IndexError) as error:
                raise UserError(
                    f"recipe: the teacher {spec} does not classify {height} x {width} pixels"
                ) from error
        if classes != student.num_classes:
            raise UserError(
                f"recipe: the teacher {spec} has {classes} classes, the model {student.num_classes}"
            )
        names = cfg.get("label_names")
        if names and list(names) != checkpoint.class_names(student):
            raise UserError(
                f"recipe: the teacher {spec} names its classes otherwise: {choices(names)}"
            )

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.model.eval()
        return self.model(images * self.scale + self.shift).argmax(1)


def _open(spec: str) -> nn.Module:
    kind, _, name = spec.partition(":")
    if kind == "torchvision":
        if name not in models.list_models():
            raise UserError(f"recipe: torchvision has no model {name!r}")
        return _fetched(spec, lambda: models.get_model(name, weights="DEFAULT"))
    if kind == "timm" and "@" not in name and timm.is_model(name):
        return _fetched(spec, lambda: timm.create_model(name, pretrained=True))
    return checkpoint.load(spec)


def _fetched(spec: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{spec}: weights could not be had ({str(error).partition(chr(10))[0]})"
        ) from error
