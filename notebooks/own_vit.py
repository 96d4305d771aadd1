"""A looped ViT of one's own: a block, a loop, and a line that tells where the sites are."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from bvit_interp import register_block


class OwnBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class OwnViT(nn.Module):
    image_size = 32

    def __init__(self, width=128, heads=8, steps=12, classes=10):
        super().__init__()
        self.pretrained_cfg = {"label_names": [str(digit) for digit in range(classes)]}
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 65, width))
        self.block, self.steps = OwnBlock(width, heads), steps
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for _ in range(self.steps):
            x = self.block(x)
        return self.head(self.norm(x)[:, 0])


register_block(
    OwnBlock,
    {
        "attn_out": "attention.out",
        "resid_mid": "norm2.in",
        "mlp_pre": "mlp.0.out",
        "mlp_post": "mlp.2.in",
        "mlp_out": "mlp.out",
    },
)


def own_vit():
    """The model with weights: those of the embedded bViT, under this class's names."""
    names = {
        "patch_embed.proj": "patches",
        "pos_embed": "position",
        "blocks.0": "block",
        "attn.qkv.": "attention.in_proj_",
        "attn.proj": "attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    weights = {}
    folder = Path(__file__).parents[1] / "checkpoints" / "bvit-digits-s"
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        weights[name] = tensor
    model = OwnViT()
    model.load_state_dict(weights)
    return model.eval()
