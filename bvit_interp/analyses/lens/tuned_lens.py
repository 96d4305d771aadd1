"""Logit lens and tuned lens on any token at any step.

The logit lens (nostalgebraist, 2020, "interpreting GPT: the logit lens") reads z_t with the model's
own norm and head as if it were z_T. The tuned lens (Belrose et al., 2023, "Eliciting Latent
Predictions from Transformers with the Tuned Lens", arXiv 2303.08112) reads ``z_t W_t + c_t``, with
an affine map for each step that minimises the KL divergence from the final prediction. Ours starts
at the map of least squared error to z_T^cls and follows the gradient of that divergence over all
cached states at once: no batches are drawn, so the maps depend on the images alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.metrics.checks import check_finite
from bvit_interp.models.dry_run import dry, example_images
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.stepping import answer, device_of, embed, proceed, states

LENSES = ("raw", "tuned")
"""The logit lens and the tuned lens: those on every group of tokens."""
ANSWER = "answer"
"""In place of a group of tokens: what the model's own forward makes of the whole state."""
RIDGE = 0.01  # penalty, relative to the mean square of the centred states
LEARNING_RATE = 0.01  # length of a full step, relative to sqrt(D) times the spread of z_T
MOMENTUM = 0.9  # of the running means of the gradient and of its square
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Translator:
    """The affine map of a step: ``x W + c`` for each of K tokens.

    Parameters
    ----------
    weight, bias : ``(K, D, D)`` and ``(K, D)``.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, tokens: Float[Tensor, "*batch k width"]) -> Float[Tensor, "*batch k width"]:
        """The tokens, each after its map."""
        return torch.einsum("...kd,kde->...ke", tokens, self.weight) + self.bias


Lenses = dict[tuple[str, str], list[Translator | None]]
"""(lens, group of tokens) -> the map of every step; None reads the state itself."""


# ---- reading -------------------------------------------------------------------------------------


def head_of(model: Model) -> Any:
    """The timm model whose norm and head make the answer of CLS alone, as a dry run shows; None for
    a model that pools tokens, has another head, or does more between its last step and the head.
    """
    vit: Any = model.model if isinstance(model, CalledSteps) else model
    if getattr(vit, "global_pool", None) != "token" or "cls" not in layout_of(model).prefix[:1]:
        return None
    if not isinstance(model, CalledSteps):
        return vit
    if not hasattr(vit, "norm") or not hasattr(vit, "forward_head"):
        return None
    with dry(model):
        state = proceed(model, embed(model, example_images(model, model.layout.image_size)))
        read = vit.forward_head(vit.norm(state.tokens[:, : head_tokens(model)]))
        return vit if torch.allclose(read, answer(model, state), rtol=1e-4, atol=1e-5) else None


def head_tokens(model: Model) -> int:
    """How many leading tokens the head reads: CLS, and the distillation token of a model that has
    one."""
    return 1 + layout_of(model).prefix.count("dist")


def token_groups(model: Model) -> dict[str, slice]:
    """Where each group of tokens is: cls, reg if there are registers, and patches.

    Unlike `Probe.kinds`, the group cls holds all tokens that the head reads together: CLS, and the
    distillation token of a model that has one.
    """
    read, prefix = head_tokens(model), layout_of(model).num_prefix_tokens
    groups = {"cls": slice(0, read)}
    if read < prefix:
        groups["reg"] = slice(read, prefix)
    return groups | {"patches": slice(prefix, None)}


def read_together(
    tokens: Float[Tensor, "batch tokens width"], group: str
) -> Float[Tensor, "batch reads k width"]:
    """Tokens of a group as the lens reads them: those of cls together, ``(B, 1, N, D)``, others one
    by one, ``(B, N, 1, D)``."""
    return tokens[:, None] if group == "cls" else tokens[:, :, None]


def head_logits(
    model: Model, tokens: Float[Tensor, "*reads k width"]
) -> Float[Tensor, "*reads classes"]:
    """Logits of the model's own norm and head.

    Parameters
    ----------
    tokens : the K tokens that the head reads, or a single one, which then stands in for each of
        them.
    """
    vit: Any = model.model if isinstance(model, CalledSteps) else model
    normed = vit.norm(tokens).flatten(0, -3)
    logits = vit.forward_head(normed.expand(-1, head_tokens(model), -1))
    return logits.unflatten(0, tokens.shape[:-2])


@torch.inference_mode()
def lens_logits(
    unrolled: Model,
    images: Float[Tensor, "batch channels height width"],
    lenses: Lenses,
) -> dict[tuple[str, str], Float[Tensor, "steps batch reads classes"]]:
    """Logits of every lens in one forward; one read per image for cls, and for answer.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : normalised.
    lenses : of `fit_lenses`.
    """
    logits: dict[tuple[str, str], list[Tensor]] = {key: [] for key in lenses}
    groups = token_groups(unrolled)
    for state in itertools.islice(states(unrolled, images), 1, None):
        for (lens, group), translators in lenses.items():
            if group == ANSWER:
                logits[lens, group].append(answer(unrolled, state)[:, None])
                continue
            tokens = read_together(state.tokens[:, groups[group]], group)
            translator = translators[state.step - 1]
            translated = tokens if translator is None else translator(tokens)
            logits[lens, group].append(head_logits(unrolled, translated))
    return {key: torch.stack(steps) for key, steps in logits.items()}


# ---- training ------------------------------------------------------------------------------------


@torch.inference_mode()
def cached_states(
    unrolled: Model,
    images: Float[Tensor, "batch channels height width"],
    index: Int[Tensor, " batch"],
    n_tokens: int,
) -> dict[str, Tensor]:
    """The states and logits that the tuned lens is trained on.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : normalised.
    index : positions of the images in the data set; they decide which tokens are kept.
    n_tokens : the most tokens M of a group that are kept per image.

    Returns
    -------
    Group of tokens -> states ``(B, T, M, K, D)``, K the tokens read together; "logits" -> the
    model's logits ``(B, C)``.
    """
    recorded: dict[str, list[Tensor]] = {group: [] for group in token_groups(unrolled)}
    for state in itertools.islice(states(unrolled, images), 1, None):
        for group, rows in token_groups(unrolled).items():
            tokens = read_together(state.tokens[:, rows], group)
            chosen = _chosen_tokens(index, tokens.shape[1], n_tokens).to(tokens.device)
            recorded[group].append(tokens.take_along_dim(chosen[..., None, None], dim=1))
    cached = {group: torch.stack(steps, 1) for group, steps in recorded.items()}
    cached["logits"] = answer(unrolled, state)
    return {name: check_finite(values) for name, values in cached.items()}


def fit_lenses(unrolled: Model, cached: Mapping[str, Tensor], iterations: int, seed: int) -> Lenses:
    """The lenses of a model: raw and tuned on every group of tokens, and shuffled on cls.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    cached : `cached_states` of the images of the fit, flat per image: ``(n, ...)``.
    iterations : see `fit_translator`.
    seed : of the permutation of the images by which the shuffled lens takes states and logits from
        different ones.
    """
    device, steps, read = device_of(unrolled), len(unrolled.blocks), head_tokens(unrolled)
    order = torch.randperm(len(cached["logits"]), generator=torch.Generator().manual_seed(seed))
    final = cached["cls"].unflatten(1, (steps, read, -1))[:, -1]
    lenses: Lenses = {}
    for group in token_groups(unrolled):
        together = read if group == "cls" else 1
        tokens = cached[group].unflatten(1, (steps, -1, together, unrolled.embed_dim)).to(device)
        lenses["raw", group] = [None] * steps
        for lens, images in (("tuned", slice(None)), ("shuffled", order)):
            if lens == "shuffled" and group != "cls":
                continue
            targets, logits = (
                each[images].repeat_interleave(tokens.shape[2], 0).to(device)
                for each in (final, cached["logits"])
            )
            lenses[lens, group] = [
                fit_translator(
                    unrolled, tokens[:, t].flatten(0, 1), targets[:, :together], logits, iterations
                )
                for t in range(steps)
            ]
    return lenses


def answer_lens(unrolled: Model) -> Lenses:
    """The logit lens of a model whose head does not read CLS alone: its answer at every step."""
    return {("raw", ANSWER): [None] * len(unrolled.blocks)}


def fit_translator(
    model: Model,
    tokens: Float[Tensor, "n k width"],
    final: Float[Tensor, "n k width"],
    logits: Float[Tensor, "n classes"],
    iterations: int,
) -> Translator:
    """The tuned lens of one step.

    Ridge regression of `final` on `tokens`, then `iterations` steps along the gradient of
    ``KL(model || lens)``, with momentum. The length of a step is that of the mean gradient over its
    root mean square, both running, and falls to 0 along a cosine. There is one scale for the whole
    map, not one per entry as in Adam: rounding errors of the states stay small.

    Parameters
    ----------
    tokens : states of the step.
    final : the states of step T that they are mapped to.
    logits : the model's own.
    iterations : number of gradient steps; 0 leaves the least-squares map.
    """
    x, y = tokens.double(), final.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    scale = (x - x_mean).square().mean().sqrt().clamp(min=1e-12)
    x = (x - x_mean) / scale
    ridge = RIDGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    gram, cross = (torch.einsum("nkd,nke->kde", x, other) / len(x) for other in (x, y - y_mean))
    least_squares = Translator(torch.linalg.solve(gram + ridge, cross), y_mean)
    spread = float((y - y_mean).square().mean().sqrt())
    rate = LEARNING_RATE * math.sqrt(x.shape[-1]) * spread
    refined = _refine(model, least_squares, x.float(), logits, iterations, rate)
    weight = refined.weight.double() / scale
    bias = refined.bias.double() - torch.einsum("kd,kde->ke", x_mean, weight)
    return Translator(weight.float(), bias.float())


def _refine(
    model: Model,
    start: Translator,
    tokens: Tensor,
    logits: Tensor,
    iterations: int,
    rate: float,
) -> Translator:
    """Follow the gradient from `start`."""
    log_p = logits.float().log_softmax(-1)
    weight, bias = start.weight.float(), start.bias.float()
    mean, square = [torch.zeros_like(weight), torch.zeros_like(bias)], weight.new_zeros(())
    for i in range(iterations):
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        with torch.enable_grad():
            log_q = head_logits(model, Translator(weight, bias)(tokens)).log_softmax(-1)
            loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        gradient = torch.autograd.grad(loss, (weight, bias))
        norm = gradient[0].square().sum() + gradient[1].square().sum()
        square = torch.lerp(norm, square, MOMENTUM)
        mean = [torch.lerp(g, old, MOMENTUM) for g, old in zip(gradient, mean, strict=True)]
        usual = (square / (1 - MOMENTUM ** (i + 1))).sqrt().clamp(min=1e-30)
        length = rate * (1 + math.cos(math.pi * i / iterations)) / 2 / usual
        weight, bias = (
            old.detach() - length * step for old, step in zip((weight, bias), mean, strict=True)
        )
    return Translator(weight, bias)


def _chosen_tokens(index: Tensor, count: int, most: int) -> Tensor:
    """Which of `count` tokens are kept of each image ``(B, M)``.

    All, or `most` of them by the golden section: other tokens for each image, so that all are kept
    about equally often.
    """
    if count <= most:
        return torch.arange(count).expand(len(index), -1)
    turns = (index[:, None].cpu() * most + torch.arange(most)).double() * GOLDEN
    return (turns.remainder(1) * count).long()
