"""What an address means in models whose steps differ, and maps of blocks that cannot be right."""

from __future__ import annotations

import re

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from bvit_interp import Probe
from bvit_interp.errors import UserError
from bvit_interp.models import families
from bvit_interp.models.families import register_block

HEADS = (8, 4, 8)


@pytest.fixture
def uneven():
    """A stack of 32 channels in 8, 4 and 8 heads; the second has 48 neurons, the others 128."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=3, num_classes=10
    )
    for i, heads in enumerate(HEADS):
        model.blocks[i] = Block(32, heads, mlp_ratio=1.5 if i == 1 else 4)
    return model.eval()


def test_a_unit_that_a_step_does_not_have_is_refused_with_the_units_of_that_step(uneven, images):
    probe = Probe(uneven)
    assert str(probe.address("z[1]:6")) == "z[1]:6"
    for key, there in {"z[2]:6": "0..3", "z:6": "0..3", "mlp_post[2]:48": "0..47"}.items():
        with (
            pytest.raises(UserError, match=re.escape(f"{there} at step 2")) as refusal,
            probe.edit({key: lambda x, _: 0 * x}),
        ):
            pass
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=r"no head 6; heads: 0\.\.3 at step 2"):
        probe.record(images, "v[2]:6")


def test_sizes_are_those_of_each_step(uneven, images):
    probe = Probe(uneven, max_bytes=4 * 4 * 17 * (128 + 48 + 128))
    cache = probe.record(images, "mlp_post")
    assert [cache["mlp_post", step].shape[-1] for step in (1, 2, 3)] == [128, 48, 128]
    probe.max_bytes -= 1
    with pytest.raises(UserError, match="max_bytes"):
        probe.record(images, "mlp_post")
    for size, listed in {"num_heads": "8, 4, 8", "num_neurons": "128, 48, 128"}.items():
        with pytest.raises(UserError, match=listed):
            getattr(probe, size)


def test_a_head_is_edited_at_a_step_of_its_own_size(uneven, images):
    """Against the projection without that head's columns."""
    probe = Probe(uneven)
    with torch.no_grad(), probe.edit({"z[2]:3": lambda z, _: 0 * z}):
        edited = probe.record(images, "attn_out[2]")["attn_out", 2]
    z = probe.record(images, "z[2]")["z", 2].flatten(2)
    project = uneven.blocks[1].attn.proj
    with torch.no_grad():
        by_hand = z[..., :24] @ project.weight[:, :24].T + project.bias
    torch.testing.assert_close(edited, by_hand)


class Shared(nn.Module):
    """One dropout behind attention and behind the FFN, as in much copied code."""

    def __init__(self):
        super().__init__()
        self.attend, self.ffn, self.drop = nn.Linear(32, 32), nn.Linear(32, 32), nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop(self.attend(x))
        return x + self.drop(self.ffn(x))


class Model(nn.Module):
    """Three calls of `Shared`."""

    image_size = 32

    def __init__(self):
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 32, 8, 8), Shared()

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        for _ in range(3):
            x = self.block(x)
        return x.mean(1)


def test_a_module_that_runs_twice_per_step_is_no_site(images, monkeypatch):
    """Neither when it is recorded nor when it is edited."""
    monkeypatch.setattr(families, "_mappers", dict(families._mappers))
    register_block(Shared, {"attn_out": "drop.out", "mlp_out": "ffn.out"})
    probe = Probe(Model().eval())
    for ask in (probe.run, probe.record):
        with pytest.raises(UserError, match="'drop' more than once per step") as refusal:
            ask(images, "attn_out[2]")
        assert "\n" not in str(refusal.value)
    with (
        pytest.raises(UserError, match="'drop' more than once per step"),
        probe.edit({"attn_out[2]": lambda x, _: 0 * x}),
    ):
        pass
    assert probe.record(images, "mlp_out")["mlp_out", 3].shape == (len(images), 16, 32)
