"""The pointing game on maps whose score is known: the mask, its complement, noise, a fixed
patch."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp import metrics
from bvit_interp.analyses.pointing_game import Config, game, measure, summary
from bvit_interp.analyses.pointing_game.untrained import untrained
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.scenes import Scenes
from bvit_interp.data.stream import stream
from bvit_interp.errors import UserError
from bvit_interp.models.planted import plants
from bvit_interp.probes import saliency
from bvit_interp.probes.probe import Probe

GRID = (4, 4)


@pytest.fixture
def maps_are(monkeypatch):
    """``maps_are(fn)``: fn(ids ``(B, 32, 32)``, labels ``(B,)``) -> maps ``(B, P)`` in place of
    attention."""
    module = importlib.import_module("bvit_interp.analyses.pointing_game.measure")

    def replace(fn):
        def play_with_these(maps, ids, labels, grid, **rules):
            given = fn(ids, labels).float().reshape(len(ids), *[1] * (maps.ndim - 2), -1)
            return game.play(given.expand_as(maps), ids, labels, grid, **rules)

        monkeypatch.setattr(module, "play", play_with_these)

    return replace


def heads(frame):
    return frame[frame["head"].str.isdigit()]


def test_the_mask_itself_as_map_hits_always_and_its_complement_never(tiny, squares, maps_are):
    maps_are(lambda ids, labels: metrics.at_patch_centres(ids > 0, GRID).double())
    assert (measure({"m": tiny}, squares(), Config())["hit_ratio"] == 1.0).all()
    maps_are(lambda ids, labels: metrics.at_patch_centres(ids == 0, GRID).double())
    assert (measure({"m": tiny}, squares(), Config())["hit_ratio"] == 0.0).all()


def test_random_maps_hit_as_often_as_the_mask_is_large(tiny, squares, monkeypatch):
    generator = torch.Generator().manual_seed(3)

    def noise(probe, images):
        return torch.rand(len(images), probe.num_steps, probe.num_heads, 16, generator=generator)

    monkeypatch.setitem(saliency.METHODS, "attention", noise)
    frame = heads(measure({"m": tiny}, squares(count=351), Config(untrained=False)))
    assert (frame["chance"] == 0.25).all()  # a 16 x 16 square of 32 x 32
    covered = ((frame["low"] <= 0.25) & (frame["high"] >= 0.25)).mean()
    assert covered >= 0.85  # 95 % intervals of 48 heads and steps
    assert abs(frame["hit_ratio"].mean() - 0.25) < 0.01
    assert ((frame["gain_low"] <= 0) & (frame["gain_high"] >= 0)).mean() >= 0.85
    assert abs(frame["gain"].mean()) < 0.01


def test_a_fixed_patch_scores_as_counted_by_hand(tiny, squares, maps_are):
    # patch (1, 1) has its centre at pixel (12, 12): inside the squares at rows and columns 0 and 8,
    # not 16
    def corner(ids, labels):
        maps = torch.zeros(len(ids), 16)
        maps[:, 5] = 1
        return maps

    maps_are(corner)
    frame = measure({"m": tiny}, squares(), Config())
    assert np.allclose(frame["hit_ratio"], 4 / 9)
    # the image's centre pixel (16, 16) lies in the squares that begin at 8 or 16 both ways
    assert np.allclose(frame["centre_hit_ratio"], 4 / 9)
    # it hits the squares of the other images as often
    assert np.allclose(frame[["other_masks", "untrained_hit_ratio"]], 4 / 9)
    assert np.allclose(frame[["gain", "untrained_gain"]], 0)
    assert (frame["gain_low"] <= 0).all()
    assert (frame["gain_high"] >= 0).all()


def test_ties_count_by_expectation(tiny, squares, maps_are):
    maps_are(lambda ids, labels: torch.zeros(len(ids), 16))
    frame = measure({"m": tiny}, squares(), Config())
    assert np.allclose(frame["hit_ratio"], 4 / 16)  # every square covers 4 of the 16 patch centres


def test_ignored_points_are_left_out_and_counted(tiny, squares, maps_are):
    def top_left(ids, labels):
        maps = torch.zeros(len(ids), 16)
        maps[:, 0] = 1
        return maps

    maps_are(top_left)
    frame = heads(measure({"m": tiny}, squares(ignore=True), Config()))
    assert (frame["n_ignored"] == 27).all()
    assert (frame["n"] == 0).all()
    assert frame["hit_ratio"].isna().all()


def test_images_without_their_object_are_skipped_and_counted(tiny, squares, maps_are):
    maps_are(lambda ids, labels: metrics.at_patch_centres(ids > 0, GRID).double())
    frame = measure({"m": tiny}, squares(empty=5), Config())
    assert (frame["n_skipped"] == 5).all()
    assert (frame["n"] == 22).all()
    assert (frame["hit_ratio"] == 1.0).all()
    with pytest.raises(UserError, match="no image shows its object"):
        measure({"m": tiny}, squares(empty=27), Config())


def test_own_class_and_any_object(tiny, squares, maps_are):
    class Mislabelled(squares):
        def read(self, i):
            image, label, mask = super().read(i)
            return image, (label + 1) % 3, mask

    class HalfOwn(squares):
        def read(self, i):
            image, label, mask = super().read(i)
            mask[:, 16:][mask[:, 16:] > 0] = 3 - label or 1
            return image, label, mask

    with pytest.raises(UserError, match="no image shows"):
        measure({"m": tiny}, Mislabelled(), Config())
    assert measure({"m": tiny}, Mislabelled(), Config(target="any"))["chance"].iloc[0] == 0.25
    own, anything = (
        measure({"m": tiny}, HalfOwn(), Config(target=t))["chance"].iloc[0] for t in ("own", "any")
    )
    assert own < anything


def test_tolerance_and_majority(tiny, squares, maps_are):
    # the centre of patch (3, 3) is pixel (28, 28); squares end at 15, 23 or 31, the nearest object
    # pixel of the middle ones lies sqrt(2) * 5 = 7.07 away, or 5 away when only one side is short
    def corner(ids, labels):
        maps = torch.zeros(len(ids), 16)
        maps[:, 15] = 1
        return maps

    maps_are(corner)
    by_tolerance = {
        t: measure({"m": tiny}, squares(), Config(tolerance=t))["hit_ratio"].iloc[0]
        for t in (0, 5, 5.1, 7.08)
    }
    assert by_tolerance == pytest.approx({0: 1 / 9, 5: 1 / 9, 5.1: 3 / 9, 7.08: 4 / 9})
    assert measure({"m": tiny}, squares(), Config(point="majority"))["hit_ratio"].iloc[
        0
    ] == pytest.approx(1 / 9)


def test_class_average(tiny, squares, maps_are):
    class Unbalanced(squares):
        """Class a is always hit and three times as frequent as b, which never is."""

        def read(self, i):
            image, _, mask = super().read(i)
            label = 0 if i % 4 else 1
            mask[:] = 0
            mask[(slice(0, 8) if label == 0 else slice(24, 32))] = label + 1
            return image, label, mask

    def top(ids, labels):
        maps = torch.zeros(len(ids), 16)
        maps[:, :4] = 1
        return maps

    maps_are(top)
    image, by_class = (
        measure({"m": tiny}, Unbalanced(count=28), Config(average=a)) for a in ("image", "class")
    )
    assert image["hit_ratio"].iloc[0] == pytest.approx(0.75)
    assert by_class["hit_ratio"].iloc[0] == pytest.approx(0.5)


def test_chance_is_what_a_point_anywhere_scores(tiny, squares, maps_are):
    class Small(squares):
        """12 x 12 pixels: one whole patch of 8, two halves and a quarter."""

        def read(self, i):
            image, label, mask = super().read(i)
            mask[:] = 0
            mask[:12, :12] = label + 1
            return image, label, mask

    maps_are(lambda ids, labels: torch.zeros(len(ids), 16))
    majority, centre = (
        measure({"m": tiny}, Small(), Config(point=point)).iloc[0]
        for point in ("majority", "centre")
    )
    assert majority["chance"] == majority["hit_ratio"] == 1 / 16
    assert centre["chance"] == 144 / 1024
    assert majority["centre_hit_ratio"] == centre["centre_hit_ratio"] == 0


def test_attention_scores_equal_a_loop_written_here(any_model, digits):
    """No reducer, no table: arg-max patch, its centre pixel, the image's own class."""
    frame = measure({"m": any_model}, digits, Config(batch_size=7))
    geometry = Geometry.of(any_model, digits)
    probe, hits = Probe(any_model), []
    for i in range(len(digits)):
        image, label, mask = digits.read(i)
        pixels, _ = geometry(image, None)
        pattern = probe.run(pixels[None], "pattern")[1]["pattern"][
            0, :, :, 0, probe.num_prefix_tokens :
        ]
        row, col = pattern.argmax(-1) // 4, pattern.argmax(-1) % 4
        hits.append(torch.as_tensor(mask)[8 * row + 4, 8 * col + 4] == label + 1)
    expected = torch.stack(hits).double().mean(0)
    grid = heads(frame).pivot(index="step", columns="head", values="hit_ratio").to_numpy()
    np.testing.assert_allclose(grid, expected.numpy(), atol=1e-12)
    mean = frame[frame["head"] == "mean"]["hit_ratio"].to_numpy()
    np.testing.assert_allclose(mean, expected.mean(1), atol=1e-12)
    best = frame[frame["head"] == "best"]
    np.testing.assert_allclose(best["hit_ratio"], expected.max(1).values, atol=1e-12)
    assert (frame["low"] <= frame["hit_ratio"]).all()
    assert (frame["hit_ratio"] <= frame["high"]).all()


def test_the_honest_maximum_of_noise_is_chance_and_the_plain_one_is_not(tiny, squares, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def noise(probe, images):
        return torch.rand(len(images), 12, 4, 16, generator=generator)

    monkeypatch.setitem(saliency.METHODS, "attention", noise)
    frame = measure({"m": tiny}, squares(count=108), Config(untrained=False))
    plain, honest = (frame[frame["head"] == h]["hit_ratio"].mean() for h in ("best", "best-split"))
    assert plain > 0.27
    assert abs(honest - 0.25) < 0.02


def test_other_masks_equal_a_loop_written_here(tiny, squares):
    """Arg-max patch of each image and head, on the mask of every other image that shows its
    object."""
    data = squares(count=20, empty=3)
    frame = measure({"m": tiny}, data, Config(batch_size=6))
    geometry, probe = Geometry.of(tiny, data), Probe(tiny)
    images, masks = [], []
    for i in range(3, 20):
        image, label, mask = data.read(i)
        images.append(geometry(image, None)[0])
        masks.append(mask[4::8, 4::8].ravel() == label + 1)
    best = saliency.attention(probe, torch.stack(images)).argmax(-1).numpy()
    masks = np.stack(masks)
    others = [[masks[j][best[i]] for j in range(len(masks)) if j != i] for i in range(len(masks))]
    expected = np.mean(others, axis=(0, 1))
    grid = heads(frame).pivot(index="step", columns="head", values="other_masks").to_numpy()
    np.testing.assert_allclose(grid, expected, atol=1e-12)
    np.testing.assert_allclose(frame["gain"], frame["hit_ratio"] - frame["other_masks"])
    assert (frame["gain_low"] <= frame["gain"]).all()
    assert (frame["gain"] <= frame["gain_high"]).all()


def test_a_planted_step_gains_what_chance_leaves_and_no_other():
    """Brightness, contrast and place of the planted object say nothing. The other steps look at
    another square, which is never on the image's own object."""
    data = Scenes(120)
    frame = measure({"m": plants.pointing(4)}, data, Config()).set_index("step")
    assert frame["chance"].iloc[0] == pytest.approx(9 / 64)
    gain = frame.loc[4, "gain"]
    assert gain == pytest.approx(1 - 9 / 64, abs=0.03)
    assert frame.loc[4, "gain_low"] > 0.8
    others = frame.drop(index=4)
    assert (others["hit_ratio"] == 0).all()
    assert (others["gain_high"] < 0).all()
    blind = frame[["luminance_hit_ratio", "contrast_hit_ratio"]]
    np.testing.assert_allclose(blind, 9 / 64)  # all patches are tied
    # random weights prefer some pattern on all images, and that of the object on few
    draws = [
        measure({"m": plants.pointing(4)}, data, Config(seed=seed))["untrained_gain"]
        for seed in range(3)
    ]
    assert np.max(draws) < 0.2
    assert np.mean(draws) < 0.05


def test_random_weights_are_those_of_the_same_model_measured_on_its_own(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(limit=20, seed=3))
    alone = measure({"m": untrained(tiny, 3)}, digits, Config(limit=20, seed=3, untrained=False))
    columns = ["hit_ratio", "gain", "gain_low", "gain_high"]
    of_random = frame[frame["head"] == "mean"][[f"untrained_{name}" for name in columns]]
    np.testing.assert_array_equal(of_random, alone[alone["head"] == "mean"][columns])
    assert alone.filter(like="untrained").isna().all(axis=None)
    without = measure({"m": tiny}, digits, Config(limit=20, seed=3, untrained=False))
    same = [name for name in frame if not name.startswith("untrained")]
    pd.testing.assert_frame_equal(frame[same], without[same])


def test_the_brightest_patch_and_that_of_most_contrast(tiny, squares):
    class Lit(squares):
        """The object is a little brighter than the rest, without contrast; far from it is a
        checked patch."""

        def read(self, i):
            _, label, mask = super().read(i)
            image = np.full((32, 32, 3), 100, np.uint8)
            image[mask > 0] = 104
            free = np.argwhere(mask[::8, ::8] == 0)[0] * 8
            rows, columns = slice(free[0], free[0] + 8), slice(free[1], free[1] + 8)
            image[rows, columns] = 95 + 10 * (np.indices((8, 8)).sum(0) % 2)[..., None]
            return image, label, mask

    class Checked(Lit):
        """The same with the mask elsewhere: where the checks are."""

        def read(self, i):
            image, label, _ = super().read(i)
            mask = np.zeros((32, 32), np.int32)
            mask[np.abs(np.diff(image[..., 0].astype(int), prepend=100)) == 10] = label + 1
            return image, label, mask

    lit = measure({"m": tiny}, Lit(), Config(untrained=False)).iloc[0]
    assert (lit["luminance_hit_ratio"], lit["contrast_hit_ratio"]) == (1, 0)
    checked = measure({"m": tiny}, Checked(), Config(untrained=False, tolerance=2)).iloc[0]
    assert (checked["luminance_hit_ratio"], checked["contrast_hit_ratio"]) == (0, 1)


def test_one_image_has_no_other_masks(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(limit=1))
    nulls = ["other_masks", "gain", "gain_low", "gain_high", "untrained_gain"]
    assert frame[nulls].isna().all(axis=None)
    assert frame[["hit_ratio", "untrained_hit_ratio"]].notna().all(axis=None)


def test_several_models_share_one_pass_and_change_nothing(tiny, tiny_reg4, digits):
    reads = []

    class Counted(type(digits)):
        def read(self, i):
            reads.append(i)
            return super().read(i)

    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    both = measure({"a": tiny, "b": tiny_reg4}, Counted("test", length=20), Config())
    assert sorted(reads) == list(range(20))
    alone = measure({"b": tiny_reg4}, Counted("test", length=20), Config())
    pd.testing.assert_frame_equal(both[both["model"] == "b"].reset_index(drop=True), alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert not tiny.training


def test_table_is_the_same_for_any_batch_size_and_seeded(tiny, digits):
    a, b = (measure({"m": tiny}, digits, Config(batch_size=size)) for size in (7, 60))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("method", ["rollout", "gradient-x-activation", "integrated-gradients"])
def test_other_saliency_has_one_map_a_step(tiny, digits, method):
    if "grad" in method:
        pytest.importorskip("captum")
    frame = measure({"m": tiny}, digits, Config(saliency=method, limit=6))
    assert list(frame["head"]) == ["all"] * 12
    assert (frame["saliency"] == method).all()
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_summary_has_the_mean_and_the_best(tiny, digits):
    shown = summary(measure({"m": tiny}, digits, Config(limit=4)))
    assert set(shown["head"]) == {"mean", "best", "best-split"}
    assert len(shown) == 3 * 12


def test_files_of_example_maps(tiny, digits, squares, tmp_path):
    frame = measure({"m/x@y": tiny}, digits, Config(limit=12, batch_size=2), folder=tmp_path)
    path = tmp_path / "pointing_game_attention_m_x_y.npz"
    assert frame["path"].unique().tolist() == [str(path)]
    with np.load(path) as arrays:
        assert arrays["maps"].shape == (3, 12, 4, 4, 4)
        for i, image, mask, maps in zip((0, 5, 10), *arrays.values(), strict=True):
            pixels, label, ids = digits.read(i)
            np.testing.assert_allclose(image, pixels, atol=1)
            np.testing.assert_array_equal(mask, ids == label + 1)
            normalised = Geometry.of(tiny, digits)(pixels)[0]
            expected = saliency.attention(Probe(tiny), normalised[None])[0]
            np.testing.assert_allclose(maps.reshape(12, 4, 16), expected, atol=1e-6)
    none = measure({"m": tiny}, digits, Config(limit=4, n_examples=0), folder=tmp_path)
    assert none["path"].isna().all()
    measure({"s": tiny}, squares(empty=2), Config(n_examples=1), folder=tmp_path)
    with np.load(tmp_path / "pointing_game_attention_s.npz") as arrays:
        np.testing.assert_allclose(arrays["image"][0], squares().read(2)[0], atol=1)


def test_integrated_gradients_are_limited_and_move_the_bar(make, squares, monkeypatch, caplog):
    pytest.importorskip("captum")
    module = importlib.import_module("bvit_interp.analyses.pointing_game.measure")
    shares = []

    def noting(models, data, config, score, **given):
        return stream(
            models,
            data,
            config,
            lambda batch: score(replace(batch, advance=shares.append)),
            **given,
        )

    monkeypatch.setattr(module, "stream", noting)
    monkeypatch.setattr(module, "_MOST_IMAGES", 3)
    model, data = make(num_steps=2), squares(9)
    frame = measure({"m": model}, data, Config(saliency="integrated-gradients"))
    assert set(frame["n"] + frame["n_skipped"]) == {3}
    assert "3 of 9 images are used" in caplog.text
    assert len(shares) > 2 * 2 * saliency.INTEGRATION_STEPS
    assert shares == pytest.approx([(i + 1) / len(shares) for i in range(len(shares))])
    shares.clear()
    assert set(measure({"m": model}, data, Config())["n"]) == {9}
    assert shares == []


def test_bad_input(tiny, digits):
    with pytest.raises(UserError, match="tolerance and n-examples must be >= 0"):
        Config(tolerance=-1)
    with pytest.raises(UserError, match="a majority has no radius"):
        Config(tolerance=3, point="majority")
    with pytest.raises(UserError, match="batch-size must be >= 1, got 0"):
        Config(batch_size=0)

    class NoMasks(type(digits)):
        has_masks = False

    with pytest.raises(UserError, match="needs masks"):
        measure({"m": tiny}, NoMasks("test", length=3), Config())
    with torch.no_grad():
        tiny.blocks[0].attn.qkv.weight.mul_(1e30)
    with pytest.raises(UserError, match="NaN"):
        measure({"m": tiny}, digits, Config(limit=2))
