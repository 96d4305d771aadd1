"""What many tools return for the neurons of a step, on looped models and on their unrolls.

Run ``python benchmarks/tools.py [--out docs/tools.md]``. Each installed tool is run on a small
seeded bViT and on a module of somebody else's that runs one block again and again, and its answer
is compared with a loop over the block (`reference.py`). A tool that is
not installed is listed as such. The package does not need some of these tools: ``pip install
nnsight grad-cam dreamlens transformer-lens``. The second table, of TransformerLens beside the
Probe, needs ``transformers`` too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from reference import (
    GROUPS,
    STEP,
    STEPS,
    TARGETS,
    ablation,
    conductance,
    gradient,
    integrated_gradients,
    loop,
)
from torch import nn
from torch.nn.utils import prune

import bvit_interp.models.bvit  # noqa: F401  (registers the models)
from bvit_interp import Probe
from bvit_interp.models.unroll import unroll

TOLERANCE = 1e-3  # of the reference's largest value


# ---- judging -------------------------------------------------------------------------------------


def distance(answer, reference):
    """Largest difference divided by the reference's largest value; infinite if shapes differ."""
    if answer.shape != reference.shape:
        return float("inf")
    return ((answer - reference).abs().max() / reference.abs().max().clamp_min(1e-12)).item()


def judge(answer, references, together=None):
    """The step whose reference equals the answer.

    Otherwise: their sum, all steps at once, or the nearest step and its distance.
    """
    errors = {t: distance(answer, reference) for t, reference in references.items()}
    matched = [t for t, error in errors.items() if error < TOLERANCE]
    if matched:
        return f"step {matched[0]} only" if len(matched) == 1 else f"steps {matched}"
    if distance(answer, sum(references.values())) < TOLERANCE:
        return f"all {len(references)} summed"
    if together is not None and distance(answer, together) < TOLERANCE:
        return f"all {len(references)} at once"
    nearest = min(errors, key=errors.get)
    off = f"off by {errors[nearest]:.0%} of its largest value"
    return f"matches no step (nearest: step {nearest}, {off})"


def judge_names(answers, references):
    """The step of each name, for tools that return several named answers."""
    verdicts = {name: judge(answer, references) for name, answer in answers.items()}
    right = [f"step {t} only" for t in references]
    if list(verdicts.values()) == right:
        names = list(verdicts)
        return (
            f"names all {len(right)} steps (`{names[0]}` ... `{names[STEP - 1]}` = step {STEP} ...)"
        )
    return (
        "; ".join(f"`{name}`: {verdict}" for name, verdict in verdicts.items())
        or "nothing (an empty answer)"
    )


@dataclass(frozen=True)
class Subject:
    """The model that a tool gets, and an unchanged copy of the recurrent model for references."""

    model: nn.Module
    recurrent: bool
    twin: nn.Module
    images: torch.Tensor

    @property
    def index(self):
        """Index into ``blocks``: the only block, or that of step 5."""
        return 0 if self.recurrent else STEP - 1

    @property
    def layer(self):
        """The module `mlp.act` of that block."""
        return self.model.get_submodule(f"blocks.{self.index}.mlp.act")

    def each_step(self, make):
        """One reference per step."""
        return {t: make(t) for t in range(1, STEPS + 1)}

    def neurons(self):
        """Neurons of every step."""
        found = loop(self.twin, self.images)[0]
        return self.each_step(lambda t: found[t - 1].detach())


# ---- the tools -----------------------------------------------------------------------------------


def plain_hook(subject):
    kept = {}
    subject.layer.register_forward_hook(
        lambda module, args, output: kept.__setitem__(module, output)
    )
    subject.model(subject.images)
    return judge(kept[subject.layer], subject.neurons())


def captum_activation(subject):
    from captum.attr import LayerActivation

    return judge(
        LayerActivation(subject.model, subject.layer).attribute(subject.images), subject.neurons()
    )


def captum_integrated_gradients(subject):
    from captum.attr import LayerIntegratedGradients

    method = LayerIntegratedGradients(subject.model, subject.layer)
    answer = method.attribute(
        subject.images, torch.zeros_like(subject.images), target=TARGETS, n_steps=6
    )
    truth = subject.each_step(lambda t: integrated_gradients(subject.twin, subject.images, t, 6))
    return judge(answer, truth)


def captum_conductance(subject):
    from captum.attr import LayerConductance

    answer = LayerConductance(subject.model, subject.layer).attribute(
        subject.images, target=TARGETS, n_steps=6
    )
    return judge(
        answer, subject.each_step(lambda t: conductance(subject.twin, subject.images, t, 6))
    )


def captum_ablation(subject):
    from captum.attr import LayerFeatureAblation

    method = LayerFeatureAblation(subject.model, subject.layer)
    answer = method.attribute(subject.images, target=TARGETS, layer_mask=GROUPS.expand(1, 17, 128))
    truth = subject.each_step(lambda t: ablation(subject.twin, subject.images, [t]))
    together = ablation(subject.twin, subject.images, range(1, STEPS + 1))
    return judge(answer[:, 0, ::32], truth, together)


def torchvision_extractor(subject):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    names = [name for name in get_graph_node_names(subject.model)[1] if ".mlp.act" in name]
    plain = next(name for name, module in subject.model.named_modules() if module is subject.layer)
    answers = create_feature_extractor(subject.model, names)(subject.images)
    neurons = subject.neurons()
    return f"`{plain}`: {judge(answers[plain], neurons)}; {judge_names(answers, neurons)}"


def timm_intermediates(subject):
    answers = subject.model.forward_intermediates(
        subject.images, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    outputs = loop(subject.twin, subject.images)[2]
    truth = subject.each_step(lambda t: outputs[t - 1].detach())
    named = {
        f"[{i}]": torch.cat([prefix, patches], 1) for i, (patches, prefix) in enumerate(answers)
    }
    return judge_names(named, truth)


def timm_attention(subject, method):
    from timm.utils.attention_extract import AttentionExtract

    for block in subject.model.modules():
        if hasattr(block, "fused_attn"):
            block.fused_attn = False
    patterns = loop(subject.twin, subject.images)[1]
    answers = AttentionExtract(subject.model, method=method)(subject.images)
    return judge_names(answers, subject.each_step(lambda t: patterns[t - 1].detach()))


def lucent_hooks(subject):
    from lucent.optvis.render import hook_model

    read = hook_model(subject.model, lambda: subject.images)
    subject.model(subject.images)
    return judge(read(f"blocks_{subject.index}_mlp_act"), subject.neurons())


def nnsight_trace(subject):
    import nnsight

    wrapped = nnsight.NNsight(subject.model)
    index = subject.index
    with wrapped.trace(subject.images):
        answer = wrapped.blocks[index].mlp.act.output.save()
    return judge(answer, subject.neurons())


def nnsight_iter(subject):
    import nnsight

    wrapped = nnsight.NNsight(subject.model)
    index = subject.index
    calls = STEPS if subject.recurrent else 1
    with wrapped.trace(subject.images) as tracer:
        found = [].save()
        for _ in tracer.iter[0:calls]:
            found.append(wrapped.blocks[index].mlp.act.output)
    if not subject.recurrent:
        return judge(found[0], subject.neurons())
    return judge_names({f"iter[{i}]": answer for i, answer in enumerate(found)}, subject.neurons())


def grad_cam(subject):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def to_grid(tokens):
        return tokens[:, 1:].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)

    def by_hand(t):
        act, grad = (to_grid(tensor) for tensor in gradient(subject.twin, subject.images, t))
        raw = (grad.mean((2, 3), keepdim=True) * act).sum(1).clamp_min(0).numpy()
        # scaled twice: the map of a layer, then the mean over layers
        return torch.tensor(scale_cam_image(scale_cam_image(raw, (32, 32))))

    cam = GradCAM(subject.model, [subject.layer], reshape_transform=to_grid)
    answer = cam(subject.images, [ClassifierOutputTarget(int(target)) for target in TARGETS])
    return judge(torch.tensor(answer), subject.each_step(by_hand))


def dreamlens_capture(subject):
    from dreamlens import FeatureVisualizer

    name = f"blocks.{subject.index}.mlp.act"
    visualizer = FeatureVisualizer(subject.model, quiet=True, preprocess=lambda images: images)
    (answer,) = visualizer.capture_layers([name], subject.images, first_batch=False)
    return judge(answer, subject.neurons())


def transformer_lens_wrap(subject):
    # its bridge accepts Hugging Face models of known architectures; its error is the answer
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "google/vit-base-patch16-224", hf_model=subject.model
    )
    cache = bridge.run_with_cache(subject.images)[1]
    return judge_names({k: v for k, v in cache.items() if "mlp.hook_post" in k}, subject.neurons())


def torch_prune(subject):
    fc1 = subject.model.get_submodule(f"blocks.{subject.index}.mlp.fc1")
    prune.l1_unstructured(fc1, "weight", amount=0.5)
    whole = subject.twin.get_submodule("blocks.0")
    masked = copy.deepcopy(whole)
    masked.mlp.fc1.weight = nn.Parameter(fc1.weight.detach().clone())

    def pruned_in(steps):
        blocks = [masked if t in steps else whole for t in range(1, STEPS + 1)]
        return loop(subject.twin, subject.images, blocks=blocks)[3].detach()

    answer = subject.model(subject.images).detach()
    return judge(
        answer, subject.each_step(lambda t: pruned_in([t])), pruned_in(range(1, STEPS + 1))
    )


@dataclass(frozen=True)
class Tool:
    """A tool: its name, its package, the question, and the function that asks it."""

    label: str
    package: str
    question: str
    ask: Callable[[Subject], str]


NEURONS, ATTENTION = "neurons of the step", "attention of the step"
TOOLS = (
    Tool("forward hook into a dict", "torch", NEURONS, plain_hook),
    Tool("captum LayerActivation", "captum", NEURONS, captum_activation),
    Tool(
        "captum LayerIntegratedGradients",
        "captum",
        "attribution to them",
        captum_integrated_gradients,
    ),
    Tool("captum LayerConductance", "captum", "attribution to them", captum_conductance),
    Tool("captum LayerFeatureAblation", "captum", "effect of zeroing them", captum_ablation),
    Tool("torchvision create_feature_extractor", "torchvision", NEURONS, torchvision_extractor),
    Tool("timm forward_intermediates", "timm", "output of the step", timm_intermediates),
    Tool(
        "timm AttentionExtract hook, unfused",
        "timm",
        "attention of the step",
        partial(timm_attention, method="hook"),
    ),
    Tool(
        "timm AttentionExtract fx, unfused",
        "timm",
        "attention of the step",
        partial(timm_attention, method="fx"),
    ),
    Tool("lucent hook_model", "torch-lucent", NEURONS, lucent_hooks),
    Tool("nnsight trace", "nnsight", NEURONS, nnsight_trace),
    Tool("nnsight trace + iter", "nnsight", NEURONS, nnsight_iter),
    Tool("TransformerLens TransformerBridge", "transformer-lens", NEURONS, transformer_lens_wrap),
    Tool("torch.nn.utils.prune", "torch", "output with half of fc1 pruned", torch_prune),
    Tool("pytorch-grad-cam GradCAM", "grad-cam", "map from the neurons", grad_cam),
    Tool("dreamlens capture_layers", "dreamlens", NEURONS, dreamlens_capture),
)


# ---- the table -----------------------------------------------------------------------------------


def reference_model():
    """A seeded bViT of width 32 and 12 steps whose steps differ well above the tolerance."""
    torch.manual_seed(0)
    model = timm.create_model(
        "bvit_small_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_heads=4,
        num_classes=10,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


class Somebodys(nn.Module):
    """A loop in a plain module: its forward runs a block of timm's again and again."""

    image_size = 32

    def __init__(self, model):
        super().__init__()
        self.embed, self.position = model.patch_embed.proj, model.pos_embed
        self.cls_token = model.cls_token
        self.blocks = nn.ModuleList([model.get_submodule("blocks.0")])
        self.norm, self.head = model.norm, model.head

    def patch_embed(self, images):
        return self.embed(images).flatten(2).mT

    def _pos_embed(self, patches):
        return (
            torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1) + self.position
        )

    def forward_head(self, tokens):
        return self.head(tokens[:, 0])

    def forward(self, images):
        tokens = self._pos_embed(self.patch_embed(images))
        for _ in range(STEPS):
            tokens = self.blocks[0](tokens)
        return self.forward_head(self.norm(tokens))


MAKERS = {"bViT": reference_model, "a looped module": lambda: Somebodys(reference_model())}


def ask(tool, make, unrolled):
    """The verdict on one tool, or its error; on a new model, because tools leave hooks behind."""
    model = make()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    subject = Subject(unroll(model) if unrolled else model, not unrolled, make(), images)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return tool.ask(subject)
    except Exception as error:  # any error of the tool is its answer
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return f"{type(error).__name__}: {lines[0][:110]}"


HOOKS = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_pre": "mlp.hook_pre",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Our site -> TransformerLens's hook of a block."""
LAYERS = 4


def hugging_face_vit(looped):
    """A seeded Hugging Face ViT: a stack, or one layer that is listed again and again."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=10,
        architectures=["ViTForImageClassification"],
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.15)
    if looped:
        model.vit.layers = nn.ModuleList([model.vit.layers[0]] * LAYERS)
    return model


def beside_transformer_lens(looped):
    """Site -> which of the Probe's steps TransformerLens's cache gives as the block of each."""
    from transformer_lens.model_bridge import TransformerBridge

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        _, ours = Probe(hugging_face_vit(looped)).run(images, list(HOOKS))
        bridge = TransformerBridge.boot_transformers(
            "google/vit-base-patch16-224", hf_model=hugging_face_vit(looped)
        )
        _, theirs = bridge.run_with_cache(images)
    found = {}
    for site, hook in HOOKS.items():
        given = [theirs[f"blocks.{i}.{hook}"] for i in range(LAYERS)]
        found[site] = judge_blocks(given, {t: ours[site, t] for t in range(1, LAYERS + 1)})
        if "no step" in found[site] and site == "scores":
            patterns = {t: ours["pattern", t] for t in range(1, LAYERS + 1)}
            found[site] = f"the pattern, after softmax: {judge_blocks(given, patterns)}"
    return found


def judge_blocks(given, references):
    """The step of what is given for each block in turn."""
    verdicts = [judge(answer, references) for answer in given]
    if verdicts == [f"step {t} only" for t in references]:
        return "every step"
    return f"always {verdicts[0]}" if len({*verdicts}) == 1 else "; ".join(verdicts)


def beside():
    """The page's second table."""
    packages = ("transformer-lens", "transformers")
    if not all(map(version, packages)):
        return []
    stack, looped = beside_transformer_lens(False), beside_transformer_lens(True)
    names = " and ".join(f"{package} {version(package)}" for package in packages)
    lines = [
        "",
        "## TransformerLens beside the Probe, on a Hugging Face ViT",
        "",
        f"Which of the Probe's steps TransformerLens's bridge gives under the names of {LAYERS}",
        f"blocks in turn, for a stack and for one layer that is listed {LAYERS} times ({names}).",
        "",
        "| site | TransformerLens | stack | one layer, listed again and again |",
        "| --- | --- | --- | --- |",
    ]
    return [
        *lines,
        *(
            f"| `{site}` | `blocks.i.{hook}` | {stack[site]} | {looped[site]} |"
            for site, hook in HOOKS.items()
        ),
    ]


def version(package):
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def rows():
    """(tool, question, then per model: on it and on its unroll) for every tool."""
    for tool in TOOLS:
        installed = version(tool.package)
        if installed is None:
            yield (tool.label, tool.question, *["not installed"] * 2 * len(MAKERS))
            continue
        verdicts = (
            ask(tool, make, unrolled) for make in MAKERS.values() for unrolled in (False, True)
        )
        yield (f"{tool.label}, {installed}", tool.question, *verdicts)


def table():
    """The markdown page."""
    lines = [
        "# Same question, many tools",
        "",
        f"What each tool returns for `blocks[0].mlp.act` of a model of {STEPS} steps, and for",
        f"`blocks[{STEP - 1}].mlp.act` (step {STEP}) of its tied unroll: a bViT, and a plain",
        "module of somebody else's whose forward runs one block of timm's in a loop. Written by",
        "`benchmarks/tools.py`, which compares every answer with a loop over the block (equal:",
        f"within {TOLERANCE:.0e} of the largest value).",
        "",
        "| tool | question | " + " | ".join(f"on {name} | on its unroll" for name in MAKERS) + " |",
        "| --- | --- |" + " --- |" * 2 * len(MAKERS),
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows()]
    lines += beside()
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="markdown file to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    os.environ.setdefault("WANDB_MODE", "disabled")  # transformer-lens imports wandb
    warnings.filterwarnings("ignore")  # from the tools
    logging.disable(logging.WARNING)
    text = table()
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    main()
