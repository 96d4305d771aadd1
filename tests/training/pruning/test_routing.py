"""Training and prediction of subnetworks, against the same written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.masks import Masks
from bvit_interp.training.loop.augment import Augmentation
from bvit_interp.training.pruning import routing, subsets
from bvit_interp.training.pruning.masked_adam import MaskedAdam
from bvit_interp.training.pruning.subnetworks import Subnets, build_model, masked_weights
from bvit_interp.training.pruning.subset_batches import Batches


@pytest.fixture
def subnets(recipe, pools):
    """``subnets(outputs)``: three subnetworks with random masks in the recipe's model."""

    def make(outputs=(None, None, None)):
        model = build_model(recipe(), pools[0])
        names = masked_weights(model)
        shapes = {name: model.get_parameter(name).shape for name in names}
        generator = torch.Generator().manual_seed(0)
        masks = {n: torch.rand(3, *shape, generator=generator) < 0.5 for n, shape in shapes.items()}
        return Subnets(model, names, Masks(masks), outputs)

    return make


def masked_model(subnets, k):
    """The model with weights multiplied by mask k, in evaluation."""
    model = subnets.module.eval()
    with torch.no_grad():
        for name, mask in subnets.masks[k].items():
            model.get_parameter(name).mul_(mask)
    return model


@pytest.mark.parametrize("outputs", [(None, None, None), (0, 1, 2)])
def test_a_route_asks_one_subset_under_the_mask_of_another(subnets, pools, outputs):
    pool, classes = pools[1], 3
    shown = subnets(outputs)
    view = Geometry.of(shown.module, DigitScenes("test"))
    predicted = routing.predict([(shown, 0, 0), (shown, 0, 2), (shown, 2, 1)], pool, view, "cpu", 7)
    images = torch.stack([view(pool.read(i))[0] for i in range(len(pool))])
    for row, (k, mask) in zip(predicted, [(0, 0), (0, 2), (2, 1)], strict=True):
        with torch.no_grad():
            logits = masked_model(subnets(outputs), mask)(images)
        assert logits.shape == (len(pool), classes)
        wanted = logits.argmax(1).float() if outputs[0] is None else logits[:, outputs[k]]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_the_last_quarter_of_the_batches(
    subnets, recipe, pools, monkeypatch
):
    plan, shown, steps = recipe(batch_size=8), subnets(), 9
    parts = [subsets.whole(pools[0])] * 3
    batches = Batches(plan, pools[0], parts, Augmentation(plan, shown.module), (1,), steps)
    losses, done, asked, original = [], [], [], Subnets.loss

    def noted(self, images, labels, k, smoothing):
        loss = original(self, images, labels, k, smoothing)
        losses.append(loss.item())
        asked.append(k)
        return loss

    monkeypatch.setattr(Subnets, "loss", noted)
    found = routing.train(shown, batches, plan, "cpu", lambda: done.append(1))
    assert len(done) == steps
    assert asked == [0, 1, 2] * 3
    assert found == pytest.approx(np.mean(losses[-2:]), rel=1e-6)


def test_a_loss_that_is_not_finite_stops(subnets, recipe, pools):
    plan, shown = recipe(batch_size=8), subnets()
    nn.init.constant_(shown.module.head.bias, math.nan)
    parts = [subsets.whole(pools[0])] * 3
    batches = Batches(plan, pools[0], parts, Augmentation(plan, shown.module), (1,), 3)
    with pytest.raises(UserError, match="the loss is nan"):
        routing.train(shown, batches, plan, "cpu")


def test_patches_and_learning_rate_follow_the_recipe_over_the_batches(recipe, pools, monkeypatch):
    model = {**recipe().model, "patch_drop_rate": 0.5}
    plan = recipe(
        batch_size=8, model=model, patch_drop_until=0.5, epochs=4, warmup_epochs=0.0, lr=1e-3
    )
    module, steps = build_model(plan, pools[0]), 8
    names = masked_weights(module)
    masks = {name: torch.ones(1, *module.get_parameter(name).shape).bool() for name in names}
    shown = Subnets(module, names, Masks(masks), [None])
    drops, rates, original = [], [], MaskedAdam.step

    def noted(self, kept):
        drops.append(module.patch_drop.prob)
        rates.append(self.param_groups[0]["lr"])
        original(self, kept)

    monkeypatch.setattr(MaskedAdam, "step", noted)
    parts = [subsets.whole(pools[0])]
    batches = Batches(plan, pools[0], parts, Augmentation(plan, module), (1,), steps)
    routing.train(shown, batches, plan, "cpu")
    assert drops == [0.5] * 4 + [0.0] * 4
    cosine = [1e-3 * (1 + math.cos(math.pi * j / steps)) / 2 for j in range(steps)]
    assert rates == pytest.approx(cosine, rel=1e-6)
