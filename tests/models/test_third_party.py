"""Foreign tools address step t on the unroll; on the recurrent model they answer for another step.

Each answer is compared with a loop over the block written in elementary operations (`by_hand`).
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foreign import foreign
from timm.utils.attention_extract import AttentionExtract
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from bvit_interp import Probe
from bvit_interp.models.attention import unfused
from bvit_interp.models.unroll import unroll

STEP = 5
TARGETS = torch.tensor([0, 1, 2, 3])
CLOSE = {"atol": 1e-4, "rtol": 1e-3}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),  # captum
    # lucent's kornia
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
]


@pytest.fixture
def hand(tiny, images, by_hand):
    """The tiny model by hand: sites of every step, and logits with the neurons of some steps
    replaced."""
    block = tiny.get_submodule("blocks.0")
    sites = by_hand.run(tiny, images, [block] * 12)

    def logits(changes=None, x=images, blocks=None):
        run = by_hand.run(tiny, x, blocks or [block] * 12, changes=changes)
        return by_hand.logits(tiny, run[-1]["resid_post"])

    return SimpleNamespace(
        sites=sites, logits=logits, acts=[site.get("mlp_post") for site in sites], block=block
    )


def integrated_gradients(hand, baseline_act, points, step=STEP):
    """Integrated gradients at a step's neurons by Gauss-Legendre nodes on [0, 1]; the image
    stays."""
    act = hand.acts[step].detach()
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total = torch.zeros_like(act)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        here = (baseline_act + node * (act - baseline_act)).float().requires_grad_()
        score = hand.logits({step: lambda _, here=here: here}).gather(1, TARGETS[:, None]).sum()
        total += float(weight) * torch.autograd.grad(score, here)[0]
    return total * (act - baseline_act)


def ablation_effects(hand, groups, steps):
    """Fall of each target logit when a group of neurons is zero in `steps`, ``(groups, B)``."""
    clean = hand.logits().gather(1, TARGETS[:, None])[:, 0]
    effects = []
    for group in groups.unique():
        keep = (groups != group).float()
        changed = hand.logits({t: lambda act, keep=keep: act * keep for t in steps})
        effects.append(clean - changed.gather(1, TARGETS[:, None])[:, 0])
    return torch.stack(effects)


def differs(answer, reference):
    """Largest difference, as a share of the reference's own largest value."""
    return ((answer - reference).abs().max() / reference.abs().max()).item()


# ---- on the unroll: step 5 -----------------------------------------------------------------------


def test_captum_layer_activation(tiny, images, hand):
    attr = pytest.importorskip("captum.attr")
    view = unroll(tiny)
    for t in (1, STEP, 12):
        seen = attr.LayerActivation(view, view.blocks[t - 1].mlp.act).attribute(images)
        torch.testing.assert_close(seen, hand.acts[t], **CLOSE)


def test_captum_layer_integrated_gradients(tiny, images, hand, by_hand):
    attr = pytest.importorskip("captum.attr")
    view = unroll(tiny)
    method = attr.LayerIntegratedGradients(view, view.blocks[STEP - 1].mlp.act)
    baseline = torch.zeros_like(images)
    answer = method.attribute(images, baseline, target=TARGETS, n_steps=6)
    black = by_hand.run(tiny, baseline, [hand.block] * STEP)[STEP]["mlp_post"].detach()
    torch.testing.assert_close(answer, integrated_gradients(hand, black, 6), **CLOSE)


def test_captum_layer_integrated_gradients_sum_to_what_the_step_contributes(
    tiny, images, hand, by_hand
):
    """Not to f(x) - f(baseline): the skip path carries the rest, so captum's own delta is not
    zero."""
    attr = pytest.importorskip("captum.attr")
    view = unroll(tiny)
    method = attr.LayerIntegratedGradients(view, view.blocks[STEP - 1].mlp.act)
    baseline = torch.zeros_like(images)
    answer, delta = method.attribute(
        images, baseline, target=TARGETS, n_steps=40, return_convergence_delta=True
    )
    black = by_hand.run(tiny, baseline, [hand.block] * STEP)[STEP]["mlp_post"]
    replaced = hand.logits({STEP: lambda _: black})
    contribution = (hand.logits() - replaced).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(answer.sum((1, 2)), contribution, atol=1e-2, rtol=1e-2)
    assert delta.abs().max() > 0.1


def test_captum_layer_conductance(tiny, images, hand, by_hand):
    attr = pytest.importorskip("captum.attr")
    view = unroll(tiny)
    answer = attr.LayerConductance(view, view.blocks[STEP - 1].mlp.act).attribute(
        images, target=TARGETS, n_steps=5
    )
    nodes = (np.polynomial.legendre.leggauss(6)[0] + 1) / 2
    acts, gradients = [], []
    for node in nodes:  # the image fades in from black; captum sums gradient x change of the neuron
        x = float(node) * images
        act = by_hand.run(tiny, x, [hand.block] * STEP)[STEP]["mlp_post"].detach().requires_grad_()
        score = hand.logits({STEP: lambda _, act=act: act}, x=x).gather(1, TARGETS[:, None]).sum()
        gradients.append(torch.autograd.grad(score, act)[0])
        acts.append(act.detach())
    expected = sum(
        g * (after - before) for g, before, after in zip(gradients, acts, acts[1:], strict=False)
    )
    torch.testing.assert_close(answer, expected, **CLOSE)


def test_captum_layer_feature_ablation(tiny, images, hand):
    attr = pytest.importorskip("captum.attr")
    view = unroll(tiny)
    groups = torch.arange(128) // 32
    method = attr.LayerFeatureAblation(view, view.blocks[STEP - 1].mlp.act)
    answer = method.attribute(images, target=TARGETS, layer_mask=groups.expand(1, 17, 128))
    expected = ablation_effects(hand, groups, [STEP])
    torch.testing.assert_close(answer[:, 0, ::32].T, expected, **CLOSE)


def test_captum_neuron_conductance_is_the_layers_share_of_one_neuron(tiny, images, hand, by_hand):
    """Input attribution of one neuron at step 5 sums to the neuron's layer conductance, up to
    quadrature."""
    attr = pytest.importorskip("captum.attr")
    view = unroll(tiny)
    neuron = attr.NeuronConductance(view, view.blocks[STEP - 1].mlp.act)
    answer = neuron.attribute(images, neuron_selector=(0, 9), target=TARGETS, n_steps=40)
    assert answer.shape == images.shape
    layer = attr.LayerConductance(view, view.blocks[STEP - 1].mlp.act)
    whole = layer.attribute(images, target=TARGETS, n_steps=200)[:, 0, 9]
    torch.testing.assert_close(answer.sum((1, 2, 3)), whole, atol=0.02, rtol=0.1)


def test_lucent_names_and_hooks(tiny, images, hand):
    util = pytest.importorskip("lucent.modelzoo.util")
    view = unroll(tiny)
    names = [name for name in util.get_model_layers(view) if name.endswith("mlp_act")]
    assert names == [f"blocks_{i}_mlp_act" for i in range(12)]
    from lucent.optvis.render import hook_model

    read = hook_model(view, lambda: images)
    view(images)
    torch.testing.assert_close(read("blocks_4_mlp_act"), hand.acts[STEP], **CLOSE)
    # lucent never removes its hooks; `no_hook_left_behind` asserts that none of them is on the
    # model


def test_lucent_reads_a_channel_as_a_token(tiny, images, hand):
    """A trap on any ViT: `channel(layer, 3)` takes axis 1, which is the token."""
    objectives = pytest.importorskip("lucent.optvis.objectives")
    value = -objectives.channel("blocks_4_mlp_act", 3)(lambda layer: hand.acts[STEP])
    torch.testing.assert_close(value, hand.acts[STEP][:, 3].mean())
    assert abs(value - hand.acts[STEP][:, :, 3].mean()) > 1e-3


def test_torchvision_feature_extractor(tiny, images, hand):
    view = unroll(tiny)
    extractor = create_feature_extractor(view, {f"blocks.{i}.mlp.act": f"{i}" for i in range(12)})
    for i, answer in extractor(images).items():
        torch.testing.assert_close(answer, hand.acts[int(i) + 1], **CLOSE)


def test_torchvision_traces_every_variant(any_model, images):
    """FX follows the loop, the registers and the time embedding (`len(x)` inside forward would
    break it)."""
    view = unroll(any_model)
    heads = [name for name, _ in view.named_children() if name in ("head", "head_dist")]
    extractor = create_feature_extractor(view, {"blocks.1": "z_2"} | {name: name for name in heads})
    answer = extractor(images)
    assert torch.equal(sum(answer[name] for name in heads) / len(heads), any_model(images))
    expected = any_model.forward_intermediates(
        images, indices=[1], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    patches, prefix = expected[0]
    assert torch.equal(answer["z_2"], torch.cat([prefix, patches], dim=1))


def test_timm_forward_intermediates(any_model, images):
    view = unroll(any_model)
    ours, theirs = (
        m.forward_intermediates(images, intermediates_only=True) for m in (any_model, view)
    )
    assert len(ours) == len(any_model.blocks)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_timm_attention_extract(tiny, images, hand, method):
    view = unroll(tiny)
    for block in view.blocks:
        block.attn.fused_attn = False
    maps = AttentionExtract(view, method=method)(images)
    suffix = {"hook": "attn_drop", "fx": "softmax"}[method]
    assert list(maps) == [f"blocks.{i}.attn.{suffix}" for i in range(12)]
    for i, pattern in enumerate(maps.values(), start=1):
        torch.testing.assert_close(pattern, hand.sites[i]["pattern"], **CLOSE)


def test_timm_attention_extract_sees_nothing_through_fused_attention(tiny, images):
    view = unroll(tiny)
    assert view.blocks[0].attn.fused_attn
    assert not AttentionExtract(view, method="hook")(images)
    with pytest.raises(RuntimeError, match="No node names found"):
        AttentionExtract(view, method="fx")


def test_torch_prune_reaches_one_step(tiny, images, hand, by_hand):
    view = unroll(tiny)
    prune.l1_unstructured(view.blocks[STEP - 1].mlp.fc1, "weight", amount=0.5)
    for i, block in enumerate(view.blocks):
        assert (block.mlp.fc1.weight == 0).float().mean() == pytest.approx(
            0.5 if i == STEP - 1 else 0.0
        )
    masked = [hand.block] * 12
    masked[STEP - 1] = view.blocks[STEP - 1]
    torch.testing.assert_close(view(images), hand.logits(blocks=masked), **CLOSE)
    assert not torch.equal(view(images), tiny(images))
    torch.testing.assert_close(tiny(images), hand.logits(), **CLOSE)


def test_pruning_a_step_still_trains_the_shared_weight(tiny, images):
    view = unroll(tiny)
    prune.l1_unstructured(view.blocks[STEP - 1].mlp.fc1, "weight", amount=0.5)
    assert view.blocks[STEP - 1].mlp.fc1.weight_orig is hand_weight(tiny)
    view(images).square().sum().backward()
    assert hand_weight(tiny).grad.any()


def hand_weight(model):
    return model.get_submodule("blocks.0").mlp.fc1.weight


def test_input_attributions_are_the_same_on_both(tiny, images):
    attr = pytest.importorskip("captum.attr")
    for method in (attr.IntegratedGradients, attr.Saliency, attr.InputXGradient):
        kwargs = {"n_steps": 5} if method is attr.IntegratedGradients else {}
        on_model, on_view = (
            method(m).attribute(images, target=TARGETS, **kwargs) for m in (tiny, unroll(tiny))
        )
        torch.testing.assert_close(on_model, on_view)


# ---- on the recurrent model ----------------------------------------------------------------------


def test_the_same_tools_on_the_recurrent_model(tiny, images, hand, by_hand):
    """The reason for `unroll`: one question, `block.mlp.act`, and every tool answers for another
    step."""
    act = tiny.blocks[0].mlp.act
    by_module, calls = {}, []
    handles = [
        act.register_forward_hook(
            lambda module, args, output: by_module.__setitem__(module, output)
        ),
        act.register_forward_hook(lambda module, args, output: calls.append(output)),
    ]
    tiny(images)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(by_module[act], hand.acts[12], **CLOSE)  # a dict keeps the last
    assert len(calls) == 12  # a list keeps all, without their names
    torch.testing.assert_close(calls[4], hand.acts[5], **CLOSE)

    names = [name for name in get_graph_node_names(tiny)[1] if "mlp.act" in name]
    assert names == ["blocks.0.mlp.act", *(f"blocks.0.mlp.act_{i}" for i in range(1, 12))]
    features = create_feature_extractor(tiny, ["blocks.0.mlp.act", "blocks.0.mlp.act_4"])(images)
    # torchvision: the first
    torch.testing.assert_close(features["blocks.0.mlp.act"], hand.acts[1], **CLOSE)
    torch.testing.assert_close(features["blocks.0.mlp.act_4"], hand.acts[5], **CLOSE)

    fc1 = tiny.blocks[0].mlp.fc1
    original = fc1.weight.detach().clone()
    prune.l1_unstructured(fc1, "weight", amount=0.5)
    pruned = tiny(images)
    # by hand with the masked weight: in all 12 steps
    torch.testing.assert_close(pruned, hand.logits(), **CLOSE)
    prune.remove(fc1, "weight")
    with torch.no_grad():
        fc1.weight.copy_(original)
    assert differs(pruned, tiny(images)) > 0.01

    tiny.blocks[0].attn.fused_attn = False
    (fx,) = AttentionExtract(tiny, names=["blocks.0.attn.softmax"], method="fx")(images).values()
    torch.testing.assert_close(fx, hand.sites[1]["pattern"], **CLOSE)  # timm by graph: the first


def test_captum_on_the_recurrent_model(tiny, images, hand, by_hand):
    attr = pytest.importorskip("captum.attr")
    act = tiny.blocks[0].mlp.act
    seen = attr.LayerActivation(tiny, act).attribute(images)
    torch.testing.assert_close(seen, hand.acts[12], **CLOSE)  # the last step only

    baseline = torch.zeros_like(images)
    black = [site.get("mlp_post") for site in by_hand.run(tiny, baseline, [hand.block] * 12)]
    true = {t: integrated_gradients(hand, black[t].detach(), 6, step=t) for t in range(1, 13)}
    answer = attr.LayerIntegratedGradients(tiny, act).attribute(
        images, baseline, target=TARGETS, n_steps=6
    )
    assert min(differs(answer, reference) for reference in true.values()) > 0.1  # no step
    assert differs(answer, sum(true.values())) > 0.1  # nor their sum

    groups = torch.arange(128) // 32
    ablation = attr.LayerFeatureAblation(tiny, act)
    answer = ablation.attribute(images, target=TARGETS, layer_mask=groups.expand(1, 17, 128))[
        :, 0, ::32
    ].T
    assert min(differs(answer, ablation_effects(hand, groups, [t])) for t in range(1, 13)) > 0.1
    # not even all steps at once
    assert differs(answer, ablation_effects(hand, groups, range(1, 13))) > 0.1


def test_lucent_on_the_recurrent_model(tiny, images, hand):
    util = pytest.importorskip("lucent.modelzoo.util")
    assert [name for name in util.get_model_layers(tiny) if name.endswith("mlp_act")] == [
        "blocks_0_mlp_act"
    ]
    from lucent.optvis.render import hook_model

    # stands in for the model: its one block, called 12 times as the model does
    view = unroll(tiny, steps=1)
    read = hook_model(view, lambda: images)
    z = view._pos_embed(view.patch_embed(images))
    for _ in range(12):
        z = view.blocks[0](z)
    torch.testing.assert_close(read("blocks_0_mlp_act"), hand.acts[12], **CLOSE)  # the last


@pytest.mark.parametrize("kind", ["encoder", "prelude", "two_state", "looped_timm"])
def test_loops_that_are_not_ours(kind, images):
    attr = pytest.importorskip("captum.attr")
    render = pytest.importorskip("lucent.optvis.render")
    view = unroll(foreign(kind))
    wanted = Probe(view).record(images, "resid_post[3]")["resid_post", 3]
    with unfused():  # as the probe runs torch's encoder layer
        answer = attr.LayerActivation(view, view.blocks[2]).attribute(images)
        read = render.hook_model(view, lambda: images)
        view(images)
        seen = read("blocks_2")
        extracted = create_feature_extractor(view, {"blocks.2": "z"})(images)
    assert torch.equal(answer, wanted)
    assert torch.equal(seen, wanted)
    assert torch.equal(extracted["z"], wanted)
