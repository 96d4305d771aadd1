"""Every question gives the same table for a loop that is not ours as for a bViT of its weights."""

from __future__ import annotations

import dataclasses
import importlib

import pandas as pd
import pytest
import torch
from foreign import foreign
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bvit_interp.analyses import ANALYSES
from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.models.looped import CalledSteps

OF_OUR_MODELS = {"early_exit": "exits", "pathways": "masks"}
"""Questions about what only our own models have, and a word of the reason."""
MACHINE = ("latency", "throughput", "peak_memory", "saved_time")
"""Columns that no two runs share."""
NEEDS_CLS = ("pointing_game", "trajectories", "dynamics", "energy_rank")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")


class Somebodys(nn.Module):
    """The parts of a bViT in a class of somebody else's."""

    image_size = 32

    def __init__(self, bvit, steps):
        super().__init__()
        self.patches, self.cls_token, self.position = (
            bvit.patch_embed.proj,
            bvit.cls_token,
            bvit.pos_embed,
        )
        self.block, self.norm, self.head = bvit.blocks[0], bvit.norm, bvit.head
        self.steps = steps

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for _ in range(self.steps):
            x = self.block(x)
        return self.head(self.norm(x)[:, 0])


def measured(word, model, steps=None):
    question = importlib.import_module(f"bvit_interp.analyses.{word}")
    fields = {field.name for field in dataclasses.fields(question.Config)}
    options = {**question.QUICK, **({"limit": 20} if "limit" in fields else {})}
    if word in ("step_accuracy", "trajectories", "dynamics", "stability"):  # of 24, past a bViT's T
        options["steps"] = 4 if steps is None else steps
    return question.measure({"model": model}, open_samples("digits-s"), question.Config(**options))


@pytest.mark.parametrize(
    "word", [word for word in ANALYSES if word not in OF_OUR_MODELS and word != "lens"]
)
def test_the_table_is_that_of_the_same_weights_in_a_bvit(make, word):
    torch.manual_seed(0)
    bvit = make(num_steps=4)
    ours, theirs = measured(word, bvit), measured(word, Somebodys(bvit, 4).eval())
    machine = [name for name in ours if name.startswith(MACHINE)]
    unknown = [name for name in ("backbone", "embedding", "norm", "head") if name in ours]
    left_out = machine + (unknown if word == "cost" else []) + (["path"] if "path" in ours else [])
    assert len(theirs)
    if word in ("patching", "schedule"):  # a loop that is not ours has fewer runs
        keys = [name for name in theirs if ours[name].dtype.kind not in "fib" or name == "step"]
        shared = ours[keys].apply(tuple, axis=1).isin(set(theirs[keys].apply(tuple, axis=1)))
        ours = ours[shared].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        ours.drop(columns=left_out), theirs.drop(columns=left_out), rtol=1e-4, atol=1e-5
    )


def test_the_lens_of_the_answer_is_that_of_the_cls_token(make):
    torch.manual_seed(0)
    bvit = make(num_steps=4)
    ours, theirs = measured("lens", bvit), measured("lens", Somebodys(bvit, 4).eval())
    ours = ours[(ours["tokens"] == "cls") & (ours["lens"] == "raw")]
    assert set(theirs["tokens"]) == {"answer"}
    both = ours.merge(theirs, on=["lens", "step", "metric", "threshold"], suffixes=("", "_theirs"))
    assert len(both) == len(theirs) > 0
    torch.testing.assert_close(
        torch.tensor(both["value"].to_numpy()),
        torch.tensor(both["value_theirs"].to_numpy()),
        rtol=1e-4,
        atol=1e-5,
        equal_nan=True,
    )


@pytest.mark.parametrize("word", OF_OUR_MODELS)
def test_what_only_our_models_have_is_refused_in_one_line(word):
    with pytest.raises(UserError, match=OF_OUR_MODELS[word]) as refused:
        measured(word, foreign("prelude"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("word", NEEDS_CLS)
def test_questions_about_cls_refuse_a_model_without_it(word):
    with pytest.raises(UserError, match="no CLS token"):
        measured(word, foreign("encoder"))


@pytest.mark.parametrize(
    "word",
    ["features", "rank_sweep", "step_accuracy", "evaluate", "attention", "cost", "selectivity"],
)
@pytest.mark.parametrize("kind", ["encoder", "prelude"])
def test_patch_questions_run_without_cls_and_between_prelude_and_coda(word, kind):
    frame = measured(word, foreign(kind))
    assert len(frame)
    assert not frame.drop(columns=[name for name in frame if frame[name].isna().all()]).empty


def test_a_looped_subclass_of_timm_is_unrolled_by_its_calls():
    frame = measured("step_accuracy", foreign("looped_timm", loops=3))
    assert frame["step"].tolist() == [1, 2, 3]
    assert isinstance(
        importlib.import_module("bvit_interp").unroll(foreign("encoder")), CalledSteps
    )


def test_a_timm_model_that_its_class_made_has_no_config_and_runs():
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4}
    frame = measured("step_accuracy", VisionTransformer(**shape, depth=2, num_classes=10).eval(), 2)
    assert frame["step"].tolist() == [1, 2]
