"""Distillation: the loss by hand, and what the teacher sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models.checkpoint import load, save
from bvit_interp.training.loop import build, distill, supervised

DISTILLED = {"name": "bvit_small_distilled_patch16_224", "weight_init": ""}


class Colours(nn.Module):
    """A teacher whose decision is the channel that is brightest by its own normalisation; it notes
    what it saw."""

    def __init__(self, classes=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125)):
        super().__init__()
        self.weight, self.classes, self.seen = nn.Parameter(torch.ones(1)), classes, []
        self.dropout = nn.Dropout(0.9)
        self.pretrained_cfg = {"mean": mean, "std": std}

    def forward(self, images):
        self.seen.append((images.clone(), self.training, torch.is_grad_enabled()))
        channels = self.dropout(images.mean((2, 3)) * self.weight)
        return nn.functional.pad(channels, (0, self.classes - 3), value=-1e9)


@pytest.fixture
def student(recipe):
    """A distilled student in training mode."""
    return build.make_model(recipe(model=DISTILLED, teacher="any"), DigitScenes("train")).train()


@pytest.fixture
def teach(monkeypatch):
    """``teach(teacher)``: every spec opens that teacher."""

    def use(teacher):
        monkeypatch.setattr(distill, "_open", lambda spec: teacher)
        return teacher

    return use


def pixels(images, cfg):
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return images * std + mean


def test_the_loss_by_hand(recipe, student, teach):
    """Smoothed labels (0.9, 0.1 / 10) for one head, the teacher's hard decision for the other."""
    teacher = teach(Colours())
    images = torch.randn(3, 3, 32, 32)
    for image, channel in zip(images, (2, 0, 1), strict=True):
        image[channel] += 20
    labels = torch.tensor([4, 5, 6])
    loss = distill.objective(
        recipe(model=DISTILLED, teacher="any", label_smoothing=0.1), student, "cpu"
    )
    head, head_dist = student(images)
    found = loss((head, head_dist), labels, images)
    log, log_dist = head.log_softmax(1), head_dist.log_softmax(1)
    own = -(0.9 * log[range(3), [4, 5, 6]] + 0.1 * log.mean(1)).mean()
    taught = -log_dist[range(3), [2, 0, 1]].mean()
    torch.testing.assert_close(found, 0.5 * own + 0.5 * taught)
    found.backward()
    assert teacher.weight.grad is None
    assert student.head_dist.weight.grad.abs().sum() > 0
    soft = torch.nn.functional.one_hot(
        labels, 10
    ).float()  # as Mixup gives them: not to be smoothed again
    expected = 0.5 * -log[range(3), [4, 5, 6]].mean() + 0.5 * taught
    torch.testing.assert_close(loss((head, head_dist), soft, images), expected)


def test_the_teacher_sees_the_same_pixels_and_learns_nothing(recipe, student, teach):
    teacher = teach(Colours())
    made = distill.Teacher("any", student).train()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    decided = made(images)
    seen, training, recorded = teacher.seen[-1]
    torch.testing.assert_close(
        pixels(seen, teacher.pretrained_cfg),
        pixels(images.detach(), student.pretrained_cfg),
        atol=1e-5,
        rtol=0,
    )
    assert decided.dtype == torch.int64 and not decided.requires_grad
    assert (training, recorded) == (False, False)
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_without_a_normalisation_of_its_own_it_is_imagenets(student, teach):
    teacher = teach(Colours())
    del teacher.pretrained_cfg
    student.pretrained_cfg |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    distill.Teacher("any", student)(
        torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    )
    assert teacher.seen[-1][0].abs().max() < 1e-6


def test_in_a_run_the_teacher_sees_the_mixed_image(recipe, trainer, teach):
    teacher = teach(Colours())
    made = trainer(
        recipe(full=True, model={**DISTILLED, "patch_drop_rate": 0.0}, teacher="any", epochs=1)
    )
    given = []
    made.forward.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    before = {key: value.clone() for key, value in made.run.model.state_dict().items()}
    for _ in made.epoch(SimpleNamespace(update=lambda: None, set_postfix=lambda **shown: None)):
        pass
    assert len(given) == 5 and len(teacher.seen) == 6  # the first was to try it
    cfg = made.run.model.pretrained_cfg
    for images, (seen, training, recorded) in zip(given, teacher.seen[1:], strict=True):
        torch.testing.assert_close(
            pixels(seen, teacher.pretrained_cfg), pixels(images, cfg), atol=1e-4, rtol=0
        )
        assert (training, recorded) == (False, False)
    changed = {
        key
        for key, value in made.run.model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert {"dist_token", "head_dist.weight", "head.weight", "cls_token"} <= changed


def test_a_checkpoint_teaches_and_the_student_opens(recipe, make, tmp_path, same_run):
    """The whole run, and resumed at the end of an epoch; in eval mode the student gives one
    answer."""
    teacher = save(make(), tmp_path / "teacher")
    plan = recipe(full=True, model=DISTILLED, teacher=str(teacher))
    model = supervised.train(plan, tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 10)
    assert torch.equal(load(tmp_path / "run")(images), model(images))
    assert load(tmp_path / "run@ema")(images).shape == (2, 10)


def test_a_teacher_of_any_kind_from_timm(recipe, student, monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: real(name, num_classes=10))
    teacher = distill.Teacher("timm:test_resnet", student)
    assert type(teacher.model).__name__ == "ResNet"
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2,)

    def offline(name, pretrained):
        raise OSError("no network\nno luck")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        CheckpointError, match=r"^timm:test_resnet: its weights cannot be loaded \(no network\)$"
    ):
        distill.Teacher("timm:test_resnet", student)


def test_a_teacher_from_torchvision(student, monkeypatch):
    from torchvision import models

    asked, real = [], models.get_model
    monkeypatch.setattr(
        models,
        "get_model",
        lambda name, weights: asked.append((name, weights)) or real(name, num_classes=10),
    )
    teacher = distill.Teacher("torchvision:squeezenet1_1", student)
    assert asked == [("squeezenet1_1", "DEFAULT")]
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2,)
    with pytest.raises(UserError, match="torchvision has no model 'regnet'"):
        distill.Teacher("torchvision:regnet", student)
    monkeypatch.setattr(models, "get_model", lambda name, weights: Segmenting())
    with pytest.raises(
        UserError, match="the teacher torchvision:resnet18 does not classify 32 x 32 pixels"
    ):
        distill.Teacher("torchvision:resnet18", student)


class Segmenting(nn.Module):
    def forward(self, images):
        return {"out": images}


def test_what_does_not_fit(recipe, make, student, tmp_path, teach):
    spec = {
        "classes": save(make(num_classes=7), tmp_path / "classes"),
        "size": save(make(img_size=64), tmp_path / "size"),
    }
    with pytest.raises(UserError, match="classes has 7 classes, the model 10"):
        distill.Teacher(str(spec["classes"]), student)
    with pytest.raises(UserError, match="size does not classify 32 x 32 pixels"):
        distill.Teacher(str(spec["size"]), student)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        distill.Teacher(str(tmp_path / "nothing"), student)
    teach(Colours()).pretrained_cfg["label_names"] = [f"kind {i}" for i in range(10)]
    with pytest.raises(
        UserError, match="the teacher any names its classes otherwise: kind 0, kind 1"
    ):
        distill.Teacher("any", student)


def test_a_teacher_and_a_distilled_model_belong_together(recipe, trainer):
    with pytest.raises(
        UserError, match="a teacher needs a distilled model, bvit_small_patch16_224 is none"
    ):
        trainer(recipe(teacher="any"))
    with pytest.raises(
        UserError, match="bvit_small_distilled_patch16_224 is distilled: give a teacher"
    ):
        trainer(recipe(model=DISTILLED))
