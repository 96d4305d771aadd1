"""The figure shows what the table says, also read back from CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from bvit_interp.analyses.selectivity import Config, measure, plot

QUICK = {"limit": 30, "n_ablated": 4, "random_units": 2, "threshold": 0.0}


@pytest.fixture
def frame(tiny, stacked, digits):
    config = Config(**QUICK, units=("mlp_post:3", "mlp_post:9"))
    return measure({"a": tiny, "b": stacked}, digits, config)


def rows(frame, metric, model="a"):
    chosen = (frame["metric"] == metric) & (frame["site"] == "mlp_post")
    return frame[chosen & (frame["model"] == model)]


def test_a_table_read_back_can_be_drawn(frame):
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    neurons, share, windows, reliability, described, ablated = figure.axes[:6]
    shown = neurons.images[0].get_array().filled(np.nan)
    assert shown.shape == (128, 12 + 1 + 3)
    selectivity = rows(frame, "selectivity").pivot(index="unit", columns="step", values="value")
    ends = {key: rows(frame, key).set_index("unit")["value"] for key in ("onset", "offset")}
    first = ends["onset"][ends["onset"].index.notna()]
    order = sorted(
        first.index,
        key=lambda u: (
            *(np.nan_to_num(ends[k][u], nan=99) for k in ends),
            -selectivity.loc[u].max(),
        ),
    )
    np.testing.assert_allclose(shown[:, :12], selectivity.loc[order].to_numpy(float))
    for i, model in enumerate("ab"):
        own = rows(frame, "selective_share", model)
        line, null = share.lines[2 * i : 2 * i + 2]
        np.testing.assert_allclose(line.get_ydata(), own["value"].astype(float))
        np.testing.assert_allclose(null.get_ydata(), own["null"].astype(float))
    lines = {line.get_label(): line.get_ydata() for line in windows.lines}
    for window in (1, 6, 11):
        own = rows(frame, "window_r_corrected")
        own = own[(own["window"] == window) & own["step"].notna()]
        np.testing.assert_allclose(lines[f"a, {window} later"], own["value"].astype(float))
    kept = rows(frame, "reliability")
    values = kept[kept["unit"].notna()]["value"].dropna().astype(float)
    own = reliability.lines[1]  # after the null
    np.testing.assert_allclose(own.get_xdata(), np.sort(values))
    np.testing.assert_allclose(own.get_ydata(), np.arange(1, len(values) + 1) / len(values))
    for ax, metric in ((described, "selectivity"), (ablated, "ablation_logit")):
        wanted = rows(frame, metric)
        wanted = wanted[(wanted["unit"] == 3) & wanted["step"].notna()]
        np.testing.assert_allclose(ax.lines[0].get_ydata(), wanted["value"].astype(float))
    figure.draw_without_rendering()


def test_bars_count_onsets_and_offsets_before_the_last_step(frame):
    figure = plot(frame)
    first, second = figure.axes[1].containers[:2]
    onsets = rows(frame, "onset")
    onsets = onsets[onsets["unit"].notna()]["value"].dropna()
    heights = {round(bar.get_center()[0]): bar.get_height() for bar in first}
    assert heights == pytest.approx((onsets.value_counts() / 128).to_dict())
    offsets = rows(frame, "offset")
    offsets = offsets[offsets["unit"].notna()]["value"].dropna()
    heights = {round(bar.get_center()[0]): bar.get_height() for bar in second}
    assert heights == pytest.approx((-offsets[offsets < 12].value_counts() / 128).to_dict())


def test_a_table_without_described_neurons_can_be_drawn(stacked, digits):
    plot(measure({"b": stacked}, digits, Config(**QUICK, units=("z:0",)))).draw_without_rendering()


def test_a_table_without_windows_can_be_drawn(frame):
    """Tables of earlier versions have no such rows."""
    older = frame[~frame["metric"].str.startswith("window")].drop(columns="window")
    axes = plot(older).axes
    assert not any(ax.get_ylabel() == "r, corrected for noise" for ax in axes)
