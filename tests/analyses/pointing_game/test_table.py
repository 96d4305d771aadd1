"""The table of hits, worked out on paper."""

from __future__ import annotations

import numpy as np
import pytest

from bvit_interp.analyses.pointing_game.table import Heads, Scored, table

ENDS = ["gain_low", "gain", "gain_high"]


def heads_of(hits, others=None, moved=None):
    hits = np.asarray(hits, dtype=float)
    given = (np.zeros(hits.shape) if each is None else each for each in (others, moved))
    return Heads(hits, *given)


def table_of(
    hits, labels=None, *, others=None, moved=None, untrained=None, centre_hit_ratio=None, **options
):
    """The table of hits ``(images, steps, heads)``; nothing else is hit unless it is given."""
    images = len(hits)
    scored = Scored(
        labels=np.zeros(images) if labels is None else np.asarray(labels, dtype=float),
        nulls={} if centre_hit_ratio is None else {"centre_hit_ratio": centre_hit_ratio},
        trained=heads_of(hits, others, moved),
        untrained=untrained,
    )
    return table(scored, **options)


def test_class_average_with_ignored_points():
    """Class 0 = (1, ignored, 0) and class 1 = (0, 0): (1 / 2 + 0) / 2, at the head, its interval
    and the centre."""
    labels, hits = [0, 0, 0, 1, 1], [1, np.nan, 0, 0, 0]
    own = np.array(hits)
    row = table_of(own[:, None, None], labels, by_class=True, centre_hit_ratio=own).iloc[0]
    assert (row["hit_ratio"], row["centre_hit_ratio"]) == (0.25, 0.25)
    assert (row["n"], row["n_ignored"]) == (4, 1)
    # class 0 nearly always ignored, else hit; class 1 never hit: whatever the resample, the mean is
    # a half
    many = np.zeros((200, 1, 2))
    many[:20], many[20:100] = 1, np.nan
    frame = table_of(many, np.repeat([0, 1], 100), by_class=True)
    assert list(frame["head"]) == ["0", "1", "mean", "best", "best-split"]
    np.testing.assert_allclose(frame[["hit_ratio", "low", "high"]], 0.5)


def test_the_table_of_one_head_by_hand():
    """One step: three hits of four, of one head; no mean and no best."""
    hits = np.array([1, 1, 0, 1])[:, None, None]
    frame = table_of(hits, others=np.full(hits.shape, 0.5), model="m")
    assert frame[["model", "head"]].to_numpy().tolist() == [["m", "all"]]
    row = frame.iloc[0]
    assert (row["hit_ratio"], row["n"], row["n_ignored"]) == (0.75, 4, 0)
    assert (row["gain"], row["other_masks"]) == (0.25, 0.5)
    assert np.isnan(row["untrained_gain"])


def test_best_head_is_chosen_on_one_half_and_scored_on_the_other():
    """Head h hits the images with remainder h alone; the halves are drawn again here."""
    remainder = np.arange(30) % 3
    hits = (remainder[:, None, None] == np.arange(3)).astype(float).repeat(2, axis=1)  # (n, T, H)
    hits[:, 1] = hits[:, 1, ::-1]  # at step 2 the heads change places
    hits[0, 1] = np.nan
    others = hits[:, :, ::-1] / 2
    frame = table_of(hits, others=others, seed=4)
    first = np.random.default_rng(4).permutation(30) % 2 == 0
    for t in range(2):
        ratios = np.nanmean(hits[:, t], axis=0)
        of_halves = [int(np.nanmean(hits[half, t], axis=0).argmax()) for half in (first, ~first)]
        scored = np.where(first, hits[:, t, of_halves[1]], hits[:, t, of_halves[0]])
        elsewhere = np.where(first, others[:, t, of_halves[1]], others[:, t, of_halves[0]])
        rows = frame[frame["step"] == t + 1].set_index("head")
        assert rows.loc["best-split", "gain"] == pytest.approx(np.nanmean(scored - elsewhere))
        gains = np.nanmean(hits[:, t] - others[:, t], axis=0)
        assert rows.loc[["0", "1", "2"], "gain"].tolist() == pytest.approx(gains.tolist())
        assert rows.loc["mean", "gain"] == pytest.approx(gains.mean())
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
    frame = table_of(np.array(hits)[:, None]).set_index("head")
    assert frame.loc[["0", "1", "mean", "best"], "n"].tolist() == [3, 4, 4, 4]
    assert frame.loc[["0", "1", "mean", "best"], "n_ignored"].tolist() == [2, 1, 1, 1]
    expected = [1 / 3, 1 / 2, (1 / 3 + 1 / 2) / 2, 1 / 2]
    assert frame.loc[["0", "1", "mean", "best"], "hit_ratio"].tolist() == pytest.approx(expected)


def test_the_head_of_a_half_is_the_best_on_its_class_average():
    """Head 0 hits the class of 30 images alone, head 1 that of ten and a fifth of the thirty."""
    labels = np.repeat([0, 1], [30, 10])
    hits = np.stack([labels == 0, (labels == 1) | (np.arange(40) % 5 == 0)], axis=1)
    for by_class, chosen in ((False, 0), (True, 1)):
        frame = table_of(hits[:, None], labels, by_class=by_class).set_index("head")
        assert frame.loc["best", "chosen_head"] == chosen
        assert frame.loc["best-split", "chosen_head"] == chosen
        # both halves choose it, so it is scored on all images; each interval is its own
        columns = ["hit_ratio", "low", "high"]
        of_head = frame.loc[str(chosen), columns].tolist()
        assert frame.loc["best", columns].tolist() == of_head
        assert frame.loc["best-split", columns].tolist() == of_head


def test_the_interval_of_the_gain_is_of_the_paired_difference():
    """Hits and other masks that rise and fall together have a gain without spread."""
    hits = np.arange(40).reshape(40, 1, 1) % 2
    frame = table_of(hits, others=hits - 0.25)
    assert frame[ENDS].iloc[0].tolist() == [0.25] * 3
    assert frame["low"].iloc[0] < 0.4 and frame["high"].iloc[0] > 0.6


def test_an_image_counts_as_a_map_and_as_a_mask():
    """All points hit; what varies is the size of the masks, so only `moved` has a spread."""
    sizes = np.tile([0.2, 0.6], 200)
    moved = (sizes - sizes.mean())[:, None, None]
    others = np.full((400, 1, 1), 0.4)
    row = table_of(np.ones((400, 1, 1)), others=others, moved=moved).iloc[0]
    half = 1.96 * 0.2 / np.sqrt(400)
    assert row[ENDS].tolist() == pytest.approx([0.6 - half, 0.6, 0.6 + half], abs=0.004)
    # a mask that is hit by its own point as much as by those of others adds nothing
    row = table_of(0.6 + moved, others=others, moved=moved).iloc[0]
    assert row[ENDS].tolist() == pytest.approx([0.2] * 3)


def test_the_untrained_columns_are_means_over_heads_of_each_step():
    rng = np.random.default_rng(0)
    hits, others = rng.random((2, 60, 2, 3))
    before = heads_of(hits, others)
    frame = table_of(np.ones((60, 2, 3)), untrained=before).groupby("step").first()
    wanted = np.stack([hits.mean((0, 2)), (hits - others).mean((0, 2))], axis=1)
    np.testing.assert_allclose(frame[["untrained_hit_ratio", "untrained_gain"]], wanted)
    own = table_of(hits, others=others)
    means = own[own["head"] == "mean"]
    np.testing.assert_allclose(
        frame[["untrained_gain_low", "untrained_gain_high"]], means[["gain_low", "gain_high"]]
    )
