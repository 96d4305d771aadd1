"""Linear removal of the step from a state.

Once the means of all steps are equal, no linear decoder beats a constant (Belrose et al., 2023,
"LEACE", arXiv 2306.03819).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvit_interp.analyses.schedule.step_decoding import StepSums

REMOVALS = ("subspace", "random_subspace", "random_scaled", "mean", "random_shift")
"""Changes of a state; see `fit_removals` and `without_step`."""


@dataclass(frozen=True)
class Removal:
    """The map ``z -> z - z B^T B + o_t`` of states of step t.

    Attributes
    ----------
    basis : orthonormal directions B that are taken out.
    offset : o_t, which is added.
    """

    basis: Float[Tensor, "directions width"]
    offset: Float[Tensor, "steps width"]

    def change(
        self, values: Float[Tensor, "*batch width"], step: int
    ) -> Float[Tensor, "*batch width"]:
        """Change of float64 states of a step."""
        return self.offset[step - 1] - (values @ self.basis.T) @ self.basis

    def applied_to(self, sums: StepSums) -> StepSums:
        """The sums over the states after the removal, exactly."""
        identity = torch.eye(self.basis.shape[1], dtype=sums.gram.dtype, device=sums.gram.device)
        kept = identity - self.basis.T @ self.basis
        left, added = sums.sums @ kept, sums.count[:, None] * self.offset
        cross = left.T @ self.offset
        gram = kept @ sums.gram @ kept + cross + cross.T + added.T @ self.offset
        return StepSums(gram, left + added, sums.count)


def fit_removals(sums: StepSums, seed: Sequence[int]) -> dict[str, Removal]:
    """Two removals that leave all steps the same mean, and their random counterparts.

    `subspace` replaces the component along the span of the differences of the steps' means (at most
    T - 1 dimensions) by its mean over the steps. `mean` subtracts the difference of the step's own
    mean from the mean over steps, and leaves what belongs to the image; for a known step it is the
    smallest such change. `random_subspace` treats as many random directions like `subspace`;
    `random_shift` moves the state as far as `mean`, in a random direction.

    Parameters
    ----------
    sums : over the tokens that the removals are fitted to.
    seed : of the random directions.
    """
    means = sums.means
    centre = means.mean(0)
    to_centre = centre - means
    sizes, directions = torch.linalg.svd(to_centre, full_matrices=False)[1:]
    basis = directions[sizes > 1e-9 * sizes[0]]
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(seed).generate_state(1)[0])
    )
    normal = torch.randn(means.shape[1], len(basis) + 1, generator=generator, dtype=means.dtype)
    normal = normal.to(means.device)
    random_basis = torch.linalg.qr(normal[:, :-1]).Q.T
    direction = normal[:, -1] / normal[:, -1].norm()
    return {
        "subspace": _replaced_by_mean(basis, centre, len(means)),
        "random_subspace": _replaced_by_mean(random_basis, centre, len(means)),
        "mean": Removal(basis[:0], to_centre),
        "random_shift": Removal(basis[:0], to_centre.norm(dim=1, keepdim=True) * direction),
    }


def _replaced_by_mean(basis: Tensor, centre: Tensor, steps: int) -> Removal:
    """The component along the directions becomes that of the mean state."""
    component = basis @ centre @ basis
    return Removal(basis, component.expand(steps, -1))


def without_step(
    tokens: Float[Tensor, "*batch width"], step: int, removals: Mapping[str, Removal]
) -> dict[str, Float[Tensor, "*batch width"]]:
    """The states of a step after each of `REMOVALS`.

    `random_scaled` is `random_subspace`, scaled so that every token moves as far as under
    `subspace`.
    """
    values = tokens.double()
    changes = {name: removal.change(values, step) for name, removal in removals.items()}
    wanted, random = (
        changes[name].norm(dim=-1, keepdim=True) for name in ("subspace", "random_subspace")
    )
    tiny = torch.finfo(random.dtype).tiny
    changes["random_scaled"] = changes["random_subspace"] * wanted / random.clamp_min(tiny)
    return {name: (values + changes[name]).to(tokens.dtype) for name in REMOVALS}
