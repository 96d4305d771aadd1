"""The initial model, weight decay, the learning rate and the EMA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import save
from bvit_interp.training.loop import build
from bvit_interp.training.loop.recipe import read

SAMPLES = DigitScenes("train")


def test_weights_are_of_the_seed_alone(recipe):
    torch.manual_seed(1)
    first = build.make_model(recipe(seed=3), SAMPLES).state_dict()
    torch.manual_seed(2)
    again, other = (build.make_model(recipe(seed=seed), SAMPLES).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])


def test_the_model_knows_its_classes_and_that_nothing_is_cut_off(recipe):
    cfg = build.make_model(recipe(), SAMPLES).pretrained_cfg
    assert cfg["label_names"] == list("0123456789")
    assert cfg["crop_pct"] == 1.0


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("bvit_small_te_patch16_224", "blocks.step_embed"),
        ("bvit_small_reg4_patch16_224", "reg_token"),
    ],
)
def test_starting_from_a_checkpoint(make, recipe, tmp_path, name, new):
    base = make(patch_size=8)
    folder = save(base, tmp_path / "base")
    arguments = {"name": name, "embed_dim": 32, "num_heads": 4, "num_steps": 12}
    model = build.make_model(
        recipe(model=arguments, init=str(folder), positions="sincos"), SAMPLES
    ).eval()
    own = model.state_dict()
    assert set(own) - set(base.state_dict()) == {new}
    assert all(torch.equal(own[key], tensor) for key, tensor in base.state_dict().items())
    if new == "blocks.step_embed":  # it starts at zero: the very same model
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(images), base(images))
    with pytest.raises(UserError, match="base does not fit the model: cls_token"):
        build.make_model(recipe(model={**arguments, "embed_dim": 64}, init=str(folder)), SAMPLES)


def test_starting_from_other_sizes_and_classes(make, recipe, tmp_path):
    base = make(img_size=24, patch_size=6)
    base.pretrained_cfg = {**base.pretrained_cfg, "label_names": [f"n{i}" for i in range(10)]}
    init = str(save(base, tmp_path / "base"))
    arguments = {"embed_dim": 32, "num_heads": 4, "img_size": 96, "patch_size": 12}
    fresh = build.make_model(recipe(model=arguments), SAMPLES).state_dict()
    own, old = (
        build.make_model(recipe(model=arguments, init=init), SAMPLES).state_dict(),
        base.state_dict(),
    )
    for key, weight in own.items():
        if key.startswith("head"):  # of other classes
            assert torch.equal(weight, fresh[key])
        elif key not in ("pos_embed", "patch_embed.proj.weight"):
            assert torch.equal(weight, old[key])
    # an enlarged patch is embedded as the patch was
    patch = torch.randn(1, 3, 6, 6)
    larger = F.interpolate(patch, size=(12, 12), mode="bicubic", antialias=True)
    before = F.conv2d(patch, old["patch_embed.proj.weight"])
    assert torch.allclose(F.conv2d(larger, own["patch_embed.proj.weight"]), before, atol=1e-5)
    # positions: CLS stays, the grid of 4 x 4 becomes one of 8 x 8
    assert torch.equal(own["pos_embed"][:, 0], old["pos_embed"][:, 0])
    grid = own["pos_embed"][0, 1:].T.reshape(1, 32, 8, 8)
    expected = old["pos_embed"][0, 1:].T.reshape(1, 32, 4, 4)
    expected = F.interpolate(expected, size=(8, 8), mode="bicubic", antialias=True)
    assert torch.allclose(grid, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["", "reg4_", "distilled_"])
def test_sincos_positions(recipe, kind):
    """Half of the width is of the row, the other half of the column."""
    model = build.make_model(
        recipe(positions="sincos", model={"name": f"bvit_small_{kind}patch16_224"}), SAMPLES
    )
    prefix, patches = model.pos_embed.detach()[0].split([1 + (kind == "distilled_"), 16])
    positions = patches.reshape(4, 4, 32)
    assert positions.abs().max() <= 1
    assert positions.square().mean() == pytest.approx(0.5)  # sin^2 + cos^2
    same_row = positions[1, 0] == positions[1, 3]
    same_column = positions[0, 1] == positions[3, 1]
    assert same_row.sum() == same_column.sum() == 16
    assert (same_row ^ same_column).all()
    assert len(torch.unique(positions.reshape(16, 32).round(decimals=4), dim=0)) == 16
    assert prefix.abs().max() < 0.2  # CLS keeps timm's


def rates(recipe, steps):
    """The learning rate at every step of a run."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    schedule, found = build.schedule(optimizer, recipe, steps), []
    for step in range(recipe.epochs * steps):
        schedule.step_update(step)
        schedule.step(step // steps)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_papers_schedule_is_torchvisions():
    recipe, steps = read("imagenet-paper"), 2
    found = rates(recipe, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    parts = [
        LinearLR(optimizer, start_factor=0.033, total_iters=30),
        CosineAnnealingLR(optimizer, T_max=270),
    ]
    schedule, expected = SequentialLR(optimizer, parts, milestones=[30]), []
    for _ in range(300):
        expected += [optimizer.param_groups[0]["lr"]] * steps
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found[0] == pytest.approx(0.033e-3)
    assert found[30 * steps] == 1e-3 == max(found)
    assert 0 < found[-1] < 1e-7


def test_cifars_schedule_changes_with_every_step():
    recipe, steps = read("cifar10"), 5
    found = rates(recipe, steps)
    warm, total = 20 * steps, 200 * steps
    for t, rate in enumerate(found):
        share = 0.033 + 0.967 * t / warm
        cosine = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * (t - warm) / (total - warm))) / 2
        assert rate == pytest.approx(5e-4 * share if t < warm else cosine)
    assert found[warm] == 5e-4
    assert found[-1] == pytest.approx(1e-5, rel=0.01)


def test_without_warm_up_the_first_step_is_at_the_peak(recipe):
    assert rates(recipe(warmup_epochs=0, lr=0.3), 4)[0] == 0.3


def named(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("kind", ["tiny_te", "tiny_reg4", "tiny_sc_block", "tiny_distilled"])
def test_weight_decay_is_on_matrices_only(request, recipe, kind):
    model = request.getfixturevalue(kind)
    optimizer = build.optimizer(model, recipe(weight_decay=0.07))
    groups = {group["weight_decay"]: named(model, group) for group in optimizer.param_groups}
    assert set(groups) == {0.0, 0.07}
    heads = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("head") and name.endswith("weight")
    }
    assert groups[0.07] == {
        "patch_embed.proj.weight",
        *heads,
        *(f"blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }
    assert groups[0.0] | groups[0.07] == {name for name, _ in model.named_parameters()}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= groups[0.0]


def test_decay_all(tiny_te, recipe):
    (group,) = build.optimizer(tiny_te, recipe(weight_decay=0.07, decay_all=True)).param_groups
    assert group["weight_decay"] == 0.07
    assert named(tiny_te, group) == {name for name, _ in tiny_te.named_parameters()}


def test_one_block_has_a_twelfth_of_the_stacks_moments(make, recipe):
    sizes = {}
    for name in ("bvit_small_patch16_224", "vit_rms_small_patch16_224"):
        model = make(name=name)
        optimizer = build.optimizer(model, recipe())
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        sizes[name] = {
            key: sum(optimizer.state[p][key].numel() for p in model.blocks.parameters())
            for key in ("exp_avg", "exp_avg_sq")
        }
    one, stack = sizes.values()
    assert one == {"exp_avg": 12 * 32**2 + 11 * 32, "exp_avg_sq": 12 * 32**2 + 11 * 32}
    assert stack == {key: 12 * size for key, size in one.items()}


def test_the_horizon_of_the_average(recipe):
    """The paper's 0.99995 is 20,000 of 375,300 steps; 20 epochs of CIFAR-10 have 391 each."""
    assert build.ema_decay(recipe(), 300 * 1251) == pytest.approx(0.99995, abs=1e-6)
    assert build.ema_decay(recipe(), 20 * 391) == pytest.approx(0.99759, abs=1e-5)
    assert build.ema_decay(recipe(), 3) == 0
    assert build.ema_decay(recipe(ema=0.9), 300 * 1251) == 0.9
