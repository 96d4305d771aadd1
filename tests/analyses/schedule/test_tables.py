"""Rows against results made by hand."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.analyses.schedule.experiments import FirstPass, SecondPass, Subject
from bvit_interp.analyses.schedule.tables import model_rows


def test_rows_of_a_model(tiny_te, images):
    subject = Subject(tiny_te, (3,), (), matrix=False)
    labels = torch.arange(len(images)) % 10
    first = FirstPass(subject)
    with torch.inference_mode():
        parts = dict.fromkeys(("test", "fit", "refit"), (images, labels))
        first.update(subject.learn(parts))
        fitted = first.fit(1e-3, seed=0)
        second = SecondPass(subject, fitted)
        second.update(subject.test(images, labels, fitted))
    rows = list(model_rows(subject, first, fitted, second))
    named = {
        (row["experiment"], row["variant"], row.get("tokens"), row["step"], row["metric"]): row
        for row in rows
    }
    assert len(named) == len(rows)
    means = second.scores["cls", "norm"].compute()["value"]
    for j, (metric, null) in enumerate(
        {"accuracy": 1 / 12, "step_error": 3, "pair_accuracy": 0.5}.items()
    ):
        for step, i in ((4, 3), (None, 12)):
            row = named["decoding", "norm", "cls", step, metric]
            assert row["value"] == means[i, j].item()
            assert row["null"] == pytest.approx(null)
    distance = second.distance.compute()["value"]
    assert named["removal", "mean", None, 2, "distance"]["value"] == distance[5 + 3].item()
    log_prob = second.outcomes.compute()["log_prob_change"]
    row = named["removal", "random_shift", None, 12, "log_prob_change"]
    assert row["value"] == log_prob[-1]["value"]
    table = tiny_te.blocks.step_embed.detach().double()
    row = named["schedule", "embedding", "patches", 5, "length"]
    assert row["value"] == pytest.approx(table[4].norm().item() / fitted.norms["patches"][4])
