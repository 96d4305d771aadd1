"""Runs side by side, time limits, precision, and patch dropout."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import load
from bvit_interp.models.masks import full
from bvit_interp.training.loop import build, epochs, preload, scoring, supervised, throughput
from bvit_interp.training.loop import trainer as run_trainer

STEPS = 5  # of an epoch
NO_BAR = SimpleNamespace(update=lambda: None, set_postfix=lambda **shown: None)


@pytest.fixture
def pair(recipe, pictures):
    """Two recipes on pictures that lie on the device, which draw all there is to draw."""
    return recipe(full=True, **pictures), recipe(full=True, **pictures, seed=1, lr=3e-3, epochs=3)


@pytest.fixture
def alone(pair, tmp_path):
    """Folders of the two, each trained on its own."""
    for i, plan in enumerate(pair):
        supervised.train(plan, tmp_path / f"alone {i}")
    return [tmp_path / f"alone {i}" for i in range(2)]


@pytest.fixture
def stopped_after(monkeypatch):
    """``stopped_after(rounds)``: the time is up after so many rounds of a step of each run."""

    def stop(rounds):
        left = iter([False] * rounds)
        monkeypatch.setattr(supervised, "_is_late", lambda until, world: next(left, True))

    return stop


def done_of(folder):
    return torch.load(folder / "state.pt", weights_only=True)["done"]


# ---- side by side


def test_each_of_two_runs_is_what_it_is_alone(pair, alone, tmp_path, same_run):
    """Of other lengths too: the longer one goes on by itself."""
    outs = [tmp_path / f"beside {i}" for i in range(2)]
    models = supervised.train_all([*zip(pair, outs, strict=True)])
    for one, other, model in zip(alone, outs, models, strict=True):
        same_run(one, other)
        trained = load(other)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True)
        )
        assert not model.training
    assert not torch.equal(models[0].head.weight, models[1].head.weight)


def test_they_take_turns_and_share_the_images(pair, tmp_path, monkeypatch):
    turns, kept, step = [], set(), run_trainer.Trainer._step

    def noted(trainer, *batch):
        turns.append(trainer.out.name)
        kept.add(id(trainer.feed.on_device))
        return step(trainer, *batch)

    monkeypatch.setattr(run_trainer.Trainer, "_step", noted)
    supervised.train_all([(plan, tmp_path / name) for plan, name in zip(pair, "ab", strict=True)])
    assert turns == ["a", "b"] * 2 * STEPS + ["b"] * STEPS
    assert len(kept) == 1 and kept != {id(None)}


@pytest.mark.parametrize("rounds", [0, 3, STEPS, 2 * STEPS + 2])
def test_stopped_and_resumed_side_by_side(
    pair, alone, tmp_path, stopped_after, monkeypatch, same_run, rounds
):
    """Before the first step, within an epoch, at its end, and when one of the two has finished."""
    outs = [tmp_path / f"beside {i}" for i in range(2)]
    stopped_after(rounds)
    supervised.train_all([*zip(pair, outs, strict=True)], minutes=1.0)
    assert [done_of(out) for out in outs] == [min(rounds, 2 * STEPS), rounds]
    assert (outs[0] / "model.safetensors").exists() == (rounds >= STEPS)
    monkeypatch.undo()
    supervised.train_all([*zip(pair, outs, strict=True)][::-1])  # in the other order
    for one, other in zip(alone, outs, strict=True):
        same_run(one, other)


def test_stopped_again_and_again_by_the_clock(recipe, pictures, tmp_path, monkeypatch, same_run):
    """A clock that goes on by a second each time it is looked at; a run is begun anew until it is
    done."""
    plan = recipe(full=True, **pictures)
    supervised.train(plan, tmp_path / "undisturbed")
    ticks, found = iter(range(10**6)), []
    monkeypatch.setattr(supervised, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    while not found or found[-1] < 2 * STEPS:
        supervised.train(plan, tmp_path / "run", minutes=0.05)
        found.append(done_of(tmp_path / "run"))
        assert len(found) < 20
    assert found == sorted(set(found)) and len(found) > 2  # each time further, and not at once
    monkeypatch.undo()
    same_run(tmp_path / "undisturbed", tmp_path / "run")
    supervised.train(plan, tmp_path / "run", minutes=1e-9)  # it is done already
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_no_time_at_all_leaves_a_run_to_go_on_with(recipe, pictures, tmp_path, same_run):
    plan = recipe(full=True, **pictures)
    supervised.train(plan, tmp_path / "run", minutes=0.0)
    assert done_of(tmp_path / "run") == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    supervised.train(plan, tmp_path / "run")
    supervised.train(plan, tmp_path / "undisturbed")
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_nan_in_one_of_them_is_told_at_the_pause_too(
    recipe, pictures, tmp_path, stopped_after, monkeypatch
):
    """No state is saved with losses that nobody has looked at."""
    monkeypatch.setattr(
        run_trainer,
        "objective",
        lambda *given: lambda output, target, images: output.sum() * torch.nan,
    )
    stopped_after(2)
    with pytest.raises(
        UserError,
        match=r"the loss is nan .* in epoch 1, step 1 of 5; .*run holds the last good state",
    ):
        supervised.train(recipe(**pictures), tmp_path / "run", minutes=1.0)
    assert done_of(tmp_path / "run") == 0


def test_two_runs_in_one_folder_are_refused(pair, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="two runs in one folder"):
        supervised.train_all(
            [(pair[0], tmp_path / "run"), (pair[1], tmp_path / "there" / ".." / "run")]
        )
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_recipe_in_one_folder_stops_all_before_a_step(pair, tmp_path, monkeypatch):
    supervised.train(pair[0], tmp_path / "b", minutes=0.0)
    supervised.train(pair[0], tmp_path / "b")
    monkeypatch.setattr(run_trainer.Trainer, "_step", None)  # no step is taken
    with pytest.raises(UserError, match="b/state.pt is of another recipe"):
        supervised.train_all([(pair[0], tmp_path / "a"), (pair[1], tmp_path / "b")])


# ---- patches left out until a share of the epochs

DROPPING = {
    "epochs": 4,
    "patch_drop_until": 0.5,
    "model": {"patch_drop_rate": 0.25, "num_classes": 2},
}


def tokens_of(made):
    """Tokens that the blocks see in each step of a run, which is done."""
    seen = []
    made.forward.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    while made.run.done < made.total:
        for _ in made.epoch(NO_BAR):
            pass
    return seen


@pytest.mark.parametrize("masks", [False, True])
def test_patches_are_left_out_before_and_not_after(recipe, pictures, tmp_path, masks):
    plan = recipe(**pictures | DROPPING)
    own = full(build.make_model(plan, open_samples(plan.data, "train"))) if masks else None
    made = run_trainer.Trainer(plan, tmp_path / "run", "cpu", 2.0, own)
    assert tokens_of(made) == [1 + 12] * 2 * STEPS + [1 + 16] * 2 * STEPS
    assert load(tmp_path / "run").eval()(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_patches_are_left_out_right_where_it_goes_on(
    recipe, pictures, tmp_path, stopped_after, monkeypatch, same_run
):
    plan = recipe(full=True, **pictures | DROPPING)
    supervised.train(plan, tmp_path / "undisturbed")
    for rounds in (
        STEPS + 2,
        STEPS - 2,
        2,
    ):  # in the second epoch, at the third's beginning, within the third
        stopped_after(rounds)
        supervised.train(plan, tmp_path / "run", minutes=1.0)
    assert done_of(tmp_path / "run") == 2 * STEPS + 2
    monkeypatch.undo()
    made = run_trainer.Trainer(plan, tmp_path / "run", "cpu", 2.0)
    made.run.resume(tmp_path / "run" / "state.pt", plan, made.data_fingerprint)
    assert tokens_of(made) == [1 + 16] * (2 * STEPS - 2)
    supervised.train(plan, tmp_path / "run")
    same_run(tmp_path / "undisturbed", tmp_path / "run")


# ---- precision


def test_precision_is_as_wanted_or_by_a_trial_that_is_made_once(monkeypatch):
    assert [throughput.precision(word, "cpu") for word in ("bf16", "off")] == ["bf16", "off"]
    found = throughput.precision("auto", "cpu")
    assert found in ("bf16", "off")
    monkeypatch.setattr(throughput, "Block", None)  # no second trial in a process
    assert {throughput.precision("auto", "cpu") for _ in range(5)} == {found}


@pytest.mark.parametrize(("seconds", "faster"), [((3.0, 2.0), "bf16"), ((2.0, 3.0), "off")])
def test_the_faster_one_is_chosen(monkeypatch, seconds, faster):
    """By a clock under which a pass takes so long in fp32, and so long in bf16; and no generator
    has moved."""
    clock = [0.0]
    forward = throughput.Block.forward

    def timed(block, images):
        clock[0] += seconds[torch.is_autocast_enabled("cpu")]
        return forward(block, images)

    monkeypatch.setattr(throughput.Block, "forward", timed)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    before = torch.get_rng_state()
    assert throughput._faster_precision.__wrapped__("cpu") == faster
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("began", "now"), [("bf16", "off"), ("off", "bf16")])
def test_a_run_goes_on_in_the_precision_it_began_with(
    recipe, pictures, tmp_path, stopped_after, monkeypatch, same_run, began, now
):
    """What a trial shows on another machine, or on another day, does not matter."""
    plan = recipe(full=True, **pictures | {"autocast": "auto"})
    monkeypatch.setattr(throughput, "_faster_precision", lambda kind: began)
    supervised.train(plan, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        left = iter([False] * 3)
        patch.setattr(supervised, "_is_late", lambda until, world: next(left, True))
        supervised.train(plan, tmp_path / "run", minutes=1.0)
    monkeypatch.setattr(throughput, "_faster_precision", lambda kind: now)
    supervised.train(plan, tmp_path / "run")
    same_run(tmp_path / "undisturbed", tmp_path / "run")
    supervised.train(plan, tmp_path / "other")
    other, own = (load(tmp_path / name).state_dict() for name in ("other", "run"))
    assert any(not torch.equal(other[key], tensor) for key, tensor in own.items())


@pytest.fixture
def shared_gradients(tmp_path, monkeypatch):
    """One process that takes itself for the first of two: gradients are shared, with nobody."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    for module in (supervised.results, epochs, preload, scoring):
        monkeypatch.setattr(module, "rank_and_world", lambda: (0, 2))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "masks",
    [False, True],
)
def test_patches_are_left_out_alike_by_several_processes(
    recipe, tmp_path, monkeypatch, shared_gradients, masks
):
    plan = recipe(epochs=2, patch_drop_until=0.5, model={"patch_drop_rate": 0.25})
    own = full(build.make_model(plan, open_samples(plan.data, "train"))) if masks else None
    made = run_trainer.Trainer(plan, tmp_path / "run", "cpu", 2.0, own)
    monkeypatch.setattr(made, "_finish", lambda epoch: None)  # scores are gathered from both
    seen = []
    made.forward.module.norm.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[1])
    )
    for _ in range(2):
        for _ in made.epoch(NO_BAR):
            pass
    assert seen == [1 + 12] * STEPS + [1 + 16] * STEPS


def test_overwrite_touches_nothing_where_one_of_the_runs_cannot_be(recipe, pictures, tmp_path):
    plan, outs = recipe(**pictures), [tmp_path / "one", tmp_path / "other"]
    supervised.train_all([(plan, outs[0])])
    before = {path.name: path.read_bytes() for path in outs[0].iterdir()}
    wrong = recipe(**pictures | {"model": pictures.get("model", {}) | {"num_heads": 3}})
    with pytest.raises(UserError, match="cannot make the model"):
        supervised.train_all([(plan, outs[0]), (wrong, outs[1])], overwrite=True)
    assert {path.name: path.read_bytes() for path in outs[0].iterdir()} == before
    assert not outs[1].exists()


def test_what_cannot_be_shown_or_scored_is_known_before_the_first_step(recipe, tmp_path):
    """A picture of another size under a crop that does not resize, and a test picture that cannot
    be read."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    plan = recipe(
        data=f"folder:{tmp_path / 'data'}",
        crop="padded",
        batch_size=4,
        images_per_epoch=None,
        model={"num_classes": 2},
    )
    odd = tmp_path / "data" / "train" / "b" / "7.png"
    good = odd.read_bytes()
    Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(odd)
    with pytest.raises(
        UserError, match=r"^b/7\.png: an image of 40 x 32 pixels for a model of 32 x 32: use crop="
    ):
        supervised.train(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    odd.write_bytes(good)
    (tmp_path / "data" / "test" / "a" / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"test/a/3\.png: the image cannot be read"):
        supervised.train(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()
