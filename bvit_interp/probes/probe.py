"""Probe: record and edit any site of any step.

A probe sets hooks on the tied unroll and watches the calls of the attention kernel. The model's
output is bit-equal with and without recording, and fused attention stays on. Hooks are removed when
a call ends, also after an exception. (torch's own encoder layer, where it would run as one
operation, runs part by part in every call of a probe.)
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from bvit_interp.errors import UserError, choices
from bvit_interp.models import attention
from bvit_interp.models.attention import Change, unfused, watching
from bvit_interp.models.looped import CalledSteps
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import is_unrolled, unroll
from bvit_interp.probes.addressing import Enough, Key, sites_of, unseen
from bvit_interp.probes.cache import Cache, unit_index
from bvit_interp.probes.sites import Step
from bvit_interp.results import rank_and_world
from bvit_interp.vocabulary import (
    Address,
    Tokens,
    axes_of,
    place_of,
)

if TYPE_CHECKING:  # it takes as long to import as torch
    from torchmetrics import Metric, MetricCollection

Edit = Callable[[Tensor, Address], Tensor | None]
"""fn(activation, address) -> new activation of the same shape, or None to leave it."""
Fired = dict[str, int]
ANNOUNCED_BYTES = 2**30


Images = Float[Tensor, "batch channels height width"]


class Probe:
    """Watch and change a model step by step.

    Parameters
    ----------
    model : any model that `unroll` takes, or an unroll (e.g. ``unroll(model, steps=24)``).
    max_bytes : a cache that would be larger is refused; above 1 GiB its size is announced by a
        warning.
    **options : as in `unroll`, e.g. ``loop="encoder.block"``.

    Attributes
    ----------
    model : the tied unroll that is watched; step t is ``model.blocks[t - 1]``.
    layout : image size, patch grid, kinds of prefix tokens, width and classes.
    num_steps : steps T.
    num_heads, num_neurons : number of heads and of FFN neurons of a step. If steps lack them, or
        have different numbers of them, reading these raises a UserError.
    """

    def __init__(self, model: nn.Module, max_bytes: int = 8 * 2**30, **options: Any) -> None:
        if isinstance(model, torch._dynamo.OptimizedModule):
            raise UserError(
                "hooks do not run in a compiled model: probe the model that went into torch.compile"
            )
        view = cast(Any, model)
        self.model = view if is_unrolled(view) and not options else unroll(model, **options)
        self.max_bytes = max_bytes
        self._lock = _lock_of(self.model)
        with self._lock:  # another thread's forward would be seen too
            self._steps = sites_of(self.model)
        self.layout = self._steps.layout
        self.num_steps = len(self._steps)
        self.num_prefix_tokens = self.layout.num_prefix_tokens
        self.grid = self.layout.grid
        self._edits: list[tuple[Address, Change]] = []
        self._edit_hooks = ExitStack()

    @property
    def num_heads(self) -> int:
        """Number of heads of a step."""
        return self._steps.num_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self._steps.head_width

    @property
    def num_neurons(self) -> int:
        """Number of neurons of a step: the inputs of the FFN's last projection."""
        return self._steps.num_neurons

    def address(self, key: Key) -> Address:
        """The address with its step counted from 1, checked against this model."""
        return self._steps.address(key)

    def rows(self, tokens: Tokens, count: int) -> tuple[slice, bool]:
        """The slice of `count` tokens that `tokens` means, and whether it is one token whose axis
        is dropped."""
        return self._steps.rows(tokens, count)

    def kinds(self) -> dict[str, slice]:
        """The kinds of token the model has, and where each is: cls, reg, dist, patches."""
        return self._steps.kinds()

    # ---- running ---------------------------------------------------------------------------------

    def __call__(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Logits ``(B, classes)`` of images ``(B, C, H, W)``, under the edits in force."""
        self._refuse_compiled()
        with self._lock, unfused():
            return self.model(images)

    def run(
        self,
        images: Images,
        sites: Key | Sequence[Key],
        steps: Iterable[int] | int | None = None,
        tokens: Tokens = "all",
        grad: bool = False,
    ) -> tuple[Tensor, Cache]:
        """Logits and recorded activations of one batch.

        Parameters
        ----------
        images : ``(B, C, H, W)``, normalised.
        sites : site names, or addresses such as ``"mlp_post[5]"`` and ``("mlp_post", 5)``, which
            contain their step. A site of an inner update is named as ``"inner2.mlp_post"``.
        steps : steps of the sites that are named without a step, from 1 (0, the embedded tokens, is
            allowed only for resid_post); by default every step that has the site.
        tokens : "cls", "dist", "reg", "patches", "all", an int or a slice; for scores and pattern,
            query tokens.
        grad : let gradients flow from the logits to what is recorded, and from there to the images
            and weights. Recorded scores and patterns then replace those of the fused kernel, whose
            rounding differs. By default what is recorded is detached.

        Returns
        -------
        The model's logits ``(B, classes)`` and the `Cache`.
        """
        with self._lock:
            cache, hooks, targets = self._recording(images, sites, steps, tokens, grad=grad)
            with hooks, unfused():
                logits = self.model(images)
        _check_seen(cache, targets)
        return logits, cache

    def record(
        self,
        images: Images,
        sites: Key | Sequence[Key],
        steps: Iterable[int] | int | None = None,
        tokens: Tokens = "all",
        grad: bool = False,
    ) -> Cache:
        """As `run`, without logits: the forward ends when the last activation is recorded."""
        with self._lock:
            cache, hooks, targets = self._recording(images, sites, steps, tokens, True, grad)
            with hooks, unfused(), contextlib.suppress(Enough):
                self.model(images)
        _check_seen(cache, targets)
        return cache

    @contextmanager
    def edit(self, edits: Mapping[Key, Edit]) -> Iterator[Fired]:
        """Change activations while the context lasts; contexts nest.

        Parameters
        ----------
        edits : ``("z", 5)``, ``"z[5]"`` or ``"z[5]:3"`` -> fn(activation, address). Without a step,
            as ``"z"``, ``"z:3"`` or ``"z[*]:3"``, the edit is made at every step. With a unit, fn
            gets and returns only that head ``(B, N, E)`` or neuron ``(B, N)``. It gets the whole
            token axis. Within a step, edits apply in the order in which the block computes its
            sites.

        Yields
        ------
        How often each edit fired, by address. An edit that never fired raises a UserError when the
        context ends.

        Raises
        ------
        UserError
            Under gradient checkpointing, where a backward pass after the context would compute the
            step again without the edit. Also for a site, step or unit that the model does not have,
            and for two edits of one address.
        """
        self._refuse_compiled()
        if torch.is_grad_enabled():
            refuse_checkpointing(self.model)
        fired: Fired = {}
        added = []
        for key, fn in edits.items():
            for address in self._steps.everywhere(key):
                if str(address) in fired:
                    raise UserError(f"two edits of {address}: make them one function")
                fired[str(address)] = 0
                added.append((address, _change(address, fn, fired)))
        with self._lock:
            before = self._edits
            try:
                self._install([*before, *added])
                with watching():
                    yield fired
            finally:
                self._install(before)
        silent = [name for name, count in fired.items() if not count]
        if silent:
            raise UserError(
                f"edits that never fired: {', '.join(silent)}; was the probe called inside the"
                " context?"
            )

    def _install(self, edits: list[tuple[Address, Change]]) -> None:
        """Replace the edits in force: all of a step are set together, so that they chain."""
        self._edit_hooks.close()
        self._edits = edits
        by_block: dict[Step, dict[str, list[Change]]] = {}
        for address, change in edits:
            block, name = self._steps.block(address.site, address.step)
            by_block.setdefault(block, {}).setdefault(name, []).append(change)
        for block, changes in by_block.items():
            for handle in block.edit(changes):
                self._edit_hooks.callback(handle.remove)

    def collect(
        self,
        loader: Iterable[Any],
        metrics: Mapping[Key, Metric | MetricCollection],
        steps: Iterable[int] | int | None = None,
        tokens: Tokens = "all",
        progress: bool = True,
    ) -> dict[Key, Any]:
        """Stream a data set through the model into torchmetrics; memory does not grow with it.

        Parameters
        ----------
        loader : batches ``(images, labels)``, or those of `bvit_interp.data.loader.Loader`; each
            process gets its own part.
        metrics : site or address -> metric. ``update`` gets the activations ``(B, T, ...)`` of a
            site or ``(B, ...)`` of an address, and the labels ``(B,)`` if it has an argument
            `labels` or `target`.

        Returns
        -------
        The same keys -> the results of ``compute()``, on every process.
        """
        device = device_of(self.model)
        for metric in metrics.values():
            metric.to(device)
        steps = list(steps) if isinstance(steps, Iterable) else steps
        rank, _ = rank_and_world()
        for batch in tqdm(loader, desc="collect", disable=not progress or rank > 0):
            images, labels = (batch.images, batch.labels) if hasattr(batch, "images") else batch[:2]
            with torch.inference_mode():
                cache = self.record(images.to(device), list(metrics), steps, tokens)
            for key, metric in metrics.items():
                # not cache[key]: an address may have recorded another step of the same site
                pairs = sorted(self._steps.places(key, steps))
                of_steps = [cache[pair] for pair in pairs]
                values = torch.stack(of_steps, dim=1) if _is_site(key) else cache[key]
                _update(metric, values, labels.to(device))
        return {key: metric.compute() for key, metric in metrics.items()}

    # ---- machinery -------------------------------------------------------------------------------

    def _recording(
        self,
        images: Images,
        sites: Key | Sequence[Key],
        steps: Iterable[int] | int | None,
        tokens: Tokens,
        stop: bool = False,
        grad: bool = False,
    ) -> tuple[Cache, ExitStack, list[tuple[str, int]]]:
        self._refuse_compiled()
        if grad and torch.is_grad_enabled():
            refuse_checkpointing(self.model)
        if images.ndim != 4:
            raise UserError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
        grid = self._grid_of(images)
        count = self.num_prefix_tokens + math.prod(grid)
        rows, single = self.rows(tokens, count)
        targets = self._steps.targets(sites, steps)
        self._announce(images.shape[0], targets, len(range(count)[rows]), count)
        cache, hooks = Cache(grid, self.num_steps), ExitStack()
        with ExitStack() as pending:
            for site, step in targets:

                def keep(tensor: Tensor, site: str = site, step: int = step) -> None:
                    if (site, step) in cache:
                        raise UserError(f"{site}[{step}] was reached twice in one forward")
                    cache[site, step] = tensor if grad else _own(tensor.detach(), site)
                    if stop and len(cache) == len(targets):
                        raise Enough

                first = (self._steps.steps[0], "resid_pre")
                block, name = first if step == 0 else self._steps.block(site, step)
                axis = 2 if name in ("scores", "pattern") else 1
                if grad:
                    handles = block.edit({name: [_through(keep, rows, axis, single)]})
                else:
                    handles = [block.record(name, rows, _squeezed(keep, axis, single))]
                for handle in handles:
                    pending.callback(handle.remove)
            if any(place_of(site)[1] in attention.SITES for site, _ in targets):
                pending.enter_context(watching())
            hooks = pending.pop_all()
        return cache, hooks, targets

    def _grid_of(self, images: Images) -> tuple[int, int]:
        """Rows and columns of patches of these images: another size has another grid."""
        size = (images.shape[-2], images.shape[-1])
        if size == self.layout.image_size:
            return self.grid
        if isinstance(self.model, CalledSteps):
            rows, columns = self.layout.image_size
            raise UserError(
                f"images of {size[0]} x {size[1]} pixels: this model was unrolled for {rows} x"
                f" {columns}; give unroll or Probe another image_size"
            )
        rows, columns = self.model.patch_embed.dynamic_feat_size(size)
        return rows, columns

    def _announce(self, batch: int, targets: list[tuple[str, int]], rows: int, count: int) -> None:
        """Refuse a cache beyond `max_bytes`, and warn of a large one. Each number is taken to need
        as many bytes as one of the model's parameters."""
        sizes = {"B": batch, "N": rows, "Q": rows, "K": count, "D": self.layout.width}
        numbers = sum(
            math.prod(
                sizes[axis] if axis in sizes else self._steps.size(axis, step)
                for axis in axes_of(site)
            )
            for site, step in targets
        )
        total = numbers * next(self.model.parameters()).element_size()
        if total > self.max_bytes:
            raise UserError(
                f"this cache would take {total / 2**30:.1f} GiB, more than"
                f" max_bytes={self.max_bytes / 2**30:.1f} GiB: "
                f"choose fewer steps, sites, tokens or images, or stream with collect()"
            )
        if total > ANNOUNCED_BYTES:
            warnings.warn(f"Probe: a cache of {total / 2**30:.1f} GiB is being built", stacklevel=4)

    def _refuse_compiled(self) -> None:
        for name, module in self.model.named_modules():
            if module._compiled_call_impl is not None:
                raise UserError(
                    f"{name or 'the model'} is compiled and its hooks would not run; probe"
                    " before compiling"
                )


def refuse_checkpointing(model: nn.Module) -> None:
    """Refuse a model whose backward pass would compute steps again without hooks.

    Raises
    ------
    UserError
        Where gradient checkpointing is on.
    """
    names = ("grad_checkpointing", "gradient_checkpointing")
    if any(getattr(module, name, False) for module in model.modules() for name in names):
        raise UserError(
            "under gradient checkpointing the backward pass computes steps again, without what a"
            " probe changes there: turn checkpointing off, or gradients"
        )


def _check_seen(cache: Cache, targets: list[tuple[str, int]]) -> None:
    """Refuse a recording that lacks a target."""
    lacking = [f"{site}[{step}]" for site, step in targets if (site, step) not in cache]
    if lacking:
        raise UserError(unseen(choices(lacking)))


def _is_site(key: Key) -> bool:
    return isinstance(key, str) and "[" not in key


def _squeezed(keep: Callable[[Tensor], None], axis: int, single: bool) -> Callable[[Tensor], None]:
    """Keep a tensor without its one-token axis."""
    return lambda tensor: keep(tensor.squeeze(axis) if single else tensor)


def _through(keep: Callable[[Tensor], None], rows: slice, axis: int, single: bool) -> Change:
    """Keep some rows, and let the model go on with what is kept, so that gradients reach it."""

    def change(whole: Tensor) -> Tensor:
        count = whole.shape[axis]
        chosen = range(count)[rows]
        index = torch.arange(count, device=whole.device)[rows]
        if torch.is_grad_enabled() and not whole.requires_grad:  # the weights are frozen
            whole = whole.detach().requires_grad_()
        kept = whole if len(chosen) == count else whole.index_select(axis, index)
        if single:
            kept = kept.squeeze(axis)
        keep(kept)
        back = kept.unsqueeze(axis) if single else kept
        # a new tensor in either case, so that a pattern stands in for the kernel's
        return back.view_as(back) if len(chosen) == count else whole.index_copy(axis, index, back)

    return change


def _own(tensor: Tensor, site: str) -> Tensor:
    """A tensor that nothing else changes in place, and that keeps no larger tensor alive."""
    made_here = place_of(site)[1] in ("scores", "pattern")
    kept = tensor.untyped_storage().nbytes()
    is_whole = kept == tensor.numel() * tensor.element_size()
    return tensor if made_here and is_whole else tensor.clone()


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def _lock_of(view: nn.Module) -> threading.RLock:
    """The one lock of a view: without it hooks would see the forward of another thread."""
    return _locks.setdefault(view, threading.RLock())


def _change(address: Address, fn: Edit, fired: Fired) -> Change:
    """A change that applies `fn` to the whole activation, or to one unit of it, and counts."""

    def change(activation: Tensor) -> Tensor | None:
        if torch.is_grad_enabled() and _saves_elsewhere():
            raise UserError(
                f"{address} is computed again in the backward pass (gradient checkpointing),"
                " without its edit: turn checkpointing off, or gradients"
            )
        fired[str(address)] += 1
        index: Any = ... if address.unit is None else unit_index(address.site, address.unit)
        old = activation[index]
        new = fn(old, address)
        if new is None:
            return None
        if new.shape != old.shape:
            raise UserError(
                f"the edit of {address} returned shape {tuple(new.shape)}, expected"
                f" {tuple(old.shape)}"
            )
        if address.unit is None:
            return new
        whole = activation.clone()
        whole[index] = new
        return whole

    return change


def _saves_elsewhere() -> bool:
    """Whether hooks store the tensors that autograd saves, as under gradient checkpointing."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def _update(metric: Any, values: Tensor, labels: Tensor) -> None:
    """Update a metric; labels are given by name, if it has such an argument: the second argument of
    a MeanMetric is a weight, not a label."""
    parameters = inspect.signature(metric.update).parameters
    # a MetricCollection passes on what fits
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    metric.update(
        values, **{name: labels for name in ("labels", "target") if anything or name in parameters}
    )
