"""Streaming statistics equal numpy's on all the data at once, however the data came."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.aggregation import MaxMetric

from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.statistics import Gram, PerImage
from bvit_interp.probes.probe import Probe


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Gram ----------------------------------------------------------------------------------------


def filled(metric, values, size, *more):
    for begin in range(0, len(values), size):
        metric.update(values[begin : begin + size], *(rest[begin : begin + size] for rest in more))
    return metric


@pytest.mark.parametrize("size", [1, 7, 23, 100])
def test_second_moments_against_numpy(size):
    values = 3 + drawn(1, 100, 4, 6)  # a mean far from zero, where centring matters
    found = filled(Gram(4, 6), values, size).compute()
    assert found["count"] == 100
    for t in range(4):
        x = values[:, t].numpy().astype(np.float64)
        np.testing.assert_allclose(found["gram"][t], x.T @ x, rtol=1e-12)
        np.testing.assert_allclose(
            found["centred"][t] / 99, np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12
        )


def test_second_moments_do_not_depend_on_the_batches():
    values = drawn(2, 90, 3, 5)
    one, other = (filled(Gram(3, 5), values, size).compute() for size in (90, 8))
    for key in ("gram", "centred"):
        torch.testing.assert_close(one[key], other[key], rtol=1e-12, atol=1e-12)
    assert one["count"] == other["count"] == 90


def test_sums_are_kept_in_float64():
    metric = Gram(1, 1)
    metric.update(torch.tensor([[[2.0**12]]]))
    for _ in range(3):
        metric.update(torch.tensor([[[1.0]]]))  # lost in float32
    assert metric.compute()["gram"].item() == 2**24 + 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    values = torch.ones(2, 3, 4)
    values[1, 2, 0] = bad
    metric = Gram(3, 4)
    metric.update(torch.ones(2, 3, 4))
    kept = {name: state.clone() for name, state in metric.metric_state.items()}
    with pytest.raises(UserError, match="NaN or infinite"):
        metric.update(values)
    assert all(torch.equal(kept[name], state) for name, state in metric.metric_state.items())


def test_singular_values_of_the_streamed_matrix():
    from bvit_interp.metrics import singular_values_of_gram

    values = 1 + drawn(3, 40, 2, 6)
    found = filled(Gram(2, 6), values, 9).compute()
    for t in range(2):
        x = values[:, t].double().numpy()
        for key, matrix in (("gram", x), ("centred", x - x.mean(0))):
            expected = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(singular_values_of_gram(found[key])[t], expected, rtol=1e-9)


# ---- PerImage ------------------------------------------------------------------------------------


def test_rows_come_back_in_the_order_of_the_data():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    values = drawn(4, 20, 3)
    values[5, 1] = math.nan
    metric = PerImage()
    for part in (slice(0, 3), slice(3, 4), slice(4, 20)):
        metric.update(2 * order[part], values[order[part]])
    index, rows = metric.compute()
    assert index.tolist() == list(range(0, 40, 2))
    assert rows.dtype == torch.float64
    np.testing.assert_array_equal(rows, values.double())


# ---- several processes ---------------------------------------------------------------------------


def one_pass_and_two(make, *tensors):
    """The metric after all the data, and after two ranks that took turns were merged by
    torchmetrics."""
    whole = filled(make(), tensors[0], 5, *tensors[1:])
    shares = [[tensor[rank::2] for tensor in tensors] for rank in (0, 1)]
    ranks = [filled(make(), share[0], 3, *share[1:]) for share in shares]
    ranks[0].merge_state(ranks[1])
    return whole.compute(), ranks[0].compute()


def test_merged_second_moments():
    whole, merged = one_pass_and_two(lambda: Gram(2, 3), drawn(6, 11, 2, 3))
    for key in whole:
        torch.testing.assert_close(merged[key], whole[key], rtol=1e-12, atol=1e-12)


def test_merged_rows():
    values = drawn(7, 11, 3)
    metrics = [PerImage(), PerImage()]
    for rank, metric in enumerate(metrics):
        metric.update(torch.arange(11)[rank::2], values[rank::2])
    metrics[0].merge_state(metrics[1])
    index, rows = metrics[0].compute()
    assert index.tolist() == list(range(11))
    assert torch.equal(rows, values.double())


def test_a_process_without_images_changes_nothing():
    metric = Gram(2, 3)
    metric.update(drawn(8, 3, 2, 3))
    expected = metric.compute()
    metric.merge_state(Gram(2, 3))
    torch.testing.assert_close(metric.compute(), expected)


# ---- through a probe -----------------------------------------------------------------------------


class ClassMeans(Metric):
    """A metric that asks for labels: the mean activation of each class, from all that it saw."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, values, labels):
        if labels.max() >= self.classes:
            raise UserError(f"a label beyond {self.classes - 1}")
        self.values.append(values.double())
        self.labels.append(labels)

    def compute(self):
        values, labels = torch.cat(self.values), torch.cat(self.labels)
        return torch.stack([values[labels == c].mean(0) for c in range(self.classes)])


def batches(images, labels, size):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


@pytest.fixture
def ten():
    return drawn(9, 10, 3, 32, 32), torch.tensor([0, 2, 1, 0, 0, 2, 1, 2, 0, 2])


@pytest.mark.parametrize("size", [3, 10])
def test_collected_class_means(tiny_reg4, ten, size):
    images, labels = ten
    probe = Probe(tiny_reg4)
    means = probe.collect(
        batches(images, labels, size),
        {"mlp_post": ClassMeans(3)},
        steps=[2, 7],
        tokens="cls",
        progress=False,
    )["mlp_post"]
    with torch.no_grad():
        neurons = (
            probe.record(images, "mlp_post", steps=[2, 7], tokens="cls")["mlp_post"]
            .numpy()
            .astype(np.float64)
        )
    assert means.shape == (3, 2, 128)
    for c in range(3):
        np.testing.assert_allclose(
            means[c], neurons[labels.numpy() == c].mean(0), rtol=1e-4, atol=1e-5
        )


def test_collected_by_metrics_of_others_and_by_address(tiny, ten, by_hand):
    images, labels = ten
    probe = Probe(tiny)
    by_address = {
        "z[5]:3": ClassMeans(3),
        "mlp_post[2]:7": MeanMetric(),
        "resid_post[-1]": MaxMetric(),
    }
    metrics = {**by_address, "resid_mid": MeanMetric()}
    found = probe.collect(
        batches(images, labels, 5), metrics, steps=(t for t in (1, 2)), progress=False
    )
    assert list(found) == ["z[5]:3", "mlp_post[2]:7", "resid_post[-1]", "resid_mid"]
    with torch.no_grad():
        hand = by_hand.run(tiny, images, [tiny.blocks[0]] * 12)
        head_outputs = probe.record(images, "z", steps=5)["z", 5][:, :, 3].double()
    assert found["z[5]:3"].shape == (3, 17, 8)
    torch.testing.assert_close(
        found["z[5]:3"][1], head_outputs[labels == 1].mean(0), rtol=1e-4, atol=1e-5
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert found["mlp_post[2]:7"].item() == pytest.approx(
        hand[2]["mlp_post"][..., 7].mean().item(), rel=1e-4
    )
    torch.testing.assert_close(found["resid_post[-1]"], hand[12]["resid_post"].max(), **close)
    both = torch.stack([hand[1]["resid_mid"], hand[2]["resid_mid"]])
    torch.testing.assert_close(found["resid_mid"], both.mean(), **close)


def test_an_address_does_not_add_its_step_to_the_site(tiny, ten):
    images, labels = ten
    probe = Probe(tiny)
    found = probe.collect(
        batches(images, labels, 5),
        {"z": ClassMeans(3), "z[9]:1": ClassMeans(3)},
        steps=[1, 2],
        progress=False,
    )
    assert found["z"].shape == (3, 2, 17, 4, 8)
    assert found["z[9]:1"].shape == (3, 17, 8)


def test_labels_are_not_taken_for_weights(tiny, ten):
    """One number an image, as many as labels: a MeanMetric would take them for weights without a
    word."""
    probe, key = Probe(tiny), "mlp_post[3]:7"
    found = probe.collect(batches(*ten, 5), {key: MeanMetric()}, tokens="cls", progress=False)[key]
    with torch.no_grad():
        neuron = probe.record(ten[0], key, tokens="cls")[key]
    assert neuron.shape == (10,)
    torch.testing.assert_close(found, neuron.mean(), rtol=1e-4, atol=1e-6)


def test_labels_go_to_those_that_ask_also_in_a_collection(tiny, ten):
    class Targets(Metric):
        def __init__(self):
            super().__init__()
            self.add_state("seen", [], dist_reduce_fx="cat")

        def update(self, values, target):
            assert len(values) == len(target)
            self.seen.append(target)

        def compute(self):
            return torch.cat(self.seen)

    probe = Probe(tiny)
    several = MetricCollection(
        {"mean": MeanMetric(), "max": MaxMetric(), "seen": Targets(), "classes": ClassMeans(3)}
    )
    found = probe.collect(
        batches(*ten, 4), {"z": several, "q": Targets()}, steps=1, tokens="cls", progress=False
    )
    with torch.no_grad():
        z = probe.record(ten[0], "z", steps=1, tokens="cls")["z"]
    assert torch.equal(found["q"], ten[1])
    assert torch.equal(found["z"]["seen"], ten[1])
    torch.testing.assert_close(found["z"]["max"], z.max(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found["z"]["classes"][2], z[ten[1] == 2].double().mean(0), rtol=1e-4, atol=1e-6
    )
    # batches of 4, 4 and 2 count by their numbers, not alike
    torch.testing.assert_close(found["z"]["mean"], z.mean(), rtol=1e-4, atol=1e-6)


def test_collect_leaves_the_model_as_it_came(tiny, ten, watched_models):
    probe = Probe(tiny)
    watched_models.append(probe.model)
    plain = tiny(ten[0])
    with pytest.raises(UserError, match="a label beyond 1"):
        probe.collect(batches(*ten, 4), {"z": ClassMeans(2)}, progress=False)
    probe.collect(
        batches(*ten, 4),
        {"z": ClassMeans(3), "pattern[3]": MeanMetric()},
        tokens="cls",
        progress=False,
    )
    assert torch.equal(tiny(ten[0]), plain)
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_a_nan_in_the_weights_is_told(tiny, ten):
    with torch.no_grad():
        tiny.blocks[0].mlp.fc1.bias[3] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        Probe(tiny).collect(
            batches(*ten, 4), {"mlp_post": Gram(1, 128)}, [1], "cls", progress=False
        )
