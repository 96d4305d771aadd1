"""Movement of states whose answer is known on paper, and against numpy on all images at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.dynamics.motion import (
    Comparisons,
    Motion,
    direction_distance,
    period,
    relative_distance,
    return_window,
    update_cosine,
)
from bvit_interp.errors import UserError


def rolled_out(start, matrix, steps):
    """States ``(B, S + 1, 1, D)`` of z_t = A z_{t-1}."""
    states = [start]
    for _ in range(steps):
        states.append(states[-1] @ matrix.T)
    return torch.stack(states, dim=1)[:, :, None]


def found(states, trained):
    metric = Motion(states.shape[1] - 1, states.shape[2], states.shape[3], trained)
    metric.update(states)
    return metric.compute()


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_contraction():
    """z_t = z_0 / 2^t: every step is half of where it starts, in a straight line, and z_S is close
    to z_T."""
    measures = found(
        rolled_out(drawn(0, 5, 3), torch.eye(3, dtype=torch.float64) / 2, 10), trained=4
    )
    np.testing.assert_allclose(measures["step_size"]["value"], 0.5)
    np.testing.assert_allclose(measures["update_cosine"]["value"], 1.0)
    np.testing.assert_allclose(
        measures["distance_to_trained"]["value"], [abs(2.0 ** (4 - t) - 1) for t in range(11)]
    )
    np.testing.assert_allclose(
        measures["distance_to_last"]["value"], [2.0 ** (10 - t) - 1 for t in range(11)]
    )
    np.testing.assert_allclose(measures["direction_change"]["value"], 0, atol=1e-7)
    norm = measures["norm"]["value"]
    np.testing.assert_allclose(norm[1:] / norm[:-1], 0.5)
    # w = 2 steps, 9 and 10, in units of z_4: (2^-5 - 2^-4) and (2^-6 - 2^-5) at lag 1
    assert measures["return_distance"]["other_step"].tolist() == [9, 8]
    np.testing.assert_allclose(
        measures["return_distance"]["value"], [(2**-5 + 2**-6) / 2, (3 * 2**-5 + 3 * 2**-6) / 2]
    )


def test_a_rotation_by_a_quarter_comes_back_after_four_steps():
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    measures = found(rolled_out(drawn(1, 6, 2), quarter, 18), trained=3)
    np.testing.assert_allclose(measures["step_size"]["value"], math.sqrt(2))
    np.testing.assert_allclose(measures["update_cosine"]["value"], 0, atol=1e-12)
    assert measures["return_distance"]["other_step"].tolist() == [17, 16, 15, 14, 13]
    root = math.sqrt(2)
    np.testing.assert_allclose(
        measures["return_distance"]["value"], [root, 2, root, 0, root], atol=1e-7
    )
    spread = measures["step_size"]["high"] - measures["step_size"]["low"]
    np.testing.assert_allclose(spread, 0, atol=1e-7)
    np.testing.assert_allclose(measures["direction_change"]["value"], root)
    np.testing.assert_allclose(
        measures["direction_return_distance"]["value"],
        measures["return_distance"]["value"],
        atol=1e-7,
    )
    # at most half the window of five lags
    assert period(measures["return_distance"]["value"].tolist(), 0.01) == 0


def test_a_drift_at_constant_speed():
    speed = torch.tensor([3.0, 4.0])
    states = (torch.arange(8)[:, None] * speed)[None, :, None]  # z_0 = 0: no unit at the first step
    measures = found(states, trained=5)
    assert math.isnan(measures["step_size"]["value"][0])
    assert measures["step_size"]["n"].tolist() == [0] + [1] * 6
    np.testing.assert_allclose(measures["step_size"]["value"][1:], [1 / t for t in range(1, 7)])
    np.testing.assert_allclose(measures["update_cosine"]["value"], 1.0)
    assert measures["return_distance"]["value"].size == 0
    assert np.isnan(
        measures["norm"]["low"]
    ).all()  # one image has no interval, and no other image for a null
    assert np.isnan(measures["step_size"]["null"]).all()


def test_a_stop_has_no_direction():
    states = torch.tensor([0.0, 1.0, 1.0, 1.0])[None, :, None, None].expand(2, 4, 1, 1)
    assert np.isnan(found(states, trained=3)["update_cosine"]["value"]).all()


@pytest.mark.parametrize("parts", [[40], [1, 39], [13, 13, 14]])
def test_against_numpy_on_all_images(parts):
    n, steps, tokens, width, trained = 40, 9, 3, 4, 3
    states = drawn(2, n, steps + 1, tokens, width).cumsum(1) + drawn(3, 1, steps + 1, tokens, width)
    metric = Motion(steps, tokens, width, trained)
    for part in states.split(parts):
        metric.update(part)
    measures = metric.compute()
    z = states.flatten(2).numpy()

    def apart(t, s, unit):
        return np.linalg.norm(z[:, t] - z[:, s], axis=-1) / np.linalg.norm(z[:, unit], axis=-1)

    def of_others(t, s, unit):
        squares = [((z[i, t] - z[j, s]) ** 2).sum() for i in range(n) for j in range(n) if i != j]
        return math.sqrt(np.mean(squares) / (z[:, unit] ** 2).sum(-1).mean())

    expected = {
        "step_size": [(t, t - 1, t - 1) for t in range(1, steps + 1)],
        "distance_to_trained": [(t, trained, trained) for t in range(steps + 1)],
        "distance_to_last": [(t, steps, steps) for t in range(steps + 1)],
    }
    for name, places in expected.items():
        values = np.stack([apart(*place) for place in places])
        np.testing.assert_allclose(measures[name]["value"], values.mean(1), atol=1e-7)
        half = 1.959963984540054 * values.std(1, ddof=1) / math.sqrt(n)
        np.testing.assert_allclose(measures[name]["high"], values.mean(1) + half, atol=1e-7)
        np.testing.assert_allclose(
            measures[name]["null"], [of_others(*place) for place in places], atol=1e-7
        )
    updates = np.diff(z, axis=1)
    unit = updates / np.linalg.norm(updates, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        measures["update_cosine"]["value"], (unit[:, 1:] * unit[:, :-1]).sum(-1).mean(0), atol=1e-12
    )
    products = np.einsum("itd,jtd->tij", updates[:, 1:], updates[:, :-1])
    others = products[:, ~np.eye(n, dtype=bool)].mean(1)
    length = np.sqrt((updates**2).sum(-1).mean(0))
    np.testing.assert_allclose(
        measures["update_cosine"]["null"], others / length[1:] / length[:-1], atol=1e-12
    )
    rms = np.sqrt((z**2).sum(-1) / tokens)
    np.testing.assert_allclose(measures["norm"]["value"], rms.mean(0))
    lags = [np.mean([apart(t, t - p, trained) for t in (8, 9)]) for p in (1, 2)]
    np.testing.assert_allclose(measures["return_distance"]["value"], lags)
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    chords = np.linalg.norm(unit[:, 1:] - unit[:, :-1], axis=-1)
    np.testing.assert_allclose(measures["direction_change"]["value"], chords.mean(0))
    lags = [
        np.mean(np.linalg.norm(unit[:, [8, 9]] - unit[:, [8 - p, 9 - p]], axis=-1)) for p in (1, 2)
    ]
    np.testing.assert_allclose(measures["direction_return_distance"]["value"], lags)
    assert measures["return_distance"]["step"].tolist() == [9, 9]


def test_images_that_move_alike_have_the_null_of_their_own():
    """Every image takes the same path: another image's next update is as aligned as its own."""
    path = drawn(4, 1, 6, 2, 3).cumsum(1).expand(5, -1, -1, -1)
    measures = found(path, trained=2)
    for name in ("step_size", "update_cosine", "distance_to_trained", "distance_to_last"):
        np.testing.assert_allclose(measures[name]["null"], measures[name]["value"], atol=1e-6)


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ([0.001] * 6, 1),
        ([0.5, 0.001] * 3, 2),
        ([0.5, 0.5, 0.001] * 2, 3),
        ([0.005, 0.009, 0.013, 0.017], 0),
        ([0.5, 0.001, 0.5, 0.5], 0),
        ([0.5, 0.5, 0.5, 0.001], 0),
        ([0.001], 0),
        ([], 0),
    ],
)
def test_the_verdict(returns, expected):
    """Rest, two cycles, a slow drift, a lag that does not recur, one too long for the window, and
    no window."""
    assert period(returns, 0.01) == expected


def test_steps_that_are_compared():
    measures = found(drawn(5, 3, 4, 1, 2), trained=2)
    compared = {
        metric: list(zip(rows["step"].tolist(), rows["other_step"].tolist(), strict=True))
        for metric, rows in measures.items()
    }
    assert compared["norm"] == [(0, -1), (1, -1), (2, -1), (3, -1)]
    assert compared["update_cosine"] == [(2, 1), (3, 2)]
    for metric in ("step_size", "direction_change"):
        assert compared[metric] == [(1, 0), (2, 1), (3, 2)]
    assert compared["distance_to_trained"] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert compared["distance_to_last"] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_fewer_steps_than_trained():
    measures = found(drawn(5, 3, 4, 1, 2), trained=12)
    assert set(measures) == {
        "norm",
        "update_cosine",
        "step_size",
        "direction_change",
        "distance_to_last",
    }
    measures = found(drawn(5, 3, 4, 1, 2), trained=3)  # as many: a distance to T, but no returns
    assert measures["distance_to_trained"]["value"].shape == (4,)
    assert measures["return_distance"]["value"].size == 0
    assert return_window(48, 12) == 12
    assert return_window(5, 12) == 0


def test_bad_states():
    metric = Motion(3, 2, 4, 2)
    with pytest.raises(UserError, match=r"\(4, 2, 4\) after B, got \(1, 3, 2, 4\)"):
        metric.update(torch.zeros(1, 3, 2, 4))
    with pytest.raises(UserError, match="NaN or infinite"):
        metric.update(torch.full((1, 4, 2, 4), torch.inf))
    metric = Motion(3, 2, 4, 2)
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(UserError, match="no image"),
    ):
        metric.compute()


def test_products_by_hand():
    """Three states in the plane: (3, 4), (0, 5) and (-3, 0); cross products with those of another
    image, (1, 0), (0, 2) and (0, 0)."""
    own = torch.tensor([[3.0, 4.0], [0.0, 5.0], [-3.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    products, cross = own @ own.T, own @ other.T
    comparisons = Comparisons.of([(1, 0, 2), (2, 1, 0)])
    apart = relative_distance(products, products, comparisons)
    np.testing.assert_allclose(apart, [math.sqrt(9 + 1) / 3, math.sqrt(9 + 25) / 5])
    chords = direction_distance(products, products, comparisons)
    np.testing.assert_allclose(chords, [math.sqrt(0.6**2 + 0.2**2), math.sqrt(2)])
    # the products with the other image: <z_1, x_0> = 0, <z_2, x_1> = 0
    np.testing.assert_allclose(
        relative_distance(products, cross, comparisons), [math.sqrt(50) / 3, math.sqrt(34) / 5]
    )
    # updates (-3, 1) and (-3, -5)
    np.testing.assert_allclose(update_cosine(products, products), [4 / math.sqrt(10 * 34)])
    # own first update (-3, 1) with the other's second one, (0, -2)
    expected = -2 / math.sqrt(10 * 34)
    np.testing.assert_allclose(update_cosine(products, cross), [expected])


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError):
        Motion(3, 2, 4, 2).update(torch.zeros(4, 2, 4))
    with pytest.raises(TypeCheckError):
        update_cosine(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(TypeCheckError):
        Comparisons(torch.zeros(2), torch.zeros(2), torch.zeros(2))
