"""Planted models: what is planted is there, and is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.analyses import ablation, lens, pointing_game, stability, step_accuracy
from bvit_interp.data.scenes import Scenes
from bvit_interp.models.planted import plants

STEPS = 6
SCENES = Scenes(40)


@pytest.fixture(scope="module")
def batch():
    read = [SCENES.read(i) for i in range(len(SCENES))]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image, _, _ in read])
    return images, torch.tensor([label for _, label, _ in read])


@pytest.mark.parametrize(
    ("model", "logit"),
    [
        (plants.clocked_heads([{2}, {4}, {2, 4}], STEPS), 20),
        (plants.clocked_neurons([{3}, {3, 5}], STEPS), 20),
        (plants.late_class(4, STEPS), 20),
        (plants.pointing(5, STEPS), 20),
        (plants.only_together(STEPS), 20),
    ],
    ids=["heads", "neurons", "late", "pointing", "together"],
)
def test_they_classify_the_scenes(model, logit, batch):
    images, labels = batch
    with torch.no_grad():
        logits = model(images)
    own = logits[range(len(labels)), labels]
    assert torch.allclose(own, torch.tensor(float(logit)), atol=0.1)
    assert (logits.sum(1) - own).abs().max() < 0.1


def test_ablation_finds_the_clock_of_heads():
    when = [{2}, {4}, {2, 4}]
    model = plants.clocked_heads(when, STEPS)
    config = ablation.Config(methods=("zero",), scopes=("each",), groups=0, n_ablated=16)
    frame = ablation.measure({"planted": model}, SCENES, config)
    table = frame.query("site == 'z' and metric == 'logit' and scope == 'each'")
    found = table.pivot(index="unit", columns="step", values="value").to_numpy()
    planted = np.array([[-5.0 if t in own else 0.0 for t in range(1, STEPS + 1)] for own in when])
    assert np.abs(found - planted).max() < 0.05


def test_the_pointing_game_finds_the_step_that_looks_at_the_object():
    frame = pointing_game.measure(
        {"planted": plants.pointing(4, STEPS)}, SCENES, pointing_game.Config(n_examples=0)
    )
    hits = frame.set_index("step")["hit_ratio"]  # of its one head
    assert hits.to_dict() == {t: float(t == 4) for t in range(1, STEPS + 1)}


def test_the_logit_lens_sees_the_class_from_its_step_on():
    model = plants.late_class(4, STEPS)
    seen = step_accuracy.measure({"planted": model}, SCENES, step_accuracy.Config(steps=STEPS))
    accuracy = seen.set_index("step")["accuracy"]
    assert (accuracy[accuracy.index >= 4] == 1).all()
    assert (accuracy[accuracy.index < 4] < 0.6).all()
    frame = lens.measure(
        {"planted": model}, Scenes(400), lens.Config(n_fit=300, limit=100, n_examples=0)
    )
    found = frame.query("tokens == 'cls' and metric == 'accuracy'").pivot(
        index="step", columns="lens", values="value"
    )
    assert (found["raw"][4:] == 1).all()
    assert (found["tuned"] > 0.95).all()  # it is linearly there from step 1


def test_stability_finds_the_singular_values():
    model = plants.linear(torch.diag(torch.tensor([1.25, 0.5])), STEPS)
    config = stability.Config(
        steps=STEPS, n_jacobian=1, limit=2, starts=(1,), jacobian_steps=(2,), iterations=20
    )
    frame = stability.measure({"planted": model}, SCENES, config)
    largest = frame.query("metric == 'singular_value'")["value"]
    assert len(largest) == 2 * config.leading  # of steps 2 and T; one for every token
    assert largest.to_numpy() == pytest.approx(1.25, abs=1e-3)
