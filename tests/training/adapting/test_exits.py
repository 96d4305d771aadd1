"""Exits trained: the loss by hand, all exits at once as each alone, states computed once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from kills import contents, is_killed, kills
from torch.nn import functional as F

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError
from bvit_interp.models import tensor_file
from bvit_interp.models.exits import FILE
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.results import read_table
from bvit_interp.training.adapting import exits as exiting
from bvit_interp.training.adapting.exits import (
    HISTORY,
    STATES,
    Plan,
    cached_states,
    fit,
    objective,
    pairwise_auroc_loss,
    train,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_pairwise_auroc_loss_on_paper():
    """Two classes; confidences .9 right, .6 right, .8 wrong: (sigma(.8 - .9) + sigma(.8 - .6)) /
    2."""
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]).double()
    labels = torch.tensor([0, 0, 1])
    expected = (sigmoid(-0.1) + sigmoid(0.2)) / 2
    assert pairwise_auroc_loss(p.log(), labels).item() == pytest.approx(expected)
    assert pairwise_auroc_loss(p.log(), labels, 0.1).item() == pytest.approx(
        (sigmoid(-1) + sigmoid(2)) / 2
    )
    assert pairwise_auroc_loss(p.log(), torch.tensor([0, 0, 0])).item() == 0  # nothing wrong
    assert pairwise_auroc_loss(p.log(), torch.tensor([1, 1, 1])).item() == 0  # nothing right


def test_its_gradient_lowers_wrong_confidence_and_raises_right_one():
    logits = torch.tensor([[2.0, 0.0], [1.5, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(pairwise_auroc_loss(logits, torch.tensor([0, 1])), logits)
    assert gradient[0, 0] < 0 < gradient[1, 0]


def test_the_objective_is_the_mean_over_exits():
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(9, 3, 4, generator=generator),
        torch.randint(4, (9,), generator=generator),
    )
    each = [torch.nn.functional.cross_entropy(logits[:, e], labels) for e in range(3)]
    assert objective(logits, labels, Plan(loss="ce")).item() == pytest.approx(sum(each).item() / 3)
    both = (
        sum(loss + pairwise_auroc_loss(logits[:, e], labels) for e, loss in enumerate(each)).item()
        / 3
    )
    assert objective(logits, labels, Plan()).item() == pytest.approx(both)


def test_states_are_the_probes_and_are_kept(any_model, tmp_path, monkeypatch):
    data, steps = DigitScenes("train", length=7), tuple(range(1, len(any_model.blocks)))[-2:]
    states, labels = cached_states(any_model, data, steps, Plan(batch_size=3), tmp_path)
    assert labels.tolist() == [data.read(i)[1] for i in range(7)]
    from bvit_interp.data.geometry import Geometry

    geometry = Geometry.of(any_model, data)
    images = torch.stack([geometry(data.read(i)[0], None)[0] for i in range(7)])
    with torch.inference_mode():
        expected = Probe(any_model).record(images, "resid_post", steps=steps, tokens="cls")[
            "resid_post"
        ]
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(exiting, "unroll", None)  # a second call must not run the model
    again, _ = cached_states(any_model, data, steps, Plan(batch_size=3), tmp_path)
    assert torch.equal(again, states)
    monkeypatch.setattr(exiting, "unroll", unroll)
    other, _ = cached_states(any_model, data, steps, Plan(limit=3), tmp_path)
    assert len(other) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: [1, 2],
        lambda content: {"states": content["states"]},
        lambda content: content | {"states": content["states"][:, :1]},
        lambda content: content | {"states": content["states"] * torch.nan},
        lambda content: content | {"labels": content["labels"] + 99},
        lambda content: content | {"labels": "abc"},
        lambda content: content | {"labels": content["labels"][:3]},
    ],
)
def test_states_that_cannot_be_are_made_again(tiny, tmp_path, damage, caplog):
    data, given = DigitScenes("train", length=5), (tiny, (6, 8), Plan(), tmp_path)
    made = cached_states(given[0], data, *given[1:])
    content = damage(torch.load(tmp_path / STATES, weights_only=True))
    if content == b"":
        (tmp_path / STATES).write_bytes(content)
    else:
        torch.save(content, tmp_path / STATES)
    again = cached_states(given[0], data, *given[1:])
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
    assert "made again" in caplog.text


def test_exits_learn_what_can_be_told_and_do_not_disturb_each_other():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    told = torch.nn.functional.one_hot(labels, 8).float() + 0.1 * torch.randn(
        600, 8, generator=generator
    )
    noise = torch.randn(600, 8, generator=generator)
    plan = Plan(epochs=30, lr=0.05, loss="ce")
    _, history = fit(torch.stack([noise, told], 1), labels, (2, 5), 3, plan)
    last = history[history["epoch"] == 30].set_index("exit")["top1"]
    assert last["5"] > 0.98
    assert last["2"] < 0.6
    alone, _ = fit(told[:, None], labels, (5,), 3, dataclasses.replace(plan, lr=0.05))
    both, _ = fit(torch.stack([noise, told], 1), labels, (2, 5), 3, plan)
    # the mean over exits halves each one's gradient; Adam does not care
    torch.testing.assert_close(both.weight[1], alone.weight[0], atol=1e-3, rtol=1e-2)


def test_trained_written_and_refused(tiny, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    data = DigitScenes("train", length=40)
    exits = train(tiny, data, Plan(epochs=2, exits=(8, 3)), tmp_path / "x")
    assert exits.steps == (3, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert (tmp_path / "x" / FILE).is_file()
    assert not (tmp_path / "x" / STATES).exists()
    history = read_table(tmp_path / "x" / HISTORY)
    assert list(history) == list(exiting.COLUMNS)
    assert history["exit"].astype(str).tolist() == ["all", "3", "8"] * 2
    with pytest.raises(UserError, match="holds exits already"):
        train(tiny, data, Plan(epochs=1), tmp_path / "x")


def test_killed_anywhere_it_ends_as_undisturbed(tiny, tmp_path, monkeypatch):
    data, plan = DigitScenes("train", length=12), Plan(epochs=1, exits=(3, 8))
    whole = train(tiny, data, plan, tmp_path / "whole").state_dict()
    number = 0
    for out, _ in kills(monkeypatch, tmp_path, lambda out: train(tiny, data, plan, out)):
        assert contents(out) == contents(tmp_path / "whole")
        number += 1
    assert number > 5
    again = train(tiny, data, Plan(epochs=1, exits=(3, 8), batch_size=5), tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.state_dict().items())
    for other in ({"lr": 0.5}, {"seed": 1}, {"exits": (3,)}):
        with pytest.raises(UserError, match="holds exits already"):
            train(tiny, data, Plan(**{"epochs": 1, "exits": (3, 8), **other}), tmp_path / "whole")
    with pytest.raises(UserError, match="holds exits already"):
        train(tiny, DigitScenes("train", length=11), plan, tmp_path / "whole")


def test_exits_of_two_plans_are_never_mixed(tiny, tmp_path, monkeypatch):
    """The history that lies beside exits is theirs, wherever a training that replaces them is
    killed."""
    data = DigitScenes("train", length=6)
    before, after = (Plan(epochs=epochs, exits=(3,)) for epochs in (1, 2))

    for number in range(2, 8):  # after the states are written
        out = tmp_path / str(number)
        train(tiny, data, before, out)
        assert is_killed(
            monkeypatch, number, lambda out=out: train(tiny, data, after, out, overwrite=True)
        )
        if (out / FILE).exists():
            about = tensor_file.read(out / FILE, "exits")[0]
            assert read_table(out / HISTORY)["epoch"].max() == about["plan"]["epochs"]


def test_history_and_schedule_against_a_loop():
    """Two exits trained by a loop written here: batches of 4, the last of 2, and a cosine to zero
    over all of them."""
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.randn(10, 2, 6, generator=generator), torch.arange(10) % 3
    plan = Plan(epochs=2, lr=0.1, loss="ce", images_at_once=4, seed=5)
    exits, history = fit(x, labels, (2, 4), 3, plan)
    norm, weight, bias = torch.ones(2, 6), torch.zeros(2, 3, 6), torch.zeros(2, 3)
    leaves = [part.requires_grad_() for part in (norm, weight, bias)]
    adam, order, done = torch.optim.Adam(leaves), torch.Generator().manual_seed(5), 0
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for epoch in (1, 2):
        losses, hits = [], torch.zeros(2)
        for chosen in torch.randperm(10, generator=order).split(4):
            for group in adam.param_groups:
                group["lr"] = 0.1 * (1 + math.cos(math.pi * done / 6)) / 2
            logits = torch.einsum("bed,ecd->bec", normed[chosen] * norm, weight) + bias
            each = [F.cross_entropy(logits[:, e], labels[chosen]) for e in (0, 1)]
            loss = sum(each) / 2
            adam.zero_grad()
            loss.backward()
            adam.step()
            done += 1
            losses += [loss.item()] * len(chosen)
            hits += (logits.argmax(-1) == labels[chosen, None]).sum(0)
        rows = history[history["epoch"] == epoch].set_index("exit")
        assert rows["loss"].tolist() == pytest.approx([sum(losses) / 10] * 3, rel=1e-5)
        assert rows.loc[["2", "4"], "top1"].tolist() == (hits.double() / 10).tolist()
        assert rows.loc["all", "top1"] == pytest.approx(hits.mean().item() / 10)
    torch.testing.assert_close(exits.weight, weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exits.norm, norm, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "auroc"}, "loss must be one of ce, ce-auroc"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"lr": -1.0}, "lr must be > 0"),
        ({"lr": float("inf")}, "lr must be > 0 and below 1e6"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(UserError, match=message):
        Plan(**options)


def test_one_class_and_late_exits_are_refused(tiny, tmp_path, monkeypatch):
    data = DigitScenes("train", length=4)
    with pytest.raises(UserError, match=r"exits must be different steps of 1\.\.11, got \(12,\)"):
        train(tiny, data, Plan(exits=(12,)), tmp_path)
    read = data.read
    monkeypatch.setattr(data, "read", lambda i: (read(i)[0], 3, read(i)[2]), raising=False)
    with pytest.raises(UserError, match="all of one class"):
        train(tiny, data, Plan(), tmp_path)
