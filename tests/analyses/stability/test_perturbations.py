"""Perturbed runs against runs of the model one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign import LoopedEncoder, foreign
from jaxtyping import TypeCheckError
from torch import nn

from bvit_interp.analyses.stability.perturbations import perturbed_runs
from bvit_interp.analyses.stability.vectors import seeded_normal
from bvit_interp.errors import UserError
from bvit_interp.models.stepping import State, answer, embed, proceed
from bvit_interp.models.unroll import run_on, with_steps

INDEX = torch.tensor([2, 5])
PERTURBATIONS = [("random", 0, 0.3), ("partner", 2, 0.3)]


def runs(view, own, other, perturbations=PERTURBATIONS, kinds=(slice(0, 1), slice(1, None))):
    with torch.inference_mode():
        return perturbed_runs(
            view, embed(view, own), embed(view, other), INDEX, perturbations, kinds, seed=3
        )


def test_against_a_loop(any_model, images):
    own, other = images[:2], images[2:]
    view = run_on(any_model, 4)
    found = runs(view, own, other)
    steps = len(view.blocks)
    assert found["distance"].shape == (2, 2, steps + 1, 2)
    assert found["distance"][:, 1, :2].isnan().all()
    random = seeded_normal(INDEX, embed(view, own).tokens.shape[1:], 3, 2).float()
    with torch.no_grad():
        for i in range(2):
            for v, (source, start, eps) in enumerate(PERTURBATIONS):
                clean, beside = (
                    proceed(view, embed(view, x[i : i + 1]), start) for x in (own, other)
                )
                change = random[i] if source == "random" else beside.tokens[0] - clean.tokens[0]
                moved = clean.tokens[0] + eps * clean.tokens[0].norm() * change / change.norm()
                for t in range(start, steps + 1):
                    perturbed = proceed(view, State(moved[None], start, clean.memory), t)
                    z, there = (
                        proceed(view, clean, t).tokens[0].numpy(),
                        perturbed.tokens[0].numpy(),
                    )
                    for k, kind in enumerate((slice(0, 1), slice(1, None))):
                        far = np.linalg.norm(there[kind] - z[kind]) / np.linalg.norm(z[kind])
                        assert found["distance"][i, v, t, k].item() == pytest.approx(far, rel=1e-4)
                        pairs = zip(there[kind], z[kind], strict=True)
                        apart = [
                            np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b))
                            for a, b in pairs
                        ]
                        assert found["direction_distance"][i, v, t, k].item() == pytest.approx(
                            np.sqrt(np.mean(np.square(apart))), rel=1e-4
                        )
                    same = (
                        answer(view, perturbed).argmax()
                        == answer(view, proceed(view, clean, t)).argmax()
                    )
                    assert found["same_prediction"][i, v, t] == float(same)


def test_the_null_is_the_other_images_run(tiny, images):
    view = run_on(tiny, 3)
    found = runs(view, images[:2], images[2:])
    with torch.no_grad():
        own, other = (proceed(view, embed(view, x)).tokens for x in (images[:2], images[2:]))
    expected = (other - own)[:, 1:].flatten(1).norm(dim=1) / own[:, 1:].flatten(1).norm(dim=1)
    torch.testing.assert_close(found["distance_null"][:, 3, 1].float(), expected)
    # CLS has seen nothing at step 0
    assert (found["direction_distance_null"][:, 0, 0] == 0).all()


def test_a_block_that_gives_more_than_tokens_is_read_at_step_0_too(images):
    """Against the same loop over the block that gives tokens alone."""

    class WithNorms(LoopedEncoder):
        def __init__(self):
            super().__init__()
            self.block = Pair(self.block)

        def forward(self, images):
            tokens = self.patches(images).flatten(2).mT + self.positions
            for _ in range(self.steps):
                tokens, norms = self.block(tokens)
            return self.head(tokens.mean(1)) + 0 * norms.mean(1, keepdim=True)

    class Pair(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.of_tokens = block

        def forward(self, tokens):
            tokens = self.of_tokens(tokens)
            return tokens, tokens.norm(dim=-1)

    plain, pairs = foreign("encoder"), WithNorms().eval()
    pairs.load_state_dict(
        {name.replace("block.", "block.of_tokens."): w for name, w in plain.state_dict().items()}
    )
    views = [with_steps(plain), with_steps(pairs)]
    assert not views[1].gives_tokens
    wanted, found = (runs(view, images[:2], images[2:], kinds=[slice(None)]) for view in views)
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, equal_nan=True)


def test_a_small_perturbation_grows_as_its_tangent(tiny, images):
    """Forward-mode AD through three steps against a finite step of 1e-4."""
    view = run_on(tiny, 3)
    for block in view.blocks:
        block.attn.fused_attn = False
    found = runs(view, images[:2], images[2:], [("random", 0, 1e-3)], [slice(None)])
    z = embed(view, images[:2]).tokens.detach()
    random = seeded_normal(INDEX, z.shape[1:], 3, 2).float()
    tangent = random * (z.flatten(1).norm(dim=1) / random.flatten(1).norm(dim=1))[:, None, None]
    after, moved = torch.autograd.functional.jvp(lambda x: view.blocks(x), z, tangent)
    expected = moved.flatten(1).norm(dim=1) / after.flatten(1).norm(dim=1)
    torch.testing.assert_close(
        found["distance"][:, 0, 3, 0].float(), 1e-3 * expected, rtol=2e-2, atol=0
    )


def test_an_equal_image_gives_no_direction(tiny, images):
    view = run_on(tiny, 3)
    found = runs(view, images[:2], torch.stack([images[0], images[3]]))
    assert found["distance"][0, 1].isnan().all()
    assert found["same_prediction"][0, 1].isnan().all()
    assert found["same_prediction"][1, 1, 2:].isfinite().all()
    assert found["same_prediction"][0, 0].isfinite().all()


def test_states_that_are_not_finite(tiny, images):
    with pytest.raises(UserError, match="NaN or infinite"):
        runs(run_on(tiny, 3), images[:2] * torch.nan, images[2:])


def test_a_wrong_shape_is_refused(tiny, images):
    view = run_on(tiny, 2)
    own, other = (embed(view, each) for each in (images[:2], images[2:]))
    with pytest.raises(TypeCheckError):
        perturbed_runs(view, own, other, INDEX[None], PERTURBATIONS, [slice(None)], seed=3)
