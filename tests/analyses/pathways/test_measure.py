"""Pathways against masks worked out on paper, random masks against their nulls, and models run with
moved
masks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import foreign

from bvit_interp.analyses.pathways import COLUMNS, Config, measure
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.masks import Masks, full, masked
from bvit_interp.models.unroll import unroll


def thinned(model, density=0.5, seed=0, emptied=()):
    """Independent masks; `emptied` names (layer, step from 1) without a weight."""
    every, generator = full(model), torch.Generator().manual_seed(seed)
    thin = {
        name: torch.rand(mask.shape, generator=generator) < density for name, mask in every.items()
    }
    for name, step in emptied:
        thin[name][step - 1] = False
    return Masks(thin, every.blocks)


def view(model, **kwargs):
    return masked(model, thinned(model, **kwargs), baked=True)


def rows(frame, metric, **keys):
    found = frame[frame["metric"] == metric]
    for key, value in keys.items():
        found = found[found[key] == value]
    return found


def value(frame, metric, **keys):
    return rows(frame, metric, **keys)["value"].item()


def hits(model, data):
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in range(len(data))]
    with torch.no_grad():
        answers = model(torch.stack([geometry(image, None)[0] for image, _, _ in scenes])).argmax(
            -1
        )
    return np.mean(answers.numpy() == [label for _, label, _ in scenes])


def test_columns(tiny, digits):
    frame = measure({"m": view(tiny)}, digits, Config(limit=4, swaps=True))
    assert list(frame) == list(COLUMNS)


def test_every_number_against_numpy(any_model, digits):
    """Sets of weights in Python, for every kind of model; steps of different blocks are not
    compared."""
    model = view(any_model, density=0.3)
    frame = measure({"m": model}, digits, Config(limit=4, shuffles=0))
    steps = range(model.masks.count)
    active = {
        name: [{(model.masks.blocks[t], i) for i in np.flatnonzero(mask[t].numpy())} for t in steps]
        for name, mask in model.masks.items()
    }
    blocks = len({*model.masks.blocks})
    size = {name: mask[0].numel() for name, mask in model.masks.items()}
    every = [{(name, *w) for name in active for w in active[name][t]} for t in steps]
    assert frame["sparsity"].unique() == pytest.approx(
        [1 - np.mean([len(e) for e in every]) / sum(size.values())]
    )
    for layer, sets in {**active, "all": every}.items():
        of = frame[frame["layer"] == layer]
        width = size.get(layer, sum(size.values()))
        union = set().union(*sets)
        assert value(of[of["step"].isna()], "mask_sparsity") == pytest.approx(
            1 - np.mean([*map(len, sets)]) / width
        )
        assert value(of, "weight_sparsity") == pytest.approx(1 - len(union) / width / blocks)
        assert value(of, "mean_uses") == pytest.approx(sum(map(len, sets)) / len(union))
        uses = np.bincount(
            [sum(weight in one for one in sets) for weight in union], minlength=len(sets) + 1
        )
        np.testing.assert_allclose(rows(of, "utilisation")["value"], uses[1:] / len(union))
        alone = [
            one - set().union(*(sets[s] for s in steps if s != t)) for t, one in enumerate(sets)
        ]
        expected = [len(own) / len(one) for own, one in zip(alone, sets, strict=True)]
        np.testing.assert_allclose(rows(of, "specialization")["value"], expected)
    for _, row in rows(frame, "jaccard", layer="fc1").iterrows():
        i, j = (active["fc1"][int(row[key]) - 1] for key in ("step", "other_step"))
        assert row["value"] == len(i & j) / len(i | j)
        assert row["n"] == pytest.approx(len(i | j))
    pairs = [
        (i, j)
        for i in steps
        for j in steps
        if i < j and model.masks.blocks[i] == model.masks.blocks[j]
    ]
    assert len(rows(frame, "jaccard", layer="all")) == len(pairs)
    by_layer = [value(frame, "weight_sparsity", layer=name) for name in size]
    assert value(frame, "weight_sparsity_layer_mean") == pytest.approx(np.mean(by_layer))


def test_size_weighted_mean_of_the_overlap(tiny, digits):
    """qkv has 3 parts of 12, proj 1, fc1 and fc2 4 each (eq. 11)."""
    frame = measure({"m": view(tiny)}, digits, Config(limit=2, shuffles=0))
    by = {
        name: value(frame, "jaccard_mean", layer=name, convention="empty=nan")
        for name in full(tiny)
    }
    expected = (3 * by["qkv"] + by["proj"] + 4 * by["fc1"] + 4 * by["fc2"]) / 12
    assert value(frame, "jaccard_mean", layer="all", convention="empty=nan") == pytest.approx(
        expected
    )
    each = rows(frame, "jaccard", layer="proj")["value"]
    assert len(each) == 66
    assert by["proj"] == pytest.approx(each.mean())


def test_random_masks_are_what_their_nulls_say_and_one_mask_for_all_is_not(make, digits):
    model = make(embed_dim=64)
    model_of = {"random": view(model, density=0.3)}
    one = thinned(model, density=0.3)
    one = Masks({name: mask[:1].expand(12, -1, -1).clone() for name, mask in one.items()})
    frame = measure(
        model_of | {"one": masked(model, one, baked=True)}, digits, Config(limit=2, shuffles=0)
    )
    compared = frame[frame["null"].notna() & ~frame["metric"].isin(["accuracy", "collapse"])]
    inside = compared["value"].between(compared["null_low"], compared["null_high"])
    assert inside[compared["model"] == "random"].mean() > 0.93
    assert inside[compared["model"] == "one"].mean() < 0.1
    found = frame[frame["model"] == "one"]
    assert (rows(found, "specialization")["value"] == 0).all()
    assert value(found, "weight_sparsity", layer="all") == pytest.approx(found["sparsity"].iloc[0])
    assert value(found, "least_weight_sparsity", layer="all") == 0


@pytest.mark.parametrize(("empty", "shown"), [("nan", np.nan), ("1", 1.0), ("0", 0.0)])
def test_fully_pruned_layers_by_every_convention(tiny, digits, empty, shown):
    models = {"m": view(tiny, emptied=[("fc2", 3), ("fc2", 4), ("proj", 3)])}
    frame = measure(models, digits, Config(limit=2, shuffles=0, empty=empty))
    flagged = frame[frame["flag"] == "fully_pruned"]
    found = {(row["metric"], row["layer"], row["step"]) for _, row in flagged.iterrows()}
    expected = {
        (s, *place)
        for s in ("specialization", "mask_sparsity")
        for place in (("fc2", 3), ("fc2", 4), ("proj", 3))
    }
    assert found == expected | {("jaccard", "fc2", 3)}  # with step 4
    undefined = flagged[flagged["metric"] != "mask_sparsity"]
    np.testing.assert_array_equal(undefined["value"], [shown] * 4)
    np.testing.assert_array_equal(undefined["null"], [shown] * 4)
    assert (undefined["convention"] == f"empty={empty}").all()
    assert (rows(frame, "mask_sparsity", flag="fully_pruned")["value"] == 1).all()
    half_empty = rows(frame, "jaccard", layer="fc2", step=1, other_step=3)
    assert half_empty["value"].item() == 0  # one of the two has weights: no 0 / 0
    means = rows(frame, "jaccard_mean", layer="fc2").set_index("convention")["value"]
    assert set(means.index) == {"empty=nan", "empty=1", f"empty={empty}"}
    total = 66 * means["empty=1"] - 1
    assert means["empty=nan"] == pytest.approx(total / 65)


def test_collapse_is_not_confused_with_thinning(tiny, digits):
    """In order of sparsity whatever the order given: thinner random masks overlap less, equal ones
    more."""
    models = {"run/b": view(tiny, density=0.3, seed=1), "run/a": view(tiny, density=0.6)}
    one = thinned(tiny, density=0.15)
    same = Masks({name: mask[:1].expand(12, -1, -1).clone() for name, mask in one.items()})
    models |= {"run/c": masked(tiny, same, baked=True), "other/a": view(tiny, density=0.2)}
    frame = measure(models, digits, Config(limit=2, shuffles=0))
    found = rows(frame, "collapse").set_index("model")
    assert set(found.index) == {"run/b", "run/c"}  # the least sparse of a run has none before it
    assert found.loc["run/b", "value"] == pytest.approx(0.3 / 1.7 - 0.6 / 1.4, abs=0.01)
    thinned_only = found.loc["run/b"]
    assert thinned_only["null_low"] < thinned_only["value"] < thinned_only["null_high"] < 0
    assert pd.isna(found.loc["run/b", "flag"])
    assert found.loc["run/c", "value"] == pytest.approx(1 - 0.3 / 1.7, abs=0.01)
    assert found.loc["run/c", "flag"] == "collapse"
    assert found.loc["run/c", "null"] == pytest.approx(0.15 / 1.85 - 0.3 / 1.7, abs=0.01)


def test_accuracies_are_those_of_models_with_the_masks_moved(tiny, digits):
    model = view(tiny, density=0.7)
    frame = measure({"m": model}, digits, Config(swaps=True, shuffles=2, batch_size=7))
    accuracy = rows(frame, "accuracy").iloc[0]
    assert accuracy["value"] == hits(model, digits)
    assert (accuracy["low"], accuracy["high"]) == wilson_interval(60 * accuracy["value"], 60)
    assert accuracy["null"] == np.bincount([digits.read(i)[1] for i in range(60)]).max() / 60
    swapped = rows(frame, "swapped")
    table = swapped.pivot_table(index="step", columns="other_step", values="value").to_numpy()
    assert table.shape == (12, 12)
    assert (np.diag(table) == accuracy["value"]).all()
    for t, s in ((1, 12), (5, 2), (12, 3)):
        order = [s - 1 if step == t - 1 else step for step in range(12)]
        moved = Masks({name: mask[order] for name, mask in model.masks.items()})
        assert table[t - 1, s - 1] == hits(masked(tiny, moved, baked=True), digits)
    assert len(np.unique(table)) > 3  # or the comparison says little
    shuffled = rows(frame, "shuffled").iloc[0]
    assert shuffled["low"] <= shuffled["value"] <= shuffled["high"]
    # an interval of the value for accuracies, of the null for masks
    accuracies = frame["metric"].isin(["accuracy", "swapped", "shuffled"])
    assert frame.loc[accuracies, ["low", "high"]].notna().all(axis=None)
    assert frame.loc[accuracies, ["null_low", "null_high"]].isna().all(axis=None)
    assert frame.loc[~accuracies, ["low", "high"]].isna().all(axis=None)
    assert rows(frame, "specialization")[["null_low", "null_high"]].notna().all(axis=None)
    other = measure({"m": model}, digits, Config(shuffles=2, seed=1, limit=60))
    assert rows(other, "swapped").empty
    assert value(other, "accuracy") == accuracy["value"]


def test_a_stack_of_copies_has_the_accuracy_of_the_bvit_but_shares_nothing(tiny, make, digits):
    stack = make(num_blocks=12, num_steps=1)
    own = {
        name.removeprefix("blocks.0."): tensor
        for name, tensor in tiny.state_dict().items()
        if "blocks" in name
    }
    rest = {name: tensor for name, tensor in tiny.state_dict().items() if "blocks" not in name}
    stack.load_state_dict(
        rest | {f"blocks.{t}.{name}": tensor for t in range(12) for name, tensor in own.items()}
    )
    masks = thinned(tiny, density=0.6)
    models = {"bvit": masked(tiny, masks, baked=True)}
    models["stack"] = masked(stack, Masks(masks.of, tuple(range(12))), baked=True)
    frame = measure(models, digits, Config(shuffles=2))
    of = {name: frame[frame["model"] == name] for name in models}
    assert value(of["stack"], "accuracy") == value(of["bvit"], "accuracy")
    sparsities = [rows(part, "mask_sparsity")["value"].tolist() for part in of.values()]
    assert sparsities[0] == pytest.approx(sparsities[1])
    assert (rows(of["stack"], "specialization")["value"] == 1).all()
    assert rows(of["stack"], "jaccard").empty
    assert rows(of["stack"], "shuffled").empty
    assert value(of["stack"], "weight_sparsity", layer="all") == pytest.approx(
        of["stack"]["sparsity"].iloc[0]
    )


def test_models_come_back_and_out_of_memory_halves_the_batch(tiny, digits, monkeypatch):
    model = view(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = measure({"m": model}, digits, Config(shuffles=1))
    head = type(tiny).forward_head

    def fail(self, x, pre_logits=False):
        if len(x) > 20:
            raise torch.OutOfMemoryError
        return head(self, x, pre_logits)

    monkeypatch.setattr(type(tiny), "forward_head", fail)
    halved = measure({"m": model}, digits, Config(shuffles=1))
    pd.testing.assert_frame_equal(halved, whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["encoder", "prelude", "looped_timm", "dinov3"])
def test_models_that_are_not_ours_are_refused(kind, digits):
    with pytest.raises(UserError, match="theirs is no BViT and no stacked timm VisionTransformer"):
        measure({"theirs": foreign(kind)}, digits, Config())


def test_bad_input(tiny, stacked, digits):
    with pytest.raises(UserError, match="empty must be one of nan, 1, 0, got 'none'"):
        Config(empty="none")
    with pytest.raises(UserError, match="shuffles must be >= 0, got -1"):
        Config(shuffles=-1)
    with pytest.raises(
        UserError, match="dense has no masks; give a folder of a pruning run.*FOLDER@masked"
    ):
        measure({"dense": tiny}, digits, Config())
    foreign = unroll(stacked)
    foreign.masks = Masks({"blocks.0.attn.qkv.weight": torch.ones(2, 3, 3, dtype=torch.bool)})
    with pytest.raises(UserError, match="the masks of tickets are not of its 3 steps"):
        measure({"tickets": foreign}, digits, Config())
