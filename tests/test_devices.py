"""Without a GPU: nothing forgets its device. A planted one is found; every analysis and training
runs without one."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from devices import Pretended, Rounded, WrongDevice
from tiny_runs import VARIANTS, table, turned

from bvit_interp.analyses import ANALYSES
from bvit_interp.data import digits
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.digits import DigitScenes
from bvit_interp.models import masks
from bvit_interp.models.adapters import Adapted, Spec
from bvit_interp.training.adapting import transfer, transfer_data, transfer_plan
from bvit_interp.training.loop import build, stepper, supervised
from bvit_interp.training.loop import trainer as run_trainer
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning import by_subset, graft_training
from bvit_interp.training.pruning.ticket_plan import TicketPlan

# before a test replaces torch.Generator, which some annotate
for word in ANALYSES:
    importlib.import_module(f"bvit_interp.analyses.{word}").measure  # noqa: B018

pytestmark = [
    # there is nothing to pin for
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    # of torch's own derivatives
    pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning"),
]


def ones(*shape):
    return torch.ones(*shape)


FORGOTTEN = {
    "a table of the CPU": lambda x: x + torch.arange(3),
    "and in a product": lambda x: x @ torch.eye(3),
    "of numpy": lambda x: x * torch.from_numpy(np.ones(3, np.float32)),
    "moved only in part": lambda x: torch.where(x > 0, x, ones(3).to(x.device).cpu()),
    "an image left on the CPU": lambda x: torch.nn.Linear(3, 2).to("cuda")(ones(2, 3)),
    "a module left on the CPU": lambda x: torch.nn.Linear(3, 2)(x),
    "numbers stacked": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "a sum begun on the CPU": lambda x: torch.zeros(()).add_(x.sum()),
    "a buffer filled on the CPU": lambda x: torch.zeros(3).index_add_(
        0, torch.tensor([0, 1]), x[:, 0]
    ),
    "a mask of the device on the CPU": lambda x: ones(2, 3)[x > 0],
    "values put in from the CPU": lambda x: x.index_put_((torch.tensor([0]),), ones(1, 3)),
    "numpy": lambda x: x.numpy(),
    "numpy of a view": lambda x: np.asarray(x[0].float()),
    "a loss with labels of the CPU": lambda x: torch.nn.functional.cross_entropy(
        x, torch.tensor([0, 1])
    ),
    "a generator of the CPU": lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
    "in a mapped function": lambda x: torch.func.vmap(lambda row: row * ones(3))(x),
    "in a backward pass": lambda x: Forgetful.apply(x.clone().requires_grad_()).sum().backward(),
    "pinned": lambda x: x.pin_memory(),
}


class Forgetful(torch.autograd.Function):
    """Its gradient is scaled by a tensor of the CPU."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ones(3)


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_forgotten_device_is_found(forgotten):
    with Pretended():
        x = ones(2, 3).to("cuda")
        with pytest.raises(WrongDevice):
            FORGOTTEN[forgotten](x)


RIGHT = {
    "made where the other is": lambda x: x + torch.arange(3, device=x.device),
    "made like the other": lambda x: x + torch.zeros_like(x) + x.new_ones(3) + torch.ones(3).to(x),
    "a number": lambda x: x * torch.tensor(2.0) + 1,
    "an index of the CPU": lambda x: x[torch.tensor([1, 0])],
    "copied from the CPU": lambda x: torch.empty_like(x).copy_(ones(2, 3)),
    "through the CPU": lambda x: torch.from_numpy(x.cpu().numpy()).to(x.device) + x,
    "a generator of its own": lambda x: (
        x + torch.rand(3, generator=torch.Generator(x.device), device=x.device)
    ),
    "drawn on the CPU": lambda x: x + torch.rand(3, generator=torch.Generator()).to(x.device),
    "in a mapped function": lambda x: torch.func.vmap(lambda row: row * row.sum())(x),
    "in a derivative": lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1],
    "a copied module": lambda x: copy.deepcopy(torch.nn.Linear(3, 2).to("cuda"))(x),
    "a Python function of torch": lambda x: torch.einsum("ij,ij->i", x, x),
    "made in a context": lambda x: in_a_context(x) + x,
    "decomposed": lambda x: torch.linalg.svd(x)[1] + torch.linalg.qr(x)[1].diagonal(),
    "a type of another": lambda x: x.to(torch.float64) + x.double(),
}


def in_a_context(x):
    with x.device:
        return torch.zeros(3)


@pytest.mark.parametrize("right", RIGHT)
def test_what_minds_its_device_passes(right):
    x = ones(2, 3)
    with Pretended() as pretended:
        there = RIGHT[right](x.to("cuda"))
        assert there.device == torch.device("cuda", 0) and there.is_cuda and not x.is_cuda
        assert pretended.moved
    assert there.device.type == "cpu"  # nothing is left of it outside
    if "generator" not in right and "drawn" not in right and "module" not in right:
        torch.testing.assert_close(there, RIGHT[right](x), rtol=0, atol=0)


def test_gradients_go_back_to_where_they_came_from():
    with Pretended():
        x = ones(3).requires_grad_()
        y = ones(3).to("cuda").requires_grad_()
        (x.to("cuda") * y).sum().backward()
        assert (x.grad.device.type, y.grad.device.type) == ("cpu", "cuda")
        torch.optim.Adam([x]).step()
        torch.optim.AdamW([y]).step()


def test_it_counts_what_waits_and_what_is_drawn():
    with Pretended() as pretended:
        x = ones(3).to("cuda")
        assert float(x.sum()) == 3
        x.normal_()
    assert sum(pretended.waits.values()) == 1
    assert sum(pretended.drawn.values()) == 1


@pytest.fixture
def scenes():
    return DigitScenes("test", length=60)


@pytest.mark.parametrize("word", ANALYSES)
def test_no_analysis_forgets_its_device(word, make, scenes, tmp_path):
    """Nor draws on it: the draws of a GPU are others than those of a CPU, and so would its table
    be."""
    with Pretended() as pretended:
        found = table(word, make(num_steps=4).to("cuda"), scenes, tmp_path)
    assert pretended.moved and not pretended.drawn
    assert turned(
        found, table(word, make(num_steps=4), scenes, tmp_path), rtol=1e-9, atol=1e-9
    ).empty


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_nor_do_other_ways_through_them(variant, make, scenes, tmp_path):
    word, options, needed = VARIANTS[variant]
    if needed:
        pytest.importorskip(needed)
    with Pretended():
        table(word, make(num_steps=4).to("cuda"), scenes, tmp_path, **options)


@pytest.mark.slow
@pytest.mark.parametrize("run", [*ANALYSES, *VARIANTS])
def test_no_table_hangs_on_rounding_or_on_the_order_of_equals(run, make, scenes, tmp_path):
    """What `test_gpu.py` may ask of a GPU: a rounding of 1e-6 moves numbers by less than its
    tolerances, no count."""
    word, options, needed = VARIANTS.get(run, (run, {}, None))
    if needed:
        pytest.importorskip(needed)
    wanted = table(word, make(num_steps=4), scenes, tmp_path / "one", **options)
    with Rounded():
        found = table(word, make(num_steps=4), scenes, tmp_path / "other", **options)
    cells = turned(found, wanted, rtol=1e-2, atol=2e-4)
    # what noise takes away may be a tiny denominator
    allowed = 0 if run in ANALYSES else wanted.size / 50
    assert len(cells) <= allowed, cells.to_string(max_rows=20)


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch):
    """``recipe(**changes)``: 24 scenes in batches of 8, a model of 3 steps; no speed is
    measured."""
    monkeypatch.setitem(digits.LENGTHS, "test", 40)
    monkeypatch.setattr(run_trainer, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(stepper, "_EAGER", 10**9)  # there is no graph to capture
    model = {
        "name": "bvit_small_patch16_224",
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "num_heads": 2,
        "num_steps": 3,
        "num_classes": 10,
    }
    plain = {
        "model": model,
        "data": "digits-s",
        "epochs": 1,
        "images_per_epoch": 24,
        "batch_size": 8,
        "warmup_epochs": 0.0,
        "autocast": "off",
    }
    return lambda **changes: Recipe(**{**plain, **changes})


@pytest.mark.slow
def test_nor_does_training(recipe, tmp_path):
    augmented = {
        "crop": "padded",
        "flip": True,
        "randaugment": "torchvision",
        "erase": 0.5,
        "mixup": 0.2,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    }
    with Pretended():
        model = supervised.train(recipe(**augmented), tmp_path / "run", "cuda")
        assert next(model.parameters()).is_cuda


@pytest.mark.parametrize("mode", ["probe", "full", "te", "lora-qv", "lora-ffn"])
def test_nor_do_adapters_and_they_start_from_the_numbers_of_a_cpu(make, mode):
    """A GPU's generator is another: what was drawn there would differ from run to run."""
    wanted = Adapted(make(), Spec(mode=mode), ["a", "b", "c"], seed=3)
    model = make()
    with Pretended():
        found = Adapted(model.to("cuda"), Spec(mode=mode), ["a", "b", "c"], seed=3)
        for name, tensor in wanted.trained.items():
            assert torch.equal(found.trained[name].detach().cpu(), tensor.detach()), name


def test_nor_do_grafts(recipe, tmp_path):
    samples, plan = open_samples("digits-s", "train"), recipe()
    init, generator = build.make_model(plan, samples), torch.Generator().manual_seed(0)
    of = masks.Masks(
        {n: torch.rand(m.shape, generator=generator) < 0.6 for n, m in masks.full(init).items()}
    )
    with Pretended():
        graft_training.train(
            plan,
            1,
            init,
            masks.masked(copy.deepcopy(init), of),
            of,
            samples,
            tmp_path / "state",
            "cuda",
        )


@pytest.mark.parametrize("by", ["class", "class-step"])
def test_nor_do_tickets(recipe, tmp_path, by):
    few = {"classes": ("0", "1", "4"), "sparsity": (0.5,), "iterations": 2, "retrain_epochs": 1}
    with Pretended():
        by_subset.run(recipe(images_per_epoch=60), TicketPlan(**few, by=by), tmp_path, "cuda")


def test_nor_do_adapters(make, tmp_path):
    train, test = (
        transfer_data.training_images(DigitScenes(split, length=90), 90)
        for split in ("train", "test")
    )
    plan = transfer_plan.Plan(
        mode=("probe", "te", "full", "lora-qv", "lora-ffn"), seeds=(0,), epochs=1, train_batch=32
    )
    with Pretended():
        model = make(num_steps=3).to("cuda")
        transfer.run(transfer.Transfer("m", model, "digits-s", train, test, plan, tmp_path))
