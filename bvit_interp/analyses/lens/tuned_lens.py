"""Lenses: the model's own head read on any token at any step, raw or behind an affine map that
carries it on to step T.

The logit lens (nostalgebraist, 2020, "interpreting GPT: the logit lens") reads z_t as if it were
z_T. The tuned lens (Belrose et al., 2023, "Eliciting Latent Predictions from Transformers with the
Tuned Lens", arXiv 2303.08112) reads ``z_t W_t + c_t``, an affine map for each step that gives the
least KL divergence from the final answer. Ours starts at the map of least squared error to z_T^cls
and goes down the gradient of that divergence over all cached states at once: no batches are drawn,
so the maps depend on the images alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.models.stepping import advance, answer, embed

RIDGE = 0.01  # of the mean square of the centred states
RATE = 0.01  # length of a full step, of sqrt(D) times the spread of z_T
GOLDEN = (math.sqrt(5) - 1) / 2
MEMORY = 0.9  # of the running means of the gradient and of its square


def tokens_read(model: VisionTransformer) -> int:
    """How many leading tokens the head reads: CLS, and with it the distillation token of a model
    that has one.

    Raises
    ------
    UserError
        For a head that pools tokens.
    """
    if model.global_pool != "token" or not model.has_class_token:
        raise UserError(
            f"the lens reads CLS as the head does: global_pool must be token, got {model.global_pool!r}"
        )
    return 1 if getattr(model, "dist_token", None) is None else 2


def kinds(model: VisionTransformer) -> dict[str, slice]:
    """Where each kind of token is: cls (all that the head reads), reg if there are any, patches."""
    own, prefix = tokens_read(model), model.num_prefix_tokens
    found = {"cls": slice(0, own), "reg": slice(own, prefix), "patches": slice(prefix, None)}
    return {kind: rows for kind, rows in found.items() if kind != "reg" or own < prefix}


def grouped(tokens: Tensor, kind: str) -> Tensor:
    """Tokens of a kind ``(B, N, D)`` as what the lens reads at once: ``(B, 1, N, D)`` of cls, else
    ``(B, N, 1, D)``."""
    return tokens[:, None] if kind == "cls" else tokens[:, :, None]


def read(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """Logits ``(..., C)`` of the model's own norm and head.

    Parameters
    ----------
    tokens : ``(..., K, D)``; K the tokens the head reads, or 1, which then stands in for each of
        them.
    """
    normed = model.norm(tokens).flatten(0, -3)
    return model.forward_head(normed.expand(-1, tokens_read(model), -1)).unflatten(
        0, tokens.shape[:-2]
    )


# ---- the tuned lens ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Translator:
    """The affine map of a step: ``x W + c`` for each of K tokens.

    Parameters
    ----------
    weight, bias : ``(K, D, D)`` and ``(K, D)``.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens ``(..., K, D)``, each behind its map."""
        return torch.einsum("...kd,kde->...ke", tokens, self.weight) + self.bias


def fit(
    model: VisionTransformer, tokens: Tensor, final: Tensor, answers: Tensor, iterations: int
) -> Translator:
    """The tuned lens of one step.

    Ridge regression of `final` on `tokens`, then `iterations` steps down the gradient of
    ``KL(answer || lens)``, with momentum; a step's length is that of the mean gradient over its
    root mean square, both running, and falls to 0 as a cosine. One scale for the whole map, not one
    an entry as in Adam: rounding of the states stays rounding.

    Parameters
    ----------
    tokens : states of the step ``(n, K, D)``.
    final : what they are carried to ``(n, K, D)``.
    answers : the model's logits ``(n, C)``.
    iterations : gradient steps; 0 leaves the map of least squares.
    """
    x, y = tokens.double(), final.double()
    mean, middle = x.mean(0), y.mean(0)
    scale = (x - mean).square().mean().sqrt().clamp(min=1e-12)
    x = (x - mean) / scale
    ridge = RIDGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    gram, cross = (torch.einsum("nkd,nke->kde", x, other) / len(x) for other in (x, y - middle))
    found = Translator(torch.linalg.solve(gram + ridge, cross), middle)
    spread = float((y - middle).square().mean().sqrt())
    found = _refine(
        model, found, x.float(), answers, iterations, RATE * math.sqrt(x.shape[-1]) * spread
    )
    weight = found.weight.double() / scale
    return Translator(
        weight.float(), (found.bias.double() - torch.einsum("kd,kde->ke", mean, weight)).float()
    )


def _refine(
    model: VisionTransformer,
    start: Translator,
    tokens: Tensor,
    answers: Tensor,
    iterations: int,
    rate: float,
) -> Translator:
    """Go down the gradient from `start`."""
    wanted = answers.float().log_softmax(-1)
    weight, bias = start.weight.float(), start.bias.float()
    mean, square = [torch.zeros_like(weight), torch.zeros_like(bias)], weight.new_zeros(())
    for i in range(iterations):
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        with torch.enable_grad():
            logits = read(model, Translator(weight, bias)(tokens))
            loss = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        gradient = torch.autograd.grad(loss, (weight, bias))
        square = torch.lerp(sum(g.square().sum() for g in gradient), square, MEMORY)
        mean = [torch.lerp(g, old, MEMORY) for g, old in zip(gradient, mean, strict=True)]
        usual = (square / (1 - MEMORY ** (i + 1))).sqrt().clamp(min=1e-30)
        size = rate * (1 + math.cos(math.pi * i / iterations)) / 2 / usual
        weight, bias = (
            old.detach() - size * m for old, m in zip((weight, bias), mean, strict=True)
        )
    return Translator(weight, bias)


Lenses = dict[tuple[str, str], list[Translator | None]]
"""(lens, kind of token) -> the map of every step; None reads the state itself."""


def make_lenses(
    view: VisionTransformer, cached: Mapping[str, Tensor], iterations: int, seed: int
) -> Lenses:
    """The lenses of a model: raw and tuned on every kind of token, and shuffled on cls.

    Parameters
    ----------
    view : a tied unroll or a stacked ViT.
    cached : `cached_states` of the images of the fit, each image's flat: ``(n, ...)``.
    iterations : of `fit`.
    seed : of the permutation of images by which the shuffled lens takes its states and answers from
        different ones.
    """
    device, steps, own = next(view.parameters()).device, len(view.blocks), tokens_read(view)
    order = torch.randperm(len(cached["answers"]), generator=torch.Generator().manual_seed(seed))
    targets = {
        "final": cached["cls"].unflatten(1, (steps, own, -1))[:, -1],
        "answers": cached["answers"],
    }
    lenses: Lenses = {}
    for kind in kinds(view):
        together = own if kind == "cls" else 1
        states = cached[kind].unflatten(1, (steps, -1, together, view.embed_dim)).to(device)
        lenses["raw", kind] = [None] * steps
        for lens, images in (("tuned", slice(None)), ("shuffled", order)):
            if lens == "shuffled" and kind != "cls":
                continue
            final, answers = (
                each[images].repeat_interleave(states.shape[2], 0).to(device)
                for each in targets.values()
            )
            lenses[lens, kind] = [
                fit(view, states[:, t].flatten(0, 1), final[:, :together], answers, iterations)
                for t in range(steps)
            ]
    return lenses


# ---- running -------------------------------------------------------------------------------------------


def cached_states(
    view: VisionTransformer, images: Tensor, index: Tensor, most: int
) -> dict[str, Tensor]:
    """What the tuned lens is trained on, of images at places `index` ``(B,)`` of the data set.

    Parameters
    ----------
    view : a tied unroll or a stacked ViT.
    most : tokens M of a kind that are kept of an image; where there are more, others of each image.

    Returns
    -------
    Kind -> states ``(B, T, M, K, D)``, K the tokens read at once; "answers" -> the model's logits
    ``(B, C)``.
    """
    states: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        state = embed(view, images.to(next(view.parameters()).device))
        for _ in view.blocks:
            state = advance(view, state)
            for kind, rows in kinds(view).items():
                tokens = grouped(state.tokens[:, rows], kind)
                chosen = _spread_over(index, tokens.shape[1], most).to(tokens.device)
                tokens = tokens.take_along_dim(chosen[..., None, None], dim=1)
                states.setdefault(kind, []).append(tokens)
        found = {kind: torch.stack(steps, 1) for kind, steps in states.items()} | {
            "answers": answer(view, state)
        }
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise UserError("activations hold NaN or infinite values")
    return found


def _spread_over(index: Tensor, count: int, most: int) -> Tensor:
    """Which of `count` tokens are kept of each image ``(B, M)``: all, or `most` by the golden
    section, image by image others, so that all come about as often."""
    if count <= most:
        return torch.arange(count).expand(len(index), -1)
    turns = (index[:, None].cpu() * most + torch.arange(most)).double() * GOLDEN
    return (turns.remainder(1) * count).long()


def look(view: VisionTransformer, images: Tensor, lenses: Lenses) -> dict[tuple[str, str], Tensor]:
    """Logits ``(T, B, N, C)`` of every lens in one forward; N is 1 for cls.

    Parameters
    ----------
    view : a tied unroll or a stacked ViT.
    lenses : of `make_lenses`.
    """
    logits: dict[tuple[str, str], list[Tensor]] = {key: [] for key in lenses}
    places = kinds(view)
    with torch.inference_mode():
        state = embed(view, images.to(next(view.parameters()).device))
        for t in range(len(view.blocks)):
            state = advance(view, state)
            for (lens, kind), translators in lenses.items():
                tokens, translator = grouped(state.tokens[:, places[kind]], kind), translators[t]
                found = read(view, tokens if translator is None else translator(tokens))
                logits[lens, kind].append(found)
        return {key: torch.stack(steps) for key, steps in logits.items()}
