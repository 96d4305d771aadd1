"""Rows of the table of a ticket search, worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.metrics import independent_jaccard, jaccard
from bvit_interp.models.masks import Masks
from bvit_interp.training.pruning import ticket_table


@pytest.fixture
def by_hand():
    """Three subsets over two layers; layer b is empty for the second."""
    a = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]
    b = [[1, 0], [0, 0], [1, 0]]
    return Masks({"a.weight": torch.tensor(a).bool(), "b.weight": torch.tensor(b).bool()})


def rows_of(masks, rows, names, **more):
    return {
        (row["subset"], row["layer"]): row
        for row in ticket_table.mask_rows(masks, rows, names, **more)
    }


def test_rows_of_masks_worked_out_on_paper(by_hand):
    rows = rows_of(by_hand, 1, ["x", "y", "z"])
    assert rows["all", "a"]["parameters"] == 3 and rows["all", "b"]["parameters"] == 1
    assert rows["all", "all"]["parameters"] == 4  # the union
    assert rows["all", "all"]["ratio"] == pytest.approx(4 / 6)
    assert (
        rows_of(by_hand, 1, ["x", "y", "z"], separate=True)["all", "all"]["parameters"] == 3 + 2 + 4
    )
    assert rows["x", "a"]["similarity"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert rows["all", "a"]["similarity"] == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)
    assert rows["x", "b"]["similarity"] == pytest.approx(
        1 / 2
    )  # 0 with the empty one, 1 with the third
    assert rows["x", "all"]["similarity"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert rows["y", "all"]["sparsity"] == pytest.approx(4 / 6)
    assert (
        rows["all", "b"]["empty"] == 1
        and rows["all", "all"]["empty"] == 1
        and rows["all", "a"]["empty"] == 0
    )
    assert (
        rows["all", "mean"]["similarity"] == rows["all", "a"]["similarity"]
    )  # layer b is left out
    assert ticket_table.empty_layers(by_hand, 1, ["x", "y", "z"]) == ["b for y"]
    null = rows["x", "all"]["null_similarity"]
    both = [2 * 2 / 4 + 0, 2 * 3 / 4 + 1 / 2]  # expected intersections with y and z, layer by layer
    assert null == pytest.approx(
        np.mean([both[0] / (3 + 2 - both[0]), both[1] / (3 + 4 - both[1])])
    )


def test_the_null_of_equal_densities_is_q_over_two_minus_q():
    masks = torch.rand(6, 40_000, generator=torch.Generator().manual_seed(0)) < 0.3
    null = ticket_table.expected_jaccard([masks[:, None]])
    torch.testing.assert_close(null, independent_jaccard(masks.double().mean(1)))
    off = ~torch.eye(6, dtype=torch.bool)
    assert null[off].mean().item() == pytest.approx(0.3 / 1.7, abs=2e-3)
    assert jaccard(masks)[off].mean().item() == pytest.approx(
        0.3 / 1.7, abs=3e-3
    )  # and that is what such masks have


def test_rows_of_masks_by_step():
    """Two subsets of two steps: rows are (x, 1), (x, 2), (y, 1), (y, 2)."""
    masks = Masks(
        {"a.weight": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]]).bool()}
    )
    rows = rows_of(masks, 2, ["x", "y"])
    assert rows["x", "a[1]"]["similarity"] == pytest.approx(2 / 3)
    assert rows["x", "a[2]"]["similarity"] == 0
    assert rows["x", "all"]["similarity"] == pytest.approx(2 / 5)
    assert rows["x", "a[1]"]["step_similarity"] == pytest.approx(1 / 2)
    assert rows["y", "all"]["step_similarity"] == pytest.approx(1 / 3)
    assert (
        rows["x", "all"]["parameters"] == 2 and rows["all", "all"]["parameters"] == 3
    )  # unions over the steps too
    assert rows_of(masks, 2, ["x", "y"], separate=True)["all", "all"]["parameters"] == 2 + 3
    assert rows["x", "all"]["sparsity"] == pytest.approx(5 / 8)


def test_collapse_is_a_rise_above_the_least():
    values = {1: 0.8, 2: 0.6, 3: 0.63, 4: 0.7, 5: 0.62}
    frame = pd.DataFrame(
        [
            {"method": m, "subset": "all", "layer": "mean", "round": r, "similarity": s}
            for r, s in values.items()
            for m in ("rtl", "multi")
        ]
        + [{"method": "rtl", "subset": "all", "layer": "all", "round": 1, "similarity": 0.8}]
    )
    found = ticket_table.with_collapse(frame, 0.05)
    rtl = found[(found["method"] == "rtl") & (found["layer"] == "mean")]
    np.testing.assert_allclose(rtl["rise"], [0, 0, 0.03, 0.1, 0.02], atol=1e-12)
    assert rtl["collapsed"].tolist() == [0, 0, 0, 1, 1]
    assert found["rise"].isna().sum() == 1


def test_scores_by_subset_are_those_of_its_images():
    named, true = torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([0, 0, 1, 0, 1, 1])
    eye = torch.eye(3, dtype=torch.bool)  # the third class has no image: it is in no mean
    of_image = np.array([0, 0, 0, 1, 1, 1])
    x, y, whole = ticket_table.score_rows(eye[named], eye[true], of_image, ["x", "y"])
    assert x["n"] == 3 and whole["n"] == 6
    assert x["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert y["balanced_accuracy"] == pytest.approx(3 / 4)
    assert whole["recall"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_scores_of_other_images_are_refused():
    predicted, truth = torch.ones(3, 2).bool(), torch.ones(4, 2).bool()
    with pytest.raises(TypeCheckError):
        ticket_table.score_rows(predicted, truth, np.full(3, -1), ["x", "y"])


def test_empty_layers_of_steps_are_named_from_one():
    masks = Masks({"fc1.weight": torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]]).bool()})
    assert ticket_table.empty_layers(masks, 2, ["x", "y"]) == ["fc1[2] for x"]


def test_a_rise_as_large_as_the_tolerance_is_no_collapse():
    rows = {"method": "rtl", "layer": "mean", "subset": "all"}
    frame = pd.DataFrame(
        [{**rows, "round": i, "similarity": s} for i, s in enumerate([0.5, 0.75, 1.0])]
    )
    assert ticket_table.with_collapse(frame, 0.25)["collapsed"].tolist() == [0, 0, 1]


def test_a_single_subset_has_the_mean_over_classes():
    truth = torch.tensor([[True, False], [False, True], [False, True]])
    predicted = torch.tensor([[True, False], [True, False], [False, True]])
    only, whole = ticket_table.score_rows(predicted, truth, np.zeros(3, dtype=int), ["x"])
    assert only["recall"] == whole["recall"] == pytest.approx((1 + 1 / 2) / 2)
