"""How the head's answer changes from step to step: entropy, the true class's rank, flips,
agreement.

The logit lens of a transformer (nostalgebraist, 2020, "interpreting GPT: the logit lens") with the
model's own norm and head, streamed over the images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError


class Answers(Metric):
    """What the head answers after every step, compared along the steps.

    Parameters
    ----------
    steps : number of steps T run.
    num_classes : classes C.
    reference : the step, from 1, whose answer the others are compared with; None for no comparison.

    Returns
    -------
    ``compute``: float64 tensors ``(T,)``, step 1 first:

    - ``entropy`` of the softmax, mean over images, nats;
    - ``true_rank`` of the label among the logits, 1 for the largest, ties at their mean; mean over
      images;
    - ``agreement`` share of images with the reference step's answer, 0..1; nan without one;
    - ``flips`` share of images whose answer differs from the step before's, 0..1; nan at step 1;
    - ``flips_null`` the same if the answers of the two steps were drawn independently, each as
      often as it is given: ``1 - sum_c p_{t-1}(c) p_t(c)``; nan at step 1.
    """

    full_state_update = False
    n: Tensor
    entropy: Tensor
    rank: Tensor
    flipped: Tensor
    agreed: Tensor
    given: Tensor

    def __init__(self, steps: int, num_classes: int, reference: int | None = None) -> None:
        super().__init__()
        self.reference = reference
        for name, shape in (
            ("n", ()),
            ("entropy", (steps,)),
            ("rank", (steps,)),
            ("flipped", (steps,)),
            ("agreed", (steps,)),
            ("given", (steps, num_classes)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits ``(T, B, C)``, labels ``(B,)`` int64."""
        logits = logits.detach().double()
        log_p, answers = logits.log_softmax(-1), logits.argmax(-1)
        own = logits.gather(-1, labels.expand(len(logits), -1)[..., None])
        above, tied = (logits > own).sum(-1), (logits == own).sum(-1)
        self.n += len(labels)
        self.entropy -= (log_p.exp() * log_p).sum(-1).sum(-1)
        self.rank += (above + (tied + 1) / 2).sum(-1)
        self.flipped[1:] += (answers[1:] != answers[:-1]).sum(-1)
        if self.reference is not None:
            self.agreed += (answers == answers[self.reference - 1]).sum(-1)
        self.given.scatter_add_(1, answers, torch.ones_like(answers, dtype=torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """All of them over all processes."""
        if not self.n:
            raise UserError("no image was scored")
        none = self.n.new_tensor([torch.nan])
        shares = self.given / self.n
        return {
            "entropy": self.entropy / self.n,
            "true_rank": self.rank / self.n,
            "agreement": self.agreed / self.n
            if self.reference is not None
            else none.expand(len(self.rank)),
            "flips": torch.cat([none, self.flipped[1:] / self.n]),
            "flips_null": torch.cat([none, 1 - (shares[1:] * shares[:-1]).sum(-1)]),
        }
