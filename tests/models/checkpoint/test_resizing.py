"""A checkpoint for images of another size."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from bvit_interp.errors import CheckpointError
from bvit_interp.models.checkpoint import load, save


def resampled(positions, prefix, old, new):
    """Position embeddings on another grid, written without timm."""
    grid = positions[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :prefix], grid.flatten(2).mT], 1)


@pytest.mark.parametrize("size", [48, (48, 24)])
@pytest.mark.parametrize("name", ["bvit_small_patch16_224", "bvit_small_reg4_patch16_224"])
def test_a_folder_at_another_size(make, tmp_path, name, size):
    """Registers have no position, so only CLS is kept as it is."""
    model = make(name=name)
    folder = save(model, tmp_path / "model")
    other = load(folder, image_size=size)
    rows, columns = (size, size) if isinstance(size, int) else size
    assert tuple(other.patch_embed.img_size) == (rows, columns)
    wanted = resampled(model.pos_embed.detach(), 1, (4, 4), (rows // 8, columns // 8))
    torch.testing.assert_close(other.pos_embed.detach(), wanted)
    for key, tensor in model.state_dict().items():
        assert key == "pos_embed" or torch.equal(other.state_dict()[key], tensor)
    assert other(torch.zeros(1, 3, rows, columns)).shape == (1, 10)
    spelled = load(f"{folder}@size={rows}x{columns}")
    assert torch.equal(spelled.pos_embed, other.pos_embed)
    again = load(save(other, tmp_path / "again"))
    assert torch.equal(again.pos_embed, other.pos_embed)


def test_the_own_size_changes_nothing(tiny, tmp_path, images):
    assert torch.equal(load(save(tiny, tmp_path / "tiny"), image_size=32)(images), tiny(images))


def test_a_file_of_timm_at_another_size(tmp_path, caplog):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    spec = f"timm:vit_tiny_patch16_224@{tmp_path / 'w.pth'}"
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 37, 192\) .*; @size=N resamples"):
        load(spec)
    assert torch.equal(load(f"{spec}@size=96").pos_embed, model.pos_embed)
    assert not caplog.records
    other = load(f"{spec}@size=64")
    assert "another layout or size" in caplog.messages[-1]
    wanted = resampled(model.pos_embed.detach(), 1, (6, 6), (4, 4))
    torch.testing.assert_close(other.pos_embed.detach(), wanted)


def test_sizes_that_cannot_be_had(tiny, tmp_path):
    folder = save(tiny, tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="36 x 36 pixels are not whole patches of 8 x 8"):
        load(f"{folder}@size=36")
    with pytest.raises(CheckpointError, match="32 x 36 pixels are not whole patches"):
        load(f"{folder}@size=32x36")
    with pytest.raises(CheckpointError, match="has no other image size"):
        load("timm:resnet10t@random@size=64")


# ---- torchvision ---------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A torchvision `vit_b_16` of two narrow layers, under its name."""

    def vit(image_size=32, num_classes=1000, **_):
        return VisionTransformer(image_size, 8, 2, 2, 16, 32, num_classes=num_classes)

    create = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name, **kwargs: vit(**kwargs) if name == "vit_b_16" else create(name, **kwargs),
    )
    return vit


def test_torchvision(small, tmp_path):
    one, two = (load("torchvision:vit_b_16@random") for _ in range(2))
    assert torch.equal(one.model.class_token, two.model.class_token)
    assert len(one.blocks) == 2
    assert one.layout.prefix == ("cls",)
    assert one.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert one.pretrained_cfg["interpolation"] == "bilinear"
    assert "label_names" not in one.pretrained_cfg  # random weights know no class
    torch.manual_seed(3)
    model = small(num_classes=7).eval()
    torch.nn.init.normal_(model.encoder.pos_embedding)
    torch.nn.init.normal_(model.heads[0].weight)
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w")
    images = torch.randn(2, 3, 32, 32)
    spec = f"torchvision:vit_b_16@{tmp_path / 'w'}"
    with torch.no_grad():
        assert torch.equal(load(spec)(images), model(images))
    assert load(spec).num_classes == 7
    other = load(f"{spec}@size=48")
    wanted = resampled_without_antialias(model.encoder.pos_embedding.detach())
    torch.testing.assert_close(other.model.encoder.pos_embedding.detach(), wanted)
    assert other.layout.grid == (6, 6)


def resampled_without_antialias(positions):
    grid = positions[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=True)
    return torch.cat([positions[:, :1], grid.flatten(2).mT], 1)


def test_published_weights_bring_class_names(small, monkeypatch):
    model = load("torchvision:vit_b_16")  # the stand-in needs no download
    assert model.pretrained_cfg["label_names"][:2] == ["tench", "goldfish"]


def test_torchvision_refuses_in_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nat all")

    with pytest.raises(
        CheckpointError, match="torchvision has no model 'vit_b'; close: .*vit_b_16"
    ):
        load("torchvision:vit_b")
    with pytest.raises(CheckpointError, match="no block of ResNet"):
        load("torchvision:resnet18@random")
    with pytest.raises(CheckpointError, match=r"no image size of 48 x 32"):
        load("torchvision:vit_b_16@random@size=48x32")
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(CheckpointError, match=r"\(no network\); .*vit_b_16@random or .* offline"):
        load("torchvision:vit_b_16")
