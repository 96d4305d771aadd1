"""Records and edits a block's attention at the kernel it calls.

Heads are not modules: queries, keys and values exist only as arguments of a kernel. They are seen
there as attention uses them (after norms, rotary embeddings, masks and position biases), in any
block that calls `torch.nn.functional.scaled_dot_product_attention`, as those of timm, torchvision,
`nn.MultiheadAttention` and Hugging Face do. A block that multiplies by hand is seen at its softmax
and at the product with the values, which give scores, pattern, v and z. The kernel and its result
stay as they are unless something is edited. Scores and pattern are computed separately, and only
for the query rows that are asked for (Vaswani et al., 2017, eq. 1).
"""

from __future__ import annotations

import math
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bvit_interp.errors import UserError
from bvit_interp.models.arguments import tokens_of

SITES = ("q", "k", "v", "scores", "pattern", "z")
"""The sites of attention, in the order in which they are computed."""
Change = Callable[[Tensor], Tensor | None]
"""Gets the activation of a whole site; returns its replacement, or None to leave it."""
Combine = Callable[[str, list[Tensor]], Tensor]
"""Makes one tensor of a site from those of several attentions of a block, or raises a UserError."""

_KERNELS = {F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_BETWEEN = {F.dropout, Tensor.to, Tensor.type_as}
"""What may happen to a pattern between its softmax and its product with the values."""


class Handle:
    """Ends a recording or an edit."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class Attention:
    """What is recorded and edited at the attention of one block.

    All readers of a block share its one `Attention` (`attention_of`), so that each sees what
    another has edited. Runs are seen only inside `watching()`.

    Parameters
    ----------
    block : the block of a step or of an inner update.
    combine : how several attentions of a block become one. Without it, a block that has several is
        refused.
    inside : attentions of blocks that run inside this one; they are not recorded as its own.
    """

    def __init__(
        self,
        block: nn.Module,
        combine: Combine | None = None,
        inside: Sequence[Attention] = (),
    ) -> None:
        self._block = weakref.ref(block)
        self.combine, self._inside = combine, inside
        self._holds = 0
        self._changes: dict[str, list[Change]] = {}
        self._keeps: list[_Keep] = []
        self._hooks: list[Any] = []

    def record(self, site: str, rows: slice, take: Callable[[Tensor], None]) -> Handle:
        """Hand the tokens `rows` (of scores and pattern: the query rows) to `take` in each run."""
        keep = _Keep(site, rows, take)
        self._keeps.append(keep)
        return self._watched(lambda: self._keeps.remove(keep))

    def edit(self, site: str, change: Change) -> Handle:
        """Change the site in each run, after the changes that are there already."""
        self._changes.setdefault(site, []).append(change)

        def end() -> None:
            self._changes[site].remove(change)
            if not self._changes[site]:
                del self._changes[site]

        return self._watched(end)

    def is_edited(self, *sites: str) -> bool:
        """Whether one of the sites is changed."""
        return any(site in self._changes for site in sites)

    def is_asked_for(self, *sites: str) -> bool:
        """Whether one of the sites is changed or recorded."""
        return self.is_edited(*sites) or any(keep.site in sites for keep in self._keeps)

    def changed(self, site: str, x: Tensor) -> Tensor:
        """`x` after each change in turn; `x` itself where there is none."""
        for change in list(self._changes.get(site, ())):
            new = change(x)
            x = x if new is None else new
        return x

    def keep(self, site: str, seen: _Pattern) -> None:
        """Hand to each recording of the site the rows that it asks for."""
        if self.combine is None:
            for keep in [keep for keep in self._keeps if keep.site == site]:
                keep.take(seen.at(site, keep.rows))

    def _watched(self, end: Callable[[], None] = lambda: None) -> Handle:
        """Set hooks that tell which block runs; the last handle removes them."""
        block = self._block()
        self._holds += 1
        if self._holds == 1 and block is not None:
            self._hooks = [
                block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                block.register_forward_hook(self._leave, always_call=True),
                *(other._watched() for other in self._inside),
            ]

        def remove() -> None:
            end()
            self._holds -= 1
            while not self._holds and self._hooks:
                self._hooks.pop().remove()

        return Handle(remove)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = tokens_of(block, args, kwargs)
        batch, count = (0, 0) if tokens is None or tokens.ndim < 2 else tokens.shape[:2]
        _runs().append(_Run(self, batch, count))

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        run = _runs().pop()
        if self.combine is not None and run.seen and output is not None:  # None: it raised
            for keep in list(self._keeps):
                parts = [seen.at(keep.site, keep.rows) for seen in run.seen]
                keep.take(self.combine(keep.site, parts))


def attention_of(
    block: nn.Module, combine: Combine | None = None, inside: Sequence[nn.Module] = ()
) -> Attention:
    """The one `Attention` of a block; `inside` are blocks that run inside it."""
    if block not in _attentions:
        within = [attention_of(each) for each in inside]
        _attentions[block] = Attention(block, combine, within)
    return _attentions[block]


@contextmanager
def watching() -> Iterator[None]:
    """Let recordings and edits of attention happen in this thread while the context lasts."""
    if getattr(_local, "watching", False):
        yield
        return
    _local.watching = True
    try:
        with unfused(), _Watch():
            yield
    finally:
        _local.watching = False


@contextmanager
def unfused() -> Iterator[None]:
    """Run torch's `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` part by part.

    Without gradients torch runs them as one operation. What happens inside it cannot be seen, and
    its rounding differs.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_attentions: weakref.WeakKeyDictionary[nn.Module, Attention] = weakref.WeakKeyDictionary()
_local = threading.local()


def _runs() -> list[_Run]:
    """The watched blocks that are running in this thread, the innermost last."""
    if not hasattr(_local, "runs"):
        _local.runs = []
    runs: list[_Run] = _local.runs
    return runs


@dataclass(frozen=True, eq=False)
class _Keep:
    """A site that is recorded: its tokens `rows`, and who takes them."""

    site: str
    rows: slice
    take: Callable[[Tensor], None]


@dataclass
class _Pattern:
    """One attention: q, k, v and z ``(B, H, N, E)``; scores and pattern where they exist."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    z: Tensor | None = None
    scores: Tensor | None = None
    pattern: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 1.0

    def at(self, site: str, rows: slice) -> Tensor:
        """Tokens `rows` of the site ``(B, Q, H, E)``; of scores and pattern ``(B, H, Q, N)``."""
        if site not in ("scores", "pattern"):
            part: Tensor | None = getattr(self, site)
            if part is None:
                raise UserError(
                    f"{site} is not seen in this block, which multiplies by hand: let it call"
                    " scaled_dot_product_attention (fused attention)"
                )
            return part.transpose(1, 2)[:, rows]
        if site == "pattern" and self.pattern is not None:
            return self.pattern[:, :, rows]
        scores = self._scores(rows)
        return scores if site == "scores" else scores.softmax(-1)

    def _scores(self, rows: slice) -> Tensor:
        if self.scores is not None:
            return self.scores[:, :, rows]
        assert self.q is not None and self.k is not None  # they came with the kernel
        groups = self.q.shape[1] // self.k.shape[1]
        k = self.k if groups == 1 else self.k.repeat_interleave(groups, dim=1)
        q = self.q[:, :, rows] * self.scale
        if q.shape[2] * 8 <= k.shape[2]:  # in this order keys are not copied
            scores = (k @ q.transpose(-2, -1)).transpose(-2, -1)
        else:
            scores = q @ k.transpose(-2, -1)
        if self.mask is None:
            return scores
        mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., rows, :]
        return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


class _Run:
    """One run of a watched block."""

    def __init__(self, attention: Attention, batch: int, tokens: int) -> None:
        self.attention, self.batch, self.tokens = attention, batch, tokens
        self.seen: list[_Pattern] = []
        self.factor: Tensor | None = None  # the last softmax, as it is multiplied with v

    def kernel(self, kernel: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """The call of a fused kernel, recorded and edited."""
        q, k, v, options = _arguments(*args, **kwargs)
        if q.ndim != 4 or len(q) != self.batch or not q.shape[2] == k.shape[2] == self.tokens:
            raise UserError(
                f"attention of queries {tuple(q.shape)} to keys {tuple(k.shape)} is not between the"
                f" {self.tokens} tokens of the step: its heads have no sites"
            )
        own = self.attention
        q, k, v = (self._changed(site, x) for site, x in zip("qkv", (q, k, v), strict=True))
        scale = options["scale"]
        seen = _Pattern(q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale)
        seen.mask = options["attn_mask"]
        if options["is_causal"]:
            seen.mask = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=q.device)
            seen.mask = seen.mask.tril()
        self._add(seen)
        for site in ("q", "k", "v"):
            own.keep(site, seen)
        replaced = own.is_edited("scores", "pattern") and self._replace(seen, options["dropout_p"])
        own.keep("scores", seen)
        own.keep("pattern", seen)
        if replaced:
            assert seen.pattern is not None
            z = seen.pattern @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        else:
            z = kernel(q, k, v, **options)
        seen.z = self._changed("z", z)
        own.keep("z", seen)
        return seen.z

    def softmax(self, softmax: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """The softmax of a block that multiplies by hand, recorded and edited."""
        if self.attention.is_asked_for("q", "k"):
            raise UserError(
                "this block multiplies queries and keys by hand: q and k are seen only where it"
                " calls scaled_dot_product_attention; scores, pattern, v and z are there"
            )
        given: Tensor = args[0]
        by_head = self._by_head(given)
        seen = _Pattern(scores=self.attention.changed("scores", by_head))
        self._add(seen)
        self.attention.keep("scores", seen)
        edited = seen.scores is not by_head and seen.scores is not None
        scores = seen.scores.reshape(given.shape) if edited and seen.scores is not None else given
        pattern = softmax(scores, *args[1:], **kwargs)
        by_head = self._by_head(pattern)
        seen.pattern = self.attention.changed("pattern", by_head)
        self.attention.keep("pattern", seen)
        if seen.pattern is not by_head:
            pattern = seen.pattern.reshape(pattern.shape)
        self.factor = pattern
        return pattern

    def between(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """What is done to a pattern between `softmax` and `product`: dropout, or another dtype."""
        self.factor = func(*args, **kwargs)
        return self.factor

    def product(self, product: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """The product of a pattern made by `softmax` with the values, recorded and edited."""
        seen, (pattern, values, *rest) = self.seen[-1], args
        by_head = self._by_head(values)
        seen.v = self.attention.changed("v", by_head.transpose(1, 2)).transpose(1, 2)
        self.attention.keep("v", seen)
        if self.attention.is_edited("v"):
            values = seen.v.reshape(values.shape)
        z = product(pattern, values, *rest, **kwargs)
        by_head = self._by_head(z)
        seen.z = self._changed("z", by_head)
        self.attention.keep("z", seen)
        return z if seen.z is by_head else seen.z.reshape(z.shape)

    def is_scores(self, args: Any, kwargs: Any) -> bool:
        """Whether a softmax with these arguments is that of attention between the step's tokens."""
        x, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
        square = x.ndim in (3, 4) and x.shape[-1] == x.shape[-2] == self.tokens
        batched = len(x) == self.batch if x.ndim == 4 else len(x) % self.batch == 0
        return square and batched and dim in (-1, x.ndim - 1)

    def is_pattern(self, args: Any) -> bool:
        """Whether the first argument is the pattern of the softmax that was seen last."""
        if not self.seen or self.seen[-1].q is not None or self.seen[-1].z is not None:
            return False
        pattern, factor = self.factor, args[0]
        return (
            pattern is not None
            and isinstance(factor, Tensor)
            and factor.numel() == pattern.numel()
            and factor.shape[-2:] == pattern.shape[-2:]
            and factor.untyped_storage()._cdata == pattern.untyped_storage()._cdata
        )

    def _add(self, seen: _Pattern) -> None:
        self.seen.append(seen)
        if self.attention.combine is not None:
            if self.attention.is_edited(*SITES):
                raise UserError("a block with several attentions is recorded, but not edited")
        elif len(self.seen) > 1:
            raise UserError(
                "this block attends more than once per step: its heads have no single pattern"
            )

    def _changed(self, site: str, x: Tensor) -> Tensor:
        """A part ``(B, H, N, E)`` after its changes, which see ``(B, N, H, E)``."""
        if not self.attention.is_edited(site):
            return x
        return self.attention.changed(site, x.transpose(1, 2)).transpose(1, 2)

    def _by_head(self, x: Tensor) -> Tensor:
        """``(B H, ...)`` as ``(B, H, ...)``."""
        return x if x.ndim == 4 else x.unflatten(0, (self.batch, -1))

    def _replace(self, seen: _Pattern, dropout: float) -> bool:
        """Edit scores and pattern; returns whether they replace the kernel's."""
        if dropout:
            raise UserError("scores and pattern cannot be edited under dropout: call model.eval()")
        plain = seen.at("scores", slice(None))
        scores = self.attention.changed("scores", plain)
        softmax = scores.softmax(-1)
        pattern = self.attention.changed("pattern", softmax)
        if scores is plain and pattern is softmax:
            return False
        seen.scores, seen.pattern = scores, pattern
        return True


class _Watch(TorchFunctionMode):
    """Hands the calls that attention consists of to the watched block that is running."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        runs = _runs()
        if not runs:
            return func(*args, **kwargs)
        run = runs[-1]
        if func in _KERNELS:
            return run.kernel(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # the functions that it calls must be seen too
                return _multi_head_attention(*args, **kwargs)
        if func in _SOFTMAX and run.is_scores(args, kwargs):
            return run.softmax(func, args, kwargs)
        if func in _PRODUCTS and run.is_pattern(args):
            return run.product(func, args, kwargs)
        if func in _BETWEEN and args and run.is_pattern(args):
            return run.between(func, args, kwargs)
        return func(*args, **kwargs)


_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""torch's own function, without the check that would hand it to the mode again."""


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The arguments of scaled_dot_product_attention, however they were given."""
    options = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    return query, key, value, options
