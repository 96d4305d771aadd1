"""The token state among several arguments of a block."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from bvit_interp import Probe, unroll
from bvit_interp.errors import UserError
from bvit_interp.models import families
from bvit_interp.models.families import register_block
from bvit_interp.models.stepping import answer, embed, proceed


class Reader(nn.Module):
    """A block that reads something beside its tokens, which it names last."""

    def __init__(self):
        super().__init__()
        self.inner = Block(32, 4)

    def forward(self, ctx, x):
        return self.inner(x + ctx.mean(1, keepdim=True))


class Loop(nn.Module):
    """Three calls of a `Reader`, made by `call`."""

    image_size = 32

    def __init__(self, call, block=Reader):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 10)
        self.block, self.call = block(), call

    def forward(self, images):
        """Each call gives what the block is to read next: (ctx, x)."""
        x = ctx = self.patches(images).flatten(2).mT
        self.read = []
        for _ in range(3):
            ctx, x = self.call(self, ctx, x)
        return self.head(x.mean(1))


def by_name(model, ctx, x):
    model.read.append(x)
    return ctx, model.block(ctx=ctx, x=x)


def in_order(model, ctx, x):
    model.read.append(x)
    return ctx, model.block(ctx, x)


def of_another_shape(model, ctx, x):
    model.read.append(x)
    return ctx, model.block(ctx[:, :5], x)


def after_an_embedding(model, ctx, x):
    model.read.append(x + 1)
    return ctx, model.block(ctx, x + 1)


def with_the_state_before(model, ctx, x):
    model.read.append(x)
    return x, model.block(ctx, x)


def unclear(model, ctx, x):
    model.read.append(x + 1)
    return x, model.block(ctx=ctx, x=x + 1)


CALLS = [by_name, in_order, of_another_shape, after_an_embedding, with_the_state_before]


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers ends with it."""
    monkeypatch.setattr(families, "_mappers", dict(families._mappers))


def check(model, images):
    """Sites, edits and runs that go on, against the model's own forward."""
    probe = Probe(model)
    with torch.no_grad():
        logits, cache = probe.run(images, ["resid_pre", "z"])
        assert torch.equal(logits, model(images))
        for step, tokens in enumerate(model.read, start=1):
            assert torch.equal(cache["resid_pre", step], tokens)
        state = proceed(probe.model, embed(probe.model, images), 2)
        assert torch.equal(embed(probe.model, images).tokens, model.read[0])
        assert torch.equal(answer(probe.model, proceed(probe.model, state)), logits)
        moved = proceed(probe.model, embed(probe.model, images), 1)
        with probe.edit({"resid_pre[1]": lambda x, _: x + 1}):
            edited = probe.record(images, "resid_post[1]")["resid_post", 1]
        first = model.read[0]
        ctx = first[:, :5] if model.call is of_another_shape else first
        ctx = ctx - 1 if model.call in (after_an_embedding, unclear) else ctx
        torch.testing.assert_close(edited, model.block(ctx, first + 1))
        assert not torch.allclose(edited, moved.tokens)


@pytest.mark.parametrize("call", CALLS)
def test_it_is_what_the_calls_hand_on(call, images):
    torch.manual_seed(0)
    check(Loop(call).eval(), images)


def test_where_nothing_tells_it_is_asked_for_and_told(images):
    torch.manual_seed(0)
    model = Loop(unclear).eval()
    with pytest.raises(
        UserError, match=r"\(ctx, x\).*register_block\(Reader, .*tokens="
    ) as refusal:
        unroll(model)
    assert "\n" not in str(refusal.value)
    register_block(Reader, {}, tokens="x")
    check(model, images)
    register_block(Reader, {}, tokens="y")
    with pytest.raises(UserError, match="'y' is the token state; .*: ctx, x"):
        unroll(model)
    with pytest.raises(UserError, match="tokens: the function"):
        register_block(Reader, lambda _: families.BlockMap({}), tokens="x")


def test_a_call_with_other_arguments_than_in_the_dry_run_is_refused(images):
    view = unroll(Loop(by_name).eval())
    view.model.call = in_order
    with pytest.raises(UserError, match="Reader is called with other arguments"):
        view(images)
