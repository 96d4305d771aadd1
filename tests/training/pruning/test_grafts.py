"""Grafts: logits of all at once against a model with one of them; refused models."""

from __future__ import annotations

import copy

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import load
from bvit_interp.models.masks import Masks, full
from bvit_interp.training.loop import build, supervised
from bvit_interp.training.pruning.grafts import Grafts, check_model, graft_logits

TE = {"model": {"name": "bvit_small_te_patch16_224"}}


@pytest.fixture
def samples():
    return open_samples("digits-s", "train")


@pytest.fixture
def trained(recipe, samples, tmp_path):
    """``trained(**changes)``: recipe, first model, masks and a model trained under them."""

    def make(**changes):
        plan = recipe(lr=5e-3, **changes)
        init = build.make_model(plan, samples)
        generator = torch.Generator().manual_seed(0)
        masks = Masks(
            {
                name: torch.rand(mask.shape, generator=generator) < 0.6
                for name, mask in full(init).items()
            }
        )
        supervised.train(plan, tmp_path / "main", masks=masks)
        return plan, init, masks, load(f"{tmp_path / 'main'}@masked")

    return make


def test_every_row_of_the_answers_is_the_model_with_one_graft(trained, images):
    _, init, masks, main = trained(**TE)
    grafts = Grafts(init, main, masks)
    with torch.no_grad():
        for parameter in grafts.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
        rows = graft_logits(main, grafts, images)
        assert rows.shape == (3, 4, 10)
        for t in range(3):
            own = copy.deepcopy(main)
            own.blocks[t] = grafts[t]
            torch.testing.assert_close(rows[t], own(images), rtol=1e-4, atol=1e-5)
        exact = graft_logits(main, main.blocks, images)
    assert all(torch.allclose(row, main(images).detach(), atol=1e-5) for row in exact)


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ({"num_blocks": 2, "num_steps": 2}, "2 blocks"),
        ({"name": "bvit_small_sc_patch16_224"}, "a memory"),
        ({"name": "bvit_small_distilled_patch16_224"}, "a distillation token"),
    ],
)
def test_models_without_grafts(recipe, samples, model, own):
    init = build.make_model(recipe(model=model), samples)
    with pytest.raises(UserError, match=f"a bViT of one block without a memory, this has {own}"):
        check_model(init)
    check_model(build.make_model(recipe(**TE), samples))


def test_images_of_another_shape_are_refused(trained, images):
    _, init, masks, main = trained()
    with pytest.raises(TypeCheckError):
        graft_logits(main, Grafts(init, main, masks), images[0])
