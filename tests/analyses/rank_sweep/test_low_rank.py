"""Models that run on truncated weights, against copies that numpy has truncated."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from timm.layers import SwiGLU
from torch import nn
from torch.nn.utils import prune

from bvit_interp.analyses.rank_sweep.factors import factors
from bvit_interp.analyses.rank_sweep.low_rank import (
    LowRank,
    Truncation,
    ffn_matrices,
    is_thin,
    low_rank,
)
from bvit_interp.errors import UserError
from bvit_interp.models.masks import Masks, full, masked
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe


def test_every_layer_of_a_weight_is_found(any_model):
    """Counted by hooks: all calls of fc1 and fc2 in a forward are found, in their steps."""
    view = unroll(any_model)
    matrices = ffn_matrices(view)
    assert len(matrices) == 2 * len(list(any_model.blocks.children()))
    linears = [linear for matrix in matrices for linear in matrix.linears]
    every = [m for name, m in view.named_modules() if name.endswith(("fc1", "fc2"))]
    assert sorted(map(id, linears)) == sorted(map(id, every))
    by_step = [
        [linear for matrix in ffn_matrices(view, t) for linear in matrix.linears]
        for t in range(1, len(view.blocks) + 1)
    ]
    assert sorted(id(linear) for of_step in by_step for linear in of_step) == sorted(
        map(id, linears)
    )
    for t, of_step in enumerate(by_step):
        assert set(map(id, of_step)) == {
            id(m) for name, m in view.blocks[t].named_modules() if name.endswith(("fc1", "fc2"))
        }


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


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (16, 16)])
def test_thin_equals_dense(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x, cut = torch.randn(3, 5, shape[1], generator=generator), factors(weight)
    bias = nn.Parameter(torch.randn(shape[0], generator=generator))
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
    matrices = ffn_matrices(view)
    linear = view.blocks[0].mlp.fc1
    with torch.no_grad(), low_rank({m: factors(m.weight) for m in matrices}, 32):
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
    left, right = factors(matrix.weight).cut(32)
    np.testing.assert_allclose(left @ right, matrix.weight, atol=1e-5)


def test_bad_input(tiny, stacked):
    with pytest.raises(UserError, match=r"give unroll\(model\)"):
        ffn_matrices(tiny)
    stacked.blocks[1].mlp = SwiGLU(32, 64)
    with pytest.raises(UserError, match="the FFN of Block has no fc1"):
        ffn_matrices(unroll(stacked))


def test_whitened_cuts_need_the_moments_they_are_given(tiny):
    """Of each weight its own moment; the factors of the latest cut alone are kept."""
    matrices = {str(t): ffn_matrices(unroll(tiny), t) for t in (1, 2)}
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for matrix in matrices["1"]:
        x = torch.randn(200, matrix.weight.shape[1], generator=generator).double()
        moments[matrix] = x.mT @ x
    truncation = Truncation(matrices, moments)
    whitened = truncation.factors("whitened", "1")
    for matrix in matrices["1"]:
        expected = factors(matrix.weight, moments[matrix])
        torch.testing.assert_close(whitened[matrix].right, expected.right)
    assert truncation.factors("whitened", "1") is whitened
    with pytest.raises(KeyError):
        truncation.factors("whitened", "2")
    plain = truncation.factors("svd", "2")[matrices["2"][0]]
    torch.testing.assert_close(plain.right, factors(tiny.blocks[0].mlp.fc1.weight).right)


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        LowRank([torch.zeros(4)], None)
    with pytest.raises(TypeCheckError):
        LowRank([torch.zeros(4, 3)], None)(torch.zeros(2, 3, dtype=torch.int64))
