"""The figure of a transfer, read back from what was drawn."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from bvit_interp.results import read_table, write_table
from bvit_interp.training.adapting.transfer import COLUMNS
from bvit_interp.training.adapting.transfer_plot import plot


def row(**values):
    keys = {
        "model": "m",
        "data": "pets",
        "backbone": "trained",
        "rank": 0,
        "epochs": 2,
        "n_train": 9,
        "weights": "0",
        "images": "0",
        "head_parameters": 3,
        "train_loss": 1.0,
        "low": 0.0,
        "high": 1.0,
        "n": 9,
        "chance": 0.25,
        "exact_accuracy": math.nan,
    }
    return keys | values


@pytest.fixture
def frame(tmp_path):
    """Two modes with two seeds, a random null, a sweep over three steps; as it comes from a CSV."""
    rows = []
    for seed in (0, 1):
        more = {"seed": seed, "trainable_parameters": 0}
        rows.append(
            row(mode="probe", steps="none", accuracy=0.5 + seed / 10, exact_accuracy=0.6, **more)
        )
        rows.append(
            row(
                mode="probe",
                steps="none",
                accuracy=0.3,
                exact_accuracy=0.3,
                **more | {"backbone": "random"},
            )
        )
        for steps, accuracy in (
            ("all", 0.8),
            ("none", 0.55),
            ("step 1", 0.6),
            ("step 2", 0.7),
            ("step 3", 0.65),
        ):
            rows.append(
                row(
                    mode="lora-qv",
                    steps=steps,
                    accuracy=accuracy,
                    **more | {"trainable_parameters": 25344, "rank": 8},
                )
            )
    write_table(pd.DataFrame(rows)[list(COLUMNS)], tmp_path / "transfer.csv")
    return read_table(tmp_path / "transfer.csv")


def levels(ax):
    return {
        line.get_label(): line.get_ydata()[0]
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }


def test_modes_are_means_with_deviations_and_grey_nulls(frame):
    modes, _ = plot(frame).axes
    (drawn,) = modes.containers
    np.testing.assert_allclose(drawn.lines[0].get_xydata(), [[0, 0.55], [1, 0.8]])
    np.testing.assert_allclose(
        drawn.lines[2][0].get_segments()[0][:, 1],
        0.55 + np.array([-1, 1]) * np.std([0, 0.1], ddof=1),
    )
    found = levels(modes)
    assert found["chance"] == 0.25
    assert found["probe of random weights"] == pytest.approx(0.3)
    assert found["probe, exact solver"] == pytest.approx(0.6)
    assert [label.get_text() for label in modes.get_xticklabels()] == [
        "probe\n0",
        "LoRA\nq, v\n25K",
    ]


def test_the_sweep_has_its_steps_and_both_ends(frame):
    _, sweep = plot(frame).axes
    single = sweep.get_lines()[0]
    (ends,) = (container.lines[0] for container in sweep.containers)
    np.testing.assert_allclose(single.get_xydata(), [[1, 0.6], [2, 0.7], [3, 0.65]])
    np.testing.assert_allclose(ends.get_ydata(orig=False), [0.55, 0.8])
    assert [label.get_text() for label in sweep.get_xticklabels()] == ["1", "2", "3", "none", "all"]


def test_a_row_a_data_set_and_models_beside_each_other(frame):
    both = pd.concat([frame, frame.assign(data="cars"), frame.assign(data="cars", model="vit")])
    figure = plot(both[~both["steps"].str.startswith("step ")])
    assert [ax.get_title() for ax in figure.axes] == ["pets", "cars"]
    assert [len(ax.containers) for ax in figure.axes] == [1, 2]


def test_runs_of_other_settings_are_not_averaged(frame):
    whole = frame[frame["steps"].isin(["all", "none"])]
    both = pd.concat([whole, whole[whole["mode"] == "lora-qv"].assign(epochs=40, accuracy=0.1)])
    (modes,) = plot(both).axes
    labels = modes.get_legend_handles_labels()[1]
    assert {"m, 2 epochs, 2 seeds", "m, 40 epochs, 2 seeds"} <= {*labels}
    np.testing.assert_allclose([c.lines[0].get_ydata()[-1] for c in modes.containers], [0.8, 0.1])


def test_one_seed_has_its_interval_over_images_and_every_models_parameters_are_told(frame):
    one = frame[(frame["seed"] == 0) | (frame["mode"] == "probe")].assign(low=0.2, high=0.9)
    vit = frame.assign(model="vit", trainable_parameters=frame["trainable_parameters"] * 10)
    modes = plot(pd.concat([one, vit])).axes[0]
    drawn = modes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(drawn[1][:, 1], [0.2, 0.9])
    np.testing.assert_allclose(drawn[0][:, 1], 0.55 + np.array([-1, 1]) * np.std([0, 0.1], ddof=1))
    assert [label.get_text() for label in modes.get_xticklabels()] == [
        "probe\n0",
        "LoRA\nq, v\n25K / 253K",
    ]
    assert {"m, 1 to 2 seeds", "vit, 2 seeds"} <= {*modes.get_legend_handles_labels()[1]}
