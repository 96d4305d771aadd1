"""Products, gains and the float64 view against the full Jacobian by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch.nn.utils import prune

from bvit_interp.analyses.stability import jacobian
from bvit_interp.analyses.stability.krylov import largest_singular_values, spectral_radius
from bvit_interp.analyses.stability.vectors import seeded_normal
from bvit_interp.models.stepping import advance, embed, proceed
from bvit_interp.models.unroll import run_on, unroll

INDEX = torch.tensor([3, 8])


def start(*shape, seed=0):
    return seeded_normal(INDEX, shape, seed)


def full(step, state):
    """The full Jacobian ``(B, N D, N D)`` by torch, image by image."""
    of = [
        torch.autograd.functional.jacobian(lambda z: step(z)[0], each[None])[:, :, 0]
        for each in state
    ]
    count = state[0].numel()
    return torch.stack([each.reshape(count, count) for each in of]).numpy()


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:FutureWarning"
)  # torch.func.jvp compiles decompositions
@pytest.mark.parametrize(
    "kind",
    [
        {"name": "bvit_small_te_patch16_224"},
        {
            "name": "bvit_small_sc_patch16_224",
            "memory": "block",
            "interval": 2,
            "step_embed": True,
            "num_steps": 3,
        },
        {"name": "vit_tiny_patch16_224", "depth": 3},
    ],
)
def test_a_step_of_a_model_against_its_full_jacobian(kind, make, images):
    """Five tokens of width 32: a matrix of 160 x 160, with a memory of 320 x 320."""
    view = jacobian.differentiable(make(img_size=16, **kind), 3)
    state = embed(view, images[:2, :, :16, :16].double())
    steps = list(jacobian.jacobians_along(view, state))
    packed = steps[0].output
    step = jacobian.step_map(view, advance(view, state))
    matrices = full(step, packed)
    vector = start(*packed.shape[1:])
    flat = vector.flatten(1).numpy()
    np.testing.assert_allclose(
        steps[1](vector).flatten(1), np.einsum("bij,bj->bi", matrices, flat), atol=1e-9
    )
    np.testing.assert_allclose(
        steps[1].adjoint(vector).flatten(1), np.einsum("bji,bj->bi", matrices, flat), atol=1e-9
    )
    torch.testing.assert_close(steps[1](vector), torch.func.jvp(step, (packed,), (vector,))[1])
    u, s, vh = np.linalg.svd(matrices)
    found = largest_singular_values(steps[1], vector, 2, 60)
    np.testing.assert_allclose(found.values, s[:, :2], rtol=1e-5)
    for mine, theirs in ((found.left, u[:, :, 0]), (found.right, vh[:, 0])):
        overlap = np.abs(np.einsum("bi,bi->b", mine.flatten(1).numpy(), theirs))
        np.testing.assert_allclose(overlap, 1, atol=1e-4)
    few = largest_singular_values(steps[1], vector, 2, 5)
    assert (few.values < found.values + 1e-12).all()
    assert (
        (few.values[:, 0] - torch.from_numpy(s[:, 0])).abs()
        <= few.residuals[:, 0] * few.values[:, 0]
    ).all()
    radius = spectral_radius(steps[1], vector, 160).radius
    np.testing.assert_allclose(radius, np.abs(np.linalg.eigvals(matrices)).max(1), rtol=1e-5)


def test_gains_are_the_blocks_of_the_jacobian(tiny_reg4, images):
    """Against ||J_ba||_F / sqrt(columns), which many probes come to; and the identity by hand."""
    view = jacobian.differentiable(tiny_reg4, 2)
    step = next(iter(jacobian.jacobians_along(view, embed(view, images[:2].double()))))
    start_state = embed(view, images[:2].double())
    state = start_state.tokens
    blocks = full(jacobian.step_map(view, start_state), state).reshape(2, 21, 32, 21, 32)
    kinds = [slice(0, 1), slice(1, 5), slice(5, 21)]
    found = jacobian.gains(step, start(24, 21, 32), kinds)
    for i, source in enumerate(kinds):
        for j, read in enumerate(kinds):
            block = blocks[:, read, :, source]
            expected = np.sqrt((block**2).sum((1, 2, 3, 4)) / (block.shape[3] * 32))
            np.testing.assert_allclose(found[:, i, j], expected, rtol=0.15)
    same = jacobian.gains(jacobian.Linearised(lambda z: 1.0 * z, state), start(2, 21, 32), kinds)
    np.testing.assert_allclose(same, np.eye(3)[None].repeat(2, 0), atol=1e-12)


def test_the_float64_view_is_the_model_and_leaves_it_alone(any_model, images):
    before = {key: value.clone() for key, value in any_model.state_dict().items()}
    view = jacobian.differentiable(any_model, 30)
    state = embed(view, images.double())
    at_end = proceed(view, state, min(30, len(any_model.blocks)))
    theirs = proceed(run_on(any_model, 30), embed(any_model, images), at_end.step)
    torch.testing.assert_close(at_end.tokens.float(), theirs.tokens, rtol=1e-3, atol=1e-3)
    packed = [step.output for step in jacobian.jacobians_along(view, state)]
    torch.testing.assert_close(packed[at_end.step - 1], jacobian.pack(view, at_end))
    assert all(torch.equal(value, before[key]) for key, value in any_model.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in any_model.parameters())
    assert all(module.fused_attn for module in any_model.modules() if hasattr(module, "fused_attn"))


def test_memory_that_training_froze_is_part_of_the_map(make, images):
    frozen = make(
        name="bvit_small_sc_patch16_224", num_steps=3, interval=2, memory_gradient="frozen"
    )
    through = make(name="bvit_small_sc_patch16_224", num_steps=3, interval=2)
    products = []
    for model in (frozen, through):
        view = jacobian.differentiable(model, 3)
        steps = list(jacobian.jacobians_along(view, embed(view, images[:2].double())))
        products.append(jacobian.Chain(steps)(start(34, 32)))
    torch.testing.assert_close(products[0], products[1])
    assert frozen.blocks[0].memory.gradient == "frozen"


def test_the_null_permutes_matrices_once_a_block(tiny, stacked, images):
    one, same, other = (jacobian.differentiable(tiny, 3, seed) for seed in (5, 5, 6))
    own = jacobian.differentiable(tiny, 3)
    for name in ("attn.qkv", "mlp.fc2"):
        weights = [view.blocks[0].get_submodule(name).weight for view in (own, one, same, other)]
        assert torch.equal(weights[0].flatten().sort().values, weights[1].flatten().sort().values)
        assert torch.equal(weights[1], weights[2])
        assert not torch.equal(weights[1], weights[3])
        assert not torch.equal(weights[0], weights[1])
        assert one.blocks[2].get_submodule(name).weight is weights[1]
    assert torch.equal(one.patch_embed.proj.weight, own.patch_embed.proj.weight)
    assert torch.equal(one.blocks[0].norm1.weight, own.blocks[0].norm1.weight)
    of_stack = jacobian.differentiable(stacked, 3, 5)
    assert not torch.equal(of_stack.blocks[0].mlp.fc1.weight, of_stack.blocks[1].mlp.fc1.weight)


def test_an_unroll_and_a_pruned_model(tiny, images):
    own = jacobian.differentiable(tiny, 12)
    of_view = jacobian.differentiable(unroll(tiny), 12, 5)
    assert torch.equal(
        of_view.blocks[0].mlp.fc1.weight,
        jacobian.differentiable(tiny, 12, 5).blocks[3].mlp.fc1.weight,
    )
    prune.random_unstructured(tiny.blocks[0].mlp.fc1, "weight", 0.5)
    try:
        view = jacobian.differentiable(tiny, 12)
        state = embed(view, images.double())
        pruned = proceed(view, state, 1).tokens
        torch.testing.assert_close(
            pruned.float(), advance(unroll(tiny), embed(tiny, images)).tokens, rtol=1e-3, atol=1e-3
        )
        assert not torch.allclose(pruned, advance(own, state).tokens)
    finally:
        prune.remove(tiny.blocks[0].mlp.fc1, "weight")


def test_a_wrong_shape_is_refused(tiny, images):
    view = jacobian.differentiable(tiny, 1)
    state = embed(view, images[:2].double())
    with pytest.raises(TypeCheckError):
        jacobian.Linearised(jacobian.step_map(view, state), state.tokens[0])
    step = next(jacobian.jacobians_along(view, state))
    with pytest.raises(TypeCheckError):
        step(torch.zeros(17, 32, dtype=torch.float64))
    with pytest.raises(TypeCheckError):
        jacobian.gains(step, start(17, 32), [slice(0, 1)])
