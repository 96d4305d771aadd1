"""Programs of one block, against what they say."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.models.planted.program import Head, Neuron, Program, compile_program
from bvit_interp.probes.probe import Probe

ONES = torch.ones(3, 4, 4) / 48


@pytest.fixture
def images():
    """Dark noise with one white patch, row 2, column 3."""
    images = 0.5 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[:, :, 8:12, 12:16] = 1
    return images


def test_the_docstrings_example(images):
    program = Program(
        steps=4,
        channels=("seen",),
        neurons=(Neuron(reads={"1": 9.0}, writes={"seen": 1 / 9}, steps={2, 3}),),
        logits=({"seen": 1.0}, {"seen": -1.0}),
    )
    with torch.no_grad():
        states = Probe(compile_program(program)).run(images, "resid_post")[1]["resid_post"]
    model = compile_program(program)
    seen = model.head.weight[0].argmax()
    assert model.head.weight[0, seen] == 1
    expected = torch.tensor([0.0, 1.0, 2.0, 2.0])
    assert torch.allclose(states[:, :, 0, seen], expected.expand(2, 4), atol=1e-5)
    assert torch.allclose(states[:, :, 2:, seen], expected[None, :, None].expand(2, 4, 64))
    assert (states[:, :, 1, seen].abs() < 1e-6).all()  # the register is left alone


def test_the_state_knows_the_step(images):
    program = Program(steps=5, channels=(), logits=[{f"step:{t}": 1.0} for t in range(1, 6)])
    model = compile_program(program)
    with torch.no_grad():
        states = Probe(model).run(images, "resid_pre", tokens="all")[1]["resid_pre"]
    hot = model.head.weight @ states[0, :, 0].T  # (step read, step that runs)
    assert torch.allclose(hot, torch.eye(5), atol=1e-5)


def test_a_head_attends_and_moves_at_its_steps_alone(images):
    program = Program(
        steps=4,
        channels=("bright", "found"),
        heads=[
            Head([({"cls": 1.0}, {"bright": 60.0})], [({"bright": 1.0}, {"found": 2.0})], {2, 4}),
            Head([], [({"1": 1.0}, {"found": 10.0})], {3}),  # a constant
        ],
        patches={"bright": ONES},
        logits=[{"found": 1.0}],
    )
    model = compile_program(program)
    with torch.no_grad():
        logits, cache = Probe(model).run(images, ["pattern", "resid_post"])
    attention = cache["pattern"][:, :, :, 0]  # (image, step, head, key)
    white, register = 2 + 2 * 8 + 3, 1
    assert (attention[:, [1, 3], 0, white] > 0.999).all()
    assert (attention[:, [0, 2], 0, register] == 1).all()
    assert (attention[:, [0, 1, 3], 1, register] == 1).all()
    # no scores: even over all tokens but the register
    even = torch.full((2, 66), 1 / 65).index_fill(1, torch.tensor([register]), 0)
    assert torch.allclose(attention[:, 2, 1], even, atol=1e-6)
    found = cache["resid_post"][:, :, 0] @ model.head.weight[0]
    assert torch.allclose(found, torch.tensor([0.0, 2.0, 12.0, 14.0]).expand(2, 4), atol=2e-3)
    assert torch.allclose(logits[:, 0], found[:, -1], atol=1e-5)


def test_a_head_that_is_off_writes_nothing_also_if_its_values_read_the_step(images):
    program = Program(
        steps=3,
        channels=("found",),
        heads=[Head([], [({"step:1": 1.0, "step:2": 1.0, "cls": 1.0}, {"found": 1.0})], {3})],
        logits=[{"found": 1.0}],
    )
    with torch.no_grad():
        logit = compile_program(program)(images)
    # at step 3 alone: 1 at CLS, 0 at the 64 patches
    assert torch.allclose(logit, torch.full((2, 1), 1 / 65), atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ({"channels": ("a", "a")}, "once each"),
        ({"channels": ("cls",)}, "once each"),
        ({"neurons": [Neuron({"b": 1.0}, {"a": 1.0})]}, "no channel 'b'"),
        ({"neurons": [Neuron({"a": 1.0}, {"step:1": 1.0})]}, "step:1 cannot be written"),
        ({"neurons": [Neuron({"a": 1.0}, {"a": 1.0}, {4})]}, r"in 1\.\.3, got \[4\]"),
    ],
)
def test_programs_that_cannot_be_executed(fault, match):
    with pytest.raises(ValueError, match=match):
        compile_program(Program(**{"steps": 3, "channels": ("a",), **fault}))
