"""Random changes of the size of an ablation's, by hand, on planted models and on random ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError
from timm.models.vision_transformer import ParallelScalingBlock

from bvit_interp.analyses.ablation import Config, measure, summary
from bvit_interp.analyses.ablation.effects import Ablator
from bvit_interp.analyses.ablation.norm_matched import move_as_far, random_directions
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import evenly_spaced
from bvit_interp.data.scenes import Scenes
from bvit_interp.models.planted import plants
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import Address

LABELS = torch.tensor([3, 1, 4, 1])


def rows(frame, **keys):
    for key, value in keys.items():
        frame = frame[frame[key] == value]
    return frame


def direction(seed, number, step, unit, image, width, draw=0):
    """The unit vector of numpy's generator for these seeds."""
    drawn = np.random.default_rng((seed, number, step, unit, image)).standard_normal((9, width))
    return torch.tensor(drawn[draw] / np.linalg.norm(drawn[draw]), dtype=torch.float32)


# ---- directions ----------------------------------------------------------------------------------


def test_directions_depend_on_seed_site_step_unit_and_image_alone():
    drawn = random_directions(torch.tensor([5, 2]), "z", 3, [1, 0], 16, draws=2, seed=4)
    assert drawn.shape == (2, 2, 2, 16)
    for draw, u, i in np.ndindex(2, 2, 2):
        unit, image = [1, 0][u], [5, 2][i]
        torch.testing.assert_close(drawn[draw, u, i], direction(4, 0, 3, unit, image, 16, draw))
    neurons = random_directions(torch.tensor([5]), "mlp_post", 3, [1], 16, seed=4)[0, 0, 0]
    torch.testing.assert_close(neurons, direction(4, 1, 3, 1, 5, 16))
    others = [
        random_directions(torch.tensor([image]), site, step, [unit], 16, seed=seed)
        for image, site, step, unit, seed in [
            (5, "z", 3, 1, 4),
            (6, "z", 3, 1, 4),
            (5, "mlp_post", 3, 1, 4),
            (5, "z", 2, 1, 4),
            (5, "z", 3, 0, 4),
            (5, "z", 3, 1, 5),
        ]
    ]
    gram = torch.cat(others).flatten(1) @ torch.cat(others).flatten(1).T
    torch.testing.assert_close(gram.diagonal(), torch.ones(6))
    assert (gram - torch.eye(6)).abs().max() < 0.9


def test_directions_are_spread_evenly():
    drawn = random_directions(torch.arange(4000), "z", 1, [0], 5)[0, 0]
    assert drawn.mean(0).abs().max() < 0.03
    torch.testing.assert_close(drawn.T @ drawn / 4000, torch.eye(5) / 5, atol=0.02, rtol=0)


def test_intact_runs_are_moved_as_far_as_ablated_ones():
    generator = torch.Generator().manual_seed(0)
    ablated = torch.randn(2, 3, 7, 8, generator=generator)  # two variants of three images
    intact = torch.randn(3, 7, 8, generator=generator).expand(2, 2, 3, 7, 8)
    directions = random_directions(torch.arange(3), "z", 1, [0, 1], 8, draws=2)
    runs = torch.cat([ablated[None], intact]).flatten(0, 2)
    found = move_as_far(directions)(runs, Address("attn_out", 1)).unflatten(0, (3, 2, 3))
    assert torch.equal(found[0], ablated)
    for draw, unit, image, token in np.ndindex(2, 2, 3, 7):
        change = found[1 + draw, unit, image, token] - intact[0, 0, image, token]
        far = (ablated[unit, image, token] - intact[0, 0, image, token]).square().sum().sqrt()
        torch.testing.assert_close(change, far * directions[draw, unit, image], atol=1e-5, rtol=0)


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        random_directions(torch.zeros(2, 2, dtype=torch.int64), "z", 1, [0], 4)
    with pytest.raises(TypeCheckError):
        move_as_far(torch.zeros(2, 3, 4))


# ---- effects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "number"), [("z", 0), ("mlp_post", 1)])
@pytest.mark.parametrize("name", ["tiny", "tiny_fl", "tiny_distilled", "stacked"])
def test_the_null_is_a_whole_run_with_a_hook(name, request, images, site, number):
    """Unit 1 is ablated to zero at step 2: its output is moved by hand, by the same norms."""
    model, width = request.getfixturevalue(name), 32
    ablator = Ablator(model, groups=2, seed=5)
    index = torch.tensor([7, 0, 3, 11])
    spans = [(1, 3), (2, 2), (3, 3)]
    with torch.inference_mode():
        effects = ablator.effects(images, LABELS, ["zero"], spans, index=index)
        plain = ablator.effects(images, LABELS, ["zero"], spans)
    assert effects.shape == (4, 1, 7, 5, 4)
    torch.testing.assert_close(effects[:, :, :, :3], plain, rtol=1e-4, atol=1e-5)
    assert effects[:, :, 4, 3:].isnan().all()  # random channels
    assert effects[:, :, [0, 1, 2, 3, 5, 6], 3:].isfinite().all()

    inner = {"z": "attn.proj", "mlp_post": "mlp.fc2"}[site]
    view = unroll(model)
    channels = slice(8, 16) if site == "z" else slice(64, 128)

    def silence(_, args):
        return (args[0].index_fill(-1, torch.arange(128)[channels], 0.0),)

    with torch.inference_mode():
        probe = Probe(model)
        output = {"z": "attn_out", "mlp_post": "mlp_out"}[site]
        intact = probe.record(images, output, steps=2)[output, 2]
        silenced = view.blocks[1].get_submodule(inner).register_forward_pre_hook(silence)
        far = (Probe(view).record(images, output, steps=2)[output, 2] - intact).norm(dim=-1)
        silenced.remove()
        assert far.min() > 1e-3
        chosen = torch.stack([direction(5, number, 2, 1, i, width) for i in index.tolist()])
        moved = intact + far[..., None] * chosen[:, None]
        with probe.edit({(output, 2): lambda x, _: moved}):
            logits = probe(images).double()
        clean = model(images).double()
    kl = (clean.softmax(-1) * (clean.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    unit = 1 if site == "z" else 6
    torch.testing.assert_close(effects[:, 0, unit, 3, 3], kl, rtol=1e-3, atol=1e-6)
    change = (logits - clean)[range(4), LABELS]
    torch.testing.assert_close(effects[:, 0, unit, 3, 1], change, rtol=1e-3, atol=1e-5)


def test_several_draws_are_averaged_and_the_first_stays(tiny, images, monkeypatch):
    def of(draws):
        ablator = Ablator(tiny, groups=0, draws=draws)
        with torch.inference_mode():
            found = ablator.effects(images, LABELS, ["zero"], [(2, 2)], index=torch.arange(4))
        return found[:, 0, :4, 1]

    first, both = of(1), of(2)

    def second_alone(*args):
        return random_directions(*args[:5], 2, args[6])[1:]

    monkeypatch.setattr("bvit_interp.analyses.ablation.effects.random_directions", second_alone)
    second = of(1)
    assert not torch.allclose(first[..., 3], second[..., 3], rtol=1e-2)
    torch.testing.assert_close((first + second) / 2, both, rtol=1e-3, atol=1e-6)


def test_variants_in_turn_and_any_batch_give_the_same(tiny, images, monkeypatch):
    ablator, index = Ablator(tiny, groups=3), torch.tensor([4, 9, 2, 30])
    with torch.inference_mode():
        whole = ablator.effects(images, LABELS, ["zero"], [(3, 3)], index=index)
        parts = [
            ablator.effects(images[k], LABELS[k], ["zero"], [(3, 3)], index=index[k])
            for k in (slice(1), slice(1, 4))
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-5, equal_nan=True)
        monkeypatch.setattr("bvit_interp.analyses.ablation.effects._BYTES_PER_RUN", 1)
        torch.testing.assert_close(
            ablator.effects(images, LABELS, ["zero"], [(3, 3)], index=index),
            whole,
            rtol=1e-3,
            atol=1e-5,
            equal_nan=True,
        )


def test_the_runs_of_the_null_are_counted_in_the_memory(tiny, images, monkeypatch):
    """A variant of four images: its ablated run and its intact one, of 4 * 17 tokens each."""
    ablator, batches = Ablator(tiny, groups=0), []
    numbers = 4 * 17 * (4 * 32 + 128)
    monkeypatch.setattr("bvit_interp.analyses.ablation.effects._BYTES_PER_RUN", 5 * 4 * numbers)
    handle = ablator.probe.model.blocks[11].register_forward_pre_hook(
        lambda _, args: batches.append(len(args[0]))
    )
    with torch.inference_mode():
        ablator.effects(images, LABELS, ["zero"], [(3, 3)], index=torch.arange(4))
    handle.remove()
    assert batches == [4, 16, 16, 4]  # clean; two heads and their nulls, twice; random channels


# ---- the table -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clocked():
    """Heads that copy the class at step 2, and never."""
    model = plants.clocked_heads([{2}, ()], 4)
    config = Config(methods=("zero",), scopes=("each", "all"), groups=0, n_ablated=20)
    return measure({"planted": model}, Scenes(40), config)


def test_a_head_that_writes_what_is_read_is_far_above_its_null(clocked):
    kl = rows(clocked, site="z", metric="kl", scope="each").set_index(["unit", "step"])
    at_two = kl.loc[(0, 2)]
    assert at_two["value"] == pytest.approx(np.log(4), abs=0.01)  # four classes, all alike
    assert at_two["norm_null"] < at_two["value"] / 20
    logit = rows(clocked, site="z", metric="logit", scope="each", unit=0, step=2)
    assert logit["value"].item() == pytest.approx(-20, abs=0.1)
    assert abs(logit["norm_null"].item()) > 0.1  # it is moved, though


def test_a_head_that_is_off_is_not_moved(clocked):
    kl = rows(clocked, site="z", metric="kl", scope="each")
    off = kl[(kl["unit"] == 1) | (kl["step"] != 2)]
    assert off["norm_null"].abs().max() < 1e-9
    assert off["value"].abs().max() < 1e-9


def test_the_null_is_of_single_steps_alone(clocked):
    each = clocked["scope"] == "each"
    assert clocked.loc[each, "norm_null"].notna().all()
    assert clocked.loc[~each, "norm_null"].isna().all()


def test_heads_that_write_in_random_directions_are_at_their_null(make):
    """Stacks of random weights: what a block's projection writes means nothing to the others."""
    ratios = []
    for seed in range(4):
        model = make(name="vit_tiny_patch16_224", depth=2, seed=seed)
        generator = torch.Generator().manual_seed(100 + seed)
        for block in model.blocks:
            block.attn.proj.weight.data = torch.randn(32, 32, generator=generator)
        config = Config(methods=("zero",), scopes=("each",), groups=0, limit=30)
        frame = measure({"m": model}, Noise(30), config)
        kl = rows(frame, site="z", metric="kl", scope="each")
        ratios += np.log(kl["value"] / kl["norm_null"]).tolist()
    assert abs(np.mean(ratios)) < 3 * np.std(ratios, ddof=1) / len(ratios) ** 0.5
    assert abs(np.mean(ratios)) < 0.5


class Noise:
    """Images of noise, of ten classes."""

    classes = tuple(map(str, range(10)))
    native_size = 32
    has_masks = False

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def name(self, i):
        return f"noise-{i}"

    def read(self, i):
        rng = np.random.default_rng(i)
        return rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), i % 10, None


def test_every_method_and_site_has_its_own_norms(make, digits):
    """Resample ablation of a group at step 2, from the images that the table is made of."""
    model = make(num_steps=3, num_heads=2)
    config = Config(n_ablated=6, limit=6, groups=2, scopes=("from", "each"), seed=3)
    frame = measure({"m": model}, digits, config)
    places = evenly_spaced(60, 6)
    geometry = Geometry.of(model, digits)
    images, donors = (
        torch.stack([geometry(digits.read(i)[0], None)[0] for i in each])
        for each in (places, np.roll(places, -3))
    )
    probe = Probe(model)
    with torch.inference_mode():
        clean = model(images).double()
        intact = probe.record(images, ["mlp_post", "mlp_out"], steps=2)
        given = probe.record(donors, "mlp_post", steps=2)["mlp_post", 2]
        ablated = intact["mlp_post", 2].clone()
        ablated[..., 64:] = given[..., 64:]
        far = ((ablated - intact["mlp_post", 2]) @ model.blocks[0].mlp.fc2.weight.T).norm(dim=-1)
        chosen = torch.stack([direction(3, 1, 2, 1, int(i), 32) for i in places])
        moved = intact["mlp_out", 2] + far[..., None] * chosen[:, None]
        with probe.edit({("mlp_out", 2): lambda x, _: moved}):
            logits = probe(images).double()
    kl = (clean.softmax(-1) * (clean.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    row = rows(frame, method="resample", site="mlp_post", scope="each", metric="kl", unit=1, step=2)
    assert row["norm_null"].item() == pytest.approx(kl.item(), rel=1e-3)
    zero = rows(frame, method="zero", site="mlp_post", scope="each", metric="kl", unit=1, step=2)
    assert zero["norm_null"].item() != pytest.approx(kl.item(), rel=1e-2)


def test_batches_of_any_size_give_the_same_null(make, digits):
    config = {"limit": 7, "groups": 2, "scopes": ("each",), "methods": ("mean", "resample")}
    model = make(num_steps=3, num_heads=2)
    whole = measure({"m": model}, digits, Config(**config))
    small = measure({"m": model}, digits, Config(**config, batch_size=2))
    pd.testing.assert_frame_equal(small, whole, rtol=1e-4, atol=3e-6)
    assert whole.loc[whole["scope"] == "each", "norm_null"].notna().all()


def test_no_draws_no_null(make, digits):
    config = Config(n_ablated=3, groups=0, methods=("zero",), norm_draws=0)
    frame = measure({"m": make(num_steps=3, num_heads=2)}, digits, config)
    assert frame["norm_null"].isna().all()
    assert frame["value"].notna().any()


def test_blocks_that_add_attention_and_ffn_at_once_have_no_null(make, digits):
    options = {"block_fn": ParallelScalingBlock, "init_values": 1.0}
    model = make(name="vit_tiny_patch16_224", depth=2, num_heads=2, **options)
    config = Config(n_ablated=3, groups=0, methods=("zero",), scopes=("each",))
    frame = measure({"m": model}, digits, config)
    assert frame["norm_null"].isna().all()
    assert rows(frame, scope="each", metric="kl")["value"].gt(0).all()


def test_the_summary_has_the_ratio_of_kl(clocked):
    shown = summary(clocked).set_index(["scope", "unit"])
    kl = rows(clocked, site="z", metric="kl", scope="each", step=2, unit=0).iloc[0]
    assert shown.loc[("each", 0), "step"] == 2
    assert shown.loc[("each", 0), "kl_ratio"] == pytest.approx(kl["value"] / kl["norm_null"])
