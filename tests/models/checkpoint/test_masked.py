"""A checkpoint under its masks: ``FOLDER@masked``."""

from __future__ import annotations

import shutil

import pytest
import torch

from bvit_interp.errors import CheckpointError
from bvit_interp.models import masks as of_steps
from bvit_interp.models.checkpoint import display_name, load, save, versions
from bvit_interp.models.masks import Masks, full, masked, masks_of
from bvit_interp.probes.probe import Probe


def half(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ones = full(model)
    return Masks(
        {name: torch.rand(m.shape, generator=generator) < 0.5 for name, m in ones.items()},
        ones.blocks,
    )


@pytest.fixture
def pruned(tiny_te, make, tmp_path):
    """Folder of a tiny model with masks and averaged weights."""
    folder = save(
        tiny_te, tmp_path / "tiny", ema=make(name="bvit_small_te_patch16_224", seed=5).state_dict()
    )
    half(tiny_te).save(folder / of_steps.FILE, tiny_te)
    return folder


def test_the_raw_weights_open_under_their_masks(pruned, tiny_te, images):
    model = load(f"{pruned}@masked")
    assert torch.equal(model(images), masked(tiny_te, half(tiny_te))(images))
    assert torch.equal(load(pruned)(images), tiny_te(images))
    assert masks_of(model).fingerprint() == half(tiny_te).fingerprint()
    assert not model.training
    assert display_name(f"{pruned}@masked") == "tiny@masked"
    assert versions(f"{pruned}@masked") == [f"{pruned}@masked"]
    # what the masks are of is asked for by name
    assert versions(pruned) == [
        str(pruned),
        f"{pruned}@ema",
    ]


def test_a_probe_sees_the_masked_steps(pruned, images, by_hand):
    model = load(f"{pruned}@masked")
    with torch.no_grad():
        sites = by_hand.run(model, images, list(model.blocks), model.blocks[0].step_embed)
    _, cache = Probe(model).run(images, sites=["mlp_pre"])
    for t in (1, 5, 12):
        torch.testing.assert_close(cache["mlp_pre", t], sites[t]["mlp_pre"], rtol=1e-4, atol=1e-4)


def test_wrong_masks_are_one_line(pruned, tiny_te, make, tmp_path):
    other = make(name="bvit_small_te_patch16_224", seed=9)
    file = pruned / of_steps.FILE
    whole = file.read_bytes()
    half(other).save(file, other)
    with pytest.raises(
        CheckpointError, match=r"masks.safetensors: masks of other weights than these$"
    ):
        load(f"{pruned}@masked")
    fewer = make(name="bvit_small_te_patch16_224", num_steps=4)
    half(fewer).save(file, tiny_te)  # the right weights, but not their steps
    with pytest.raises(
        CheckpointError, match=r"masks.safetensors: masks of 4 steps for a model of 12$"
    ):
        load(f"{pruned}@masked")
    file.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match=r"masks.safetensors: truncated"):
        load(f"{pruned}@masked")
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"tiny has no masks \(masks.safetensors\): leave out @masked"
    ):
        load(f"{pruned}@masked")
    with pytest.raises(CheckpointError, match="no checkpoint at .*nowhere"):
        load(f"{tmp_path / 'nowhere'}@masked")


def test_a_folder_whose_name_ends_so_is_itself(pruned, tiny_te, images):
    shutil.copytree(pruned, pruned.parent / "tiny@masked")
    assert torch.equal(load(pruned.parent / "tiny@masked")(images), tiny_te(images))
