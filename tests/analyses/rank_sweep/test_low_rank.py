"""Cuts against numpy's SVD and SVD-LLM's formula with a Cholesky factor, and models that run on
them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.layers import SwiGLU
from torch import nn
from torch.nn.utils import prune

from bvit_interp.analyses.rank_sweep.low_rank import (
    InputMoments,
    LowRank,
    factors,
    ffn_matrices,
    is_thin,
    low_rank,
    random_factors,
    watch_inputs,
)
from bvit_interp.errors import UserError
from bvit_interp.models.masks import Masks, full, masked
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe

WEIGHTS = [(48, 12), (12, 48), (16, 16)]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def inputs(width, count=400):
    """Correlated, with a mean and with scales over two decades."""
    return (
        drawn(count, width, seed=1) * np.geomspace(1, 0.01, width) @ drawn(width, width, seed=2)
        + 0.3
    )


def weight_of(cut, rank):
    left, right = cut.cut(rank)
    return (left @ right).numpy()


def relative_error(x, weight, cut):
    return np.square(x @ (weight - cut).T).sum() / np.square(x @ weight.T).sum()


# ---- factors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_is_numpys(shape, rank):
    weight = drawn(*shape)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    cut = factors(torch.tensor(weight))
    np.testing.assert_allclose(
        weight_of(cut, rank), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-12
    )
    assert cut.energy(rank) == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum())
    assert cut.full_rank == len(s)


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_whitened_is_svd_llms_formula(shape, rank):
    """W_k = (W S)_k S^-1 with the Cholesky factor S of C, as its paper has it."""
    weight, x = drawn(*shape), inputs(shape[1])
    moment = x.T @ x / len(x)
    root = np.linalg.cholesky(moment)
    u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    cut = factors(torch.tensor(weight), torch.tensor(moment))
    np.testing.assert_allclose(weight_of(cut, rank), expected, atol=1e-6 * np.abs(expected).max())
    # the singular values dropped are the loss: the paper's theorem
    assert cut.error(rank, torch.tensor(moment)) == pytest.approx(
        (s[rank:] ** 2).sum() / (s**2).sum(), rel=1e-6
    )


@pytest.mark.parametrize("shape", WEIGHTS)
def test_error_is_that_of_the_outputs_themselves_and_least_when_whitened(shape):
    weight, x = drawn(*shape), inputs(shape[1])
    moment = torch.tensor(x.T @ x)  # of any scale
    generator = torch.Generator().manual_seed(0)
    cuts = {
        "svd": factors(torch.tensor(weight)),
        "whitened": factors(torch.tensor(weight), moment),
        "random": random_factors(torch.tensor(weight), generator),
    }
    for rank in (1, 4, 9):
        errors = {name: cut.error(rank, moment) for name, cut in cuts.items()}
        for name, cut in cuts.items():
            assert errors[name] == pytest.approx(
                relative_error(x, weight, weight_of(cut, rank)), rel=1e-6
            ), name
        assert errors["whitened"] < 0.9 * errors["svd"]
        assert errors["whitened"] < 0.9 * errors["random"]
        energies = {name: cut.energy(rank) for name, cut in cuts.items()}
        assert energies["svd"] > max(energies["whitened"], energies["random"])
        for name, cut in cuts.items():
            kept = np.square(weight_of(cut, rank)).sum() / np.square(weight).sum()
            assert energies[name] == pytest.approx(kept), name
    for cut in cuts.values():
        assert cut.error(cut.full_rank, moment) == 0.0
        assert cut.energy(cut.full_rank) == pytest.approx(1.0)


def test_inputs_of_few_directions_need_as_many_and_no_inverse():
    """C of rank 3 has no Cholesky factor; three directions lose nothing."""
    x = drawn(100, 3) @ drawn(3, 12, seed=3)
    weight, moment = drawn(48, 12, seed=4), x.T @ x / 100
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(moment)
    cut = factors(torch.tensor(weight), torch.tensor(moment))
    assert cut.error(3, torch.tensor(moment)) < 1e-12
    np.testing.assert_allclose(x @ weight_of(cut, 3).T, x @ weight.T, atol=1e-9)
    assert factors(torch.tensor(weight)).error(3, torch.tensor(moment)) > 0.05


def test_white_inputs_make_both_the_svd():
    weight = torch.tensor(drawn(20, 7))
    for rank in range(1, 8):
        np.testing.assert_allclose(
            weight_of(factors(weight, 3 * torch.eye(7, dtype=torch.float64)), rank),
            weight_of(factors(weight), rank),
            atol=1e-10,
        )


def test_random_directions_are_seeded_orthonormal_and_keep_k_of_r_on_average():
    weight = torch.tensor(drawn(30, 10))
    first, again = (random_factors(weight, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.left, again.left)
    np.testing.assert_allclose(first.left.T @ first.left, np.eye(10), atol=1e-12)
    np.testing.assert_allclose(weight_of(first, 10), weight, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    energies = [random_factors(weight, generator).energy(4) for _ in range(300)]
    assert np.mean(energies) == pytest.approx(0.4, abs=0.02)


# ---- places and inputs ---------------------------------------------------------------------------------


def test_every_place_of_a_weight_is_found(any_model):
    """Counted by hooks: all calls of fc1 and fc2 in a forward are at the places, in their steps."""
    view = unroll(any_model)
    matrices = ffn_matrices(view)
    assert len(matrices) == 2 * len(list(any_model.blocks.children()))
    places = [linear for matrix in matrices for linear in matrix.linears]
    every = [m for name, m in view.named_modules() if name.endswith(("fc1", "fc2"))]
    assert sorted(map(id, places)) == sorted(map(id, every))
    by_step = [
        [linear for matrix in ffn_matrices(view, t) for linear in matrix.linears]
        for t in range(1, len(view.blocks) + 1)
    ]
    assert sorted(id(linear) for of_step in by_step for linear in of_step) == sorted(
        map(id, places)
    )
    for t, of_step in enumerate(by_step):
        assert set(map(id, of_step)) == {
            id(m) for name, m in view.blocks[t].named_modules() if name.endswith(("fc1", "fc2"))
        }


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


# ---- a model of low rank -------------------------------------------------------------------------------


def dense_copy(model, rank):
    """A copy whose stored weights numpy has truncated."""
    model = copy.deepcopy(model)
    for block in model.blocks.children():
        for linear in (block.mlp.fc1, block.mlp.fc2):
            u, s, vt = np.linalg.svd(linear.weight.detach().double().numpy(), full_matrices=False)
            linear.weight.data = torch.tensor(
                (u[:, :rank] * s[:rank]) @ vt[:rank], dtype=torch.float32
            )
    return model


@pytest.mark.parametrize("rank", [1, 8, 25, 26, 31])  # two products pay below 25.6
def test_thin_and_dense_give_the_copy_with_cut_weights(any_model, images, rank):
    assert is_thin(rank, 128, 32) == (rank <= 25)
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    view = unroll(any_model)
    chosen = {matrix: factors(matrix.weight) for matrix in ffn_matrices(view)}
    with torch.no_grad(), low_rank(chosen, rank):
        layer = view.blocks[0].mlp.fc1
        assert isinstance(layer, LowRank)
        assert len(layer.matrices) == (2 if rank <= 25 else 1)
        assert layer.bias is any_model.blocks[0].mlp.fc1.bias
        logits = view(images)
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items()
        )
    with torch.no_grad():
        torch.testing.assert_close(
            logits, dense_copy(any_model, rank)(images), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(view(images), any_model(images))  # as it came


@pytest.mark.parametrize("shape", WEIGHTS)
def test_thin_equals_dense(shape):
    x, cut = torch.randn(3, 5, shape[1]), factors(torch.tensor(drawn(*shape)))
    bias = nn.Parameter(torch.randn(shape[0]))
    for rank in (1, 6, 12):
        left, right = (part.float() for part in cut.cut(rank))
        thin, dense = LowRank((right, left), bias), LowRank((left @ right,), bias)
        torch.testing.assert_close(thin(x), dense(x), rtol=1e-5, atol=1e-5)
        assert (
            (thin.in_features, thin.out_features)
            == (shape[1], shape[0])
            == (dense.in_features, dense.out_features)
        )


def test_full_rank_is_the_model_itself_bit_by_bit(any_model, images):
    view = unroll(any_model)
    moments = moments_of(view, ffn_matrices(view), images, 4)
    linear = view.blocks[0].mlp.fc1
    with torch.no_grad(), low_rank({m: factors(m.weight, moments[m]) for m in moments}, 32):
        assert view.blocks[0].mlp.fc1 is linear
        assert torch.equal(view(images), any_model(images))


@pytest.mark.parametrize("step", [1, 7, 12])
def test_one_step_cut_is_a_stack_with_one_block_cut(tiny, images, by_hand, step):
    """The other steps keep the shared weight, though it is the same Parameter."""
    view = unroll(tiny)
    with torch.no_grad(), low_rank({m: factors(m.weight) for m in ffn_matrices(view, step)}, 3):
        logits, cache = Probe(view).run(images, "resid_post", tokens="cls")
    cut = dense_copy(tiny, 3).blocks[0]
    blocks = [cut if t == step else tiny.blocks[0] for t in range(1, 13)]
    with torch.no_grad():
        sites = by_hand.run(tiny, images, blocks)
        torch.testing.assert_close(
            logits, by_hand.logits(tiny, sites[-1]["resid_post"]), rtol=1e-4, atol=1e-4
        )
        whole = Probe(tiny).run(images, "resid_post", tokens="cls")[1]
    same = [torch.equal(cache["resid_post", t], whole["resid_post", t]) for t in range(1, 13)]
    assert same == [t < step for t in range(1, 13)]


def test_cuts_end_with_the_context_also_by_an_error(tiny, images):
    view = unroll(tiny)
    linears = [matrix.linears for matrix in ffn_matrices(view)]
    chosen = {matrix: factors(matrix.weight) for matrix in ffn_matrices(view)}
    with pytest.raises(RuntimeError, match="on purpose"), low_rank(chosen, 4):
        raise RuntimeError("on purpose")
    assert [matrix.linears for matrix in ffn_matrices(view)] == linears
    assert list(dict(view.blocks[0].mlp.named_children())) == [
        "fc1",
        "act",
        "drop1",
        "norm",
        "fc2",
        "drop2",
    ]
    for rank in (0, 33):
        with (
            pytest.raises(UserError, match=rf"no rank {rank} of fc1; ranks: 1\.\.32"),
            low_rank(chosen, rank),
        ):
            pass
    assert [matrix.linears for matrix in ffn_matrices(view)] == linears


def test_the_cut_model_trains_only_what_it_had(tiny, images):
    """The stand-in has no parameter of its own: the shared bias learns, the weight gets no
    gradient."""
    view = unroll(tiny)
    with low_rank({m: factors(m.weight) for m in ffn_matrices(view)}, 4):
        view(images).sum().backward()
    assert tiny.blocks[0].mlp.fc1.bias.grad.abs().sum() > 0
    assert tiny.blocks[0].mlp.fc1.weight.grad is None


def test_half_precision_weights_are_cut_in_their_own_type(tiny, images):
    view = unroll(tiny.bfloat16())
    with torch.no_grad(), low_rank({m: factors(m.weight) for m in ffn_matrices(view)}, 31):
        assert view(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("baked", [False, True])
def test_steps_with_their_own_masks_are_cut_each_as_masked(tiny, images, by_hand, baked):
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.rand(mask.shape, generator=generator) < 0.5 for name, mask in full(tiny).items()
    }
    masks = Masks({**drawn, "qkv": full(tiny)["qkv"], "proj": full(tiny)["proj"]})
    view = unroll(masked(tiny, masks, baked=baked))
    matrices = ffn_matrices(view)
    assert len(matrices) == 24
    blocks = []
    for t in range(12):
        blocks.append(copy.deepcopy(tiny.blocks[0]))
        for name in ("fc1", "fc2"):
            weight = getattr(tiny.blocks[0].mlp, name).weight.detach() * masks[name][t]
            u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
            getattr(blocks[-1].mlp, name).weight.data = torch.tensor(
                (u[:, :5] * s[:5]) @ vt[:5], dtype=torch.float32
            )
    with torch.no_grad(), low_rank({m: factors(m.weight) for m in matrices}, 5):
        expected = by_hand.logits(tiny, by_hand.run(tiny, images, blocks)[-1]["resid_post"])
        torch.testing.assert_close(view(images), expected, rtol=1e-4, atol=1e-4)


def test_pruned_weights_are_cut_as_pruned(stacked):
    pruned = copy.deepcopy(stacked)  # prune leaves hooks, as it should
    prune.l1_unstructured(pruned.blocks[1].mlp.fc1, "weight", amount=0.5)
    matrix = ffn_matrices(unroll(pruned), 2)[0]
    assert (matrix.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(weight_of(factors(matrix.weight), 32), matrix.weight, atol=1e-5)


def test_bad_input(tiny, stacked):
    with pytest.raises(UserError, match=r"give unroll\(model\)"):
        ffn_matrices(tiny)
    stacked.blocks[1].mlp = SwiGLU(32, 64)
    with pytest.raises(UserError, match="the FFN of a Block has no Linear fc1"):
        ffn_matrices(unroll(stacked))
