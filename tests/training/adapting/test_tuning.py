"""The state of a tuning run, and which tensors decay."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.errors import UserError
from bvit_interp.models.adapters import Adapted, Spec
from bvit_interp.training.adapting import tuning
from bvit_interp.training.adapting.tuning import recipe_of


def test_a_state_of_other_options_or_torn_is_refused(work, tmp_path):
    job = work(mode=("te",))
    path = tmp_path / "state.pt"
    adapted = Adapted(job.model, Spec(mode="te"), job.classes)
    recipe = recipe_of(job.plan, "te", 0, "colours", 18)
    optimizer = tuning._optimizer(adapted, recipe)
    tuning._save(path, {"alpha": 1.0}, adapted, optimizer, 1, 0.5)
    assert tuning._resume(path, {"alpha": 1.0}, adapted, optimizer, 3) == (1, 0.5)
    with pytest.raises(UserError, match=r"of another run \(alpha: 1.0 there, 2.0 now\)"):
        tuning._resume(path, {"alpha": 2.0}, adapted, optimizer, 3)
    whole = torch.load(path, weights_only=True)
    weights = {name: torch.zeros(()) for name in whole["trained"]}
    wrong = [{"done": -5}, {"done": 4}, {"done": "1"}, {"loss": "x"}, {"loss": None}]
    for change in (*wrong, {"trained": weights}, {"trained": {}}, {"optimizer": {}}, {"about": 3}):
        torch.save({**whole, **change}, path)
        with pytest.raises(UserError, match=r"not the whole state of a run \(.+\); delete it"):
            tuning._resume(path, {"alpha": 1.0}, adapted, optimizer, 3)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not the whole state of a run"):
        tuning._resume(path, {}, adapted, optimizer, 3)


def test_norms_biases_and_embeddings_are_free_of_decay(work):
    job = work(mode=("full",))
    for mode in ("te", "full", "lora-qv"):
        adapted = Adapted(job.model, Spec(mode=mode), job.classes)
        groups = tuning._optimizer(
            adapted, recipe_of(job.plan, mode, 0, "colours", 18)
        ).param_groups
        decayed = {
            id(tensor) for group in groups if group["weight_decay"] for tensor in group["params"]
        }
        names = {name for name, tensor in adapted.trained.items() if id(tensor) in decayed}
        assert "head.weight" in names
        assert not [
            name for name in names if "norm" in name or "bias" in name or name.endswith("_embed")
        ]
        assert ("blocks.0.attn.qkv.lora_a" in names) == (mode == "lora-qv")
