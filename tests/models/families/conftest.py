"""What every family of models is held to: a loop written by hand in elementary operations.

A test file writes the forward of its model as a function of the model, the images and a `Loop`, and
hands each site of each step to it. `check` compares the Probe with that loop, site by site, without
and with changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import SITES

CLOSE = {"atol": 2e-5, "rtol": 2e-4}
EDITED = 2
"""The step that is changed."""


class Operations:
    """Elementary operations with the weights of modules."""

    @staticmethod
    def linear(module: Any, x: Tensor) -> Tensor:
        return x @ module.weight.T + (0 if module.bias is None else module.bias)

    @staticmethod
    def norm(module: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
        return scaled * module.weight + module.bias

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    @staticmethod
    def heads(x: Tensor, count: int) -> Tensor:
        """``(B, N, H E)`` as ``(B, N, H, E)``."""
        return x.unflatten(-1, (count, -1))

    @staticmethod
    def patches(module: Any, images: Tensor) -> Tensor:
        """The embedded patches ``(B, N, D)`` of a convolution that has them as its kernel."""
        size = module.kernel_size[0]
        cut = F.unfold(images, size, stride=size).transpose(1, 2)
        return cut @ module.weight.flatten(1).T + (0 if module.bias is None else module.bias)


class Loop(Operations):
    """One run by hand: keeps the sites of each step, and changes one of them."""

    def __init__(
        self, site: str = "", step: int = 0, change: Callable[[Tensor], Tensor] = torch.clone
    ) -> None:
        self.changed, self.change = (site, step), change
        self.sites: dict[tuple[str, int], Tensor] = {}
        self.step = 0

    def begin(self) -> Loop:
        """The next step."""
        self.step += 1
        return self

    def at(self, site: str, x: Tensor) -> Tensor:
        """The site's activation, as the rest of the step is to read it."""
        x = self.change(x) if self.changed == (site, self.step) else x
        self.sites[site, self.step] = x
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """z ``(B, N, H E)`` of q, k and v ``(B, N, H, E)``; k and v may have fewer heads."""
        q, k, v = self.at("q", q), self.at("k", k), self.at("v", v)
        groups = q.shape[2] // k.shape[2]
        k, v = (part.repeat_interleave(groups, dim=2) for part in (k, v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1]) + bias
        exponentials = self.at("scores", scores).exp()
        pattern = self.at("pattern", exponentials / exponentials.sum(-1, keepdim=True))
        return self.at("z", torch.einsum("bhqk,bkhe->bqhe", pattern, v)).flatten(2)


def zero_head(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 1] = 0
    return x


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "z": zero_head,
    "pattern": lambda x: torch.full_like(x, 1 / x.shape[-1]),
    "scores": lambda x: 2 * x,
}
Hand = Callable[[Tensor, Loop], Tensor]
"""The answer for images, each site of each step handed to the loop."""


def other(x: Tensor) -> Tensor:
    """A change of every token and unit, by another amount: norms take out what is the same."""
    return x + 1 + torch.linspace(-1, 1, x[0].numel()).reshape(x[0].shape)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if _is_scale(name) else 0.15 * noise)
    return model.eval()


def _is_scale(name: str) -> bool:
    *_, owner, own = ("", *name.split("."))
    scales = ("gamma", "lambda1") if own != "weight" else ("norm", "ln")
    return any(word in (own if own != "weight" else owner) for word in scales)


@pytest.fixture
def random_model(watched_models: list[nn.Module]) -> Callable[..., Any]:
    """``random_model(model)``: the same in eval mode, every parameter random; watched for hooks."""

    def random(model: nn.Module, seed: int = 0) -> nn.Module:
        watched_models.append(model)
        return randomise(model, seed)

    return random


@pytest.fixture
def loop() -> Loop:
    """A run by hand that changes nothing, in its first step."""
    return Loop().begin()


@pytest.fixture
def check(images: Tensor) -> Callable[..., Probe]:
    """``check(model, by_hand, missing={site: reason}, recorded_only=(), **options of Probe)``."""
    images = images[:2]

    def run(
        model: nn.Module,
        by_hand: Callable[[Any, Tensor, Loop], Tensor],
        missing: Mapping[str, str] | None = None,
        recorded_only: str = "",
        **options: Any,
    ) -> Probe:
        missing = missing or {}
        hand: Hand = partial(by_hand, model)
        probe = Probe(model, **options)
        sites = [site for site in SITES if site not in missing]
        with torch.no_grad():
            plain = exactly(model, images)
            check_recording(probe, hand, images, sites, plain)
            check_missing(probe, images, missing)
            check_edits(probe, hand, images, sites, plain, recorded_only)
        return probe

    return run


def exactly(model: nn.Module, images: Tensor) -> Tensor:
    """The model's own answer, without torch's fused encoder layer, which rounds otherwise."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        answer = model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if isinstance(answer, Tensor):
        return answer
    names = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
    return next(answer[name] for name in names if answer.get(name) is not None)


def check_recording(
    probe: Probe, by_hand: Hand, images: Tensor, sites: list[str], plain: Tensor
) -> None:
    assert torch.equal(probe(images), plain)
    loop = Loop()
    torch.testing.assert_close(by_hand(images, loop), plain, **CLOSE)
    assert loop.step == probe.num_steps >= EDITED
    logits, cache = probe.run(images, sites)
    assert torch.equal(logits, plain)
    _, rows = probe.run(images, sites, tokens=slice(0, 2))
    for site in sites:
        axis = 2 if site in ("scores", "pattern") else 1
        for step in range(1, loop.step + 1):
            expected = loop.sites[site, step]
            what = f"{site}[{step}]"
            compare(cache[site, step], expected, what)
            compare(rows[site, step], expected.narrow(axis, 0, 2), what)
    if "pattern" in sites:
        assert probe.num_heads == loop.sites["pattern", 1].shape[1]
    if "mlp_post" in sites:
        assert probe.num_neurons == loop.sites["mlp_post", 1].shape[-1]


def compare(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, **CLOSE, msg=lambda message: f"{what}: {message}")


def check_missing(probe: Probe, images: Tensor, missing: Mapping[str, str]) -> None:
    for site, reason in missing.items():
        with pytest.raises(UserError, match=reason) as refusal:
            probe.run(images, site)
        assert "\n" not in str(refusal.value)


def check_edits(
    probe: Probe, by_hand: Hand, images: Tensor, sites: list[str], plain: Tensor, reason: str
) -> None:
    if reason:
        with pytest.raises(UserError, match=reason), probe.edit({("z", EDITED): lambda x, _: x}):
            probe(images)
        sites = [site for site in sites if site not in ("q", "k", "v", "scores", "pattern", "z")]
    steps = range(1, probe.num_steps + 1)
    bitwise = [site for site in sites if site not in ("scores", "pattern")]  # those go by no kernel
    with probe.edit({(site, step): lambda x, _: x for site in bitwise for step in steps}):
        assert torch.equal(probe(images), plain)
    with probe.edit({(site, step): lambda x, _: x.clone() for site in sites for step in steps}):
        torch.testing.assert_close(probe(images), plain, **CLOSE)
    for site in sites:
        change = CHANGES.get(site, other)
        expected = by_hand(images, Loop(site, EDITED, change))
        with probe.edit({(site, EDITED): lambda x, _, change=change: change(x)}):
            compare(probe(images), expected, f"the edit of {site}")
        assert (expected - plain).abs().max() > 1e-3, site
    assert torch.equal(probe(images), plain)
