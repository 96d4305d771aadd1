"""Studies: one table, which continues and refuses other options."""

from __future__ import annotations

import pandas as pd
import pytest
import timm
import torch
import yaml

from bvit_interp.errors import UserError
from bvit_interp.models import cost
from bvit_interp.results import read_table
from bvit_interp.training.loop import study, supervised
from bvit_interp.training.loop import trainer as run_trainer

SHIPPED = {"blocks": 6, "heads": 4, "steps": 4, "width": 15, "width-small": 9}
POINTS = [
    {"series": "bViT", "model.num_steps": 2},
    {"series": "bViT, wide", "model.num_steps": 2, "model.embed_dim": 48},
    {
        "series": "ViT",
        "model.name": "vit_rms_small_patch16_224",
        "model.num_blocks": 2,
        "model.num_steps": 1,
    },
]


@pytest.fixture
def shipped(settings, tmp_path, monkeypatch):
    """A study "width" of three tiny points beside a recipe that it names."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings(epochs=1)))
    content = {
        "recipe": str(tmp_path / "tiny.yaml"),
        "settings": ["batch_size=20"],
        "points": POINTS,
    }
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "width.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(study, "FOLDER", tmp_path / "studies")
    return tmp_path


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_study_has_points_that_can_be_built(name):
    runs = study.read(name).runs((0, 1))
    assert len(runs) == 2 * SHIPPED[name]
    assert [seed for _, seed, _ in runs] == [0] * SHIPPED[name] + [1] * SHIPPED[name]
    assert all(
        plan.seed == seed and plan.epochs == (6 if "small" in name else 12)
        for _, seed, plan in runs
    )
    varied = set()
    for series, _, plan in runs[: SHIPPED[name]]:
        arguments = dict(plan.model)
        with torch.device("meta"):
            model = timm.create_model(arguments.pop("name"), **arguments)
        about = study._shape(model)
        varied.add((series, about[study.read(name).name]))
        if name == "blocks":
            assert about["steps"] == 12
    assert len(varied) == SHIPPED[name]


def test_a_file_of_ones_own(shipped):
    content = yaml.safe_load((shipped / "studies" / "width.yaml").read_text())
    own = shipped / "mine.yaml"
    own.write_text(yaml.safe_dump({**content, "varies": "steps"}))
    assert study.read(str(own)).name == "steps"
    assert len(study.read(str(own)).points) == len(POINTS)
    for change, message in (
        ({"varies": "depth"}, "varies must be one of width, heads, blocks, steps, got 'depth'"),
        ({"varies": None}, "got None"),
    ):
        own.write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(UserError, match=message):
            study.read(str(own))
    own.write_text("points: []")
    with pytest.raises(UserError, match="mine.yaml: not a study, it lacks recipe, settings"):
        study.read(str(own))


def test_names_and_settings(shipped):
    assert study.available() == ["width"]
    with pytest.raises(UserError, match="no study 'depth'; studies: width"):
        study.read("depth")
    plan = study.read("width", settings=("lr=0.5",)).runs((3,))[1][2]
    assert (plan.batch_size, plan.lr, plan.seed, plan.model["embed_dim"]) == (20, 0.5, 3, 48)
    other = study.read("width", recipe="digits-s", settings=("epochs=2",)).runs((0,))[0][2]
    assert (other.batch_size, other.epochs, other.model["num_steps"]) == (
        32,
        2,
        2,
    )  # not the study's own settings


def test_the_table(shipped):
    frame = study.run(study.read("width"), (0, 7), shipped / "out")
    assert list(frame) == list(study.COLUMNS)
    assert frame["series"].tolist() == ["bViT", "bViT, wide", "ViT"] * 2
    assert frame["seed"].tolist() == [0] * 3 + [7] * 3
    assert frame["width"].tolist() == [32, 48, 32] * 2
    assert frame["heads"].tolist() == [2] * 6
    assert frame["blocks"].tolist() == [1, 1, 2] * 2
    assert frame["steps"].tolist() == [2, 2, 2] * 2
    assert (
        set(frame["epochs"]) == {1}
        and set(frame["study"]) == {"width"}
        and frame["chance"].between(0.1, 0.2).all()
    )
    plan = study.read("width").runs((0,))[1][2]
    arguments = dict(plan.model)
    wide = timm.create_model(arguments.pop("name"), **arguments)
    assert (
        frame["parameters"][1] == cost.parameters(wide) == sum(p.numel() for p in wide.parameters())
    )
    assert frame["gflops"][1] == pytest.approx(cost.flops(wide, count_attention=False) / 1e9)
    assert frame["parameters"][2] - frame["parameters"][0] == 12 * 32**2 + 11 * 32
    for (_, seed, plan), row in zip(
        study.read("width").runs((0, 7)), frame.itertuples(), strict=True
    ):
        alone = shipped / "alone" / f"{row.Index}"
        supervised.train(plan, alone)
        last = read_table(alone / "history.csv").iloc[-1]
        assert (row.seed, row.accuracy, row.ema_accuracy, row.test_loss) == (
            seed,
            last["top1"],
            last["ema_top1"],
            last["test_loss"],
        )
    pd.testing.assert_frame_equal(
        read_table(shipped / "out" / "study_width.csv")[list(study.COLUMNS)], frame
    )


def test_it_goes_on_in_the_middle_of_a_run_and_of_the_table(shipped, monkeypatch):
    whole = study.run(study.read("width"), (0,), shipped / "whole")
    trained, original = [], run_trainer.Trainer._step
    monkeypatch.setattr(run_trainer, "_CHECKED_EVERY", 1)

    def noted(trainer, *batch):
        if len(trained) == 3:  # the second of two steps of the second run
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append((trainer.out.name, trainer.run.done))
        return original(trainer, *batch)

    monkeypatch.setattr(run_trainer.Trainer, "_step", noted)
    with pytest.raises(KeyboardInterrupt):
        study.run(study.read("width"), (0,), shipped / "out", save_minutes=0)
    assert len(read_table(shipped / "out" / "study_width.csv")) == 1
    frame = study.run(study.read("width"), (0,), shipped / "out", save_minutes=0)
    pd.testing.assert_frame_equal(frame, whole, check_exact=True)
    first, second, third = (
        f"width-{name}-0" for name in ("bvit-32-2-1-2", "bvit-wide-48-2-1-2", "vit-32-2-2-2")
    )
    assert trained == [
        (first, 0),
        (first, 1),
        (second, 0),
        "killed",
        (second, 1),
        (third, 0),
        (third, 1),
    ]

    study.run(study.read("width"), (0,), shipped / "out")
    assert len(trained) == 7  # nothing was missing
    more = study.run(study.read("width"), (0, 1), shipped / "out")
    assert len(trained) == 13 and more["seed"].tolist() == [0, 0, 0, 1, 1, 1]
    study.run(study.read("width"), (0,), shipped / "out", overwrite=True)
    assert len(trained) == 19


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("lr=0.5", "recipe.lr"),
        ("model.patch_drop_rate=0.5", "recipe.model"),
        ("model.img_size=64", "recipe.model"),
    ],
)
def test_a_table_of_other_options_is_refused(shipped, setting, named):
    study.run(study.read("width"), (0,), shipped / "out")
    with pytest.raises(
        UserError, match=rf"study_width.csv was made with other options \({named}: "
    ):
        study.run(study.read("width", settings=(setting,)), (0,), shipped / "out")
    other = study.read("width", settings=(setting,))
    if "img_size" not in setting:  # and the other way round
        study.run(other, (0,), shipped / "other")
        with pytest.raises(UserError, match="was made with other options"):
            study.run(study.read("width"), (0,), shipped / "other")


def test_a_point_that_cannot_be_built_stops_before_the_first_run(shipped):
    with pytest.raises(UserError, match="num_heads=5"):
        study.run(study.read("width", settings=("model.num_heads=5",)), (0,), shipped / "out")
    with pytest.raises(UserError, match="at least one seed"):
        study.run(study.read("width"), (), shipped / "out")
    assert not (shipped / "out").exists()
