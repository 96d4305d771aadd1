"""Second moments of inputs against those of recorded activations."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.analyses.rank_sweep.input_moments import InputMoments, watch_inputs
from bvit_interp.analyses.rank_sweep.low_rank import ffn_matrices
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll


def moments_of(model, matrices, images, batch):
    metric = InputMoments(matrices)
    with torch.no_grad():
        for part in images.split(batch):
            with watch_inputs(matrices) as found:
                model(part)
            metric.update(found)
    return metric.compute()


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_moments_are_those_of_the_recorded_inputs(tiny_te, images, by_hand, batch):
    view = unroll(tiny_te)
    matrices = ffn_matrices(view) + ffn_matrices(view, 5)
    found = [moments_of(view, matrices, images, batch)[matrix] for matrix in matrices]
    with torch.no_grad():
        steps = by_hand.run(tiny_te, images, [tiny_te.blocks[0]] * 12, tiny_te.blocks.step_embed)[
            1:
        ]
        reads = {
            "fc1": [
                tiny_te.blocks[0].norm2(step["resid_mid"]).flatten(0, 1).double() for step in steps
            ],
            "fc2": [step["mlp_post"].flatten(0, 1).double() for step in steps],
        }
    for moment, matrix, chosen in zip(found, matrices, [range(12)] * 2 + [[4]] * 2, strict=True):
        x = torch.cat([reads[matrix.name][t] for t in chosen])
        torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[2], rtol=1e-2)


def test_two_halves_merge_into_the_whole(tiny_fl, images):
    """What two processes add up to; inner updates count too."""
    view = unroll(tiny_fl)
    matrices = ffn_matrices(view)
    whole = moments_of(view, matrices, images, 4)
    halves = [InputMoments(matrices) for _ in range(2)]
    with torch.no_grad():
        for half, part in zip(halves, images.split((3, 1)), strict=True):
            with watch_inputs(matrices) as found:
                view(part)
            half.update(found)
            assert found[matrices[0]][1] == len(part) * 17 * 12  # tokens, applications
    for i, matrix in enumerate(matrices):
        total = sum(getattr(half, f"total{i}") for half in halves) / sum(
            getattr(half, f"count{i}") for half in halves
        )
        torch.testing.assert_close(total, whole[matrix], rtol=1e-6, atol=1e-9)
    assert {reduction.__name__ for reduction in halves[0]._reductions.values()} == {"dim_zero_sum"}


def test_nan_is_an_error_and_an_exception_leaves_no_hook(tiny, images, watched_models):
    view = unroll(tiny)
    watched_models.append(view)
    matrices = ffn_matrices(view)
    images[0, 0, 0, 0] = torch.nan
    with torch.no_grad(), watch_inputs(matrices) as found:
        view(images)
    with pytest.raises(UserError, match="the inputs of fc1 hold NaN or infinite values"):
        InputMoments(matrices).update(found)
    with pytest.raises(RuntimeError), watch_inputs(matrices):
        view(images[:, :1])
