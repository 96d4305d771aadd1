"""Accuracy, cross-entropy and calibration of a classifier, streamed.

One `torchmetrics.Metric` for analyses and for training; it takes logits and needs no Probe. The
calibration error is that of Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017,
https://arxiv.org/abs/1706.04599).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite

TOP = 5


class Classification(Metric):
    """Scores of a classifier. Counts are int64, sums float64; memory is constant.

    Parameters
    ----------
    num_classes : number of classes C; labels are 0..C-1.
    bins : number M of equal-width bins of the confidence, for the calibration error.

    Returns
    -------
    ``compute``: a dict of floats; counts are ints, and the bins are tuples of length M:

    - ``n``: number of images;
    - ``accuracy``, ``top5_accuracy``: share of images whose class has the largest logit, or one of
      the five largest, 0..1 (top5_accuracy is nan for fewer than 5 classes);
    - ``loss``: mean cross-entropy, nats; ``confidence``: mean of the largest softmax probability,
      0..1;
    - ``calibration_error`` = sum_m (n_m / n) abs(accuracy_m - confidence_m) over the bins m, 0..1;
    - ``chance``, ``top5_chance``: the nulls, the share of the most frequent class and of the five
      most frequent, 0..1;
    - ``bin_n``, ``bin_confidence``, ``bin_accuracy``: number of images, mean confidence and
      accuracy of each bin ``((m - 1) / M, m / M]``; the last two are nan for an empty bin.

    Raises
    ------
    UserError
        For logits of another shape or with NaN or infinite values, labels out of range, and no
        images at all.
    """

    full_state_update = False
    loss: Tensor
    top5_hits: Tensor
    classes: Tensor
    bin_n: Tensor
    bin_hits: Tensor
    bin_confidence: Tensor

    def __init__(self, num_classes: int, bins: int = 15) -> None:
        super().__init__()
        self.num_classes, self.bins = num_classes, bins
        for name, shape, dtype in (
            ("loss", (), torch.float64),
            ("top5_hits", (), torch.int64),
            ("classes", (num_classes,), torch.int64),
            ("bin_n", (bins,), torch.int64),
            ("bin_hits", (bins,), torch.int64),
            ("bin_confidence", (bins,), torch.float64),
        ):
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> None:
        """Add a batch: logits of any floating type and labels."""
        self._check(logits, labels)
        logits = logits.detach().double()
        confidence, hit = logits.softmax(-1).amax(-1), logits.argmax(-1) == labels
        edges = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64, device=logits.device)
        bin_index = torch.bucketize(confidence, edges[1:-1])
        best = logits.topk(min(TOP, self.num_classes), dim=-1).indices
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        self.top5_hits += (best == labels[:, None]).any(-1).sum()
        self.classes += torch.bincount(labels, minlength=self.num_classes)
        self.bin_n += torch.bincount(bin_index, minlength=self.bins)
        self.bin_hits += torch.bincount(bin_index[hit], minlength=self.bins)
        self.bin_confidence.index_add_(0, bin_index, confidence)

    def compute(self) -> dict[str, Any]:
        """All scores over all processes."""
        n = int(self.bin_n.sum())
        if n == 0:
            raise UserError("no image was scored")
        frequent = self.classes.sort(descending=True).values
        enough = self.num_classes >= TOP
        return {
            "n": n,
            "accuracy": int(self.bin_hits.sum()) / n,
            "top5_accuracy": int(self.top5_hits) / n if enough else float("nan"),
            "loss": float(self.loss) / n,
            "confidence": float(self.bin_confidence.sum()) / n,
            "calibration_error": float((self.bin_hits - self.bin_confidence).abs().sum()) / n,
            "chance": int(frequent[0]) / n,
            "top5_chance": int(frequent[:TOP].sum()) / n if enough else float("nan"),
            "bin_n": tuple(self.bin_n.tolist()),
            "bin_confidence": tuple((self.bin_confidence / self.bin_n).tolist()),
            "bin_accuracy": tuple((self.bin_hits.double() / self.bin_n).tolist()),
        }

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if logits.shape != (len(labels), self.num_classes):
            expected = (len(labels), self.num_classes)
            raise UserError(f"logits must be (B, C) = {expected}, got {tuple(logits.shape)}")
        check_finite(logits, "logits")
        if len(labels) and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise UserError(
                f"labels must be 0..{self.num_classes - 1}, got {labels.min()}..{labels.max()}"
            )
