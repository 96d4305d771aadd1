"""Subnetworks: their weights, gradients and models, and what is masked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from jaxtyping import TypeCheckError
from torch import nn

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError
from bvit_interp.models.masks import Masks
from bvit_interp.models.unroll import unroll
from bvit_interp.training.pruning.masked_adam import MaskedAdam
from bvit_interp.training.pruning.subnetworks import (
    Subnets,
    build_model,
    input_settings,
    masked_weights,
    untie_steps,
)


def random_masks(model, places, count, seed=0):
    generator, own = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    return Masks({n: torch.rand(count, *own[n].shape, generator=generator) < 0.5 for n in places})


@pytest.mark.parametrize("kind", ["bvit", "resnet", "by step"])
def test_pruned_weights_are_left_bit_for_bit_on_their_subsets_batch_and_move_on_others(
    recipe, kind, images
):
    arguments = (
        {"name": "test_resnet", "num_classes": 10} if kind == "resnet" else dict(recipe().model)
    )
    model = timm.create_model(arguments.pop("name"), **arguments)
    places = masked_weights(model, by_step=kind == "by step")
    rows = len(next(iter(places.values())))
    assert rows == (3 if kind == "by step" else 1)
    masks = random_masks(model, places, 2 * rows)
    subnets = Subnets(unroll(model) if kind == "by step" else model, places, masks, [0, 1])
    optimizer = MaskedAdam([{"params": list(model.parameters()), "weight_decay": 0.1}], lr=1e-2)
    model.train()
    for k in (0, 1, 0, 1):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        subnets.loss(images, torch.tensor([0, 1, 0, 1]), k, 0.0).backward()
        optimizer.step(subnets.kept[k])
        optimizer.zero_grad()
        for name in places:
            union = masks[name][k * rows : (k + 1) * rows].any(0)
            now = model.get_parameter(name).detach()
            assert torch.equal(now[~union], before[name][~union]), name
            assert (now[union] != before[name][union]).any(), name
        head = model.get_classifier().weight.detach()
        name = next(n for n, p in model.named_parameters() if p is model.get_classifier().weight)
        assert ((head != before[name]).any(1)).nonzero().flatten().tolist() == [
            k
        ]  # the subset's own output


def test_the_gradient_is_that_of_the_masked_model_times_the_mask(recipe, images):
    """Algorithm 2: grad * m_k, with the gradient taken at theta * m_k."""
    model = timm.create_model("test_resnet", num_classes=10).eval()
    places = masked_weights(model)
    masks = random_masks(model, places, 1)
    subnets = Subnets(model, places, masks, [None])
    subnets.loss(images, torch.arange(4), 0, 0.0).backward()
    other = timm.create_model("test_resnet", num_classes=10).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in places:
            other.get_parameter(name).mul_(masks[name][0])
    nn.functional.cross_entropy(other(images), torch.arange(4)).backward()
    for name, p in other.named_parameters():
        wanted = p.grad * masks[name][0] if name in places else p.grad
        torch.testing.assert_close(model.get_parameter(name).grad, wanted)


def test_masks_of_steps_give_the_masked_unroll(tiny, images):
    from bvit_interp.models.masks import PLACES, masked

    places = masked_weights(tiny, by_step=True)
    masks = random_masks(tiny, places, 2 * 12)
    of_second = Masks({short: masks[f"blocks.0.{at}.weight"][12:] for short, at in PLACES.items()})
    subnets = Subnets(unroll(tiny), places, masks, [None, None])
    torch.testing.assert_close(subnets(images, 1), masked(tiny, of_second)(images))


def test_untied_steps_start_equal_and_are_separate(tiny, images):
    apart = untie_steps(tiny)
    assert torch.equal(apart(images), tiny(images))
    weights = [block.mlp.fc1.weight for block in apart.blocks]
    assert len({id(weight) for weight in weights}) == 12
    assert apart.blocks[3].norm1.weight is apart.blocks[5].norm1.weight
    assert not {id(p) for p in apart.parameters()} & {id(p) for p in tiny.parameters()}


def test_linear_layers_and_convolutions_are_masked_and_the_classifier_is_not(tiny):
    assert set(masked_weights(tiny)) == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    }
    resnet = timm.create_model("test_resnet")
    convolutions = {f"{n}.weight" for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(masked_weights(resnet)) == convolutions


def test_models_that_cannot_be_masked(tiny_distilled, tiny_hybrid):
    with pytest.raises(UserError, match="not one classifier"):
        masked_weights(tiny_distilled)
    with pytest.raises(UserError, match="2 blocks"):
        masked_weights(tiny_hybrid, by_step=True)
    with pytest.raises(UserError, match="masks of steps are of a bViT, not of ResNet"):
        masked_weights(timm.create_model("test_resnet"), by_step=True)


def test_build_gives_an_output_a_class_and_the_same_weights_for_a_seed(recipe, pools):
    assert build_model(recipe(), pools[0]).num_classes == 3
    plan = replace(recipe(), model={"name": "test_resnet"})
    one, other = (build_model(plan, pools[0]) for _ in range(2))
    assert one.num_classes == 3
    assert torch.equal(one.conv1[0].weight, other.conv1[0].weight)
    assert input_settings(one, DigitScenes("test")).patch_embed.img_size == (32, 32)
    with pytest.raises(UserError, match="cannot make the model test_resnet"):
        build_model(replace(plan, model={**plan.model, "wide": 3}), pools[0])
    with pytest.raises(UserError, match="cannot make the model resnet0"):
        build_model(replace(plan, model={"name": "resnet0"}), pools[0])


def test_images_of_another_shape_are_refused(recipe, pools, images):
    model = build_model(recipe(), pools[0])
    names = masked_weights(model)
    subnets = Subnets(model, names, random_masks(model, names, 1), [None])
    with pytest.raises(TypeCheckError):
        subnets.loss(images, torch.zeros(len(images), 1, dtype=torch.long), 0, 0.0)


def test_the_loss_of_a_class_is_binary_cross_entropy_with_smoothed_labels(recipe, pools, images):
    model = build_model(recipe(), pools[0]).eval()
    names = masked_weights(model)
    subnets = Subnets(model, names, random_masks(model, names, 1), [1])
    labels = torch.tensor([0, 1, 2, 1])
    positive = subnets(images, 0).sigmoid()
    target = torch.tensor([0.1, 0.9, 0.1, 0.9])  # smoothing 0.2
    wanted = -(target * positive.log() + (1 - target) * (1 - positive).log()).mean()
    torch.testing.assert_close(subnets.loss(images, labels, 0, 0.2), wanted)


def test_attention_is_not_fused_in_bf16_on_a_cpu(recipe, pools):
    fused = [
        build_model(recipe(autocast=word), pools[0]).blocks[0].attn.fused_attn
        for word in ("off", "bf16")
    ]
    assert fused == [True, False]
