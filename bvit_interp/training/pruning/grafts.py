"""Grafts: a copy of the block per step in a frozen model.

The inner loop of the pruning of appendix G.3 (arXiv 2605.10661): graft t starts from the first
weights under the masks of step t, and learns step t while the trained model does all other steps.
The T grafts are independent of each other, so they are one computation. The model runs once up to
every step. The outputs of the grafts go through the later steps together, as one batch that grows
by one graft per step. This takes T (T - 1) / 2 frozen steps; T separate runs take T (T - 1). Biases
and norms of a graft learn too; embeddings, head and a time embedding are those of the frozen model
(our reading).
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from bvit_interp.errors import UserError
from bvit_interp.models import stepping
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import PLACES, Masks, put_on
from bvit_interp.models.unroll import unroll


class Grafts(nn.ModuleList):
    """Graft t - 1: the block of `init` under mask t, with Parameters of its own.

    Parameters
    ----------
    init : the model before its first training step.
    main : the frozen, masked, trained model (an unroll). The grafts share its time embedding.
    masks : one per step.
    """

    def __init__(self, init: BViT, main: VisionTransformer, masks: Masks) -> None:
        blocks = [copy.deepcopy(block) for block in unroll(init).blocks]
        for t, (block, frozen) in enumerate(zip(blocks, main.blocks, strict=True)):
            if getattr(frozen, "step_embed", None) is not None:
                block.step_embed = frozen.step_embed
            put_on(block, masks, t)
        super().__init__(blocks)

    def no_weight_decay(self) -> set[str]:
        """Names of tensors without weight decay beside norms and biases, as a model lists them."""
        return set()

    def weights(self) -> dict[str, Float[Tensor, "steps ..."]]:
        """The matrices of all grafts, component -> ``(T, *shape)``, masked entries included."""
        return {
            name: torch.stack([_unmasked(graft.get_submodule(place)) for graft in self])
            for name, place in PLACES.items()
        }


def graft_logits(
    main: VisionTransformer,
    grafts: nn.ModuleList | nn.Sequential,
    images: Float[Tensor, "batch channels height width"],
    *,
    recompute: bool = False,
) -> Float[Tensor, "steps batch classes"]:
    """Logits of T models: in model t, step t is graft t and the other steps are those of `main`.

    Parameters
    ----------
    main : an unroll with frozen parameters.
    grafts : a block per step.
    images : normalised.
    recompute : recompute the main model's activations in the backward pass, to save memory.
    """
    with torch.no_grad():
        path = [stepping.embed(main, images)]
        for _ in range(len(grafts) - 1):
            path.append(stepping.advance(main, path[-1]))
    tokens = path[0].tokens[:0]
    for state, graft, block in zip(path, grafts, main.blocks, strict=True):
        if len(tokens):  # the states of the earlier grafts take this step of the main model
            if recompute:
                tokens = recompute_in_backward(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        tokens = torch.cat([tokens, graft(state.tokens)])
    return main.forward_head(main.norm(tokens)).unflatten(0, (len(grafts), len(images)))


def check_model(model: BViT) -> None:
    """Refuse models that cannot have grafts: several blocks, a memory, a distillation token."""
    stored = list(model.blocks.children())
    if hasattr(stored[0], "memory"):
        reason = "a memory"
    elif hasattr(model, "head_dist"):
        reason = "a distillation token"
    elif len(stored) > 1:
        reason = f"{len(stored)} blocks"
    else:
        return
    raise UserError(
        "recipe: masks of steps are learned for a bViT of one block without a memory,"
        f" this has {reason}"
    )


def _unmasked(linear: nn.Module) -> Tensor:
    """The weight under a mask's parametrization, on the CPU."""
    parametrizations = linear.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    original = parametrizations["weight"].original
    assert isinstance(original, Tensor)
    return original.detach().cpu()
