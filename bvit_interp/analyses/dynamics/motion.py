"""How far states move, how they turn, and whether they return.

Everything follows from the inner products of one image's states z_0..z_S, so one small matrix per
image is enough. The null is pooled over all pairs of two different images: it is the same number
with the second state from another image. The measures and nulls are ours; Appendix E.1 of bViT
(arXiv 2605.10661) makes the claim in words and gives no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.streaming.means import MeanCI

_RETURNS = ("return_distance", "direction_return_distance")

Products = Float[Tensor, "*batch states states"]
"""Inner products ``<z_s, z_t>`` of states 0..S."""


@dataclass(frozen=True)
class Comparisons:
    """P comparisons of state `first` with state `second`, in units of the norm of state `unit`."""

    first: Int[Tensor, " comparisons"]
    second: Int[Tensor, " comparisons"]
    unit: Int[Tensor, " comparisons"]

    @classmethod
    def of(cls, triples: Sequence[tuple[int, int, int]]) -> Comparisons:
        """From (first, second, unit) triples."""
        return cls(*torch.tensor(list(triples), dtype=torch.int64).reshape(-1, 3).unbind(1))


def return_window(steps: int, trained: int) -> int:
    """Number of last steps w, and largest lag, at which a return is looked for.

    It is a third of the steps past the trained ones. States as far back as 2 w steps are compared,
    so all of them are past step T.
    """
    return max(steps - trained, 0) // 3


def relative_distance(
    products: Products, cross: Products, comparisons: Comparisons
) -> Float[Tensor, "*batch comparisons"]:
    """``||z_first - z_second|| / ||z_unit||``; nan where the unit is 0.

    Parameters
    ----------
    products : of one image's states.
    cross : of the first states with the second ones: `products` again for one image's own states.
    """
    square = products.diagonal(dim1=-2, dim2=-1)
    product = cross[..., comparisons.first, comparisons.second]
    apart = square[..., comparisons.first] + square[..., comparisons.second] - 2 * product
    unit = square[..., comparisons.unit]
    return torch.where(unit > 0, (apart.clamp(min=0) / unit).sqrt(), torch.nan)


def direction_distance(
    products: Products, cross: Products, comparisons: Comparisons
) -> Float[Tensor, "*batch comparisons"]:
    """Distance of the unit vectors of two states, 0 (same direction) .. 2 (opposite).

    It is what an RMSNorm that follows leaves of a distance. nan where a state is 0. Parameters are
    those of `relative_distance`.
    """
    square = products.diagonal(dim1=-2, dim2=-1)
    size = (square[..., comparisons.first] * square[..., comparisons.second]).sqrt()
    cosine = (cross[..., comparisons.first, comparisons.second] / size).clamp(-1, 1)
    return torch.where(size > 0, (2 - 2 * cosine).sqrt(), torch.nan)


def update_cosine(products: Products, cross: Products) -> Float[Tensor, "*batch updates"]:
    """Cosine of ``z_t - z_{t-1}`` and ``z_{t-1} - z_{t-2}`` for t = 2..S; nan where one is 0.

    Parameters are those of `relative_distance`; the result has S - 1 columns.
    """
    s = torch.arange(products.shape[-1], device=products.device)
    two_before, before, now = s[:-2], s[1:-1], s[2:]
    square = products.diagonal(dim1=-2, dim2=-1)
    length = square[..., 1:] + square[..., :-1] - 2 * products[..., s[1:], s[:-1]]
    product = (
        cross[..., before, now]
        - cross[..., before, before]
        - cross[..., two_before, now]
        + cross[..., two_before, before]
    )
    size = (length[..., 1:] * length[..., :-1]).clamp(min=0).sqrt()
    return torch.where(size > 0, (product / size).clamp(-1, 1), torch.nan)


def period(distances: Sequence[float], tolerance: float) -> int:
    """Smallest lag p at whose every multiple the states have returned, or 0.

    At least two multiples are needed, so p is at most half the number of lags. 1 is a fixed point:
    over the whole window nothing moves by more than the tolerance.

    Parameters
    ----------
    distances : the return distance at lags 1, 2, ...
    """
    lags = len(distances)
    for p in range(1, lags // 2 + 1):
        if all(distances[multiple - 1] < tolerance for multiple in range(p, lags + 1, p)):
            return p
    return 0


class Motion(MeanCI):
    """Movement of one kind of token, streamed in constant memory.

    Parameters
    ----------
    steps : S, the last step.
    tokens, width : K tokens of this kind, and D. An image's states are taken as one vector of K D
        numbers.
    trained : step T that the model was made for. Where it is above S, what is measured from it is
        left out.

    Returns
    -------
    ``compute``: metric -> a dict of `step`, `other_step` (-1 for none), `value` (mean over images),
    `low`, `high`, `null` (nan for none) and `n`, all of shape ``(rows,)``:

    - ``norm``: root mean square over tokens of ||z_t||, t = 0..S;
    - ``update_cosine``: of the update of step t and the one before, t = 2..S;
    - ``step_size``: ||z_t - z_{t-1}|| / ||z_{t-1}||, t = 1..S;
    - ``direction_change``: ||z_t / ||z_t|| - z_{t-1} / ||z_{t-1}|| ||, 0..2, t = 1..S;
    - ``distance_to_trained``, ``distance_to_last``: ||z_t - z_s|| / ||z_s|| with s = T and s = S,
      t = 0..S;
    - ``return_distance``: mean of ||z_t - z_{t-p}|| / ||z_T|| over the last w steps t, for p = 1..w
      (see `return_window`), given as step S and other step S - p; ``direction_return_distance``:
      the same for the distance of unit vectors.

    Raises
    ------
    UserError
        For states of another shape, for NaN or infinite values, and for no images at all.
    """

    gram: Tensor
    states: Tensor
    images: Tensor

    def __init__(self, steps: int, tokens: int, width: int, trained: int) -> None:
        self.steps = steps
        self.window = return_window(steps, trained)
        self.shape = (steps + 1, tokens, width)
        self.comparisons = _comparisons(steps, trained, self.window)
        self.rows = _rows(self.comparisons, steps, self.window)
        super().__init__(sum(len(rows) for rows in self.rows.values()))
        for name, shape in (
            ("gram", (steps + 1, steps + 1)),
            ("states", (steps + 1, tokens * width)),
            ("images", ()),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, states: Float[Tensor, "batch states tokens width"]) -> None:
        """Add the states of a batch, step 0 first."""
        if tuple(states.shape[1:]) != self.shape:
            raise UserError(
                f"states must be (B, S + 1, K, D) with {self.shape} after B,"
                f" got {tuple(states.shape)}"
            )
        flat = check_finite(states).double().flatten(2)
        products = flat @ flat.mT
        super().update(torch.cat(list(self._values(products, products).values()), dim=-1))
        self.gram += products.sum(0)
        self.states += flat.sum(0)
        self.images += len(states)

    def compute(self) -> dict[str, dict[str, np.ndarray]]:  # type: ignore[override]
        """The metrics over all images and processes; in numpy, because torchmetrics squeezes
        tensors of one number."""
        if not self.images:
            raise UserError("no image was measured")
        steps = [pair for rows in self.rows.values() for pair in rows]
        step, other_step = torch.tensor(steps).reshape(-1, 2).unbind(1)
        columns = {
            **super().compute(),
            "null": self._nulls().cpu(),
            "step": step,
            "other_step": other_step,
        }
        sizes = [len(rows) for rows in self.rows.values()]
        parts = {
            key: [part.numpy() for part in tensor.split(sizes)] for key, tensor in columns.items()
        }
        return {
            metric: {key: part[i] for key, part in parts.items()}
            for i, metric in enumerate(self.rows)
        }

    def _values(self, products: Tensor, cross: Tensor) -> dict[str, Tensor]:
        """Every metric from inner products ``(..., S + 1, S + 1)``, in the order of `rows`."""
        square = products.diagonal(dim1=-2, dim2=-1)
        values = {
            "norm": (square / self.shape[1]).sqrt(),
            "update_cosine": update_cosine(products, cross),
        }
        for metric, comparisons in self.comparisons.items():
            distance = direction_distance if metric.startswith("direction") else relative_distance
            values[metric] = distance(products, cross, comparisons)
            if metric in _RETURNS and self.window:
                by_lag = values[metric].unflatten(-1, (self.window, self.window))
                values[metric] = by_lag.mean(-1)
        return values

    def _nulls(self) -> Tensor:
        """The metrics of the mean products over all ordered pairs of two different images."""
        pairs = self.images * (self.images - 1)
        cross = (self.states @ self.states.T - self.gram) / torch.where(pairs > 0, pairs, torch.nan)
        nulls = self._values(self.gram / self.images, cross)
        nulls["norm"] = torch.full_like(nulls["norm"], torch.nan)
        return torch.cat(list(nulls.values()))


def _comparisons(steps: int, trained: int, window: int) -> dict[str, Comparisons]:
    """Which states each metric compares; for returns all pairs of the window, lag by lag."""
    every = range(steps + 1)
    consecutive = Comparisons.of([(t, t - 1, t - 1) for t in every[1:]])
    comparisons = {"step_size": consecutive, "direction_change": consecutive}
    if trained <= steps:
        to_trained = Comparisons.of([(t, trained, trained) for t in every])
        last = range(steps - window + 1, steps + 1)
        returns = Comparisons.of([(t, t - p, trained) for p in range(1, window + 1) for t in last])
        comparisons |= {"distance_to_trained": to_trained} | dict.fromkeys(_RETURNS, returns)
    comparisons["distance_to_last"] = Comparisons.of([(t, steps, steps) for t in every])
    return comparisons


def _rows(
    comparisons: dict[str, Comparisons], steps: int, window: int
) -> dict[str, list[tuple[int, int]]]:
    """(step, other step) of every value, -1 for no other step."""
    rows = {
        "norm": [(t, -1) for t in range(steps + 1)],
        "update_cosine": [(t, t - 1) for t in range(2, steps + 1)],
    }
    for metric, compared in comparisons.items():
        rows[metric] = list(zip(compared.first.tolist(), compared.second.tolist(), strict=True))
        if metric in _RETURNS:
            rows[metric] = [(steps, steps - p) for p in range(1, window + 1)]
    return rows
