"""Training of grafts: against one after the other, killed and resumed, refused states."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.models import stepping
from bvit_interp.models.checkpoint import load
from bvit_interp.models.masks import PLACES, Masks, full
from bvit_interp.models.unroll import unroll
from bvit_interp.training.loop import build, feed, supervised
from bvit_interp.training.pruning import graft_training

TE = {"model": {"name": "bvit_small_te_patch16_224"}}


@pytest.fixture
def samples():
    return open_samples("digits-s", "train")


@pytest.fixture
def trained(recipe, samples, tmp_path):
    """``trained(**changes)``: recipe, first model, masks and a model trained under them."""

    def make(**changes):
        plan = recipe(lr=5e-3, **changes)
        init = build.make_model(plan, samples)
        generator = torch.Generator().manual_seed(0)
        masks = Masks(
            {
                name: torch.rand(mask.shape, generator=generator) < 0.6
                for name, mask in full(init).items()
            }
        )
        supervised.train(plan, tmp_path / "main", masks=masks)
        return plan, init, masks, load(f"{tmp_path / 'main'}@masked")

    return make


def one_after_the_other(plan, epochs, init, main, masks, samples):
    """The matrices of the grafts, and their mean losses, by an optimiser and T applications for
    each."""
    of, losses = {name: [] for name in PLACES}, []
    shortened = graft_training.shortened_recipe(plan, epochs)
    for t in range(len(main.blocks)):
        block = copy.deepcopy(unroll(init).blocks[t])
        free = {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in block.named_parameters()
        }
        if "step_embed" in free:
            free["step_embed"] = main.blocks[t].step_embed.detach()
        learned = [tensor for tensor in free.values() if tensor.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
                {"params": [p for p in learned if p.ndim > 1], "weight_decay": plan.weight_decay},
            ],
            lr=plan.lr,
        )
        steps = plan.images_per_epoch // plan.batch_size
        schedule = build.schedule(optimizer, shortened, steps)
        for epoch in range(epochs):
            source, seen = feed.Feed(shortened, samples, init, "cpu"), []
            for i, (images, labels) in enumerate(source.epoch(plan.epochs + epoch)):
                schedule.step_update(epoch * steps + i)
                schedule.step(epoch)
                tokens = stepping.embed(main, images).tokens
                for s, frozen in enumerate(main.blocks):
                    if s == t:
                        sparse = {
                            f"{place}.weight": free[f"{place}.weight"] * masks[name][t]
                            for name, place in PLACES.items()
                        }
                        tokens = functional_call(block, {**free, **sparse}, tokens)
                    else:
                        tokens = frozen(tokens)
                loss = F.cross_entropy(main.forward_head(main.norm(tokens)).float(), labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, plan.clip)
                optimizer.step()
                seen.append(loss.item())
            losses.append({"epoch": epoch + 1, "step": t + 1, "loss": sum(seen) / len(seen)})
        for name, place in PLACES.items():
            of[name].append(free[f"{place}.weight"].detach())
    return {name: torch.stack(each) for name, each in of.items()}, losses


@pytest.mark.parametrize(
    "change",
    [
        {"clip": 0.3, "warmup_epochs": 0.5},
        {**TE, "schedule": "epoch", "warmup_epochs": 1, "grad_checkpointing": True},
    ],
    ids=["plain", "te"],
)
def test_all_at_once_is_one_after_the_other(trained, samples, tmp_path, monkeypatch, change):
    """In float64, as AdamW turns rounding of a small gradient into a step."""
    plan, init, masks, main = trained(**change)
    if "model" in change:
        assert (
            main.blocks[0].step_embed.abs().max() > 1e-3
        )  # it was trained, and differs from the first, zero
    init, main = init.double(), main.double()
    coloured = feed.Augmentation.coloured
    monkeypatch.setattr(feed.Augmentation, "coloured", lambda *given: coloured(*given).double())
    weights, table = graft_training.train(
        plan, 2, init, main, masks, samples, tmp_path / "grafts.pt"
    )
    expected, losses = one_after_the_other(plan, 2, init, main, masks, samples)
    for name, place in PLACES.items():
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-5)
        before = init.blocks[0].get_submodule(place).weight
        assert (weights[name] - before).abs().max() > 1e-3
        assert not torch.allclose(weights[name][0], weights[name][1], atol=1e-4)
    assert list(table) == list(graft_training.COLUMNS)
    found = {(row["epoch"], row["step"]): row["loss"] for row in table.to_dict("records")}
    assert found == pytest.approx(
        {(row["epoch"], row["step"]): row["loss"] for row in losses}, abs=1e-5
    )


def test_what_is_frozen_and_what_learns(trained, samples, tmp_path):
    plan, init, masks, main = trained(full=True, **TE)
    before = {
        name: tensor.clone()
        for name, tensor in (*main.state_dict().items(), *init.state_dict().items())
    }
    weights, _ = graft_training.train(plan, 1, init, main, masks, samples, tmp_path / "grafts.pt")
    after = {**main.state_dict(), **init.state_dict()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    state = torch.load(tmp_path / "grafts.pt", weights_only=True)["grafts"]
    for t in range(3):
        assert not torch.equal(state[f"{t}.mlp.fc1.bias"], init.blocks[0].mlp.fc1.bias)
        assert not torch.equal(state[f"{t}.norm1.weight"], init.blocks[0].norm1.weight)
        for name, place in PLACES.items():  # what the mask hides is only decayed
            moved = (weights[name][t] != init.blocks[0].get_submodule(place).weight)[masks[name][t]]
            assert moved.float().mean() > 0.9


@pytest.mark.parametrize("full", [False, True])
def test_killed_in_any_step_the_grafts_are_the_same(trained, samples, tmp_path, monkeypatch, full):
    plan, init, masks, _ = trained(full=full)

    def run(state):
        main = load(f"{tmp_path / 'main'}@masked")
        return graft_training.train(
            plan, 2, init, main, masks, samples, tmp_path / state, save_minutes=0
        )

    weights, losses = run("undisturbed.pt")
    original = graft_training._Training._step
    for step in (0, 1, 4, 5, 7):

        def dying(training, *batch, at=step):
            if training.done == at:
                raise KeyboardInterrupt
            original(training, *batch)

        monkeypatch.setattr(graft_training._Training, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run("killed.pt")
        monkeypatch.setattr(graft_training._Training, "_step", original)
    again, table = run("killed.pt")
    assert all(torch.equal(again[name], weights[name]) for name in PLACES)
    assert table.equals(losses)
    monkeypatch.setattr(graft_training._Training, "_step", None)  # finished: no step is taken
    assert all(torch.equal(run("killed.pt")[0][name], weights[name]) for name in PLACES)


def test_an_older_state_is_read(trained, samples, tmp_path, monkeypatch):
    plan, init, masks, main = trained()
    path = tmp_path / "grafts.pt"
    weights, losses = graft_training.train(plan, 1, init, main, masks, samples, path)
    state = torch.load(path, weights_only=True)
    state["identity"] = state.pop("resume_key")
    torch.save(state, path)
    monkeypatch.setattr(graft_training._Training, "_step", None)  # finished: no step is taken
    again, table = graft_training.train(plan, 1, init, main, masks, samples, path)
    assert all(torch.equal(again[name], weights[name]) for name in PLACES)
    assert table.equals(losses)
    with pytest.raises(UserError, match=r"\(other epochs\)"):
        graft_training.train(plan, 2, init, main, masks, samples, path)


def test_the_state_of_other_grafts_is_refused(trained, samples, tmp_path):
    plan, init, masks, main = trained()
    state = tmp_path / "grafts.pt"
    graft_training.train(plan, 1, init, main, masks, samples, state)
    with pytest.raises(
        UserError, match=r"grafts.pt is of other grafts \(other epochs\); --overwrite starts again"
    ):
        graft_training.train(plan, 2, init, main, masks, samples, state)
    whole = torch.load(state, weights_only=True)
    losses = torch.zeros(99)
    wrong = [{"done": -5}, {"done": 10**6}, {"history": ["a"]}, {"history": [{"epoch": 1}]}]
    for change in (*wrong, {"losses": losses}, {"grafts": {}}, {"precision": 3}, {"optimizer": 1}):
        torch.save({**whole, **change}, state)
        with pytest.raises(UserError, match=r"not the whole state of grafts \(.+\); remove it"):
            graft_training.train(plan, 1, init, main, masks, samples, state)
    torch.save(whole, state)
    with pytest.raises(UserError, match=r"\(other masks\)"):
        graft_training.train(plan, 1, init, main, full(init), samples, state)
    with torch.no_grad():
        main.head.bias[0] += 1
    with pytest.raises(UserError, match=r"\(other main\)"):
        graft_training.train(plan, 1, init, main, masks, samples, state)
    state.write_bytes(state.read_bytes()[:3000])
    with pytest.raises(
        UserError, match=r"grafts.pt: not the whole state of grafts \(.*\); remove it"
    ):
        graft_training.train(plan, 1, init, main, masks, samples, state)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_and_the_last_good_state_stays(trained, samples, tmp_path, monkeypatch, kind):
    plan, init, masks, main = trained()
    made, calls = graft_training.objective, []

    def poisoned(*given):
        def loss(*batch):
            calls.append(1)
            value = made(*given)(*batch)
            if len(calls) != 3 * 7 + 2:  # step 8 of 10, the second graft
                return value
            return (
                value * math.nan if kind == "loss" else value + (0 * value).sqrt()
            )  # whose gradient is 0 / 0

        return loss

    monkeypatch.setattr(graft_training, "objective", poisoned)
    with pytest.raises(
        UserError,
        match=r"graft of step 2, or its gradient, is nan in epoch 2; .* the last good state",
    ):
        graft_training.train(
            plan, 2, init, main, masks, samples, tmp_path / "grafts.pt", save_minutes=0
        )
    state = torch.load(tmp_path / "grafts.pt", weights_only=True)
    assert state["done"] == 7
    assert all(tensor.isfinite().all() for tensor in state["grafts"].values())


def test_the_schedule_of_the_grafts(recipe):
    plan = recipe(epochs=10, warmup_epochs=2, easy_epochs=3, fade_epochs=2)
    shorter = graft_training.shortened_recipe(plan, 5)
    assert (shorter.epochs, shorter.warmup_epochs, shorter.hardness(0)) == (5, 1, 1)
    by_epoch = recipe(epochs=10, warmup_epochs=3, schedule="epoch")
    assert graft_training.shortened_recipe(by_epoch, 5).warmup_epochs == 1
    assert graft_training.shortened_recipe(by_epoch, 1).warmup_epochs == 0
