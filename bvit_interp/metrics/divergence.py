"""How far one predicted distribution is from another."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def kl_divergence(
    reference: Float[Tensor, "*#batch classes"], logits: Float[Tensor, "*#batch classes"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax(reference) || softmax(logits)) in nats, over the last dimension.

    Parameters
    ----------
    reference : logits of the distribution that the expectation is over.
    logits : logits of the other; leading dimensions broadcast.
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
