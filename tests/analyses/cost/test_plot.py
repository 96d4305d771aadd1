"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses import cost


def test_bars_and_a_cost_that_is_not_known(tiny, make, digits):
    pooled = make(name="vit_tiny_patch16_224", depth=2, global_pool="map", class_token=False)
    table = cost.measure({"a": tiny, "b": pooled}, digits, cost.Config(runs=1, batch_size=1))
    frame = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    parameters, flops, latency, throughput = cost.plot(frame).axes
    widths = [bar.get_width() for bar in parameters.patches]
    np.testing.assert_allclose(widths, frame["parameters"] / 1e6)
    np.testing.assert_allclose(flops.patches[0].get_width(), frame["gflops"][0])
    attention = flops.patches[2]
    np.testing.assert_allclose(attention.get_x(), frame["gflops"][0])
    np.testing.assert_allclose(
        attention.get_width(), (frame["gflops_attention"] - frame["gflops"])[0]
    )
    np.testing.assert_allclose(latency.patches[1].get_width(), frame["latency_ms"][1])
    (bars,) = latency.collections
    ends = np.array([segment[:, 0] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, frame[["latency_low", "latency_high"]])
    np.testing.assert_allclose(throughput.patches[0].get_width(), frame["throughput"][0])
    assert [text.get_text() for text in flops.texts][1] == "not known"
