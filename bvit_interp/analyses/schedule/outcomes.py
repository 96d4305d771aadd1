"""Answers of changed runs, compared with those of the normal run."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.streaming.means import MeanCI

METRICS = ("accuracy", "accuracy_change", "agreement", "log_prob_change")


class Outcomes(MeanCI):
    """Accuracy and log-probability of K changed runs, beside the normal run.

    Parameters
    ----------
    runs, classes : K, C.

    Returns
    -------
    ``compute``: `accuracy`, `accuracy_change` (accuracy minus that of the normal run), `agreement`
    (share of images with the answer of the normal run) and `log_prob_change` (change of the true
    class's log-probability, nats), each a list of K dicts: `value`, `low`, `high` (95 % over
    images: Wilson for shares, normal for changes) and `n`. Shares also have a `null`: for accuracy
    the share of the most frequent class among the images, for agreement that of independent answers
    that are given as often.
    """

    answers: Tensor
    normal_answers: Tensor
    true_classes: Tensor

    def __init__(self, runs: int, classes: int) -> None:
        super().__init__(runs, len(METRICS))
        shapes = {
            "answers": (runs, classes),
            "normal_answers": (classes,),
            "true_classes": (classes,),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(  # type: ignore[override]
        self,
        logits: Float[Tensor, "runs batch classes"],
        normal: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> None:
        """Add a batch: logits of the changed runs and of the normal run, and true classes."""
        both = check_finite(torch.cat([normal[None], logits]), "logits")
        answers = both.argmax(-1)
        hits = (answers == labels).double()
        true_classes = labels.expand(len(both), -1)[..., None]
        log_p = both.double().log_softmax(-1).gather(-1, true_classes)[..., 0]
        same = (answers[1:] == answers[0]).double()
        values = [hits[1:], hits[1:] - hits[0], same, log_p[1:] - log_p[0]]
        super().update(torch.stack(values, dim=-1).transpose(0, 1))
        self.answers.scatter_add_(1, answers[1:], torch.ones_like(same))
        self.normal_answers += torch.bincount(answers[0], minlength=len(self.normal_answers))
        self.true_classes += torch.bincount(labels, minlength=len(self.true_classes))

    def compute(self) -> dict[str, list[dict[str, float]]]:  # type: ignore[override]
        """All metrics over all processes."""
        n = int(self.true_classes.sum())
        if not n:
            raise UserError("no image was scored")
        columns = {key: values.tolist() for key, values in super().compute().items()}
        runs = range(len(self.answers))
        rows = {
            metric: [{key: values[run][j] for key, values in columns.items()} for run in runs]
            for j, metric in enumerate(METRICS)
        }
        by_chance = (self.answers @ self.normal_answers / n**2).tolist()
        most_frequent = [float(self.true_classes.max()) / n] * len(by_chance)
        for metric, nulls in (("accuracy", most_frequent), ("agreement", by_chance)):
            for row, null in zip(rows[metric], nulls, strict=True):
                low, high = wilson_interval(row["value"] * n, n)
                row |= {"low": low, "high": high, "null": null}
        return rows
