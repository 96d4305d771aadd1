"""Attention at the kernel: scale, masks and rows by hand, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bvit_interp.errors import UserError
from bvit_interp.models.attention import attention_of, watching

SCALE = 0.7
TOKENS = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))


class Kernel(nn.Module):
    """Attention of two heads of width 4 among the tokens themselves, with options of the kernel."""

    def __init__(self, times: int = 1, keys: int = 9, **options: object) -> None:
        super().__init__()
        self.times, self.keys, self.options = times, keys, options

    def forward(self, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        keys = heads[:, :, : self.keys]
        for _ in range(self.times):
            z = F.scaled_dot_product_attention(heads, keys, keys, scale=SCALE, **self.options)
        return z.transpose(1, 2).flatten(2)


def recorded(block, site, rows):
    """Tokens `rows` of the site."""
    seen = []
    handle = attention_of(block).record(site, rows, seen.append)
    with torch.no_grad(), watching():
        block(TOKENS)
    handle.remove()
    (found,) = seen
    return found


def edited(block, change):
    """The output of a block whose pattern is changed."""
    handle = attention_of(block).edit("pattern", change)
    try:
        with torch.no_grad(), watching():
            return block(TOKENS)
    finally:
        handle.remove()


KEYS = torch.arange(9) < torch.tensor([6, 8])[:, None]  # the keys of each image that are there
MASKS = {
    "of keys": KEYS[:, None, None],
    "of keys, added": torch.zeros(2, 1, 1, 9).masked_fill(~KEYS[:, None, None], -3.0),
    "of pairs": torch.linspace(-2, 2, 81).reshape(9, 9),
}


@pytest.mark.parametrize("mask", [*MASKS, "causal", None])
@pytest.mark.parametrize("rows", [slice(None), slice(5, 7), slice(8, 9)])
def test_scores_and_pattern_by_hand(mask, rows):
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": MASKS.get(mask)}
    heads = TOKENS.unflatten(-1, (2, 4))
    scores = SCALE * torch.einsum("bqhe,bkhe->bhqk", heads, heads)
    if mask == "causal":
        scores = scores.masked_fill(torch.arange(9) > torch.arange(9)[:, None], -torch.inf)
    elif mask == "of keys":
        scores = torch.where(KEYS[:, None, None], scores, -torch.inf)
    elif mask is not None:
        scores = scores + MASKS[mask]
    block = Kernel(**options)
    torch.testing.assert_close(recorded(block, "scores", rows), scores[:, :, rows])
    pattern = scores.exp() / scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(recorded(block, "pattern", rows), pattern[:, :, rows])
    z = torch.einsum("bhqk,bkhe->bqhe", pattern, heads)
    torch.testing.assert_close(recorded(block, "z", rows), z[:, rows])
    torch.testing.assert_close(edited(block, torch.clone), z.flatten(2))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Kernel(times=2), "attends more than once"),
        (Kernel(keys=5), "not between the 9 tokens"),
    ],
)
def test_attention_without_a_single_square_pattern_is_refused(block, message):
    with pytest.raises(UserError, match=message):
        recorded(block, "pattern", slice(None))


def test_a_pattern_is_not_edited_under_dropout():
    with pytest.raises(UserError, match="dropout"):
        edited(Kernel(dropout_p=0.5), torch.clone)
