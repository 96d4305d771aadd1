"""Adapters: the paper's counts, the identity at the start, LoRA written out by hand, merged, saved
and refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models import adapters, checkpoint
from bvit_interp.models.adapters import Adapted, LowRank, Spec
from bvit_interp.models.unroll import unroll

CLASSES = ["cat", "dog", "owl"]
MODES = ["probe", "te", "full", "lora-qv", "lora-ffn"]
LORA = ["lora-qv", "lora-ffn"]
COUNTS = {
    "bvit_base_patch16_224": {
        "probe": 0,
        "te": 9_216,
        "full": 7_829_760,
        "lora-qv": 25_344,
        "lora-ffn": 62_208,
    },
    "vit_rms_base_patch16_224": {"full": 85_779_456, "lora-qv": 295_680, "lora-ffn": 738_048},
}


def moved(adapted, seed=5):
    """Every trained tensor off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapted.trained.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return adapted


@pytest.mark.parametrize(("name", "counts"), COUNTS.items())
def test_the_papers_counts(name, counts):
    """Table 4's 9K, 25K, 62K, 7.8M, and 296K, 738K, 85.8M of ViT-B; the new head is not counted."""
    with torch.device("meta"):
        model = timm.create_model(name)
        for mode, count in counts.items():
            adapted = Adapted(model, Spec(mode=mode), CLASSES)
            assert adapted.count() == count
            assert adapted.head_count() == 768 * 3 + 3
    with torch.device("meta"):
        without = Adapted(model, Spec(mode="lora-qv", train_final_norm=False), CLASSES)
    assert without.count() == counts["lora-qv"] - 768


@pytest.mark.parametrize("mode", MODES)
def test_it_starts_as_the_identity_and_leaves_its_base_alone(any_model, images, mode):
    if mode == "te" and getattr(any_model.blocks, "step_embed", any_model) is not None:
        pytest.skip("has a time embedding, or is no BViT")
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    expected = any_model.forward_features(images)
    adapted = Adapted(any_model, Spec(mode=mode, rank=2), CLASSES)
    assert torch.equal(adapted.view.forward_features(images), expected)
    assert adapted.view(images).shape == (4, 3)
    moved(adapted)
    assert not torch.allclose(adapted.view.forward_features(images), expected) or mode == "probe"
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    assert all(parameter.requires_grad for parameter in any_model.parameters())
    assert not adapted.view.training


def test_low_rank_by_hand():
    """W + 2 B A on rows 0..1 and 4..5 of a fused matrix; the k rows 2..3 keep their weights."""
    a, b = (
        torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]),
        torch.tensor([[[1.0], [0.0]], [[3.0], [-1.0]]]),
    )
    update = LowRank(torch.nn.Parameter(a), torch.nn.Parameter(b), (0, None, 1), 2.0)
    expected = torch.tensor([[2.0, 4.0], [0, 0], [0, 0], [0, 0], [0, 6], [0, -2]])
    assert torch.equal(update.delta(), expected)
    assert torch.equal(update(torch.ones(6, 2)), expected + 1)


@pytest.mark.parametrize("mode", LORA)
def test_an_adapted_model_is_the_block_with_other_weights(tiny, images, by_hand, mode):
    """Against the tests' own block, its matrices replaced by W + 16 / 4 B A."""
    adapted = moved(Adapted(tiny, Spec(mode=mode, rank=4), CLASSES))
    other = copy.deepcopy(tiny)
    other.norm.weight.data, other.head = adapted.trained["norm.weight"].data, adapted.model.head
    block = next(other.blocks.children())
    for layer, rows in {
        "lora-qv": [("attn.qkv", (0, 2))],
        "lora-ffn": [("mlp.fc1", (0,)), ("mlp.fc2", (0,))],
    }[mode]:
        a, b = (adapted.trained[f"blocks.0.{layer}.lora_{kind}"] for kind in "ab")
        weight = block.get_submodule(layer).weight.data
        for part, row in enumerate(rows):
            height = b.shape[1]
            weight[row * height : (row + 1) * height] += 4 * b[part] @ a[part]
    z = by_hand.run(other, images, [block] * 12)[-1]["resid_post"]
    torch.testing.assert_close(adapted.view(images), by_hand.logits(other, z), atol=2e-4, rtol=1e-4)


def test_steps_share_one_pair_and_chosen_steps_alone_change(tiny, images):
    adapted = moved(Adapted(tiny, Spec(mode="lora-qv", rank=2, steps=(5, 6)), CLASSES))
    assert adapted.count() == 4 * 32 * 2 + 32
    same, base = adapted.view, unroll(tiny)
    for t, (one, other) in enumerate(zip(same.blocks, base.blocks, strict=True), start=1):
        assert torch.equal(one.attn.qkv.weight, other.attn.qkv.weight) == (t not in (5, 6))
    assert torch.equal(same.blocks[4].attn.qkv.weight, same.blocks[5].attn.qkv.weight)
    none = Adapted(tiny, Spec(mode="lora-qv", steps=()), CLASSES)
    assert none.count() == 32


def test_a_hybrid_has_a_pair_for_each_stored_block_and_an_inner_update_its_steps(
    tiny_hybrid, tiny_fl, stacked
):
    assert (
        Adapted(tiny_hybrid, Spec(mode="lora-qv", rank=2), CLASSES).count() == 2 * 4 * 32 * 2 + 32
    )
    # LayerNorm
    assert (
        Adapted(stacked, Spec(mode="lora-ffn", rank=2), CLASSES).count() == 3 * 10 * 32 * 2 + 2 * 32
    )
    view = moved(Adapted(tiny_fl, Spec(mode="lora-ffn", rank=2, steps=(2,)), CLASSES)).view
    weight = next(tiny_fl.blocks.children()).mlp.fc1.weight
    changed = [
        not torch.equal(part.mlp.fc1.weight, weight) for b in view.blocks for part in (b, *b.inner)
    ]
    assert changed == [t == 2 for t in range(1, 5) for _ in range(3)]


@pytest.mark.parametrize("mode", MODES)
def test_saved_small_and_opened_again(tiny, images, tmp_path, mode):
    adapted = moved(Adapted(tiny, Spec(mode=mode, rank=2), CLASSES, seed=3))
    adapted.save(tmp_path / "a" / adapters.FILE, {"seed": 3})
    opened = adapters.load(tmp_path / "a", tiny)
    assert torch.equal(opened(images), adapted.view(images))
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    assert checkpoint.class_names(opened) == CLASSES
    kept = sum(tensor.numel() for tensor in load_file(tmp_path / "a" / adapters.FILE).values())
    assert kept == adapted.count() + adapted.head_count()


def test_an_adapter_of_steps_and_of_a_stack_opens_again(tiny, stacked, images, tmp_path):
    for model in (tiny, stacked):
        adapted = moved(Adapted(model, Spec(mode="lora-ffn", rank=2, steps=(2, 3)), CLASSES))
        adapted.save(tmp_path / adapters.FILE)
        assert torch.equal(
            adapters.load(tmp_path / adapters.FILE, model)(images), adapted.view(images)
        )


def test_another_base_a_torn_file_and_a_missing_one_are_refused(tiny, make, tmp_path):
    file = tmp_path / adapters.FILE
    with pytest.raises(CheckpointError, match="no adapter at"):
        adapters.load(file, tiny)
    Adapted(tiny, Spec(mode="lora-qv", rank=2), CLASSES).save(file)
    with pytest.raises(CheckpointError, match="an adapter of another base model"):
        adapters.load(file, make(seed=1))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or not an adapter"):
        adapters.load(file, tiny)
    save_file({"a": torch.zeros(1)}, str(file))
    with pytest.raises(CheckpointError, match="not an adapter"):
        adapters.load(file, tiny)


@pytest.mark.parametrize("mode", MODES)
def test_merged_it_is_an_ordinary_checkpoint(tiny, images, tmp_path, mode):
    adapted = moved(Adapted(tiny, Spec(mode=mode, rank=2), CLASSES))
    opened = checkpoint.load(checkpoint.save(adapted.merged(), tmp_path / "merged"))
    torch.testing.assert_close(opened(images), adapted.view(images), atol=1e-5, rtol=1e-5)
    assert checkpoint.class_names(opened) == CLASSES


def test_only_what_all_uses_of_a_matrix_share_merges(tiny, stacked, images):
    adapted = moved(Adapted(stacked, Spec(mode="lora-qv", rank=2, steps=(2,)), CLASSES))
    torch.testing.assert_close(adapted.merged()(images), adapted.view(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="does not merge"):
        Adapted(tiny, Spec(mode="lora-qv", rank=2, steps=(5,)), CLASSES).merged()


def test_gradients_reach_what_is_trained_and_nothing_else(tiny, images):
    for mode in MODES:
        adapted = moved(Adapted(tiny, Spec(mode=mode, rank=2), CLASSES))
        adapted.view(images).sum().backward()
        own = {id(tensor) for tensor in adapted.trained.values()}
        for name, tensor in adapted.view.named_parameters():
            assert (tensor.grad is not None) == (id(tensor) in own), (mode, name)


def test_the_seed_decides_the_start_and_the_global_generator_is_left_alone(tiny):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (Adapted(tiny, Spec(mode="lora-qv"), CLASSES, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("head.weight", "blocks.0.attn.qkv.lora_a"):
        assert torch.equal(one.trained[name], same.trained[name])
        assert not torch.equal(one.trained[name], other.trained[name])
    assert not one.trained["blocks.0.attn.qkv.lora_b"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "lora"}, "mode must be one of probe, te, full, lora-qv, lora-ffn, got 'lora'"),
        ({"mode": "lora-qv", "rank": 0}, r"rank must be in 1\.\.32, the model's width, got 0"),
        ({"mode": "lora-ffn", "rank": 33}, r"rank must be in 1\.\.32, the model's width, got 33"),
        ({"mode": "lora-qv", "alpha": 0.0}, "alpha must be > 0"),
        ({"mode": "lora-qv", "steps": (5, 13)}, r"steps must be of 1\.\.12, got 5 13"),
        ({"mode": "te", "steps": (5,)}, "steps are chosen for lora-qv and lora-ffn, not for te"),
    ],
)
def test_bad_specs(tiny, options, message):
    with pytest.raises(UserError, match=message):
        Adapted(tiny, Spec(**options), CLASSES)


def test_bad_bases(tiny, tiny_te, stacked):
    with pytest.raises(UserError, match="the model has one already"):
        Adapted(tiny_te, Spec(mode="te"), CLASSES)
    with pytest.raises(UserError, match="te needs a BViT"):
        Adapted(stacked, Spec(mode="te"), CLASSES)
    with pytest.raises(UserError, match="not an unroll"):
        Adapted(unroll(tiny), Spec(mode="lora-qv"), CLASSES)


def test_the_ffn_adapter_is_pefts(tiny, images):
    """peft is for this test alone: it cannot adapt only q and v of a fused matrix."""
    peft = pytest.importorskip("peft")
    adapted = moved(Adapted(tiny, Spec(mode="lora-ffn", rank=4, train_final_norm=False), CLASSES))
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["fc1", "fc2"])
    other = peft.get_peft_model(copy.deepcopy(adapted.model), config).eval()
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            for layer in ("fc1", "fc2"):
                for theirs, ours in (("lora_A", "a"), ("lora_B", "b")):
                    if f"{layer}.{theirs}" in name:
                        tensor.copy_(adapted.trained[f"blocks.0.mlp.{layer}.lora_{ours}"][0])
    torch.testing.assert_close(other(images), adapted.view(images), atol=1e-4, rtol=1e-4)
