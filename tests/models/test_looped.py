"""Loops that are not ours: the right step, or one line that says why not."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from foreign import STEPS, LoopedEncoder, PreludeCoreCoda, TwoState, foreign
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from bvit_interp import Probe, unroll
from bvit_interp.errors import UserError
from bvit_interp.models.attention import unfused
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import CalledSteps
from bvit_interp.models.stepping import advance, answer, embed, proceed, states
from bvit_interp.models.unroll import run_on, with_steps

SIZE, WIDTH, HEADS = 32, 32, 4
LOOPS = ("encoder", "prelude", "two_state", "looped_timm")


@pytest.fixture(autouse=True)
def part_by_part():
    """As a Probe runs torch's encoder layer: without gradients it would be one operation."""
    with unfused():
        yield


@pytest.fixture(params=LOOPS)
def looped(request):
    """A model and how often it calls a block."""
    return foreign(request.param), STEPS[request.param]


def seen(model: nn.Module, block: nn.Module, images: Tensor) -> list[Tensor]:
    """What the block gives at each of its calls, seen by a hook on the model itself."""
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    return outputs


# ---- the right step ------------------------------------------------------------------------------


def test_the_output_is_bit_equal_and_every_parameter_is_the_models_own(looped, images):
    model, calls = looped
    before = copy.deepcopy(model.state_dict())
    view = unroll(model)
    assert isinstance(view, CalledSteps)
    assert len(view.blocks) == calls
    for fused in (False, True):
        torch.backends.mha.set_fastpath_enabled(fused)
        with torch.no_grad():
            assert torch.equal(view(images), model(images))
    assert {*map(id, view.parameters())} == {*map(id, model.parameters())}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "block"), [("encoder", "block"), ("looped_timm", "blocks.0"), ("two_state", "net")]
)
def test_step_t_is_call_t(kind, block, images):
    model = foreign(kind)
    by_hand = seen(model, model.get_submodule(block), images)
    cache = Probe(model).record(images, "resid_post")
    for step, output in enumerate(by_hand, start=1):
        assert torch.equal(cache["resid_post", step], output)


def test_a_core_of_two_blocks_is_counted_in_call_order(images):
    model = foreign("prelude", rounds=2)
    first, second = (seen(model, block, images) for block in model.core)
    cache = Probe(model).record(images, "resid_post")
    for step, output in zip((1, 3), first, strict=True):
        assert torch.equal(cache["resid_post", step], output)
    for step, output in zip((2, 4), second, strict=True):
        assert torch.equal(cache["resid_post", step], output)


def test_an_edit_fires_at_its_step_alone(looped, images):
    model, calls = looped
    probe = Probe(model)
    with torch.no_grad():
        _, plain = probe.run(images, "resid_post")
        with probe.edit({("z", 2): lambda z, _: torch.zeros_like(z)}) as fired:
            _, edited = probe.run(images, "resid_post")
    assert fired == {"z[2]": 1}
    assert torch.equal(plain["resid_post", 1], edited["resid_post", 1])
    for step in range(2, calls + 1):
        assert not torch.equal(plain["resid_post", step], edited["resid_post", step])


def test_gradients_reach_the_model_and_sum_over_the_steps(images):
    model = foreign("encoder")
    weight = model.block.linear1.weight
    (of_model,) = torch.autograd.grad(model(images).square().sum(), weight)
    (of_view,) = torch.autograd.grad(unroll(model)(images).square().sum(), weight)
    assert torch.equal(of_model, of_view)


def test_training_mode_and_dropout_are_the_models(images):
    model = foreign("encoder").train()
    view = unroll(model)
    assert view.training
    assert view.blocks[0].training
    torch.manual_seed(1)
    trained = model(images)
    torch.manual_seed(1)
    assert torch.equal(view(images), trained)
    assert model.training  # the dry run has put it back


def test_each_step_is_a_module_of_its_own(looped, images):
    model, _ = looped
    view = unroll(model)
    copied = copy.deepcopy(view)
    prune.identity(view.blocks[1].norm1, "weight")
    assert not hasattr(view.blocks[0].norm1, "weight_orig")
    assert dict(view.named_modules())["blocks.2"] is view.blocks[2]
    with torch.no_grad():
        nn.init.zeros_(copied.blocks[0].norm1.weight)
        assert not torch.equal(copied(images), view(images))
        assert torch.equal(view(images), model(images))


def test_an_untied_step_changes_that_step(images):
    view = unroll(foreign("encoder"))
    plain = Probe(view).record(images, "resid_post")["resid_post"]
    view.blocks[2] = nn.Identity()
    with torch.no_grad():
        cached = [state.tokens for state in states(view, images)]
    assert torch.equal(cached[2], plain[:, 1])
    assert torch.equal(cached[3], cached[2])


def test_a_block_listed_again_and_again_is_a_stack_of_its_clones(images):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=WIDTH, num_heads=HEADS)
    model.blocks = nn.Sequential(*[Block(WIDTH, HEADS)] * 3)
    by_hand = seen(model.eval(), model.blocks[0], images)
    cache = Probe(model).record(images, "resid_post")
    assert Probe(model).num_steps == 3
    for step, output in enumerate(by_hand, start=1):
        assert torch.equal(cache["resid_post", step], output)


class InnerLoop(nn.Module):
    """A block that runs its own inner block again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(WIDTH, HEADS)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False):
        for _ in range(3):
            x = self.inner(x)
        return x


def test_a_loop_inside_a_block_of_a_plain_timm_model_is_found(images):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=WIDTH, num_heads=HEADS
    ).eval()
    model.blocks = nn.Sequential(InnerLoop())
    by_hand = seen(model, model.blocks[0].inner, images)
    probe = Probe(model)
    assert probe.num_steps == 3
    assert torch.equal(probe.record(images, "resid_post", steps=2)["resid_post", 2], by_hand[1])


class LoopElsewhere(VisionTransformer):
    """The loop is in a method of another name."""

    def forward_features(self, x: Tensor, **_: object) -> Tensor:
        return self.norm(self.think(self._pos_embed(self.patch_embed(x))))

    def think(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks(x)
        return x


def test_a_loop_in_another_method_over_two_blocks(images):
    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS}
    model = LoopElsewhere(**shape, depth=2).eval()
    probe = Probe(model)
    assert probe.num_steps == 6
    second = seen(model, model.blocks[1], images)
    cache = probe.record(images, "resid_post")
    for step, output in zip((2, 4, 6), second, strict=True):
        assert torch.equal(cache["resid_post", step], output)


# ---- one step at a time --------------------------------------------------------------------------


def test_states_are_those_of_the_forward_and_go_on_bit_equal(looped, images):
    model, calls = looped
    view = unroll(model)
    with torch.no_grad():
        cache = Probe(view).record(images, "resid_post")
        run = list(states(view, images))
        assert torch.equal(
            run[0].tokens, Probe(view).record(images, "resid_pre", 1)["resid_pre", 1]
        )
        for step in range(1, calls + 1):
            assert torch.equal(run[step].tokens, cache["resid_post", step])
            assert torch.equal(answer(view, proceed(view, run[step])), model(images))


def test_a_state_of_some_images_goes_on_as_they_do(looped, images):
    model, _ = looped
    view = unroll(model)
    with torch.no_grad():
        state = proceed(view, embed(view, images), 2)
        some = proceed(view, state[torch.tensor([1])])
        twice = proceed(view, state.repeated(2))
        torch.testing.assert_close(answer(view, some), model(images[1:2]))
        torch.testing.assert_close(answer(view, twice), model(images).repeat(2, 1))


def test_the_answer_after_a_step_is_the_models_own_readout(images):
    model = foreign("prelude", rounds=2)
    view = unroll(model)
    with torch.no_grad():
        state = proceed(view, embed(view, images), 3)
        assert torch.equal(answer(view, state), model.leave(state.tokens))


def test_only_a_state_beside_the_tokens_needs_the_history(looped):
    model, _ = looped
    assert unroll(model).needs_history == isinstance(model, TwoState)


def test_an_advance_runs_one_block(images):
    view = unroll(foreign("encoder"))
    state = embed(view, images)
    ran = []
    for i, block in enumerate(view.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    advance(view, advance(view, state))
    assert ran == [0, 1]


# ---- what cannot be unrolled ---------------------------------------------------------------------


class Halting(LoopedEncoder):
    """Stops when the mean of the state is above a threshold."""

    threshold = 2.0

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT + self.positions
        for _ in range(self.steps):
            tokens = self.block(tokens)
            if images.mean() > self.threshold:
                break
        return self.head(tokens.mean(1))


def test_a_data_dependent_number_of_calls_is_refused(images):
    view = unroll(Halting().eval())
    with pytest.raises(UserError, match="block ran 1 times, not 5 .* depends on the input"):
        view(images + 10)
    with torch.no_grad():
        view(images)  # and the view is as it was


def test_more_calls_than_in_the_dry_run_are_refused(images):
    model = LoopedEncoder().eval()
    view = unroll(model)
    view.model.steps = 6
    with pytest.raises(UserError, match="call 6 is of block, unlike in the dry run"):
        view(images)


class Checkpointed(LoopedEncoder):
    """Each call is checkpointed by the model."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT + self.positions
        for _ in range(self.steps):
            tokens = checkpoint(self.block, tokens, use_reentrant=False)
        return self.head(tokens.mean(1))


def test_calls_again_under_gradient_checkpointing_are_refused(images):
    view = unroll(Checkpointed().eval())
    logits = view(images)  # the forward itself is right
    with pytest.raises(UserError, match="called outside the forward .* gradient checkpointing"):
        logits.sum().backward()


def test_a_call_outside_the_forward_is_refused(images):
    view = unroll(foreign("encoder"))
    with pytest.raises(UserError, match="block was called outside the forward"):
        view.model.block(torch.zeros(1, 16, WIDTH))


class TwoLoops(LoopedEncoder):
    """Two modules run again and again, and neither is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.LayerNorm(WIDTH), Block(WIDTH, HEADS))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        for _ in range(3):
            tokens = self.other(self.block(tokens))
        return self.head(tokens.mean(1))


def test_two_loops_are_told_apart_by_the_user(images):
    model = TwoLoops().eval()
    with pytest.raises(UserError, match=r"more than one module .*block \(3 times\), other \(3"):
        unroll(model)
    assert Probe(model, loop="block").num_steps == 3
    assert isinstance(unroll(model, loop="other.1").blocks[0], Block)


def test_a_path_that_is_not_there_and_a_block_that_never_runs_are_named():
    model = PreludeCoreCoda()
    with pytest.raises(
        UserError, match="no module 'blocks'; lists of modules: prelude, core, coda"
    ):
        unroll(model, loop="blocks")
    model.spare = Block(WIDTH, HEADS)
    with pytest.raises(UserError, match="spare never ran in a forward"):
        unroll(model, loop="spare")


def test_a_number_of_steps_that_the_forward_does_not_make_is_refused():
    model = LoopedEncoder()
    with pytest.raises(UserError, match="block runs 5 times .* cannot take 7 steps"):
        unroll(model, steps=7)
    assert len(run_on(model, 7).blocks) == 5


def test_a_loop_is_cut_as_if_it_ended_there(looped, images):
    model, calls = looped
    view, short = unroll(model), unroll(unroll(model), steps=2)
    assert (len(view.blocks), len(short.blocks)) == (calls, 2)
    with torch.no_grad():
        state = proceed(view, embed(view, images), 2)
        assert torch.equal(short(images), answer(view, state))
        assert torch.equal(answer(short, proceed(short, embed(short, images))), short(images))
    assert {*map(id, short.parameters())} == {*map(id, model.parameters())}
    assert len(run_on(model, 2).blocks) == 2


def test_a_list_that_runs_once_may_be_chosen(images):
    model = PreludeCoreCoda().eval()
    assert Probe(model, loop="coda").num_steps == 1
    with torch.no_grad():
        assert torch.equal(unroll(model, loop="prelude")(images), model(images))


# ---- tokens --------------------------------------------------------------------------------------


def test_the_layout_is_what_the_dry_run_showed(looped):
    model, _ = looped
    layout = layout_of(unroll(model))
    prefix = () if isinstance(model, LoopedEncoder) else ("cls",)
    assert (layout.image_size, layout.grid, layout.prefix) == ((SIZE, SIZE), (4, 4), prefix)
    assert (layout.width, layout.num_classes, layout.channels) == (WIDTH, 10, 3)


class ClsAtTheEnd(LoopedEncoder):
    """CLS stands behind the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([tokens, self.cls_token.expand(len(tokens), -1, -1)], dim=1)
        for _ in range(self.steps):
            tokens = self.block(tokens)
        return self.head(tokens[:, -1])


def test_prefix_tokens_elsewhere_are_refused():
    with pytest.raises(UserError, match="do not depend on the image are 16"):
        unroll(ClsAtTheEnd())


def test_a_token_without_a_known_name_is_a_register_unless_it_is_named():
    model = TwoState()
    model.start_token = model.cls_token
    del model.cls_token
    model.__class__ = type("Renamed", (TwoState,), {"cls_token": property(lambda s: s.start_token)})
    assert layout_of(unroll(model)).prefix == ("reg",)
    assert Probe(model, prefix=("cls",)).layout.prefix == ("cls",)
    with pytest.raises(UserError, match="no CLS token"):
        Probe(model).record(torch.zeros(1, 3, SIZE, SIZE), "pattern", tokens="cls")


def test_a_model_that_does_not_say_its_size_is_asked_for_it():
    model = LoopedEncoder()
    model.image_size = None
    with pytest.raises(UserError, match="does not say the size of its images"):
        unroll(model)
    assert layout_of(unroll(model, image_size=SIZE)).grid == (4, 4)


def test_models_as_analyses_take_them(looped, tiny):
    model, calls = looped
    assert with_steps(tiny) is tiny
    view = with_steps(model)
    assert len(view.blocks) == calls
    assert with_steps(view) is view


# ---- blocks of other habits ----------------------------------------------------------------------


class WithLoss(nn.Module):
    """A block that takes its tokens by name and gives them beside a loss, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH, HEADS)

    def forward(self, *, state: Tensor) -> dict[str, Tensor]:
        tokens = self.block(state)
        return {"state": tokens, "loss": tokens.square().mean()}


class LoopWithLoss(LoopedEncoder):
    """A loop over `WithLoss`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = WithLoss()

    def forward(self, images: Tensor) -> Tensor:
        tokens, loss = self.patches(images).flatten(2).mT, 0.0
        for _ in range(self.steps):
            out = self.block(state=tokens)
            tokens, loss = out["state"], loss + out["loss"]
        return self.head(tokens.mean(1)) + loss


def test_a_block_with_names_and_a_dict(images):
    torch.manual_seed(0)
    model = LoopWithLoss().eval()
    probe = Probe(model, loop="block")
    with torch.no_grad():
        by_hand = [out["state"] for out in seen(model, model.block, images)]
        logits, cache = probe.run(images, ["resid_pre", "resid_post", "pattern"])
        assert torch.equal(logits, model(images))
        for step, tokens in enumerate(by_hand, start=1):
            assert torch.equal(cache["resid_post", step], tokens)
        assert torch.equal(cache["resid_pre", 3], by_hand[1])
        assert cache["pattern", 2].shape == (len(images), HEADS, 16, 16)
        with probe.edit({"resid_post[2]": lambda x, _: 0 * x}):
            edited = probe.record(images, "resid_pre[3]")["resid_pre", 3]
        assert torch.equal(edited, torch.zeros_like(edited))
        state = proceed(probe.model, embed(probe.model, images), 3)
        assert torch.equal(answer(probe.model, proceed(probe.model, state)), logits)
        state = embed(probe.model, images)  # before all steps, with the loss of the first
        loss = by_hand[0].square().mean()
        expected = model.head(state.tokens.mean(1)) + 5 * loss
        torch.testing.assert_close(answer(probe.model, state), expected)


# ---- what a view does not stand for --------------------------------------------------------------


class Timed(nn.Module):
    """A block that reads its step from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH, HEADS)
        self.rows = nn.Parameter(torch.randn(5, WIDTH))
        self.step = 0

    def set_step(self, step: int) -> None:
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.rows[self.step])


class Counting(Timed):
    """A block that counts its own calls."""

    def forward(self, x: Tensor) -> Tensor:
        self.step = (self.step + 1) % 5
        return super().forward(x)


class TimedLoop(LoopedEncoder):
    """Tells its block the step: by an attribute, by a method, or not at all."""

    def __init__(self, block: nn.Module, how: str) -> None:
        super().__init__()
        self.block, self.how = block, how

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        for step in range(self.steps):
            if self.how == "attribute":
                self.block.step = step
            elif self.how == "method":
                self.block.set_step(step)
            tokens = self.block(tokens)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("how", ["attribute", "method"])
def test_what_the_forward_tells_its_block_reaches_the_next_call(how, images):
    torch.manual_seed(0)
    model = TimedLoop(Timed(), how).eval()
    view = unroll(model)
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(view(images), wanted)
        state = proceed(view, embed(view, images), 3)
        assert torch.equal(answer(view, proceed(view, state)), wanted)


def test_a_block_that_counts_its_calls_is_refused():
    torch.manual_seed(0)
    with pytest.raises(UserError, match="answers otherwise than before: its block keeps something"):
        unroll(TimedLoop(Counting(), "itself").eval())


class Alternating(Timed):
    """A block that counts its calls in a buffer: a forward of five begins where the last ended."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.step = int(self.calls) % 3
        self.calls += 1
        return super().forward(x)


def test_a_block_that_differs_from_forward_to_forward_is_refused():
    torch.manual_seed(0)
    with pytest.raises(UserError, match="answers otherwise than before"):
        unroll(TimedLoop(Alternating(), "itself").eval())


class TwoTimed(LoopedEncoder):
    """Rounds of two blocks, each told its step before the round begins."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.ModuleList([Timed(), Timed()])
        del self.block

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        for round_ in range(2):
            self.core[0].step, self.core[1].step = round_, round_ + 2
            tokens = self.core[1](self.core[0](tokens))
        return self.head(tokens.mean(1))


def test_what_the_forward_tells_a_block_reaches_the_next_call_of_that_block(images):
    torch.manual_seed(0)
    model = TwoTimed().eval()
    view = unroll(model)
    with torch.no_grad():
        assert torch.equal(view(images), model(images))
    assert [block.step for block in view.blocks] == [0, 2, 1, 3]


class Between(VisionTransformer):
    """A subclass of timm's that adds something between its blocks."""

    def __init__(self) -> None:
        shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS}
        super().__init__(**shape, depth=3, num_classes=10)
        self.rows = nn.Parameter(torch.randn(3, WIDTH))

    def forward_features(self, x: Tensor, **_: object) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for row, block in zip(self.rows, self.blocks, strict=True):
            x = block(x + row)
        return self.norm(x)


def test_a_stack_with_something_between_its_blocks_goes_by_call(images):
    torch.manual_seed(0)
    model = Between().eval()
    view = unroll(model)
    assert isinstance(view, CalledSteps)
    cache = Probe(view).record(images, "resid_post")
    for state in list(states(view, images))[1:]:
        assert torch.equal(state.tokens, cache["resid_post", state.step])


class LateReader(TwoState):
    """The last call alone reads only the output before it."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.enter(images)
        slow = fast = torch.zeros_like(tokens)
        for _ in range(2):
            for _ in range(2):
                fast = self.net(fast + slow + tokens)
            slow = self.net(fast)
        return self.head(slow.mean(1))


def test_a_history_that_the_last_call_does_not_need_is_kept(images):
    torch.manual_seed(0)
    view = unroll(LateReader().eval())
    assert view.needs_history
    cache = Probe(view).record(images, "resid_post")
    with torch.no_grad():
        for state in list(states(view, images))[1:]:
            assert torch.equal(state.tokens, cache["resid_post", state.step])


class EarlyReader(LoopedEncoder):
    """The third and last call reads the output of the first beside that of the second."""

    def forward(self, images: Tensor) -> Tensor:
        first = self.block(self.patches(images).flatten(2).mT)
        return self.head(self.block(self.block(first) + first).mean(1))


def test_a_history_that_the_third_call_alone_needs_is_kept(images):
    torch.manual_seed(0)
    model = EarlyReader().eval()
    view = unroll(model)
    assert view.needs_history
    with torch.no_grad():
        state = proceed(view, embed(view, images), 2)
        assert torch.equal(answer(view, advance(view, state)), model(images))


class InPlace(nn.Module):
    """A block that changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x += self.linear(self.norm(x))
        return x


def test_blocks_that_work_in_place_do_not_change_what_is_recorded(images):
    torch.manual_seed(0)
    model = TimedLoop(InPlace(), "no").eval()
    with torch.no_grad():
        tokens, by_hand = model.patches(images).flatten(2).mT, []
        for _ in range(5):
            by_hand.append(tokens)
            tokens = tokens + model.block.linear(model.block.norm(tokens))
        _, cache = Probe(model).run(images, ["resid_pre", "resid_post"])
        view = unroll(model)
        for step, (before, state) in enumerate(
            zip(by_hand, list(states(view, images)), strict=False), start=1
        ):
            torch.testing.assert_close(cache["resid_pre", step], before)
            torch.testing.assert_close(state.tokens, before)
    torch.testing.assert_close(cache["resid_post", 5], tokens)


class Layers(nn.Module):
    """Attention and FFN in a list of lists, as in much copied code."""

    image_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.Linear(WIDTH, 10)
        self.layers = nn.ModuleList(
            nn.ModuleList([Block(WIDTH, HEADS), InPlace()]) for _ in range(3)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        for attention, ffn in self.layers:
            x = ffn(attention(x) + x)
        return self.head(x.mean(1))


def test_steps_in_pieces_are_refused():
    with pytest.raises(UserError, match="more than one list holds blocks: layers.0 .2 blocks."):
        unroll(Layers())


class Twice(LoopedEncoder):
    """A stack one of whose blocks runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        for i in (0, 1, 1, 2):
            x = self.block[i](x)
        return self.head(x.mean(1))


def test_a_stack_one_of_whose_blocks_runs_twice_has_all_its_steps(images):
    torch.manual_seed(0)
    model = Twice().eval()
    cache = Probe(model).record(images, "resid_post")
    assert torch.equal(cache["resid_post", 1], seen(model, model.block[0], images)[0])
    assert torch.equal(cache["resid_post", 3], seen(model, model.block[1], images)[1])
    assert torch.equal(cache["resid_post", 4], seen(model, model.block[2], images)[0])


class Leaving(LoopedEncoder):
    """Images leave the loop one by one."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        for step in range(3):
            x = torch.cat([x[: step % 2], self.block(x[step % 2 :])])
        return self.head(x.mean(1))


def test_calls_of_some_images_are_refused():
    with pytest.raises(UserError, match="states for 2 images: images leave the loop"):
        unroll(Leaving().eval())


class Buffered(LoopedEncoder):
    """Counts its forwards in a buffer, and calls its block through a lambda if asked to."""

    def __init__(self, through: bool = False) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.call = (lambda x: self.block(x)) if through else None

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        x = self.patches(images).flatten(2).mT
        for _ in range(3):
            x = (self.call or self.block)(x)
        return self.head(x.mean(1))


def test_a_dry_run_leaves_buffers_and_refuses_closures():
    model = Buffered().eval()
    Probe(model)
    assert model.count == 0
    with pytest.raises(UserError, match="block through a function that was made for this very"):
        unroll(Buffered(through=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": -4}, "image_size must be a whole number"),
        ({"image_size": "32"}, "image_size must be a whole number"),
        ({"image_size": 64}, "fails on two images of 3 x 64 x 64"),
        ({"prefix": "nose"}, "no kind 'nose'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        unroll(foreign("encoder"), **options)


def test_options_of_an_unroll_come_too_late():
    with pytest.raises(UserError, match="give loop where the model is unrolled"):
        unroll(unroll(foreign("encoder")), loop="block")
