"""Tensors with facts in one file, against safetensors read by hand."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bvit_interp.models import tensor_file

FACTS = {"model": "bvit", "steps": [1, 12], "nested": {"a": None}}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "masks.safetensors"
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor([True, False])}
    tensor_file.write(path, "masks", FACTS, tensors)
    with safe_open(str(path), "pt") as file:
        assert json.loads(file.metadata()["masks"]) == FACTS
        assert torch.equal(file.get_tensor("a"), tensors["a"])
    about, read = tensor_file.read(path, "masks")
    assert about == FACTS
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_of_others_raise_what_is_listed(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(tensor_file.UNREADABLE):
        tensor_file.read(path, "masks")
    path.write_bytes(b"not a tensor")
    with pytest.raises(tensor_file.UNREADABLE):
        tensor_file.read(path, "masks")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(tensor_file.UNREADABLE):
        tensor_file.read(path, "masks")
    save_file({"a": torch.zeros(1)}, path, metadata={"masks": "{"})
    with pytest.raises(tensor_file.UNREADABLE):
        tensor_file.read(path, "masks")
