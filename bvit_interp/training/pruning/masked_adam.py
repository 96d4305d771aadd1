"""Adam for masked training: pruned weights keep value, moments and step count.

Routing the Lottery (arXiv 2601.22141) gives ``theta <- theta - eta (grad * m_k)``, for plain
gradient steps. With Adam, a masked gradient alone would let momentum move pruned weights, and
moments that K subsets share would be corrected for K times the steps that they have seen. Ours: on
a batch of subset k, the weights that m_k prunes keep their value, their moments and their own count
of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class MaskedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that moves only the weights that are kept.

    A weight that is not kept at a step does not change by a single bit. It is not decayed either.
    Its moments, and its own count of steps for their bias correction, stay as they are.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, kept: Mapping[nn.Parameter, Bool[Tensor, " ..."]]
    ) -> None:
        """Take one step.

        Parameters
        ----------
        kept : parameter -> mask that broadcasts to its shape. A parameter without a mask is kept
            whole.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    whole = torch.ones((), dtype=torch.bool, device=parameter.device)
                    self._move(parameter, kept.get(parameter, whole), group)

    def _move(self, p: nn.Parameter, keep: Tensor, group: Mapping[str, Any]) -> None:
        assert p.grad is not None
        (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        state = self.state[p]
        if not state:
            state["m"] = torch.zeros_like(p)
            state["v"] = torch.zeros_like(p)
            state["count"] = torch.zeros(keep.shape, device=p.device)
        state["count"] += keep
        m, v, count = state["m"], state["v"], state["count"].clamp(min=1)
        m.copy_(torch.where(keep, m.lerp(p.grad, 1 - b1), m))
        v.copy_(torch.where(keep, v * b2 + p.grad.square() * (1 - b2), v))
        update = m / (1 - b1**count) / ((v / (1 - b2**count)).sqrt() + group["eps"])
        p.copy_(torch.where(keep, p * (1 - lr * decay) - lr * update, p))
