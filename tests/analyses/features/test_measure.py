"""Feature pictures against Probe, numpy and scipy; choice of neurons, resuming, and what is
drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from kills import contents, kills
from PIL import Image
from scipy import stats

from bvit_interp.analyses.features import COLUMNS, TREND_COLUMNS, Config, measure
from bvit_interp.analyses.features import maximise as module
from bvit_interp.analyses.features.maximise import maximise
from bvit_interp.analyses.features.measure import _with_trends
from bvit_interp.analyses.features.neurons import NeuronActivations
from bvit_interp.analyses.features.recipe import Recipe
from bvit_interp.cli import main
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import save
from bvit_interp.probes.probe import Probe
from bvit_interp.results import Table

QUICK = {"iterations": 2, "limit": 20, "batch_size": 7}


def patches_of(model, data, images):
    """`mlp_post` of the patches, ``(n, T, P, F)``, of the images of those numbers."""
    geometry = Geometry.of(model, data)
    views = torch.stack([geometry(data.read(i)[0], None)[0] for i in images])
    with torch.no_grad():
        return Probe(model).record(views, "mlp_post", tokens="patches")["mlp_post"].double().numpy()


def test_every_model_has_its_table(any_model, digits):
    frame = measure({"m": any_model}, digits, Config(**{**QUICK, "iterations": 1}, n_neurons=2))
    assert list(frame) == list(COLUMNS)
    assert len(frame) == 2 * len(any_model.blocks)
    assert frame["neuron"].nunique() == 2
    assert np.isfinite(
        frame.drop(
            columns=[
                "model",
                "top_images",
                "patch_grid",
                "path",
                "activation_ratio",
                *TREND_COLUMNS,
            ]
        ).to_numpy(float)
    ).all()
    assert ((frame["activation"] > frame["real_activation"]) == frame["exceeds_real"]).all()
    assert frame["path"].isna().all()


def test_optimised_images_and_their_numbers(tiny_reg4, digits, tmp_path):
    frame = measure(
        {"m": tiny_reg4}, digits, Config(**QUICK, neurons=(5, 72), steps=(3, -1)), tmp_path
    )
    assert frame[["neuron", "step"]].to_numpy().tolist() == [[5, 3], [5, 12], [72, 3], [72, 12]]
    geometry = Geometry.of(tiny_reg4, digits)
    of = NeuronActivations(tiny_reg4, geometry.mean, geometry.std)
    neurons, steps = torch.tensor([5, 5, 72, 72]), torch.tensor([3, 12, 3, 12])
    start, images = maximise(of, neurons, steps, Recipe(iterations=2))
    for i, row in enumerate(frame.itertuples()):
        normalised = [
            (image - torch.tensor(geometry.mean)[:, None, None])
            / torch.tensor(geometry.std)[:, None, None]
            for image in (images[i], start)
        ]
        with torch.no_grad():
            recorded = Probe(tiny_reg4).record(torch.stack(normalised), "mlp_post", row.step)[
                "mlp_post", row.step
            ]
        expected = recorded[:, 5:, row.neuron].mean(1)  # behind CLS and four registers
        assert [row.activation, row.start_activation] == pytest.approx(expected.tolist(), abs=1e-5)
        picture = np.asarray(Image.open(row.path))
        assert picture.shape == (32, 4 * 32, 3)
        np.testing.assert_array_equal(
            picture[:, :32], (255 * images[i].permute(1, 2, 0)).round().byte()
        )
        shown = [int(entry.partition(":")[0]) for entry in row.top_images.split()]
        for place, number in enumerate(shown, start=1):
            np.testing.assert_array_equal(
                picture[:, 32 * place : 32 * (place + 1)], digits.read(number)[0]
            )


def test_best_real_images_against_all_activations(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(**QUICK, neurons=(5, 72), steps=(1, 7), n_top=4))
    seen = np.arange(0, 60, 3)  # 20 of 60, spread evenly
    patches = patches_of(tiny, digits, seen)
    for row in frame.itertuples():
        values = patches[:, row.step - 1, :, row.neuron]
        best = np.argsort(-values.mean(1))[:4]
        assert row.real_activation == pytest.approx(values.mean(1).max(), abs=1e-6)
        places = [divmod(int(values[i].argmax()), 4) for i in best]
        assert row.top_images == " ".join(
            f"{seen[i]}:{r},{c}" for i, (r, c) in zip(best, places, strict=True)
        )
        assert (row.patch_grid, row.n) == ("4x4", 20)
        assert (
            np.isnan(row.activation_ratio)
            if row.real_activation <= 0
            else row.activation_ratio == pytest.approx(row.activation / row.real_activation)
        )


def test_auto_takes_even_quantiles_of_the_change(tiny, digits):
    with torch.no_grad():  # silence two neurons: the steadiest there could be
        tiny.blocks[0].mlp.fc1.weight[[3, 4]] = 0
    means = patches_of(tiny, digits, np.arange(0, 60, 3)).mean(2)  # (n, T, F)
    spread = means.std(0)
    responsive = (spread > 0.1 * np.median(spread, axis=1, keepdims=True)).all(0)
    assert not responsive[[3, 4]].any()
    steady = np.array(
        [
            np.mean([np.corrcoef(means[:, t, f], means[:, t + 1, f])[0, 1] for t in range(11)])
            if responsive[f]
            else np.nan
            for f in range(128)
        ]
    )
    ranked = [f for f in np.argsort(1 - steady) if responsive[f]]
    for count, places in ((1, [0.5]), (2, [0, 1]), (5, [0, 0.25, 0.5, 0.75, 1])):
        frame = measure(
            {"m": tiny}, digits, Config(**{**QUICK, "iterations": 1}, n_neurons=count, steps=(1,))
        )
        expected = [ranked[int(np.round(q * (len(ranked) - 1)))] for q in places]
        if count == 1:
            expected = [ranked[len(ranked) // 2]]
        assert list(frame["neuron"]) == expected
        np.testing.assert_allclose(frame["correlation_distance"], 1 - steady[expected], atol=1e-5)


def test_too_few_neurons_respond(tiny, digits):
    with pytest.raises(
        UserError, match=r"m: 0 neurons respond differently .* not 3; name some with --neurons"
    ):
        measure({"m": tiny}, digits, Config(limit=1, iterations=1))


def test_trend_of_the_centroid_and_its_null():
    """On a table made up: three neurons, two of whose ten steps have found nothing, and another
    with two steps."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, 11)
    made = [
        pd.DataFrame(
            {
                "model": "m",
                "neuron": f,
                "step": steps,
                "spectral_centroid": 0.3 - slope * steps + rng.normal(0, 0.01, 10),
            }
        )
        for f, slope in ((7, 0.02), (2, 0.02), (5, 0.0))
    ]
    frame = pd.concat([*made, made[0].head(2).assign(neuron=11)], ignore_index=True).assign(
        exceeds_real=1
    )
    frame.loc[[3, 15], ["exceeds_real", "spectral_centroid"]] = 0, 9.0
    frame = _with_trends(frame.assign(**dict.fromkeys(TREND_COLUMNS, np.nan)), seed=0)
    counted = frame[frame["exceeds_real"] == 1]
    rho = [
        stats.spearmanr(part["step"], part["spectral_centroid"]).statistic
        if len(part) > 2
        else np.nan
        for _, part in counted.groupby("neuron", sort=False)
    ]
    np.testing.assert_allclose(frame["spearman"], np.repeat(rho, [10, 10, 10, 2]))
    assert rho[0] < -0.95
    np.testing.assert_allclose(frame["spearman_mean"], np.nanmean(rho))
    # by another route: normal, with the variance of Spearman's rho, 1 / (steps - 1), of the mean of
    # three
    expected = 1.96 * np.sqrt(1 / 8 + 1 / 8 + 1 / 9) / 3
    assert frame["spearman_null_high"].iloc[0] == pytest.approx(expected, abs=0.05)
    assert frame["spearman_null_low"].iloc[0] == pytest.approx(-expected, abs=0.05)
    of_step = frame.groupby("step")[["centroid_null_low", "centroid_null_high"]].first()
    assert (of_step["centroid_null_low"] < of_step["centroid_null_high"]).all()
    assert (
        counted["spectral_centroid"].groupby(counted["step"]).mean()[10]
        < of_step.loc[10, "centroid_null_low"]
    )  # the fall is seen
    assert (of_step["centroid_null_high"] < 1).all()  # 9.0 is left out


def test_nothing_found_has_no_trend(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(**QUICK, neurons=(5,), steps=(1, 2)))
    assert frame["spearman_mean"].isna().all()
    assert frame["start_spectral_centroid"].nunique() == 1
    assert frame["start_spectral_centroid"].iloc[0] == pytest.approx(
        0.3826, abs=0.02
    )  # white noise


def test_several_models_share_one_pass_and_come_back_as_they_were(tiny, stacked, digits):
    reads = []

    class Counted(type(digits)):
        def read(self, i):
            reads.append(i)
            return super().read(i)

    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    config = Config(iterations=1, neurons=(5,), steps=(1, 3))
    both = measure({"a": tiny, "b": stacked}, Counted("test", length=20), config)
    assert sorted(reads) == list(range(20))
    assert both.groupby("model").size().to_dict() == {"a": 2, "b": 2}
    alone = measure({"b": stacked}, Counted("test", length=20), config)
    pd.testing.assert_frame_equal(both[both["model"] == "b"].reset_index(drop=True), alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tiny.parameters())


def test_a_stack_of_copies_has_the_pictures_of_the_recurrent_model(make, digits):
    model, stack = make(num_steps=3), make(name="vit_rms_small_patch16_224", num_blocks=3)
    weights = model.state_dict()
    stack.load_state_dict(
        {
            name: weights[name if name in weights else "blocks.0." + name.split(".", 2)[2]]
            for name in stack.state_dict()
        }
    )
    config = Config(**QUICK, neurons=(5, 72))
    of_model, of_stack = (measure({"m": each}, digits, config) for each in (model, stack))
    pd.testing.assert_frame_equal(of_model, of_stack, rtol=1e-4, atol=1e-5)


def test_a_table_is_continued_and_not_mixed(tiny, digits, tmp_path, monkeypatch):
    made = []

    def counted(activations, neurons, steps, *rest, plain=module.maximise):
        made.extend(zip(neurons.tolist(), steps.tolist(), strict=True))
        return plain(activations, neurons, steps, *rest)

    monkeypatch.setattr(module, "maximise", counted)
    first, more = (
        Config(**QUICK, neurons=(5,), steps=(1, 2)),
        Config(**QUICK, neurons=(5, 9), steps=(2, 1, 3), chunk_size=2),
    )
    path = tmp_path / "features.csv"
    begun = measure({"m": tiny}, digits, first, tmp_path, Table(path, first.resume_key()))
    assert made == [(5, 1), (5, 2)]
    went_on = measure({"m": tiny}, digits, more, tmp_path, Table(path, more.resume_key()))
    assert made[2:] == [(5, 3), (9, 2), (9, 1), (9, 3)]
    fixed = [column for column in COLUMNS if column not in TREND_COLUMNS]
    pd.testing.assert_frame_equal(went_on.head(2)[fixed], begun[fixed])
    whole = measure({"m": tiny}, digits, Config(**QUICK, neurons=(5, 9), steps=(1, 2, 3)), tmp_path)
    together = went_on.sort_values(["neuron", "step"], ignore_index=True)
    pd.testing.assert_frame_equal(together, whole, rtol=1e-3, atol=1e-3)
    other = Config(**{**QUICK, "iterations": 3}, neurons=(5,), steps=(1, 2))
    with pytest.raises(UserError, match="made with other options .*iterations: 2 there, 3 now"):
        Table(path, other.resume_key())


def test_killed_anywhere_it_ends_as_undisturbed(tiny, digits, tmp_path, monkeypatch):
    """Also the batches are those of a run that was not stopped: an image depends on the size."""
    config = Config(limit=3, iterations=1, neurons=(5,), steps=(1, 7), chunk_size=2)
    sizes = []

    def sized(activations, neurons, *rest, plain=module.maximise):
        sizes.append(len(neurons))
        return plain(activations, neurons, *rest)

    monkeypatch.setattr(module, "maximise", sized)

    def run(out):
        table = Table(out / "features.csv", config.resume_key())
        return measure({"m": tiny}, digits, config, out, table).drop(columns="path")

    whole, number = run(tmp_path / "whole"), 0
    for out, frame in kills(monkeypatch, tmp_path, run, ("replace",)):
        pd.testing.assert_frame_equal(frame, whole, check_exact=True, check_dtype=False)
        for name, content in contents(tmp_path / "whole" / "features").items():
            assert (out / "features" / name).read_bytes() == content
        number += 1
    assert number > 4
    assert set(sizes) == {2}


def test_a_started_chunk_is_made_again_as_a_whole(tiny, digits, tmp_path, monkeypatch):
    made = []

    def noted(activations, neurons, steps, *rest, plain=module.maximise):
        made.append(steps.tolist())
        return plain(activations, neurons, steps, *rest)

    monkeypatch.setattr(module, "maximise", noted)
    config = Config(limit=6, iterations=1, neurons=(5,), steps=(1, 7, 12, 3, 4), chunk_size=2)
    table = Table(tmp_path / "features.csv", config.resume_key())
    whole = measure({"m": tiny}, digits, config, tmp_path, table)
    assert made == [[1, 7], [12, 3], [4]]
    table.rows = table.rows[:3]
    made.clear()
    again = measure({"m": tiny}, digits, config, tmp_path, table)
    assert made == [[12, 3], [4]]
    pd.testing.assert_frame_equal(again, whole)


@pytest.mark.slow
def test_the_command(tiny, tmp_path):
    ckpt = str(save(tiny, tmp_path / "tiny"))
    words = [
        "features",
        "--ckpt",
        ckpt,
        "--data",
        "digits-s",
        "--limit",
        "12",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--neurons", "5", "72", "--steps", "1", "12", "--iterations", "1"]) == 0
    assert (
        main([*words, "--neurons", "auto", "--n-neurons", "1", "--steps", "1", "--iterations", "1"])
        == 0
    )
    assert len(pd.read_csv(tmp_path / "out" / "features.csv")) == 5
    assert len(list((tmp_path / "out" / "features").glob("*.png"))) == 5


def test_bad_input(tiny, stacked, make, digits):
    with pytest.raises(UserError, match="grey: images are optimised in three colours"):
        measure({"a": tiny, "grey": make(in_chans=1)}, digits, Config(neurons=(5,)))
    with pytest.raises(UserError, match=r"a: no neuron 128; neurons: 0\.\.127"):
        measure({"a": tiny}, digits, Config(neurons=(5, 128)))
    with pytest.raises(UserError, match=r"b: no step 4; steps: 1\.\.3"):
        measure({"a": tiny, "b": stacked}, digits, Config(steps=(4,)))
    for options, message in (
        ({"n_neurons": 0}, "n-neurons must be >= 1, got 0"),
        ({"n_top": 0}, "n-top must be >= 1, got 0"),
        ({"chunk_size": 0}, "chunk-size must be >= 1, got 0"),
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"neurons": ()}, "no neuron chosen; neurons: auto, or numbers from 0"),
        ({"limit": 0}, "limit must be >= 1"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**options)
    with torch.no_grad():
        tiny.pos_embed[0, 3, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        measure({"a": tiny}, digits, Config(limit=2))
