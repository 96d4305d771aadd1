"""Products, spectra and exponents against the full Jacobian, and a linear map whose answers are on
paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bvit_interp.analyses.stability import jacobian
from bvit_interp.errors import UserError
from bvit_interp.models.stepping import State, advance, embed, proceed
from bvit_interp.models.unroll import run_on, unroll

INDEX = torch.tensor([3, 8])


def start(*shape, seed=0):
    return jacobian.seeded_normal(INDEX, shape, seed)


def linear(matrix, tokens, width):
    """The step z -> A z on the flattened tokens, the same for every image."""
    return lambda z: (z.flatten(1) @ matrix.T).unflatten(1, (tokens, width))


def full(step, state):
    """The full Jacobian ``(B, N D, N D)`` by torch, image by image."""
    of = [
        torch.autograd.functional.jacobian(lambda z: step(z)[0], each[None])[:, :, 0]
        for each in state
    ]
    count = state[0].numel()
    return torch.stack([each.reshape(count, count) for each in of]).numpy()


@pytest.fixture
def toy():
    """A of 6 numbers: singular values and eigenvalues known. Eigenvalues 1.3 exp(+-0.5 i), 0.9,
    0.5, -0.3 and 0.1."""
    turn = 1.3 * torch.tensor(
        [[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]], dtype=torch.float64
    )
    diagonal = torch.block_diag(
        turn, torch.diag(torch.tensor([0.9, 0.5, -0.3, 0.1], dtype=torch.float64))
    )
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).standard_normal((6, 6))))[0]
    return basis @ diagonal @ basis.T


def test_a_linear_toy(toy):
    """It is normal, so its singular values are the moduli, the double one found once; the iteration
    stops by itself."""
    step = jacobian.Linearised(linear(toy, 3, 2), start(3, 2))
    found = jacobian.largest_singular(step, start(3, 2, seed=1), 4, 10)
    np.testing.assert_allclose(found.values, [[1.3, 0.9, 0.5, 0.3]] * 2, atol=1e-10)
    assert (found.residuals < 1e-8).all()
    leading = jacobian.spectral_radius(step, start(3, 2, seed=1), 10)
    np.testing.assert_allclose(leading.radius, [1.3, 1.3], atol=1e-10)
    assert leading.rotates.all()
    assert (leading.residual < 1e-8).all()
    stretch = jacobian.spectral_radius(
        jacobian.Linearised(linear(toy @ toy - 2 * toy, 3, 2), start(3, 2)), start(3, 2), 6
    )
    other = np.abs(np.linalg.eigvals((toy @ toy - 2 * toy).numpy())).max()
    np.testing.assert_allclose(stretch.radius, other, rtol=1e-9)


def test_a_toy_far_from_normal():
    """[[1, 10], [0, 0.5]]: eigenvalues 1 and 0.5, but s_1 s_2 = det = 0.5 and s_1^2 + s_2^2 =
    101.25."""
    matrix = torch.tensor([[1.0, 10.0], [0.0, 0.5]], dtype=torch.float64)
    step = jacobian.Linearised(linear(matrix, 2, 1), start(2, 1))
    s_1, s_2 = jacobian.largest_singular(step, start(2, 1), 2, 2).values[0]
    assert (s_1 * s_2).item() == pytest.approx(0.5)
    assert (s_1**2 + s_2**2).item() == pytest.approx(101.25)
    assert jacobian.spectral_radius(step, start(2, 1), 2).radius[0].item() == pytest.approx(1.0)


def test_exponents_of_the_toy(toy):
    """All six add up to log |det A| a step whatever the start; in the long run they are log
    |l_i|."""
    steps = [jacobian.Linearised(linear(toy, 3, 2), start(3, 2))] * 60
    tangents, logs = jacobian.orthonormal(start(6, 3, 2))[0], []
    for step in steps:
        tangents, log = jacobian.orthonormal(jacobian.transported(step, tangents))
        logs.append(log)
        gram = tangents.flatten(2) @ tangents.flatten(2).mT
        np.testing.assert_allclose(gram, np.eye(6)[None].repeat(2, 0), atol=1e-12)
    det = math.log(1.3 * 1.3 * 0.9 * 0.5 * 0.3 * 0.1)
    np.testing.assert_allclose(logs[0].sum(1), det, atol=1e-10)
    expected = np.log([1.3, 1.3, 0.9, 0.5, 0.3, 0.1])
    np.testing.assert_allclose(torch.stack(logs[30:]).mean(0), [expected] * 2, atol=1e-3)
    ftle = jacobian.largest_singular(jacobian.Chain(steps[:5]), start(3, 2), 2, 6).values.log() / 5
    np.testing.assert_allclose(ftle, math.log(1.3), atol=1e-9)


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
    steps = list(jacobian.along(view, state))
    packed = steps[0].output
    step = jacobian.step_map(view, 1)
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
    found = jacobian.largest_singular(steps[1], vector, 2, 60)
    np.testing.assert_allclose(found.values, s[:, :2], rtol=1e-5)
    for mine, theirs in ((found.left, u[:, :, 0]), (found.right, vh[:, 0])):
        overlap = np.abs(np.einsum("bi,bi->b", mine.flatten(1).numpy(), theirs))
        np.testing.assert_allclose(overlap, 1, atol=1e-4)
    few = jacobian.largest_singular(steps[1], vector, 2, 5)
    assert (few.values < found.values + 1e-12).all()
    assert (
        (few.values[:, 0] - torch.from_numpy(s[:, 0])).abs()
        <= few.residuals[:, 0] * few.values[:, 0]
    ).all()
    radius = jacobian.spectral_radius(steps[1], vector, 160).radius
    np.testing.assert_allclose(radius, np.abs(np.linalg.eigvals(matrices)).max(1), rtol=1e-5)


def test_gains_are_the_blocks_of_the_jacobian(tiny_reg4, images):
    """Against ||J_ba||_F / sqrt(columns), which many probes come to; and the identity by hand."""
    view = jacobian.differentiable(tiny_reg4, 2)
    step = next(iter(jacobian.along(view, embed(view, images[:2].double()))))
    state = embed(view, images[:2].double()).tokens
    blocks = full(jacobian.step_map(view, 0), state).reshape(2, 21, 32, 21, 32)
    kinds = [slice(0, 1), slice(1, 5), slice(5, 21)]
    found = jacobian.gains(step, start(24, 21, 32), kinds)
    for i, source in enumerate(kinds):
        for j, read in enumerate(kinds):
            block = blocks[:, read, :, source]
            expected = np.sqrt((block**2).sum((1, 2, 3, 4)) / (block.shape[3] * 32))
            np.testing.assert_allclose(found[:, i, j], expected, rtol=0.15)
    same = jacobian.gains(jacobian.Linearised(lambda z: 1.0 * z, state), start(2, 21, 32), kinds)
    np.testing.assert_allclose(same, np.eye(3)[None].repeat(2, 0), atol=1e-12)


def test_shares_of_energy():
    vector = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]])
    np.testing.assert_allclose(
        jacobian.shares(vector, [slice(0, 1), slice(1, 3)]), [[9 / 25, 16 / 25]], rtol=1e-6
    )


def test_the_float64_view_is_the_model_and_leaves_it_alone(any_model, images):
    before = {key: value.clone() for key, value in any_model.state_dict().items()}
    view = jacobian.differentiable(any_model, 30)
    state = embed(view, images.double())
    at_end = proceed(view, state, min(30, len(any_model.blocks)))
    theirs = proceed(run_on(any_model, 30), embed(any_model, images), at_end.step)
    torch.testing.assert_close(at_end.tokens.float(), theirs.tokens, rtol=1e-3, atol=1e-3)
    packed = [step.output for step in jacobian.along(view, state)]
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
        steps = list(jacobian.along(view, embed(view, images[:2].double())))
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
    from torch.nn.utils import prune

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


def test_random_vectors_are_an_images_own():
    both = jacobian.seeded_normal(torch.tensor([4, 9]), (3, 2), 1)
    assert torch.equal(both[1:], jacobian.seeded_normal(torch.tensor([9]), (3, 2), 1))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, jacobian.seeded_normal(torch.tensor([4, 9]), (3, 2), 2))


def test_states_that_are_not_finite(tiny, images):
    with pytest.raises(UserError, match="NaN or infinite"):
        jacobian.finite(torch.tensor([1.0, math.nan]))
    view = jacobian.differentiable(tiny, 2)
    state = State(embed(view, images.double()).tokens * math.inf)
    with pytest.raises(UserError, match="NaN or infinite"):
        jacobian.of_run(view, state, torch.arange(4), [slice(0, 17)], [1], 2, 1, 2, 0)


def test_the_full_matrix_is_never_made(tiny, images):
    """No tensor of a product is as large as one image's Jacobian of 544 x 544."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(
                t.numel()
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, torch.Tensor)
            )
            return out

    view = jacobian.differentiable(tiny, 1)
    state = embed(view, images[:2].double())
    with Watch():
        jacobian.of_run(view, state, INDEX, [slice(0, 17)], [1], 1, 2, 8, 0)
    assert 0 < max(largest) < 544 * 544
