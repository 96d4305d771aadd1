"""Adam for masked training: for every weight, Adam on the batches whose subset keeps it.

Routing the Lottery (arXiv 2601.22141) gives ``theta <- theta - eta (grad * m_k)``, for plain
gradient steps. With Adam, a masked gradient alone would let momentum move pruned weights, and
moments shared by K subsets would be corrected for K times the steps they have seen. Ours: on a
batch of subset k the weights that m_k prunes keep their value, their moments and their own count of
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MaskedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that moves only what is kept; everything else it leaves bit
    for bit.

    A weight that is not kept at a step is not decayed either; its moments wait, and so does its own
    count of steps, which corrects their bias.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, kept: Mapping[nn.Parameter, Tensor]) -> None:  # type: ignore[override]
        """One step; `kept`: parameter -> bool that broadcasts to its shape; a parameter not in it
        is kept whole."""
        for group in self.param_groups:
            (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                keep, state = (
                    kept.get(p, torch.ones((), dtype=torch.bool, device=p.device)),
                    self.state[p],
                )
                if not state:
                    count = torch.zeros(keep.shape, device=p.device)
                    state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "count": count}
                state["count"] += keep
                m, v, count = state["m"], state["v"], state["count"].clamp(min=1)
                m.copy_(torch.where(keep, m.lerp(p.grad, 1 - b1), m))
                v.copy_(torch.where(keep, v * b2 + p.grad.square() * (1 - b2), v))
                update = m / (1 - b1**count) / ((v / (1 - b2**count)).sqrt() + group["eps"])
                p.copy_(torch.where(keep, p * (1 - lr * decay) - lr * update, p))
