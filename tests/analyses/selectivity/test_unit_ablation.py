"""Ablation of units against edits written by hand."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.selectivity.responses import unit_responses
from bvit_interp.analyses.selectivity.unit_ablation import (
    ablated_logits,
    ablation_effects,
    single_units,
)
from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe

UNITS = [("mlp_post", 5), ("z", 2)]


def means_of(probe, images):
    """Mean activations by site."""
    with torch.no_grad():
        responses = unit_responses(probe, images)
    return {site: (seen.sums / len(images)).float() for site, seen in responses.items()}


@pytest.mark.parametrize("zero", [False, True])
def test_ablated_runs_are_runs_of_their_own(any_model, images, zero):
    probe = Probe(any_model)
    variants = {
        site: torch.cat([keep, torch.ones_like(keep[:1])])  # the third variant keeps all
        for site, keep in single_units(probe, UNITS).items()
    }
    fill = None if zero else means_of(probe, images)
    with torch.inference_mode():
        found = list(ablated_logits(probe, images, variants, fill))
        assert len(found) == probe.num_steps + 2
        assert torch.allclose(found[0][0], probe(images), atol=1e-6)
        for i, steps in ((1, [1]), (3, [3]), (-1, range(1, probe.num_steps + 1))):
            for variant, (site, unit) in enumerate(UNITS):

                def by_hand(values, address, site=site, unit=unit):
                    if zero:
                        return torch.zeros_like(values)
                    return fill[site][address.step - 1][:, unit].expand_as(values)

                with probe.edit({f"{site}[{t}]:{unit}": by_hand for t in steps}):
                    expected = probe(images)
                assert torch.allclose(found[i][variant], expected, atol=1e-4)
                assert not torch.allclose(found[i][variant], found[0][0], atol=1e-4)
            assert torch.allclose(found[i][2], found[0][0], atol=1e-4)


def test_effects_are_differences_of_each_image(stacked, images):
    probe, labels = Probe(stacked), torch.arange(len(images)) % 10
    with torch.no_grad():
        effects = ablation_effects(probe, images, labels, UNITS, None)
        clean = stacked(images)
        with probe.edit({"z[2]:2": lambda z, _: torch.zeros_like(z)}):
            ablated = probe(images)
    rows = torch.arange(len(images))
    true_logits = [(x - x.mean(1, keepdim=True))[rows, labels] for x in (clean, ablated)]
    hits = [(x.argmax(1) == labels).double() for x in (clean, ablated)]
    assert effects.changes.shape == (len(images), 2, 4, 2)  # three steps and all of them; two units
    assert torch.equal(effects.hits, hits[0])
    assert torch.equal(effects.changes[:, 0, 1, 1], hits[1] - hits[0])
    expected = (true_logits[1] - true_logits[0]).double()
    assert torch.allclose(effects.changes[:, 1, 1, 1], expected, atol=1e-5)


def test_single_units_keep_all_but_one(tiny):
    variants = single_units(Probe(tiny), UNITS)
    assert {site: keep.shape for site, keep in variants.items()} == {
        "mlp_post": (2, 128),
        "z": (2, 4),
    }
    assert (~variants["mlp_post"]).nonzero().tolist() == [[0, 5]]
    assert (~variants["z"]).nonzero().tolist() == [[1, 2]]


def test_wrong_shapes_and_nan_are_refused(tiny, images):
    probe, labels = Probe(tiny), torch.zeros(len(images), dtype=torch.int64)
    with pytest.raises(TypeCheckError):
        ablation_effects(probe, images, labels[:-1], UNITS, None)
    with pytest.raises(TypeCheckError):
        next(ablated_logits(probe, images[0], single_units(probe, UNITS), None))
    with torch.no_grad(), pytest.raises(UserError, match="NaN"):
        ablation_effects(probe, images * torch.nan, labels, UNITS, None)
