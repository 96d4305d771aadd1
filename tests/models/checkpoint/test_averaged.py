"""Averaged weights beside the raw ones, and weights stored in half the bytes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from bvit_interp.errors import CheckpointError
from bvit_interp.models.checkpoint import display_name, load, save, versions
from bvit_interp.models.checkpoint.saving import _as_stored


@pytest.fixture
def saved(tiny, tmp_path):
    """Folder of a saved tiny model."""
    return save(tiny, tmp_path / "tiny")


@pytest.fixture
def averaged(tiny, make, tmp_path):
    """Folder of a tiny model whose averaged weights are those of another seed."""
    return save(tiny, tmp_path / "tiny", ema=make(seed=5).state_dict())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_averaged_weights_open_under_their_own_spec(averaged, tiny, make, images):
    assert torch.equal(load(averaged)(images), tiny(images))
    assert torch.equal(load(f"{averaged}@ema")(images), make(seed=5)(images))
    assert not torch.equal(load(averaged)(images), load(f"{averaged}@ema")(images))
    through_timm = timm.create_model(f"local-dir:{averaged}", pretrained=True).eval()
    assert torch.equal(through_timm(images), tiny(images))  # timm takes the raw ones


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_allows(tiny, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = save(tiny, tmp_path / "tiny", ema=tiny.state_dict())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys(
        ["model.safetensors", "ema.safetensors", "config.json", "README.md"], mode
    )


def test_versions_and_names(averaged, tiny, monkeypatch):
    assert versions(averaged) == [str(averaged), f"{averaged}@ema"]
    assert versions(f"{averaged}/") == [f"{averaged}/", f"{averaged}@ema"]
    assert versions(f"{averaged}@ema") == [f"{averaged}@ema"]
    assert versions(save(tiny, averaged.parent / "raw")) == [str(averaged.parent / "raw")]
    assert versions("timm:vit_tiny_patch16_224") == ["timm:vit_tiny_patch16_224"]
    assert versions("nowhere") == ["nowhere"]
    assert display_name("checkpoints/x@ema") == "x@ema"
    monkeypatch.chdir(averaged)
    assert versions(".") == [".", ".@ema"]
    assert display_name(".@ema") == "tiny@ema"
    assert load(".@ema")


def test_a_folder_whose_name_ends_so_is_itself(averaged, make, images):
    other = save(make(seed=6), averaged.parent / "tiny@ema")
    assert torch.equal(load(other)(images), make(seed=6)(images))
    assert display_name(other) == "tiny@ema"


def test_a_folder_without_averaged_weights_says_so(saved, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"tiny has no averaged weights \(ema\.safetensors\): leave out @ema"
    ):
        load(f"{saved}@ema")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere: give a folder"):
        load(f"{tmp_path / 'nowhere'}@ema")


def test_averaged_weights_of_an_earlier_save_go(averaged, tiny):
    save(tiny, averaged)
    assert sorted(path.name for path in averaged.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert versions(averaged) == [str(averaged)]


def test_averaged_weights_of_another_model_are_refused(saved, tiny, make):
    before = contents(saved)
    other = make(embed_dim=16).state_dict()
    with pytest.raises(
        CheckpointError,
        match=r"the averaged weights do not fit the model\. of another shape: .*blocks",
    ):
        save(tiny, saved, ema=other)
    prefixed = {f"module.{name}": tensor for name, tensor in tiny.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: .*unexpected: module\."):
        save(tiny, saved, ema=prefixed)
    assert contents(saved) == before


def test_damaged_averaged_weights_are_named(averaged):
    file = averaged / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: truncated"):
        load(f"{averaged}@ema")
    assert load(averaged)


def test_a_disk_that_fills_at_the_averaged_weights_leaves_the_old_ones(averaged, make, monkeypatch):
    write = safetensors.torch.save_file

    def write_raw_only(weights, filename, metadata=None):
        if Path(filename).name == "ema.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)
        write(weights, filename, metadata)

    before = contents(averaged)
    monkeypatch.setattr(safetensors.torch, "save_file", write_raw_only)
    with pytest.raises(OSError, match="No space left"):
        save(make(seed=6), averaged, ema=make(seed=7).state_dict())
    assert contents(averaged) == before
    assert [path.name for path in averaged.parent.iterdir()] == ["tiny"]


# ---- storage types -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_the_bytes_open_as_float32(tiny, make, tmp_path, images, dtype):
    whole = save(tiny, tmp_path / "whole", ema=make(seed=5).state_dict())
    folder = save(tiny, tmp_path / "half", ema=make(seed=5).state_dict(), dtype=dtype)
    for file in ("model.safetensors", "ema.safetensors"):
        assert {tensor.dtype for tensor in safetensors.torch.load_file(folder / file).values()} == {
            dtype
        }
        assert (folder / file).stat().st_size < 0.6 * (whole / file).stat().st_size
    for model in (load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()):
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, tiny.state_dict()[name].to(dtype).float()), name
        torch.testing.assert_close(model(images), tiny(images), rtol=0.1, atol=0.5)
    assert next(tiny.parameters()).dtype == torch.float32  # the model that was saved is not changed
    assert torch.equal(
        load(f"{folder}@ema").norm.weight, make(seed=5).norm.weight.to(dtype).float()
    )


def test_buffers_that_are_not_floating_keep_their_type(tmp_path):
    stored = _as_stored({"count": torch.tensor(70000), "weight": torch.ones(2)}, torch.float16)
    assert stored["count"] == 70000
    assert (stored["count"].dtype, stored["weight"].dtype) == (torch.int64, torch.float16)


def test_weights_beyond_the_range_of_the_type_are_refused(saved, tiny):
    before = contents(saved)
    with torch.no_grad():
        tiny.head.bias[0] = 1e5  # float16 ends at 65504
    with pytest.raises(
        CheckpointError, match=r"head\.bias holds weights beyond the range of torch\.float16"
    ):
        save(tiny, saved, dtype=torch.float16)
    with pytest.raises(
        CheckpointError,
        match=r"cannot be stored as torch\.int8; types: torch\.float32, torch\.float16",
    ):
        save(tiny, saved, dtype=torch.int8)
    assert contents(saved) == before
    save(tiny, saved, dtype=torch.bfloat16)
    assert load(saved).head.bias[0].item() == pytest.approx(1e5, rel=1e-2)
