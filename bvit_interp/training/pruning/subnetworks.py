"""Subnetworks that share the weights of one model and differ in masks.

On a batch of subset k the model computes with ``theta * m_k`` (Algorithm 2 of Routing the Lottery,
arXiv 2601.22141). Norms, biases, tokens, the classifier and the running statistics of batch norms
are not masked: they are dense and shared, as in the paper. In a one-vs-rest subset k, output k of
the classifier is the binary prediction, and is trained on the batches of that subset only. That is
our choice, so that all methods train one architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from bvit_interp.data.samples import Samples
from bvit_interp.errors import REFUSALS, UserError
from bvit_interp.models.bvit import BViT
from bvit_interp.models.layout import Layout
from bvit_interp.models.masks import PLACES, Masks
from bvit_interp.models.unroll import unroll
from bvit_interp.training.loop.build import make_model
from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.throughput import precision
from bvit_interp.training.pruning.grafts import check_model
from bvit_interp.training.pruning.subsets import Pool

WeightNames = Mapping[str, tuple[str, ...]]
"""Masked weight of the model -> its names in the module that computes, one per mask of a subset:
one, or one per step."""


def build_model(recipe: Recipe, pool: Pool, device: str = "cpu") -> nn.Module:
    """The recipe's model before its first training step, a bViT or any timm model.

    It has an output per class of the pool.
    """
    model = _build(recipe, pool)
    if device == "cpu" and precision(recipe.autocast, device) != "off":
        for inner in model.modules():
            if hasattr(inner, "fused_attn"):
                inner.fused_attn = False  # type: ignore[assignment]  # slow backward in bf16
    return model


def _build(recipe: Recipe, pool: Pool) -> nn.Module:
    recipe = replace(recipe, model={**recipe.model, "num_classes": len(pool.classes)})
    name = str(recipe.model["name"])
    if not timm.is_model(name) or timm.model_entrypoint(name).__module__.startswith("bvit_interp."):
        about = SimpleNamespace(classes=pool.classes, native_size=pool.samples.native_size)
        return make_model(recipe, cast("Samples", about))
    with seeded(recipe.seed):
        arguments = {key: value for key, value in recipe.model.items() if key != "name"}
        try:
            return timm.create_model(name, **arguments)
        except REFUSALS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"recipe: cannot make the model {name}: {reason}") from error


def input_settings(model: nn.Module, samples: Samples) -> Any:
    """A model, or a stand-in, with the attributes that `Augmentation` and `Geometry` read.

    A timm model without patches takes images of the data set's own size.
    """
    if hasattr(getattr(model, "patch_embed", None), "img_size"):
        return model
    cfg = cast("dict[str, Any]", model.pretrained_cfg)
    side = samples.native_size or cfg["input_size"][-1]
    return SimpleNamespace(
        patch_embed=SimpleNamespace(img_size=(side, side)),
        pretrained_cfg=cfg,
        layout=Layout((side, side), 3, (1, 1), (), 0, cast("Any", model).num_classes),
    )


class Subnets:
    """K subnetworks in one module.

    Parameters
    ----------
    module : the model, its tied unroll, or `untie_steps` of it; trained in place.
    names : its masked weights, R names for each.
    masks : weight -> K * R masks; those of subset k are rows k R to k R + R - 1.
    outputs : per subset, the class of a one-vs-rest subset, or None.
    """

    def __init__(
        self, module: nn.Module, names: WeightNames, masks: Masks, outputs: Sequence[int | None]
    ) -> None:
        self.module, self.outputs = module, tuple(outputs)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        device = next(iter(parameters.values())).device
        rows = len(next(iter(names.values())))
        self.masks: list[dict[str, Tensor]] = []
        self.kept: list[dict[nn.Parameter, Tensor]] = []
        for k, output in enumerate(self.outputs):
            masked = {
                name: masks[weight][k * rows + r].to(device)
                for weight, listed in names.items()
                for r, name in enumerate(listed)
            }
            kept: dict[nn.Parameter, Tensor] = {}
            for name, mask in masked.items():  # a tied weight may move if any step keeps it
                parameter = parameters[name]
                kept[parameter] = kept[parameter] | mask if parameter in kept else mask
            if output is not None:
                for parameter in _classifier(module).parameters():
                    chosen = torch.arange(len(parameter), device=device) == output
                    kept[parameter] = chosen.view(-1, *[1] * (parameter.ndim - 1))
            self.masks.append(masked)
            self.kept.append(kept)

    def weights(self, k: int) -> dict[str, Tensor]:
        """``theta * m_k`` by name in the module."""
        return {
            name: self.module.get_parameter(name) * mask for name, mask in self.masks[k].items()
        }

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        k: int,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Logits of subnetwork k: of its own class ``(B,)``, or of all classes ``(B, C)``.

        `weights` are those of `weights(k)`, or of another subset; by default its own.
        """
        logits = functional_call(
            self.module, dict(weights or self.weights(k)), (images,), tie_weights=False
        )
        output = self.outputs[k]
        return logits if output is None else logits[:, output]

    def loss(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        k: int,
        smoothing: float,
    ) -> Float[Tensor, ""]:
        """Cross-entropy on a batch of subset k: binary for one-vs-rest."""
        logits, output = self(images, k), self.outputs[k]
        if output is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return F.binary_cross_entropy_with_logits(
            logits, (labels == output) * (1 - smoothing) + smoothing / 2
        )


def masked_weights(model: nn.Module, by_step: bool = False) -> dict[str, tuple[str, ...]]:
    """The weights that are masked, as `WeightNames`.

    These are the weights of every Linear and convolution but the classifier; with `by_step`, those
    of the block.
    """
    if by_step:
        if not isinstance(model, BViT):
            raise UserError(f"masks of steps are of a bViT, not of {type(model).__name__}")
        check_model(model)
        steps = range(len(model.blocks))
        return {
            f"blocks.0.{at}.weight": tuple(f"blocks.{t}.{at}.weight" for t in steps)
            for at in PLACES.values()
        }
    dense = set(_classifier(model).modules())
    kinds = (nn.Linear, _ConvNd)
    names = [
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, kinds) and m not in dense
    ]
    if not names:
        raise UserError(f"{type(model).__name__} has no linear layer or convolution to mask")
    return {name: (name,) for name in names}


def _classifier(model: nn.Module) -> nn.Module:
    get_classifier: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    found = None if get_classifier is None else get_classifier()
    if not isinstance(found, nn.Linear | _ConvNd):
        raise UserError(
            f"{type(model).__name__} has not one classifier (a distilled model has two)"
        )
    return found


def untie_steps(model: nn.Module) -> nn.Module:
    """The unroll of a bViT in which every step has masked weights of its own, equal at first."""
    view = copy.deepcopy(unroll(model))  # type: ignore[arg-type]
    for block in view.blocks:
        for place in PLACES.values():
            weight = block.get_parameter(f"{place}.weight")
            block.get_submodule(place).weight = nn.Parameter(weight.detach().clone())
    return view
