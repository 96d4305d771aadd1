"""Masks of steps: against weights multiplied by hand, in a file, and of other models."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models import cost
from bvit_interp.models.masks import PLACES, Masks, full, masked, masks_of
from bvit_interp.models.steps import Steps
from bvit_interp.models.unroll import unroll


def drawn(model, density=0.6, seed=3):
    """Masks of `model` with each entry drawn on its own."""
    generator = torch.Generator().manual_seed(seed)
    ones = full(model)
    of = {
        name: torch.rand(mask.shape, generator=generator) < density for name, mask in ones.items()
    }
    return Masks(of, ones.blocks)


def untied(model, masks):
    """A block for every step with weights of its own, W * M_t written out."""
    stored, blocks = list(model.blocks.children()), []
    for t in range(len(model.blocks)):
        block = copy.deepcopy(
            stored[model.blocks.block_index(t) if isinstance(model.blocks, Steps) else t]
        )
        with torch.no_grad():
            for name, place in PLACES.items():
                weight = block.get_submodule(place).weight
                weight.copy_(torch.where(masks[name][t], weight, torch.zeros(())))
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("baked", [False, True])
def test_step_t_uses_its_own_mask(any_model, images, by_hand, baked):
    masks = drawn(any_model)
    before = copy.deepcopy(any_model.state_dict())
    step_embed = getattr(any_model.blocks, "step_embed", None)
    with torch.no_grad():
        sites = by_hand.run(any_model, images, untied(any_model, masks), step_embed)
        logits = masked(any_model, masks, baked=baked)(images)
    torch.testing.assert_close(
        logits, by_hand.logits(any_model, sites[-1]["resid_post"]), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(logits, any_model(images), atol=1e-2)
    assert before.keys() == any_model.state_dict().keys()  # no parametrization on the model itself
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())


def test_full_masks_change_nothing(any_model, images):
    for baked in (False, True):
        assert torch.equal(
            masked(any_model, full(any_model), baked=baked)(images), any_model(images)
        )


def test_the_gradient_of_a_weight_is_that_of_the_steps_that_keep_it(tiny_te, images):
    masks = drawn(tiny_te)
    masks["fc1"][:, 5] = False  # no step keeps neuron 5
    view = masked(tiny_te, masks).train()
    F.cross_entropy(view(images), torch.arange(4)).backward()
    shared = {
        name: view.blocks[0].get_submodule(place).parametrizations.weight.original
        for name, place in PLACES.items()
    }
    assert all(
        shared[name] is tiny_te.blocks[0].get_submodule(place).weight
        for name, place in PLACES.items()
    )

    own = unroll(tiny_te)
    for t, block in enumerate(own.blocks):
        for name, place in PLACES.items():
            weight = block.get_submodule(place).weight.detach() * masks[name][t]
            block.get_submodule(place).weight = nn.Parameter(weight)
    gradient = {name: shared[name].grad.clone() for name in PLACES}
    F.cross_entropy(own(images), torch.arange(4)).backward()
    for name, place in PLACES.items():
        each = torch.stack([block.get_submodule(place).weight.grad for block in own.blocks])
        torch.testing.assert_close(
            gradient[name], (each * masks[name]).sum(0), rtol=1e-4, atol=1e-5
        )
    assert not gradient["fc1"][5].any()
    assert gradient["fc1"][4].any()


def test_a_masked_model_unrolls_masked(tiny, images):
    masks = drawn(tiny)
    for baked in (False, True):
        view = masked(tiny, masks, baked=baked)
        again = unroll(view)
        assert torch.equal(again(images), view(images))
        assert masks_of(again) is masks
    assert masks_of(tiny) is None
    assert cost.parameters(masked(tiny, masks)) == cost.parameters(tiny)


def test_densities_and_unions_by_hand(tiny_hybrid):
    ones = full(tiny_hybrid)
    assert (ones.count, ones.blocks) == (6, (0, 1, 0, 1, 0, 1))
    of = {name: torch.zeros_like(mask) for name, mask in ones.items()}
    of["qkv"][0, 0, 0] = of["qkv"][2, 0, 1] = of["qkv"][1, 0, 2] = True
    of["proj"][5] = True
    masks = Masks(of, ones.blocks)
    weights = sum(mask[0].numel() for mask in masks.values())
    assert weights == 12 * 32**2
    assert masks.density().tolist() == pytest.approx(
        [count / weights for count in (1, 1, 1, 0, 0, 32**2)]
    )
    assert masks.density("proj").tolist() == [0, 0, 0, 0, 0, 1]
    union = masks.union()
    assert {name: tuple(mask.shape) for name, mask in union.items()} == {
        "qkv": (2, 96, 32),
        "proj": (2, 32, 32),
        "fc1": (2, 128, 32),
        "fc2": (2, 32, 128),
    }
    assert union["qkv"][0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert union["qkv"][1].nonzero().tolist() == [[0, 2]]
    assert union["proj"].sum((1, 2)).tolist() == [0, 32**2]
    assert int(masks.flat(0).sum()) == 1
    assert len(masks.flat(0)) == weights


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_holds_eight_weights_a_byte_and_comes_back(any_model, tmp_path):
    masks = drawn(any_model)
    masks.save(tmp_path / "masks.safetensors", any_model)
    again = Masks.load(tmp_path / "masks.safetensors", any_model)
    assert again.blocks == masks.blocks
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    assert again.fingerprint() == masks.fingerprint()
    entries = sum(mask.numel() for mask in masks.values())
    assert entries / 8 < (tmp_path / "masks.safetensors").stat().st_size < entries / 8 + 2000


def test_masks_of_parts_of_the_data_of_any_shape(tiny, tmp_path):
    # 105 entries: no whole number of bytes
    masks = Masks({"head.weight": torch.rand(3, 5, 7) < 0.5})
    masks.save(tmp_path / "m", tiny)
    assert torch.equal(Masks.load(tmp_path / "m")["head.weight"], masks["head.weight"])
    with pytest.raises(
        CheckpointError, match=r"head\.weight are \(5, 7\), its weight is \(10, 32\)"
    ):
        Masks.load(tmp_path / "m", tiny)
    named = Masks({"head.weight": torch.rand(3, 10, 32) < 0.5})
    named.save(tmp_path / "n", tiny)
    assert torch.equal(Masks.load(tmp_path / "n", tiny)["head.weight"], named["head.weight"])
    with pytest.raises(
        UserError, match=r"masks of head\.weight; expected those of qkv, proj, fc1, fc2"
    ):
        masked(tiny, masks)


def test_other_masks_have_another_fingerprint(tiny):
    masks = drawn(tiny)
    one_off = {name: mask.clone() for name, mask in masks.items()}
    one_off["fc2"][11, 31, 127] ^= True
    reshaped = {
        name: mask.transpose(1, 2) if name == "proj" else mask for name, mask in masks.items()
    }
    others = [Masks(one_off), Masks(reshaped), Masks(masks.of, (0, 1) * 6), full(tiny)]
    assert len({m.fingerprint() for m in (masks, *others)}) == 5


def test_masks_of_another_model_are_refused_by_what_differs(tiny, make, tmp_path):
    path = tmp_path / "masks.safetensors"
    drawn(tiny).save(path, tiny)
    for other, wrong in (
        (make(seed=1), "masks of other weights than these"),
        (make(num_steps=6), "masks of 12 steps for a model of 6"),
        (make(embed_dim=16), r"masks of qkv are \(96, 32\), its weight is \(48, 16\)"),
    ):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: {wrong}$"):
            Masks.load(path, other)
    for other in (make(num_steps=6), make(embed_dim=16)):
        with pytest.raises(UserError, match=r"masks of (12 steps|qkv are)"):
            masked(other, drawn(tiny))


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (lambda whole: whole[:-7], "truncated or not a file of masks"),
        (lambda whole: whole[:3], "truncated or not a file of masks"),
        (lambda whole: b"", "truncated or not a file of masks"),
        (lambda whole: whole.replace(b"qkv", b"qkw", 1), "truncated or not a file of masks"),
        (
            lambda whole: whole.replace(b"[12, 32, 32]", b"[12, 32, 99]", 1),
            "truncated or not a file of masks",
        ),
        (
            lambda whole: whole.replace(b"[12, 32, 32]", b"[11, 32, 32]", 1),
            "truncated or not a file of masks",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tiny, tmp_path, content, wrong):
    drawn(tiny).save(tmp_path / "m", tiny)
    whole = (tmp_path / "m").read_bytes()
    assert content(whole) != whole
    (tmp_path / "m").write_bytes(content(whole))
    with pytest.raises(CheckpointError, match=wrong) as caught:
        Masks.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    save_file({"weight": torch.ones(3)}, str(tmp_path / "weights.safetensors"))
    assert load_file(tmp_path / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"weights.safetensors: truncated or not a file of masks"
    ):
        Masks.load(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="no masks at .*nowhere"):
        Masks.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("of", "blocks"),
    [
        ({}, None),
        ({"a": torch.ones(2, 3)}, None),
        ({"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.ones(3, 3, dtype=torch.bool)}, None),
        ({"a": torch.ones(2, 3, dtype=torch.bool)}, (0, 0, 1)),
    ],
)
def test_what_is_no_set_of_masks(of, blocks):
    with pytest.raises(UserError, match="masks"):
        Masks(of, blocks)


def rewritten(path, about=None, **tensors):
    """Change what a file of masks says of itself, and its tensors."""
    with safe_open(str(path), "pt") as file:
        said = json.loads(file.metadata()["masks"])
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = about(said) if about else said
    save_file(kept | tensors, str(path), metadata={"masks": json.dumps(said)})


@pytest.mark.parametrize(
    ("about", "wrong"),
    [
        (lambda said: [1], "does not say the shapes"),
        (lambda said: said | {"shapes": 3}, "does not say the shapes"),
        (lambda said: said | {"shapes": {}}, "shapes of"),
        (
            lambda said: said | {"shapes": said["shapes"] | {"qkv": [12, -96, 32]}},
            "qkv cannot have",
        ),
        (lambda said: said | {"shapes": said["shapes"] | {"qkv": [36864]}}, "qkv cannot have"),
        (lambda said: said | {"shapes": said["shapes"] | {"qkv": "large"}}, "qkv cannot have"),
        (lambda said: said | {"shapes": said["shapes"] | {"qkv": [12.0, 96, 32]}}, "qkv cannot"),
        (lambda said: said | {"blocks": "0" * 12}, "blocks must be whole numbers"),
        (lambda said: said | {"blocks": [0.5] * 12}, "blocks must be whole numbers"),
        (lambda said: said | {"blocks": None}, "blocks must be whole numbers"),
        (lambda said: said | {"blocks": [0]}, "12 masks need as many blocks"),
        (lambda said: said | {"blocks": [7] * 12}, "masks of the stored blocks"),
        (lambda said: said | {"weights": ["a"]}, "masks of other weights"),
        (lambda said: {key: said[key] for key in ("shapes", "blocks")}, "masks of other weights"),
    ],
)
def test_a_whole_file_that_says_something_else(tiny, tmp_path, about, wrong):
    drawn(tiny).save(tmp_path / "m", tiny)
    rewritten(tmp_path / "m", about)
    with pytest.raises(CheckpointError, match=wrong) as caught:
        Masks.load(tmp_path / "m", tiny)
    assert "\n" not in str(caught.value)


def test_tensors_that_are_no_rows_of_bytes_and_foreign_names(tiny, tmp_path):
    path = tmp_path / "m"
    for tensor in (torch.rand(4608), torch.zeros(4608, 1, dtype=torch.uint8), torch.zeros(2, 2)):
        drawn(tiny).save(path, tiny)
        rewritten(path, qkv=tensor)
        with pytest.raises(CheckpointError, match="qkv is .* not a row of bytes"):
            Masks.load(path, tiny)
    drawn(tiny).save(path, tiny)
    rewritten(path, more=torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="not a file of masks"):
        Masks.load(path, tiny)
    Masks({"blocks.7.attn": torch.ones(12, 4, 4, dtype=torch.bool)}).save(path, tiny)
    with pytest.raises(CheckpointError, match=r"masks of blocks\.7\.attn, which the model"):
        Masks.load(path, tiny)
