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
from bvit_interp.analyses.pointing_game.measure import _table
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.stream import stream
from bvit_interp.errors import UserError
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
            given = fn(ids, labels)[:, None, None].expand_as(maps)
            return game.play(given.float(), ids, labels, grid, **rules)

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
    frame = heads(measure({"m": tiny}, squares(count=351), Config()))
    assert (frame["chance"] == 0.25).all()  # a 16 x 16 square of 32 x 32
    covered = ((frame["low"] <= 0.25) & (frame["high"] >= 0.25)).mean()
    assert covered >= 0.85  # 95 % intervals of 48 heads and steps
    assert abs(frame["hit_ratio"].mean() - 0.25) < 0.01


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


def test_class_average_with_ignored_points():
    """Class 0 = (1, ignored, 0) and class 1 = (0, 0): (1 / 2 + 0) / 2, at the head, its interval
    and the centre."""
    labels, hits = [0, 0, 0, 1, 1], [1, np.nan, 0, 0, 0]
    rows = np.array([[label, 1, 0.5, hit, hit] for label, hit in zip(labels, hits, strict=True)])
    row = _table("m", rows, 1, Config(average="class")).iloc[0]
    assert (row["hit_ratio"], row["centre_hit_ratio"], row["chance"]) == (0.25, 0.25, 0.5)
    assert (row["n"], row["n_ignored"]) == (4, 1)
    # class 0 nearly always ignored, else hit; class 1 never hit: whatever the resample, the mean is
    # a half
    many = np.array([[0, 1, 0.5, 1, *([1 if i < 20 else np.nan] * 2)] for i in range(100)])
    many = np.concatenate([many, np.array([[1, 1, 0.5, 0, 0, 0]] * 100)])
    frame = _table("m", many, 1, Config(average="class"))
    assert list(frame["head"]) == ["0", "1", "mean", "best", "best-split"]
    np.testing.assert_allclose(frame[["hit_ratio", "low", "high"]], 0.5)


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
    frame = measure({"m": tiny}, squares(count=108), Config())
    plain, honest = (frame[frame["head"] == h]["hit_ratio"].mean() for h in ("best", "best-split"))
    assert plain > 0.27
    assert abs(honest - 0.25) < 0.02


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


def test_the_table_of_one_head_by_hand():
    """One step: three hits of four, of one head; no mean and no best."""
    rows = np.array([[0, 1, 0.5, 1, hit] for hit in (1, 1, 0, 1)] + [[0, 0, 0, 0, np.nan]])
    frame = _table("m", rows, 1, Config())
    assert frame["head"].tolist() == ["all"]
    row = frame.iloc[0]
    assert (row["hit_ratio"], row["n"], row["n_ignored"], row["n_skipped"]) == (0.75, 4, 0, 1)


def test_best_head_is_chosen_on_one_half_and_scored_on_the_other():
    """Head h hits the images with remainder h alone; the halves are drawn again here."""
    remainder = np.arange(30) % 3
    hits = (remainder[:, None, None] == np.arange(3)).astype(float).repeat(2, axis=1)  # (n, T, H)
    hits[:, 1] = hits[:, 1, ::-1]  # at step 2 the heads change places
    hits[0, 1] = np.nan
    facts = np.tile([0, 1, 0.5, 1.0], (30, 1))
    frame = _table("m", np.concatenate([facts, hits.reshape(30, -1)], axis=1), 2, Config(seed=4))
    first = np.random.default_rng(4).permutation(30) % 2 == 0
    for t in range(2):
        ratios = np.nanmean(hits[:, t], axis=0)
        of_halves = [int(np.nanmean(hits[half, t], axis=0).argmax()) for half in (first, ~first)]
        scored = np.where(first, hits[:, t, of_halves[1]], hits[:, t, of_halves[0]])
        rows = frame[frame["step"] == t + 1].set_index("head")
        assert rows.loc["mean", "hit_ratio"] == pytest.approx(ratios.mean())
        assert rows.loc["best", "hit_ratio"] == pytest.approx(ratios.max())
        assert rows.loc["best", "chosen_head"] == ratios.argmax()
        assert rows.loc["best-split", "hit_ratio"] == pytest.approx(np.nanmean(scored))
        assert rows.loc["best-split", "chosen_head"] == of_halves[0]
        assert (rows["n"] == 30 - t).all()
        heads = rows.drop("mean")  # every image is hit by one head of the three
        assert (heads["low"] < heads["hit_ratio"]).all()
        assert (heads["hit_ratio"] < heads["high"]).all()
        # a normal interval of a share: close to the bootstrap's
        half = 1.96 * np.sqrt(ratios[0] * (1 - ratios[0]) / (30 - t))
        assert rows.loc["0", "low"] == pytest.approx(ratios[0] - half, abs=0.04)
        assert rows.loc["0", "high"] == pytest.approx(ratios[0] + half, abs=0.04)


def test_an_image_is_ignored_if_it_is_by_every_head():
    """Head 0 hits one of three images and ignores one, head 1 hits two of four."""
    hits = [(1, 1), (0, 1), (np.nan, 0), (0, 0), (np.nan, np.nan)]
    rows = np.array([[0, 1, 0.5, 1, *of_image] for of_image in hits])
    frame = _table("m", rows, 1, Config()).set_index("head")
    assert frame.loc[["0", "1", "mean", "best"], "n"].tolist() == [3, 4, 4, 4]
    assert frame.loc[["0", "1", "mean", "best"], "n_ignored"].tolist() == [2, 1, 1, 1]
    expected = [1 / 3, 1 / 2, (1 / 3 + 1 / 2) / 2, 1 / 2]
    assert frame.loc[["0", "1", "mean", "best"], "hit_ratio"].tolist() == pytest.approx(expected)


def test_the_head_of_a_half_is_the_best_on_its_class_average():
    """Head 0 hits the class of 30 images alone, head 1 that of ten and a fifth of the thirty."""
    labels = np.repeat([0, 1], [30, 10])
    hits = np.stack([labels == 0, (labels == 1) | (np.arange(40) % 5 == 0)], axis=1)
    rows = np.concatenate([np.stack([labels, *np.ones((3, 40))], axis=1), hits], axis=1)
    for average, chosen in (("image", 0), ("class", 1)):
        frame = _table("m", rows, 1, Config(average=average)).set_index("head")
        assert frame.loc["best", "chosen_head"] == chosen
        assert frame.loc["best-split", "chosen_head"] == chosen
        # both halves choose it, so it is scored on all images; each interval is its own
        columns = ["hit_ratio", "low", "high"]
        of_head = frame.loc[str(chosen), columns].tolist()
        assert frame.loc["best", columns].tolist() == of_head
        assert frame.loc["best-split", columns].tolist() == of_head


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
    assert len(shares) > 2 * saliency.INTEGRATION_STEPS
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
