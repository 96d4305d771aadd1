"""How the predicted class changes from step to step.

The logit lens of a transformer (nostalgebraist, 2020, "interpreting GPT: the logit lens") reads
every step with the model's own norm and head; this metric summarises the readings of many images.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError


class StepPredictions(Metric):
    """Entropy, rank of the true class, agreement and flips of the predictions after every step.

    Parameters
    ----------
    steps : number of steps T run.
    num_classes : classes C.
    reference : the step, from 1, whose prediction the others are compared with; None for no
        comparison.

    Returns
    -------
    ``compute``: float64 tensors ``(T,)``, step 1 first:

    - ``entropy`` of the softmax, mean over images, nats;
    - ``true_rank``, the rank of the label among the logits: 1 for the largest, equal logits share
      their mean rank; mean over images;
    - ``agreement``, the share of images with the prediction of the reference step, 0..1; nan
      without a reference;
    - ``flips``, the share of images whose prediction differs from that of the previous step, 0..1;
      nan at step 1;
    - ``flips_null``, the flips expected if the two steps predicted independently, each class as
      often as it is predicted: ``1 - sum_c p_{t-1}(c) p_t(c)``; nan at step 1.
    """

    full_state_update = False
    n: Tensor
    entropy: Tensor
    rank: Tensor
    flipped: Tensor
    agreed: Tensor
    predicted: Tensor

    def __init__(self, steps: int, num_classes: int, reference: int | None = None) -> None:
        super().__init__()
        self.reference = reference
        for name, shape in (
            ("n", ()),
            ("entropy", (steps,)),
            ("rank", (steps,)),
            ("flipped", (steps,)),
            ("agreed", (steps,)),
            ("predicted", (steps, num_classes)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, logits: Float[Tensor, "steps batch classes"], labels: Int[Tensor, " batch"]
    ) -> None:
        """Add a batch."""
        logits = logits.detach().double()
        log_p, predictions = logits.log_softmax(-1), logits.argmax(-1)
        true = logits.gather(-1, labels.expand(len(logits), -1)[..., None])
        above, tied = (logits > true).sum(-1), (logits == true).sum(-1)
        self.n += len(labels)
        self.entropy -= (log_p.exp() * log_p).sum(-1).sum(-1)
        self.rank += (above + (tied + 1) / 2).sum(-1)
        self.flipped[1:] += (predictions[1:] != predictions[:-1]).sum(-1)
        if self.reference is not None:
            self.agreed += (predictions == predictions[self.reference - 1]).sum(-1)
        self.predicted.scatter_add_(
            1, predictions, torch.ones_like(predictions, dtype=torch.float64)
        )

    def compute(self) -> dict[str, Tensor]:
        """The five measures over all processes.

        Raises
        ------
        UserError
            If no image was added.
        """
        if not self.n:
            raise UserError("no image was scored")
        nan = self.n.new_tensor([torch.nan])
        agreement = nan.expand(len(self.rank)) if self.reference is None else self.agreed / self.n
        shares = self.predicted / self.n
        return {
            "entropy": self.entropy / self.n,
            "true_rank": self.rank / self.n,
            "agreement": agreement,
            "flips": torch.cat([nan, self.flipped[1:] / self.n]),
            "flips_null": torch.cat([nan, 1 - (shares[1:] * shares[:-1]).sum(-1)]),
        }
