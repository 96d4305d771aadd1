"""How far the states of an image move from step to step, where they turn and whether they come
back.

Everything is read from the inner products of one image's states z_0..z_S, so one small matrix an
image is enough. The null is pooled over all pairs of two different images: it is what the same
number would be if the second state were another image's. The measures and nulls are ours; Appendix
E.1 of bViT (arXiv 2605.10661) has words and no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MeanCI

_RETURNS = ("return", "return_direction")


@dataclass(frozen=True)
class Places:
    """Which states each measure compares: ``of``, ``to`` and the state ``unit`` whose norm is the
    unit of length."""

    of: Tensor
    to: Tensor
    unit: Tensor

    @classmethod
    def listed(cls, triples: Sequence[tuple[int, int, int]]) -> Places:
        """Places of (of, to, unit) triples."""
        return cls(*torch.tensor(list(triples), dtype=torch.int64).reshape(-1, 3).unbind(1))


def window(steps: int, trained: int) -> int:
    """Steps w at the end, and largest lag, over which a return is looked for: a third of those past
    the trained.

    States as far back as 2 w steps are compared, so all of them lie past step T.
    """
    return max(steps - trained, 0) // 3


def distance(own: Tensor, cross: Tensor, places: Places) -> Tensor:
    """``||z_of - z_to|| / ||z_unit||`` from inner products; nan where the unit is 0.

    Parameters
    ----------
    own : ``(..., S + 1, S + 1)``, ``<z_s, z_t>`` of the states.
    cross : the same between the first and the second of the states compared: `own` for one image's.
    places : P comparisons.

    Returns
    -------
    ``(..., P)``.
    """
    square = own.diagonal(dim1=-2, dim2=-1)
    apart = square[..., places.of] + square[..., places.to] - 2 * cross[..., places.of, places.to]
    unit = square[..., places.unit]
    return torch.where(unit > 0, (apart.clamp(min=0) / unit).sqrt(), torch.nan)


def chord(own: Tensor, cross: Tensor, places: Places) -> Tensor:
    """``||z_of / ||z_of|| - z_to / ||z_to|| ||``, 0 (same direction) .. 2 (opposite); nan where a
    state is 0.

    What a following RMSNorm leaves of a distance. `own`, `cross` and the result as for `distance`.
    """
    square = own.diagonal(dim1=-2, dim2=-1)
    size = (square[..., places.of] * square[..., places.to]).sqrt()
    cosine = (cross[..., places.of, places.to] / size).clamp(-1, 1)
    return torch.where(size > 0, (2 - 2 * cosine).sqrt(), torch.nan)


def period(returns: Sequence[float], tolerance: float) -> int:
    """Smallest p at whose every multiple the states have returned, or 0; `returns[p - 1]` is the
    distance at lag p.

    At least two multiples are asked for, so p is at most half the number of lags. 1 is a fixed
    point: over the whole window nothing moves by more than the tolerance.
    """
    lags = len(returns)
    for p in range(1, lags // 2 + 1):
        if all(returns[multiple - 1] < tolerance for multiple in range(p, lags + 1, p)):
            return p
    return 0


def turn(own: Tensor, cross: Tensor) -> Tensor:
    """Cosine of ``z_t - z_{t-1}`` with ``z_{t-1} - z_{t-2}``, t = 2..S; nan where one of them is 0.

    `own` and `cross` as for `distance`; returns ``(..., S - 1)``.
    """
    s = torch.arange(own.shape[-1], device=own.device)
    a, b, c = s[:-2], s[1:-1], s[2:]  # t - 2, t - 1, t
    square = own.diagonal(dim1=-2, dim2=-1)
    length = square[..., 1:] + square[..., :-1] - 2 * own[..., s[1:], s[:-1]]
    product = cross[..., b, c] - cross[..., b, b] - cross[..., a, c] + cross[..., a, b]
    size = (length[..., 1:] * length[..., :-1]).clamp(min=0).sqrt()
    return torch.where(size > 0, (product / size).clamp(-1, 1), torch.nan)


class Motion(MeanCI):
    """Movement of one kind of token, streamed in constant memory.

    Parameters
    ----------
    steps : S, the last step.
    tokens, width : K tokens of this kind and D; their states are taken together, as one vector of K
        D numbers.
    trained : step T the model was made for; above S, what is measured from it is left out.

    Returns
    -------
    ``compute``: a dict of measures, each a dict of `step`, `other` (-1: none), `value` (mean over
    images), `low`, `high`, `null` (nan: none) and `n`, all of shape ``(rows,)``:

    - ``norm``: root mean square over tokens of ||z_t||, t = 0..S;
    - ``step_size``: ||z_t - z_{t-1}|| / ||z_{t-1}||, t = 1..S;
    - ``cosine``: of the last two updates at t = 2..S;
    - ``to_trained``, ``to_last``: ||z_t - z_s|| / ||z_s|| with s = T and s = S, t = 0..S;
    - ``direction``: ||z_t / ||z_t|| - z_{t-1} / ||z_{t-1}|| ||, 0..2, t = 1..S;
    - ``return``: mean of ||z_t - z_{t-p}|| / ||z_T|| over the last w steps t, at p = 1..w (see
      `window`), given as step S and other step S - p; ``return_direction``: the same of the
      distance of directions.

    Raises
    ------
    UserError
        For states of another shape or holding NaN or infinite values, and no images at all.
    """

    gram: Tensor
    states: Tensor
    images: Tensor

    def __init__(self, steps: int, tokens: int, width: int, trained: int) -> None:
        self.shape, self.trained, self.window = (
            (steps + 1, tokens, width),
            trained,
            window(steps, trained),
        )
        self.places = self._places(steps)
        self.rows = self._rows(steps)
        super().__init__(sum(len(rows) for rows in self.rows.values()))
        for name, shape in (
            ("gram", (steps + 1, steps + 1)),
            ("states", (steps + 1, tokens * width)),
            ("images", ()),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, states: Tensor) -> None:
        """Add a batch ``(B, S + 1, K, D)``, step 0 first."""
        if tuple(states.shape[1:]) != self.shape:
            raise UserError(
                f"states must be (B, S + 1, K, D) with {self.shape} behind B, got {tuple(states.shape)}"
            )
        if not torch.isfinite(states).all():
            raise UserError("activations hold NaN or infinite values")
        flat = states.double().flatten(2)
        gram = flat @ flat.mT
        super().update(torch.cat(list(self._values(gram, gram).values()), dim=-1))
        self.gram += gram.sum(0)
        self.states += flat.sum(0)
        self.images += len(states)

    def compute(self) -> dict[str, dict[str, np.ndarray]]:  # type: ignore[override]
        """The measures over all images and processes; numpy's, as torchmetrics would squeeze
        tensors of one number."""
        if not self.images:
            raise UserError("no image was measured")
        columns = {**super().compute(), "null": self._nulls().cpu()}
        places = torch.tensor([place for rows in self.rows.values() for place in rows]).reshape(
            -1, 2
        )
        columns |= {"step": places[:, 0], "other": places[:, 1]}
        sizes = [len(rows) for rows in self.rows.values()]
        parts = {
            key: [part.numpy() for part in tensor.split(sizes)] for key, tensor in columns.items()
        }
        return {
            name: {key: part[i] for key, part in parts.items()} for i, name in enumerate(self.rows)
        }

    def _places(self, steps: int) -> dict[str, Places]:
        """Which states are compared; of `return`, all pairs of the window, lag by lag."""
        trained, w = self.trained, self.window
        every = range(steps + 1)
        found = {
            name: Places.listed([(t, t - 1, t - 1) for t in every[1:]])
            for name in ("step_size", "direction")
        }
        if trained <= steps:
            found["to_trained"] = Places.listed([(t, trained, trained) for t in every])
            last = range(steps - w + 1, steps + 1)
            for name in _RETURNS:
                found[name] = Places.listed(
                    [(t, t - p, trained) for p in range(1, w + 1) for t in last]
                )
        found["to_last"] = Places.listed([(t, steps, steps) for t in every])
        return found

    def _rows(self, steps: int) -> dict[str, list[tuple[int, int]]]:
        """(step, other step) of every value, -1 for no other step, in the order of `_values`."""
        rows = {
            "norm": [(t, -1) for t in range(steps + 1)],
            "cosine": [(t, t - 1) for t in range(2, steps + 1)],
        }
        for name, places in self.places.items():
            rows[name] = list(zip(places.of.tolist(), places.to.tolist(), strict=True))
        for name in _RETURNS:
            if name in rows:
                rows[name] = [(steps, steps - p) for p in range(1, self.window + 1)]
        return rows

    def _values(self, own: Tensor, cross: Tensor) -> dict[str, Tensor]:
        """Every measure from inner products ``(..., S + 1, S + 1)``."""
        square = own.diagonal(dim1=-2, dim2=-1)
        values = {"norm": (square / self.shape[1]).sqrt(), "cosine": turn(own, cross)}
        for name, places in self.places.items():
            values[name] = (chord if name.endswith("direction") else distance)(own, cross, places)
            if name in _RETURNS and self.window:
                values[name] = values[name].unflatten(-1, (self.window, self.window)).mean(-1)
        return values

    def _nulls(self) -> Tensor:
        """The same with the second state from another image: of the expected products over all
        ordered pairs of two."""
        pairs = self.images * (self.images - 1)
        cross = (self.states @ self.states.T - self.gram) / torch.where(pairs > 0, pairs, torch.nan)
        nulls = self._values(self.gram / self.images, cross)
        nulls["norm"] = torch.full_like(nulls["norm"], torch.nan)
        return torch.cat(list(nulls.values()))
