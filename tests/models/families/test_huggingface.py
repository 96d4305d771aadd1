"""Hugging Face's ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP, SigLIP and BEiT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.models.families import map_of
from bvit_interp.probes.probe import Probe

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="needs the extra huggingface: transformers>=5"
)

BY_HAND = dict.fromkeys("qk", "multiplies queries and keys by hand")
GATED = {"mlp_pre": "gated FFN"}
SIZE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_labels": 10,
}


@pytest.fixture(params=["eager", "sdpa"])
def kernel(request):
    return request.param


@pytest.fixture
def hf(random_model):
    """``hf("ViT", "ForImageClassification", kernel, **config)``."""

    def build(family, suffix, kernel="sdpa", **options):
        wide = {"intermediate_size": 64} if "v2" not in family else {"mlp_ratio": 2}
        config = getattr(transformers, f"{family}Config")(**SIZE | wide | options)
        config._attn_implementation = kernel
        return random_model(getattr(transformers, f"{family}{suffix}")(config))

    return build


# ---- by hand ----------------------------------------------------------------


def vit_tokens(embeddings, images, loop):
    """CLS, a distillation token, and patches, all with positions."""
    x = loop.patches(embeddings.patch_embeddings.projection, images)
    names = ("cls_token", "distillation_token")
    prefix = [getattr(embeddings, name) for name in names if hasattr(embeddings, name)]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
    return x + embeddings.position_embeddings


def dino_tokens(embeddings, images, loop):
    """CLS and patches with positions, registers between them without."""
    x = loop.patches(embeddings.patch_embeddings.projection, images)
    x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = x + embeddings.position_embeddings
    if not hasattr(embeddings, "register_tokens"):
        return x
    return torch.cat([x[:, :1], embeddings.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)


def states(layers, x, loop, step):
    for layer in layers:
        x = loop.begin().at("resid_pre", x)
        x = loop.at("resid_post", step(layer, x, loop))
    return x


def vit_layer(layer, x, loop):
    attn = attended(layer.attention, loop.norm(layer.layernorm_before, x), loop)
    mid = loop.at("resid_mid", x + loop.at("attn_out", attn))
    mlp = fed(layer.mlp, loop.norm(layer.layernorm_after, mid), loop)
    return mid + loop.at("mlp_out", mlp)


def dino_layer(layer, x, loop, turn=None):
    attn = attended(layer.attention, loop.norm(layer.norm1, x), loop, turn)
    mid = loop.at("resid_mid", x + loop.at("attn_out", layer.layer_scale1.lambda1 * attn))
    mlp = fed(layer.mlp, loop.norm(layer.norm2, mid), loop)
    return mid + loop.at("mlp_out", layer.layer_scale2.lambda1 * mlp)


def attended(attn, x, loop, turn=None, bias=0.0):
    q, k, v = (
        loop.heads(loop.linear(one, x), 4) for one in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if turn is not None:
        q, k = turn(q), turn(k)
    out = attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj
    return loop.linear(out, loop.attend(q, k, v, bias))


def fed(mlp, x, loop, activation=None):
    if hasattr(mlp, "gate_proj"):
        gate = loop.linear(mlp.gate_proj, x)
        activation = loop.silu if "SiLU" in type(mlp.act_fn).__name__ else loop.gelu
        post = activation(gate) * loop.linear(mlp.up_proj, x)
    else:
        first = mlp.fc1 if hasattr(mlp, "fc1") else mlp.up_proj
        post = (activation or loop.gelu)(loop.at("mlp_pre", loop.linear(first, x)))
    last = mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj
    return loop.linear(last, loop.at("mlp_post", post))


def refused(kernel):
    return BY_HAND if kernel == "eager" else {}


# ---- models -----------------------------------------------------------------


def vit_states(model, images, loop):
    x = vit_tokens(model.embeddings, images, loop)
    return loop.norm(model.layernorm, states(model.layers, x, loop, vit_layer))


def dino_states(model, images, loop):
    x = dino_tokens(model.embeddings, images, loop)
    return loop.norm(model.layernorm, states(model.encoder.layer, x, loop, dino_layer))


def test_vit(hf, check, kernel):
    def by_hand(model, images, loop):
        return loop.linear(model.classifier, vit_states(model.vit, images, loop)[:, 0])

    probe = check(hf("ViT", "ForImageClassification", kernel), by_hand, refused(kernel))
    assert probe.layout.prefix == ("cls",)
    assert probe.layout.num_classes == 10


def test_vit_without_a_head(hf, check):
    def pooled(model, images, loop):
        return loop.linear(model.pooler.dense, vit_states(model, images, loop)[:, 0]).tanh()

    assert check(hf("ViT", "Model"), pooled).layout.num_classes == 0
    model = hf("ViT", "Model")
    model.pooler = None
    check(model, vit_states)


def test_deit(hf, check, kernel):
    def by_hand(model, images, loop):
        x = vit_states(model.deit, images, loop)
        first = loop.linear(model.cls_classifier, x[:, 0])
        return (first + loop.linear(model.distillation_classifier, x[:, 1])) / 2

    probe = check(hf("DeiT", "ForImageClassificationWithTeacher", kernel), by_hand, refused(kernel))
    assert probe.layout.prefix == ("cls", "dist")


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2(hf, check, kernel, family):
    def by_hand(model, images, loop):
        body = model.dinov2 if family == "Dinov2" else model.dinov2_with_registers
        x = dino_states(body, images, loop)
        count = x.shape[1] - 16
        return loop.linear(model.classifier, torch.cat([x[:, 0], x[:, count:].mean(1)], -1))

    probe = check(hf(family, "ForImageClassification", kernel), by_hand, refused(kernel))
    registers = ("reg",) * 4 if family != "Dinov2" else ()
    assert probe.layout.prefix == ("cls", *registers)


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_with_a_gated_ffn_and_no_head(hf, check, family):
    def by_hand(model, images, loop):
        return dino_states(model, images, loop)[:, 0]

    check(hf(family, "Model", use_swiglu_ffn=True), by_hand, GATED)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(hf, check, kernel, gated):
    def by_hand(model, images, loop):
        x = loop.patches(model.embeddings.patch_embeddings, images)
        prefix = torch.cat([model.embeddings.cls_token, model.embeddings.register_tokens], dim=1)
        x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

        def step(layer, x, loop):
            return dino_layer(layer, x, loop, rotate)

        return loop.norm(model.norm, states(model.model.layer, x, loop, step))[:, 0]

    model = hf("DINOv3ViT", "Model", kernel, use_gated_mlp=gated, num_register_tokens=3)
    probe = check(model, by_hand, refused(kernel) | (GATED if gated else {}))
    assert probe.layout.prefix == ("cls", "reg", "reg", "reg")


def rotate(x, theta=100.0, side=4):
    """Channels of a patch turned by angles of its centre (rows, columns) in -1..1."""
    quarter = x.shape[-1] // 4
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    rates = 2 * torch.pi / theta ** (torch.arange(quarter) / quarter)
    rows = (centres[:, None] * rates)[:, None].expand(side, side, quarter)
    columns = (centres[:, None] * rates)[None].expand(side, side, quarter)
    angles = torch.cat([rows, columns], dim=-1).reshape(side**2, 1, 2 * quarter)
    prefix, patches = x.split([x.shape[1] - side**2, side**2], dim=1)
    first, second = patches.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([prefix, turned], dim=1)


# ---- towers of CLIP and SigLIP ------------------------------------------------


def clip_states(model, images, loop, activation):
    """The states of a tower, behind a norm of its own where it has one."""
    embeddings = model.embeddings
    x = loop.patches(embeddings.patch_embedding, images)
    if hasattr(embeddings, "class_embedding"):
        x = torch.cat([embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = x + embeddings.position_embedding.weight
    if hasattr(model, "pre_layrnorm"):
        x = loop.norm(model.pre_layrnorm, x)

    def step(layer, x, loop):
        attn = attended(layer.self_attn, loop.norm(layer.layer_norm1, x), loop)
        mid = loop.at("resid_mid", x + loop.at("attn_out", attn))
        mlp = fed(layer.mlp, loop.norm(layer.layer_norm2, mid), loop, activation)
        return mid + loop.at("mlp_out", mlp)

    return states(model.encoder.layers, x, loop, step)


def quick_gelu(x):
    return x / (1 + (-1.702 * x).exp())


def tanh_gelu(x):
    return x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())


@pytest.mark.parametrize("projected", [False, True])
def test_clip(hf, check, kernel, projected):
    def by_hand(model, images, loop):
        tower = model.vision_model if projected else model
        x = clip_states(tower, images, loop, quick_gelu)
        features = loop.norm(tower.post_layernorm, x[:, 0])
        return loop.linear(model.visual_projection, features) if projected else features

    suffix = "ModelWithProjection" if projected else "Model"
    probe = check(hf("CLIPVision", suffix, kernel, projection_dim=24), by_hand, refused(kernel))
    assert probe.layout.prefix == ("cls",)
    assert probe.layout.num_classes == 0


def pooled(head, x, loop):
    """What a learned query reads from the tokens, and an FFN beside it."""
    attn = head.attention
    query = head.probe.expand(len(x), -1, -1)
    parts = zip(
        (query, x, x), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True
    )
    q, k, v = (loop.heads(part @ weight.T + bias, 4) for part, weight, bias in parts)
    outside = type(loop)()  # attention between other tokens than those of a step
    read = loop.linear(attn.out_proj, outside.attend(q, k, v))
    mlp = fed(head.mlp, loop.norm(head.layernorm, read), outside, tanh_gelu)
    return (read + mlp)[:, 0]


def test_siglip(hf, check, kernel):
    def by_hand(model, images, loop):
        x = clip_states(model, images, loop, tanh_gelu)
        return pooled(model.head, loop.norm(model.post_layernorm, x), loop)

    probe = check(hf("SiglipVision", "Model", kernel), by_hand, refused(kernel))
    assert probe.layout.prefix == ()
    assert probe.layout.num_classes == 0


def test_siglip_with_a_classifier_says_its_size_in_a_config_of_its_own(random_model, check):
    def by_hand(model, images, loop):
        x = clip_states(model.vision_model, images, loop, tanh_gelu)
        x = loop.norm(model.vision_model.post_layernorm, x)
        return loop.linear(model.classifier, x.mean(1))

    config = transformers.SiglipConfig(
        vision_config={**SIZE, "intermediate_size": 64}, num_labels=10
    )
    model = random_model(transformers.SiglipForImageClassification(config))
    assert check(model, by_hand).layout.num_classes == 10


# ---- BEiT -------------------------------------------------------------------


def beit_bias(module, side=4):
    """Position bias ``(H, N, N)``: a row of the table for each offset of two patches, then one
    for CLS to others, one for others to CLS, and one for CLS to itself."""
    if module is None:
        return 0.0
    table = module.relative_position_bias_table
    cells = [(row, column) for row in range(side) for column in range(side)]
    bias = torch.empty(table.shape[1], 1 + side**2, 1 + side**2)
    bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = table[-3, :, None], table[-2, :, None], table[-1]
    for i, (row, column) in enumerate(cells, start=1):
        for j, (other, across) in enumerate(cells, start=1):
            offset = (row - other + side - 1) * (2 * side - 1) + column - across + side - 1
            bias[:, i, j] = table[offset]
    return bias


@pytest.mark.parametrize("scale", [0.1, 0.0])
@pytest.mark.parametrize("shared", [False, True])
def test_beit(hf, check, kernel, scale, shared):
    """With a bias per layer, or one for all; with a learned scale, or without."""

    def step(layer, x, loop):
        bias = beit_bias(layer.relative_position_bias) + every
        attn = attended(layer.attention, loop.norm(layer.layernorm_before, x), loop, bias=bias)
        mid = loop.at("resid_mid", x + loop.at("attn_out", layer.lambda_1 * attn))
        mlp = fed(layer.mlp, loop.norm(layer.layernorm_after, mid), loop)
        return mid + loop.at("mlp_out", layer.lambda_2 * mlp)

    def by_hand(model, images, loop):
        x = loop.patches(model.beit.embeddings.patch_embeddings.projection, images)
        x = torch.cat([model.beit.embeddings.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = states(model.beit.layers, x, loop, step)
        return loop.linear(
            model.classifier, loop.norm(model.beit.pooler.layernorm, x[:, 1:].mean(1))
        )

    which = "use_shared_relative_position_bias" if shared else "use_relative_position_bias"
    options = {which: True, "layer_scale_init_value": scale}
    model = hf("Beit", "ForImageClassification", kernel, **options)
    every = beit_bias(model.beit.shared_position_bias)
    missing = dict.fromkeys(("attn_out", "mlp_out"), "lambda_1") if scale else {}
    assert check(model, by_hand, refused(kernel) | missing).layout.prefix == ("cls",)


# ---- one layer again and again ----------------------------------------------


class Loops(nn.Module):
    """Three calls of one ViTLayer, and a mean over the patches."""

    image_size = 32

    def __init__(self, layer):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, stride=8)
        self.layer = layer
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        for _ in range(3):
            x = self.layer(x)
        return self.head(x.mean(1))


def test_a_layer_called_three_times_in_a_loop(hf, random_model, check, kernel):
    def by_hand(model, images, loop):
        x = states([model.layer] * 3, loop.patches(model.patches, images), loop, vit_layer)
        return loop.linear(model.head, x.mean(1))

    model = random_model(Loops(hf("ViT", "Model", kernel).layers[0]))
    probe = check(model, by_hand, refused(kernel))
    assert probe.layout.prefix == ()
    with pytest.raises(UserError, match="no CLS token"):
        probe.run(torch.zeros(1, 3, 32, 32), "pattern", tokens="cls")


def test_eager_attention_in_half_precision(hf, images):
    """Its softmax is in single precision, so that the values meet a copy of the pattern."""
    model = hf("ViT", "Model", "eager").bfloat16()
    given = images.bfloat16()
    answer, cache = Probe(model).run(given, ["pattern", "v", "z"])
    assert torch.equal(answer, model(given).pooler_output)
    for step in (1, 2):
        assert cache["pattern", step].dtype == torch.float32
        pattern, v = cache["pattern", step].bfloat16(), cache["v", step]
        assert torch.equal(cache["z", step], (pattern @ v.transpose(1, 2)).transpose(1, 2))


def test_hooks_that_the_library_leaves_do_no_harm(hf, check):
    model = hf("ViT", "Model")
    model(torch.zeros(1, 3, 32, 32), output_hidden_states=True, output_attentions=True)
    assert model.layers[0]._forward_hooks  # the library's own, which it keeps

    def by_hand(model, images, loop):
        return loop.linear(model.pooler.dense, vit_states(model, images, loop)[:, 0]).tanh()

    check(model, by_hand)
    for module in model.modules():
        module._forward_hooks.clear()


# ---- the layers of version 4 ------------------------------------------------


class Parts(nn.Module):
    """Modules by name."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_version_4_has_its_ffn_in_two_modules_of_the_layer(hf):
    layer = hf("ViT", "Model").layers[0]
    old = type(layer).__new__(type(layer))
    nn.Module.__init__(old)
    old.attention = Parts(output=Parts(dense=nn.Linear(32, 32)))
    old.intermediate = Parts(dense=nn.Linear(32, 64))
    old.output = Parts(dense=nn.Linear(64, 32), dropout=nn.Dropout())
    old.layernorm_after = nn.LayerNorm(32)
    for place in map_of(old).sites.values():
        old.get_submodule(place.rpartition(".")[0])
    assert map_of(old).sites["mlp_post"] == "output.dense.in"
