"""Options of a transfer: the protocol, and what is refused."""

from __future__ import annotations

import pytest

from bvit_interp.errors import UserError
from bvit_interp.training.adapting.transfer_plan import DEFAULTS, Plan
from bvit_interp.training.adapting.tuning import recipe_of


def test_defaults_are_the_protocol():
    """40 epochs, 5 of warm-up, 128 images for CIFAR and 64 else; learning rate by mode."""
    plan = Plan()
    assert (plan.epochs, plan.seeds, plan.rank, plan.alpha) == (40, (0, 1, 2), 8, 16.0)
    found = {mode: recipe_of(plan, mode, 0, "cifar10", 1000) for mode in DEFAULTS}
    assert {r.warmup_epochs for r in found.values()} == {5}
    assert {r.batch_size for r in found.values()} == {128}
    assert recipe_of(plan, "probe", 0, "pets", 1000).batch_size == 64
    assert recipe_of(plan, "probe", 0, "pets", 10).batch_size == 10
    rates = {mode: (r.lr, r.min_lr, r.weight_decay) for mode, r in found.items()}
    assert rates["probe"] == (1e-3, 0.0, 1e-4)
    assert rates["full"] == (1e-4, 1e-6, 0.05)
    assert rates["te"] == rates["lora-qv"] == rates["lora-ffn"] == (1e-3, 1e-5, 0.01)
    assert recipe_of(Plan(lr=0.5, min_lr=0.0), "full", 0, "pets", 99).lr == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": ()}, "mode must be one or more"),
        ({"seeds": (1, 1)}, "seeds must be one or more different values"),
        ({"seeds": (-1,)}, "seeds must be >= 0"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"n_train": 0}, "n-train must be >= 1"),
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"autocast": "fp16"}, "autocast must be off or bf16"),
        ({"steps": (5,)}, "steps are chosen for lora-qv and lora-ffn, not for probe"),
        ({"mode": ("lora-qv",), "steps": (5,), "sweep_steps": True}, "steps or sweep-steps"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(UserError, match=message):
        Plan(**options)
