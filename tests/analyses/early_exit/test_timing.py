"""Times against a clock that the test makes tick: one second per image and step."""

from __future__ import annotations

import time

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.early_exit import Config, measure
from bvit_interp.analyses.early_exit.timing import exit_times
from bvit_interp.models.exits import FILE, Exits, run_with_exits
from bvit_interp.models.unroll import unroll


@pytest.fixture
def ticking(monkeypatch):
    """``ticking(view)``: a clock that advances with every image of every step; its hooks."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def tick(_, args, __):
        clock[0] += len(args[0])

    return lambda view: [block.register_forward_hook(tick) for block in view.blocks]


def test_each_batch_of_each_threshold(tiny, images, exits_of, ticking):
    exits, view = Exits.load(exits_of(tiny, (2, 4)) / FILE, tiny), unroll(tiny)
    images = torch.cat([images, images.flip(-1), 2 * images[:1]])
    ticking(view)
    seconds = exit_times(view, exits, images, (0.0, 0.4, 1.0), 4)
    assert seconds.shape == (4, 2)  # the ninth image fills no batch
    assert seconds[0].tolist() == [48, 48]
    assert seconds[1].tolist() == [8, 8]
    assert seconds[3].tolist() == [48, 48]
    for j, batch in enumerate((images[:4], images[4:8])):
        assert seconds[2, j] == run_with_exits(view, exits, batch, 0.4)[1].sum().item()


def test_columns_of_time(tiny, digits, exits_of, monkeypatch):
    """A clock of 2 ms per image and step; 6 of 7 images are timed, in batches of 3."""
    clock, timed = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    forward = type(tiny.blocks[0]).forward

    def tick(self, x, *args, **kwargs):
        timed.append(len(x))
        clock[0] += 0.002 * len(x)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(tiny.blocks[0]), "forward", tick)
    config = Config(
        exits=(exits_of(tiny, (3, 6)),), thresholds=(0.0, 1.0), n_timed=7, timed_batch=3, limit=12
    )
    frame = measure({"m": tiny}, digits, config)
    rows = frame[frame["table"] == "threshold"].set_index("threshold")
    assert rows["latency_ms"].tolist() == pytest.approx([2 * 3, 2 * 12])
    assert rows["saved_time"].tolist() == pytest.approx([1 - 3 / 12, 0])
    assert timed.count(3) == 12 + 2 * (12 + 3 + 12)  # warm-up, then two batches of three runs
    assert frame[frame["table"] != "threshold"]["saved_time"].isna().all()


def test_other_shapes_are_refused(tiny, images, exits_of):
    exits = Exits.load(exits_of(tiny, (2, 4)) / FILE, tiny)
    with pytest.raises(TypeCheckError):
        exit_times(unroll(tiny), exits, images[0], (0.5,), 1)
