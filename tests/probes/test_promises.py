"""What a probe promises: gradients, edits everywhere, several probes, threads, odd models."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bvit_interp import Probe, unroll
from bvit_interp.errors import UserError
from bvit_interp.probes.cache import Cache
from bvit_interp.vocabulary import SITES

# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
@pytest.mark.parametrize("site", SITES)
def test_the_gradient_of_a_recorded_site_is_that_of_a_small_change(tiny, images, site, tokens):
    """By differences: the site plus eps times a direction, by an edit."""
    probe = Probe(tiny.double())
    images = images.double()
    logits, cache = probe.run(images, site, steps=3, tokens=tokens, grad=True)
    recorded = cache[site, 3]
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), recorded)
    direction = torch.randn(recorded.shape, generator=torch.Generator().manual_seed(0)).double()
    axis = 2 if site in ("scores", "pattern") else 1
    rows, single = probe.rows(tokens, 17)
    whole = direction.unsqueeze(axis) if single else direction

    def moved(eps):
        def change(x, _):
            x = x.clone()
            x.movedim(axis, 0)[rows] += eps * whole.movedim(axis, 0)
            return x

        with torch.no_grad(), probe.edit({(site, 3): change}):
            return probe(images)[:, 1].sum()

    eps = 1e-5
    torch.testing.assert_close(
        (gradient * direction).sum(), (moved(eps) - moved(-eps)) / (2 * eps), rtol=1e-5, atol=1e-8
    )


def test_recording_with_gradients_leaves_the_logits_as_they_are(tiny, images):
    probe, fused = Probe(tiny), [site for site in SITES if site not in ("scores", "pattern")]
    for tokens in ("all", "cls"):
        logits, _ = probe.run(images, fused, tokens=tokens, grad=True)
        assert torch.equal(logits, tiny(images))


def test_gradients_reach_a_site_of_frozen_weights_and_by_default_nothing_is_attached(tiny, images):
    tiny.requires_grad_(False)
    logits, cache = Probe(tiny).run(images, "z", steps=2, grad=True)
    (gradient,) = torch.autograd.grad(logits.sum(), cache["z", 2])
    assert gradient.abs().sum() > 0
    tiny.requires_grad_(True)
    logits, cache = Probe(tiny).run(images, "z", steps=2)
    assert not cache["z", 2].requires_grad
    assert logits.requires_grad


@pytest.mark.parametrize("grad", [False, True])
def test_edits_and_gradients_are_refused_under_gradient_checkpointing(tiny, images, grad):
    probe = Probe(tiny)
    probe.model.set_grad_checkpointing(True)
    context = nullcontext() if grad else probe.edit({"z[2]": lambda z, _: 0 * z})
    with pytest.raises(UserError, match="gradient checkpointing"), context:
        probe.run(images, "z", grad=True)
    with torch.no_grad(), probe.edit({"z[2]": lambda z, _: 0 * z}) as fired:
        probe(images)
    assert fired == {"z[2]": 1}


class Checkpoints(nn.Module):
    """A block that checkpoints its FFN itself."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_an_edit_inside_a_users_own_checkpoint_is_refused(images):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=2
    ).eval()
    for block in model.blocks:
        block.mlp = Checkpoints(block.mlp)
    probe = Probe(model)
    with (
        pytest.raises(UserError, match="computed again in the backward pass"),
        probe.edit({"resid_mid[1]": lambda x, _: x, "z[1]": lambda z, _: z}),
        torch.autograd.graph.save_on_cpu(),
    ):
        probe(images)


# ---- edits everywhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["z:3", "z[*]:3"])
def test_a_head_is_edited_at_every_step(tiny, images, key):
    probe = Probe(tiny)
    with torch.no_grad():
        with probe.edit({key: lambda z, _: 0 * z}) as fired:
            everywhere = probe(images)
        one_by_one = {f"z[{t}]:3": lambda z, _: 0 * z for t in range(1, 13)}
        with probe.edit(one_by_one):
            assert torch.equal(probe(images), everywhere)
    assert fired == {f"z[{t}]:3": 1 for t in range(1, 13)}
    assert not torch.equal(everywhere, tiny(images))


def test_a_site_is_edited_at_every_step_that_has_it(tiny_sc, images):
    probe = Probe(tiny_sc)
    with torch.no_grad(), probe.edit({"mlp_post": lambda x, _: 0 * x}) as fired:
        probe(images)
    assert list(fired) == [f"mlp_post[{t}]" for t in range(1, probe.num_steps + 1)]


def test_an_edit_of_a_step_and_of_every_step_is_one_too_many(tiny):
    with (
        pytest.raises(UserError, match=r"two edits of z\[2\]:3"),
        Probe(tiny).edit({"z[2]:3": lambda z, _: z, "z:3": lambda z, _: z}),
    ):
        pass


def test_a_unit_of_all_recorded_steps(tiny, images):
    cache = Probe(tiny).record(images, ["z", "pattern"], steps=[2, 5])
    assert torch.equal(cache["z:3"], cache["z"][:, :, :, 3])
    assert torch.equal(cache["pattern[*]:1"], cache["pattern"][:, :, 1])
    with pytest.raises(UserError, match="no head 4"):
        Probe(tiny).record(images, "z[1]:4")


# ---- several readers -----------------------------------------------------------------------------


def test_two_probes_of_one_unroll_see_each_others_edits(tiny, images):
    view = unroll(tiny)
    first, second = Probe(view), Probe(view)
    uniform = {"pattern[2]": lambda p, _: torch.full_like(p, 1 / p.shape[-1])}
    with torch.no_grad(), first.edit(uniform):
        logits, seen = second.run(images, ["pattern", "z"], steps=2)
        own_logits, own = first.run(images, ["pattern", "z"], steps=2)
    assert torch.equal(seen["pattern", 2], own["pattern", 2])
    assert torch.equal(seen["z", 2], own["z", 2])
    assert torch.equal(logits, own_logits)
    assert (seen["pattern", 2] == 1 / 17).all()


def test_threads_do_not_mix_answers(tiny, images):
    probe = Probe(tiny)
    batches = [images * (i + 1) for i in range(3)]
    with torch.no_grad():
        wanted = [probe.run(batch, ["pattern", "mlp_post"], steps=7) for batch in batches]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(10):
            with torch.no_grad():
                logits, cache = probe.run(batches[i], ["pattern", "mlp_post"], steps=7)
            same = [torch.equal(logits, wanted[i][0])]
            same += [torch.equal(cache[key], wanted[i][1][key]) for key in cache]
            if not all(same):
                wrong.append(f"{i}: {same}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- odd models ----------------------------------------------------------------------------------


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=4, depth=3
    ).eval()


def test_a_replaced_attention_forward_is_seen_at_its_softmax(images):
    model, plain = vit(), Probe(vit())

    def by_hand(attn):
        def forward(x, attn_mask=None, is_causal=False):
            q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            pattern = (q @ k.mT * attn.scale).softmax(-1)
            return attn.proj((pattern @ v).transpose(1, 2).flatten(2))

        return forward

    for block in model.blocks:
        block.attn.forward = by_hand(block.attn)
    sites = ["z", "pattern", "attn_out"]
    with torch.no_grad():
        _, cache = Probe(model).run(images, sites)
        _, wanted = plain.run(images, sites)
    for site in sites:
        torch.testing.assert_close(cache[site], wanted[site])


def test_a_model_whose_forward_was_replaced_is_refused(images):
    model = vit()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(UserError, match="forward .* was replaced on the instance"):
        Probe(model)


def test_a_site_that_is_reached_twice_is_an_error(images):
    probe = Probe(vit())
    block = probe.model.blocks[1]
    block.mlp = nn.Sequential(block.mlp.fc1, nn.GELU(), block.mlp.fc2)
    block.mlp.fc1, block.mlp.fc2 = block.mlp[0], block.mlp[2]
    block.register_forward_hook(lambda module, args, _: module.forward(*args))
    with torch.no_grad(), pytest.raises(UserError, match=r"drop_path|attn_out\[2\] was reached"):
        probe.run(images, "attn_out")


# ---- the cache -----------------------------------------------------------------------------------


def test_a_cache_is_a_mapping_that_moves_and_is_saved(tiny, images, tmp_path):
    cache = Probe(tiny).record(images, ["z", "resid_post"], steps=[3, 4], tokens="cls")
    assert set(cache.keys()) == {("z", 3), ("z", 4), ("resid_post", 3), ("resid_post", 4)}
    assert dict(cache.items())["z", 4] is cache["z", 4]
    halved = cache.to(torch.float16).cpu()
    assert halved["z", 3].dtype == torch.float16
    assert torch.equal(halved["z", 3].float(), cache["z", 3].half().float())
    cache.save(tmp_path / "cache.safetensors")
    loaded = Cache.load(tmp_path / "cache.safetensors")
    assert (loaded.grid, loaded.num_steps) == (cache.grid, cache.num_steps)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in cache.items())
    assert "z 4x4x8 x 2 steps" in repr(cache)
    (tmp_path / "other").write_text("no tensors")
    with pytest.raises(UserError, match="other is no saved cache"):
        Cache.load(tmp_path / "other")


def test_a_probe_made_while_another_edits_knows_its_heads_and_fires_nothing(tiny, images):
    view = unroll(tiny)
    with torch.no_grad(), Probe(view).edit({"z[2]": lambda z, _: 0 * z}) as fired:
        second = Probe(view)
        assert second.num_heads == 4
        assert fired == {"z[2]": 0}
        second(images)
    assert fired == {"z[2]": 1}


def test_a_dry_run_calls_no_hook_of_the_users(tiny):
    seen = []
    tiny.register_forward_hook(lambda *_: seen.append(1))
    tiny.blocks[0].register_forward_pre_hook(lambda *_: seen.append(2))
    Probe(tiny)
    assert not seen
    for module in tiny.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
