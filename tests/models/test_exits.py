"""Exits by hand: which image leaves where, and which steps are computed."""

from __future__ import annotations

import json

import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors import safe_open
from safetensors.torch import save_file

from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models.exits import FILE, Exits, check_exits, exit_logits, run_with_exits
from bvit_interp.models.stepping import advance, answer, embed
from bvit_interp.models.unroll import unroll


def random_exits(steps, model, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    exits = Exits(steps, model.embed_dim, model.num_classes)
    for parameter in exits.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return exits.eval()


def by_loop(view, exits, images, threshold):
    """Every image on its own, all steps run, as the rule says."""
    logits, left = [], []
    for image in images[:, None]:
        state = embed(view, image)
        for t in range(1, len(view.blocks) + 1):
            state = advance(view, state)
            if t == len(view.blocks):
                found = answer(view, state)[0]
            elif t in exits.steps:
                e, cls = exits.steps.index(t), state.tokens[0, 0]
                normed = cls / (cls.square().mean() + 1e-6).sqrt() * exits.norm[e]
                found = exits.weight[e] @ normed + exits.bias[e]
                if found.softmax(0).max() <= threshold:
                    continue
            else:
                continue
            break
        logits.append(found)
        left.append(t)
    return torch.stack(logits), torch.tensor(left)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_a_batch_leaves_as_every_image_alone(any_model, images, threshold):
    view = unroll(any_model)
    steps = tuple(range(1, len(view.blocks)))[:3]
    exits = random_exits(steps, any_model, scale=0.3)
    images = torch.cat([images, images.flip(-1), 2 * images])
    with torch.inference_mode():
        logits, left = run_with_exits(view, exits, images, threshold)
        expected, steps_left = by_loop(view, exits, images, threshold)
    assert left.tolist() == steps_left.tolist()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    if threshold == 1:
        assert (left == len(view.blocks)).all()
        torch.testing.assert_close(logits, any_model(images), atol=1e-5, rtol=1e-5)
    if threshold == 0:
        assert (left == steps[0]).all()


def test_every_exit_and_the_head_for_images_that_stay(any_model, images):
    """At threshold 1 nobody leaves; the logits of an exit are those by hand."""
    view = unroll(any_model)
    exits = random_exits((1, 2), any_model, scale=0.3)
    with torch.inference_mode():
        found = exit_logits(view, exits, images)
        assert found.shape == (4, 3, 10)
        torch.testing.assert_close(found[:, 2], any_model(images))
        for e in (0, 1):
            alone = Exits((e + 1,), any_model.embed_dim, 10)
            for name, parameter in exits.named_parameters():
                getattr(alone, name).copy_(parameter[e : e + 1])
            expected, _ = by_loop(view, alone, images, -1.0)
            torch.testing.assert_close(found[:, e], expected, atol=1e-5, rtol=1e-5)


def test_other_shapes_are_refused(tiny, images):
    exits = random_exits((2, 4), tiny)
    with pytest.raises(TypeCheckError):
        run_with_exits(unroll(tiny), exits, images[0], 0.5)
    with pytest.raises(TypeCheckError):
        exits(torch.zeros(4, 32))


def test_images_that_left_are_not_computed(tiny, images):
    view, seen = unroll(tiny), []
    handles = [
        block.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
        for block in view.blocks
    ]
    exits = random_exits((2, 4), tiny, scale=0.3)
    images = torch.cat([images, images.flip(-1), 2 * images])
    _, left = run_with_exits(view, exits, images, 0.4)
    for handle in handles:
        handle.remove()
    assert seen == [n for n in ((left >= t).sum().item() for t in range(1, 13)) if n]
    assert len({*left.tolist()}) > 1  # or the test says little


def test_saved_and_opened_again(tiny, tiny_te, tmp_path):
    exits = random_exits((6, 8), tiny)
    exits.save(tmp_path / FILE, tiny, {"images": 3})
    again = Exits.load(tmp_path / FILE, tiny)
    states = torch.randn(2, 2, 32)
    assert again.steps == (6, 8)
    assert torch.equal(again(states), exits(states))
    torch.testing.assert_close(again(states)[:, 1], again.one(1, states[:, 1]))
    with pytest.raises(CheckpointError, match="exits of another model's weights"):
        Exits.load(tmp_path / FILE, tiny_te)
    with pytest.raises(CheckpointError, match="no exits at .*early-exit train"):
        Exits.load(tmp_path / "none", tiny)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated or not a file of exits"):
        Exits.load(tmp_path / FILE, tiny)


def test_bad_exits(tiny, make):
    assert check_exits((8, 6), tiny) == (6, 8)
    for steps in ((), (6, 6), (0, 6), (6, 12), (13,)):
        with pytest.raises(UserError, match=r"exits must be different steps of 1\.\.11"):
            check_exits(steps, tiny)
    pooled = make(name="vit_tiny_patch16_224", depth=3, class_token=False, global_pool="avg")
    with pytest.raises(UserError, match="no"):
        check_exits((1,), pooled)


def test_exits_that_are_no_numbers_and_models_of_one_step_are_refused(tiny, make, tmp_path):
    exits = Exits((6,), 32, 10)
    with torch.no_grad():
        exits.weight[0, 0, 0] = torch.nan
    exits.save(tmp_path / FILE, tiny, {})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        Exits.load(tmp_path / FILE, tiny)
    with pytest.raises(UserError, match="one step"):
        check_exits((1,), make(num_steps=1))


@pytest.mark.parametrize(
    ("about", "tensors", "wrong"),
    [
        ({"steps": ["6", "8"]}, {}, "must be whole numbers, ascending, got"),
        ({"steps": "68"}, {}, "must be whole numbers, ascending"),
        ({"steps": [8, 6]}, {}, "must be whole numbers, ascending"),
        ({"steps": [6, 6]}, {}, "must be whole numbers, ascending"),
        ({"steps": [6.0, 8]}, {}, "must be whole numbers, ascending"),
        ({"steps": []}, {}, "must be whole numbers, ascending"),
        ({"steps": [6, 12]}, {}, r"exits must be different steps of 1\.\.11"),
        ({"steps": [6]}, {}, "the exits have tensors"),
        ({"weights": 3}, {}, "of another model's weights"),
        ({}, {"weight": torch.zeros(2, 7, 32)}, "the exits have tensors"),
        ({}, {"weight": torch.zeros(2, 10, 16), "norm": torch.zeros(2, 16)}, "have tensors"),
        ({}, {"weight": torch.zeros(32)}, "the exits have tensors"),
        ({}, {"surplus": torch.zeros(1)}, "the exits have tensors"),
        ({}, {"bias": torch.zeros(2, 10, dtype=torch.int64)}, "bias is torch.int64"),
    ],
)
def test_a_whole_file_that_does_not_fit_the_model(tiny, tmp_path, about, tensors, wrong):
    path = tmp_path / FILE
    random_exits((6, 8), tiny).save(path, tiny, {})
    with safe_open(str(path), "pt") as file:
        said = json.loads(file.metadata()["exits"]) | about
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(kept | tensors, str(path), metadata={"exits": json.dumps(said)})
    with pytest.raises(CheckpointError, match=wrong) as caught:
        Exits.load(path, tiny)
    assert "\n" not in str(caught.value)
    save_file(kept, str(path), metadata={"exits": "[" * 100_000})
    with pytest.raises(CheckpointError, match="truncated or not a file of exits"):
        Exits.load(path, tiny)
