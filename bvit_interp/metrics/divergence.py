"""Divergence of one predicted distribution from another."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def kl_divergence(
    reference: Float[Tensor, "*#batch classes"], logits: Float[Tensor, "*#batch classes"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax(reference) || softmax(logits)) in nats, over the last dimension.

    Parameters
    ----------
    reference : logits of the distribution over which the expectation is taken.
    logits : logits of the other distribution; leading dimensions broadcast.
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
