"""Builds planted models: what happens at each step is known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bvit_interp.models.bvit import BViT
from bvit_interp.models.planted.patterns import CLASSES, DISTRACTOR, PATCH, SIZE, detector
from bvit_interp.models.planted.program import ONE, Head, Neuron, Program, Reads, compile_program

CLASS_IDS = range(len(CLASSES))
_SURE = 20.0  # score of what is attended to; logit of one unit of evidence


def clocked_heads(when: Sequence[Collection[int]], steps: int = 6) -> BViT:
    """Head h copies the class of the object to CLS at the steps `when[h]`, and is off at others.

    Every copy adds the same to the logit of the class. Without the head at one of its steps the
    logit falls by ``20 / copies``. Without it at another step the logit does not change.
    """
    copies = sum(len(set(own)) for own in when)
    heads = [Head([_look("object")], _copy("object", "found", 1 / copies), own) for own in when]
    return _compile(steps, ("object", "found"), heads, reads="found")


def clocked_neurons(when: Sequence[Collection[int]], steps: int = 6) -> BViT:
    """The neurons of group g make the class readable at the steps `when[g]`, and are off at others.

    A head finds the class at step 1. A group has a neuron per class; the neurons of the program
    start at index ``2 (steps - 1)`` of the FFN. Every action, a group at one of its steps, adds
    ``20 / actions`` to the logit.
    """
    actions = sum(len(set(own)) for own in when)
    neurons = [
        # one unit of evidence gives 20, where gelu(x) is x; none gives -20, where it is 0
        Neuron({f"found:{k}": 2 * _SURE, ONE: -_SURE}, {f"said:{k}": 1 / (_SURE * actions)}, own)
        for own in when
        for k in CLASS_IDS
    ]
    return _compile(steps, ("object", "found", "said"), [_finder()], neurons, reads="said")


def late_class(step: int, steps: int = 6) -> BViT:
    """The class is linearly readable in CLS from step 1 on, and by the head from `step` on."""
    if step < 2:
        raise ValueError(f"the class is found at step 1 and moved later, not at step {step}")
    return clocked_neurons([{step}], steps)


def pointing(step: int, steps: int = 6) -> BViT:
    """CLS attends to the object at `step`, and to the distractor at all others.

    Both have the same brightness, contrast and size. CLS gets the class at `step`.
    """
    others = {f"step:{t}": 1.0 for t in range(1, steps + 1) if t != step}
    head = Head(
        [({f"step:{step}": 1.0}, _look("object")[1]), (others, {"distractor": _SURE})],
        _copy("object", "found"),
    )
    return _compile(steps, ("object", "distractor", "found"), [head], reads="found")


def only_together(steps: int = 6) -> BViT:
    """Heads 0 and 1 find the class at step 1; at step 2 it is read only if both have found it."""
    heads = [Head([_look("object")], _copy("object", name), {1}) for name in ("first", "second")]
    both = [
        Neuron(
            {f"first:{k}": 2 * _SURE, f"second:{k}": 2 * _SURE, ONE: -3 * _SURE},
            {f"said:{k}": 1 / _SURE},
            {2},
        )
        for k in CLASS_IDS
    ]
    return _compile(steps, ("object", "first", "second", "said"), heads, both, reads="said")


def linear(matrix: Float[Tensor, "n n"], steps: int = 12) -> BViT:
    """Every step multiplies the channels "x:0" to "x:n-1" of CLS and patches by a matrix.

    The Jacobian of a step is the matrix in these channels of each of these tokens, and the identity
    in all others. CLS starts at (1, ..., 1), and patches start as random projections of their
    pixels. The logits are the channels of CLS, the same for all images.
    """
    size = len(matrix)
    names = [f"x:{i}" for i in range(size)]
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(size, 3, PATCH, PATCH, generator=generator) / PATCH
    change = matrix - torch.eye(size)
    neurons = [
        # gelu(x) - gelu(-x) is x
        Neuron({name: sign}, dict(zip(names, (sign * change[:, i]).tolist(), strict=True)))
        for i, name in enumerate(names)
        for sign in (1.0, -1.0)
    ]
    program = Program(
        steps=steps,
        channels=names,
        neurons=neurons,
        patches=dict(zip(names, filters, strict=True)),
        cls=dict.fromkeys(names, 1.0),
        logits=[{names[k % size]: 1.0} for k in CLASS_IDS],
    )
    return _named(program)


def _compile(
    steps: int,
    channels: Sequence[str],
    heads: Sequence[Head],
    neurons: Sequence[Neuron] = (),
    *,
    reads: str,
) -> BViT:
    """The model of a program with one channel per class under each name, and one for the
    distractor. Its logits read the channels `reads`."""
    per_class = [name for name in channels if name != "distractor"]
    detectors = {f"object:{k}": detector(k + 1) for k in CLASS_IDS}
    if "distractor" in channels:
        detectors["distractor"] = detector(DISTRACTOR)
    program = Program(
        steps=steps,
        channels=(
            *(f"{name}:{k}" for name in per_class for k in CLASS_IDS),
            *set(channels) - set(per_class),
        ),
        heads=heads,
        neurons=neurons,
        patches=detectors,
        logits=[{f"{reads}:{k}": _SURE} for k in CLASS_IDS],
    )
    return _named(program)


def _named(program: Program) -> BViT:
    model = compile_program(program, SIZE, PATCH)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(CLASSES)}  # type: ignore[assignment, dict-item]
    return model


def _look(name: str) -> tuple[Reads, Reads]:
    """The score of CLS with patches that show a class."""
    return {"cls": 1.0}, {f"{name}:{k}": _SURE for k in CLASS_IDS}


def _copy(source: str, target: str, share: float = 1.0) -> list[tuple[Reads, Reads]]:
    return [({f"{source}:{k}": 1.0}, {f"{target}:{k}": share}) for k in CLASS_IDS]


def _finder() -> Head:
    """Finds the class at step 1."""
    return Head([_look("object")], _copy("object", "found"), {1})
