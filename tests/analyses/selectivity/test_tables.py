"""Rows of the table against statistics made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bvit_interp.analyses.selectivity import tables
from bvit_interp.metrics import wilson_interval


def test_the_null_of_an_ablation_is_the_mean_of_the_other_random_units_of_the_site():
    ablated = [("z", 0), ("z", 1), ("z", 2), ("mlp_post", 7), ("mlp_post", 8)]
    values = torch.arange(2 * 3 * 5, dtype=torch.float64).reshape(2, 3, 5)
    changes = {"value": values, "low": values - 1, "high": values + 2, "n": values.long()}
    rows = list(tables.ablation_rows(changes, ablated, [("z", 1), ("mlp_post", 7)], ablated[:4]))
    assert [rows[i]["metric"][0] for i in range(4)] == [
        "ablation_accuracy",
        "ablation_accuracy",
        "ablation_logit",
        "ablation_logit",
    ]
    logit = rows[2]
    assert logit["step"].tolist()[:2] == [1, 2]
    assert logit["step"].isna().tolist() == [False, False, True]
    assert logit["value"].tolist() == values[1, :, 1].tolist()
    assert logit["null"].tolist() == values[1, :, [0, 2]].mean(1).tolist()
    assert logit["low"].tolist() == (values[1, :, 1] - 1).tolist()
    assert rows[1]["null"].isna().all()  # the only random neuron is the neuron itself


def test_top_images_by_row_and_column():
    top = {
        "values": torch.tensor([[5.0, 4.0], [3.0, -torch.inf]], dtype=torch.float64),
        "images": torch.tensor([[12, 3], [7, -1]]),
        "patches": torch.tensor([[0, 9], [14, -1]]),
    }
    rows = tables.top_image_rows("z", 2, top, (3, 5), Path("a.png"))
    assert rows["top_images"].tolist() == ["12:0,0 3:1,4", "7:2,4"]
    assert rows["value"].tolist() == [5.0, 3.0]
    assert rows["step"].tolist() == [1, 2]
    assert set(rows["path"]) == {"a.png"}
    assert tables.top_image_rows("z", 2, top, (3, 5), None)["path"].isna().all()


def test_firing_rates_and_accuracy():
    firing = {"value": torch.tensor([[0.1, 0.2], [0.3, 0.4]]), "n": torch.full((2, 2), 9)}
    rows = tables.firing_rows(1, firing)
    assert rows["value"].tolist() == pytest.approx([0.2, 0.4])
    assert rows["unit"].tolist() == [1, 1]
    assert rows["step"].tolist() == [1, 2]
    hits = {"value": torch.tensor([0.75]), "n": torch.tensor([8])}
    row = tables.accuracy_row(hits).iloc[0]
    assert (row["value"], row["n"]) == (0.75, 8)
    assert (row["low"], row["high"]) == wilson_interval(6, 8)


def test_windows_are_means_over_the_units_that_have_a_value():
    nan = torch.nan
    value = torch.tensor([[0.9, 0.7, nan], [0.5, nan, nan]], dtype=torch.float64)
    null = torch.tensor([[0.2, -0.2, nan], [nan, nan, nan]], dtype=torch.float64)
    rows = tables._window_rows("window_r", "z", 6, {"value": value, "null": null})
    assert rows["step"].tolist()[:2] == [1, 2]
    assert np.isnan(rows["step"].tolist()[2])
    assert set(rows["window"]) == {6}
    # over all steps: the mean over units of each unit's mean over steps, 0.7 and 0.7
    assert rows["value"].tolist() == pytest.approx([0.8, 0.5, 0.7])
    assert rows["null"].tolist() == pytest.approx([0.0, nan, 0.0], nan_ok=True)
    assert rows["n"].tolist() == [2, 1, 2]
    assert rows["low"].tolist() == pytest.approx([0.7, 0.5, 0.7])
    assert rows["high"].tolist() == pytest.approx([0.9, 0.5, 0.7])
