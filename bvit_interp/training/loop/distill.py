"""The training loss: cross-entropy, with hard distillation if there is a teacher.

DeiT (Touvron et al. 2021, https://arxiv.org/abs/2012.12877; appendix C of the paper): half of the
loss compares the class head with the label, and half the distillation head with the teacher's
decision. The teacher sees the same image, augmented and mixed. Labels are smoothed only in the
first half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision import models

from bvit_interp.errors import CheckpointError, UserError, choices, first_line
from bvit_interp.models import checkpoint
from bvit_interp.models.bvit import BViT
from bvit_interp.training.loop.recipe import Recipe

Objective = Callable[[Any, Tensor, Tensor], Tensor]
"""Output of the model (logits, or those of both heads), targets (labels ``(B,)`` or soft ones
``(B, C)``) and images -> mean loss, nats."""


def objective(recipe: Recipe, model: BViT, device: str) -> Objective:
    """The recipe's loss; with a teacher, `model` is switched to return the logits of both heads.

    Raises
    ------
    UserError
        For a teacher without a distilled model or with other classes, and for a distilled model
        without a teacher.
    """

    def supervised(logits: Tensor, target: Tensor, images: Tensor) -> Tensor:
        smoothing = recipe.label_smoothing if target.ndim == 1 else 0.0  # soft ones are smoothed
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)

    student: Any = model
    distilled = hasattr(student, "set_distilled_training")
    name = recipe.model["name"]
    if recipe.teacher is None:
        if distilled:
            raise UserError(f"recipe: {name} is distilled: give a teacher")
        return supervised
    if not distilled:
        raise UserError(f"recipe: a teacher needs a distilled model, {name} is none")
    teacher = Teacher(recipe.teacher, model).to(device)
    student.set_distilled_training(True)

    def distillation(output: tuple[Tensor, Tensor], target: Tensor, images: Tensor) -> Tensor:
        class_logits, distillation_logits = output
        decided = teacher(images)
        return 0.5 * supervised(class_logits, target, images) + 0.5 * F.cross_entropy(
            distillation_logits.float(), decided
        )

    return distillation


class Teacher(nn.Module):
    """A classifier that labels images which are normalised for the student.

    Parameters
    ----------
    spec : a checkpoint as in `checkpoint.load`, timm:NAME of any kind of model, or
        torchvision:NAME; the last two with their published weights.
    student : its normalisation and number of classes are used.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: str, student: BViT) -> None:
        super().__init__()
        self.model = _open(spec).eval().requires_grad_(False)
        cfg: dict[str, Any] = getattr(self.model, "pretrained_cfg", None) or {}
        student_cfg: dict[str, Any] = student.pretrained_cfg  # type: ignore[assignment]
        mean, std = _per_channel(student_cfg["mean"]), _per_channel(student_cfg["std"])
        own_mean = _per_channel(cfg.get("mean") or IMAGENET_DEFAULT_MEAN)
        own_std = _per_channel(cfg.get("std") or IMAGENET_DEFAULT_STD)
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
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, " batch"]:
        """The index of the teacher's most likely class."""
        self.model.eval()
        return self.model(images * self.scale + self.shift).argmax(1)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def _open(spec: str) -> nn.Module:
    kind, _, name = spec.partition(":")
    if kind == "torchvision":
        if name not in models.list_models():
            raise UserError(f"recipe: torchvision has no model {name!r}")
        return _download(spec, lambda: models.get_model(name, weights="DEFAULT"))
    if kind == "timm" and "@" not in name and timm.is_model(name):
        return _download(spec, lambda: timm.create_model(name, pretrained=True))
    return checkpoint.load(spec, own_code=False)


def _download(spec: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{spec}: its weights cannot be loaded ({first_line(error)})"
        ) from error
