"""Probe: record and edit any site of any step.

Hooks on the tied unroll, and a look at the attention kernel as it is called. The model's output is
bit-equal with and without recording and fused attention stays on; hooks are removed when a call
ends, also by an exception. (torch's own encoder layer, where it would run as one operation, runs
part by part in every call of a probe.)
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
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
from bvit_interp.models.dry_run import dry, example_images
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import CalledSteps
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import is_unrolled, unroll
from bvit_interp.probes.cache import Cache, unit_index
from bvit_interp.probes.sites import Step
from bvit_interp.results import rank_and_world
from bvit_interp.vocabulary import (
    SITES,
    TOKEN_WORDS,
    Address,
    Tokens,
    axes_of,
    check_site,
    check_step,
    check_steps,
    place_of,
    unit_axis,
)

if TYPE_CHECKING:  # it takes as long to import as torch
    from torchmetrics import Metric, MetricCollection

Key = str | tuple[str, int] | Address
"""A site name, or an address in any of its forms."""
Edit = Callable[[Tensor, Address], Tensor | None]
"""fn(activation, address) -> new activation of the same shape, or None to leave it."""
Fired = dict[str, int]
ANNOUNCED_BYTES = 2**30


class _Recorded(Exception):
    """Everything asked for is there: the forward need not go on."""


Images = Float[Tensor, "batch channels height width"]


class Probe:
    """Watch and change a model step by step.

    Parameters
    ----------
    model : any model that `unroll` takes, or an unroll (e.g. ``unroll(model, steps=24)``).
    max_bytes : a cache that would be larger is refused; above 1 GiB its size is announced by a
        warning.
    **options : as of `unroll`, e.g. ``loop="encoder.block"``.

    Attributes
    ----------
    model : the tied unroll that is watched; step t is ``model.blocks[t - 1]``.
    layout : image size, patch grid, kinds of prefix tokens, width and classes.
    num_steps : steps T.
    num_heads, num_neurons : heads, and neurons of the FFN, of a step. A block without them raises
        a UserError that says why.
    """

    def __init__(self, model: nn.Module, max_bytes: int = 8 * 2**30, **options: Any) -> None:
        if isinstance(model, torch._dynamo.OptimizedModule):
            raise UserError(
                "hooks do not run in a compiled model: probe the model that went into torch.compile"
            )
        view = cast(Any, model)
        self.model = view if is_unrolled(view) and not options else unroll(model, **options)
        self.layout = layout_of(self.model)
        self._steps = [Step(block) for block in self.model.blocks]
        self.max_bytes = max_bytes
        self.num_steps = len(self._steps)
        self.num_prefix_tokens = self.layout.num_prefix_tokens
        self.grid = self.layout.grid
        # before anybody's hooks are on the view
        self._shapes = {site: self._dry_shape(site) for site in ("z", "k", "mlp_post")}
        if isinstance(self._shapes["z"], str):  # the pattern alone may be seen
            self._shapes["pattern"] = self._dry_shape("pattern")
        self._edits: list[tuple[Address, Change]] = []
        self._edit_hooks = ExitStack()

    @property
    def num_heads(self) -> int:
        """Heads of a step."""
        return self._size("z", 2) if "pattern" not in self._shapes else self._size("pattern", 1)

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self._size("z", 3)

    @property
    def num_neurons(self) -> int:
        """Neurons of a step: what the FFN's last projection reads."""
        return self._size("mlp_post", 2)

    def _dry_shape(self, site: str) -> tuple[int, ...] | str:
        """Shape of the site at step 1 for an image of noise, or why there is none."""
        shapes: list[tuple[int, ...]] = []

        def keep(activation: Tensor) -> None:
            shapes.append(tuple(activation.shape))
            raise _Recorded

        image = example_images(self.model, self.layout.image_size)[:1]
        try:
            handle = self._steps[0].record(site, slice(None), keep)
            try:
                with dry(self.model), watching(), contextlib.suppress(_Recorded):
                    self.model(image)
            finally:
                handle.remove()
        except UserError as error:
            return str(error)
        return shapes[0] if shapes else _unseen(site)

    def _size(self, site: str, axis: int) -> int:
        shape = self._shapes[site]
        if isinstance(shape, str):
            raise UserError(shape)
        return shape[axis]

    # ---- running ---------------------------------------------------------------------------------

    def __call__(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Logits ``(B, classes)`` of images ``(B, C, H, W)``, under the edits in force."""
        self._refuse_compiled()
        with unfused():
            return self.model(images)

    def run(
        self,
        images: Images,
        sites: Key | Sequence[Key],
        steps: Iterable[int] | int | None = None,
        tokens: Tokens = "all",
    ) -> tuple[Tensor, Cache]:
        """Logits and recorded activations of one batch.

        Parameters
        ----------
        images : ``(B, C, H, W)``, normalised.
        sites : site names, or addresses such as ``"mlp_post[5]"`` and ``("mlp_post", 5)``, which
            bring their step. Sites of an inner update are ``"inner2.mlp_post"``.
        steps : which steps of the named sites, from 1 (0 is allowed for resid_post alone: the
            embedded tokens); by default every step that has the site.
        tokens : "cls", "dist", "reg", "patches", "all", an int or a slice; for scores and pattern,
            query tokens.

        Returns
        -------
        The model's logits ``(B, classes)`` and the `Cache`.
        """
        cache, hooks, targets = self._recording(images, sites, steps, tokens)
        with hooks, unfused():
            logits = self.model(images)
        self._check_seen(cache, targets)
        return logits, cache

    def record(
        self,
        images: Images,
        sites: Key | Sequence[Key],
        steps: Iterable[int] | int | None = None,
        tokens: Tokens = "all",
    ) -> Cache:
        """As `run`, without logits: the forward ends as soon as the last activation is there."""
        cache, hooks, targets = self._recording(images, sites, steps, tokens, stop=True)
        with hooks, unfused(), contextlib.suppress(_Recorded):
            self.model(images)
        self._check_seen(cache, targets)
        return cache

    @contextmanager
    def edit(self, edits: Mapping[Key, Edit]) -> Iterator[Fired]:
        """Change activations while the context lasts; contexts nest.

        Parameters
        ----------
        edits : ``("z", 5)``, ``"z[5]"`` or ``"z[5]:3"`` -> fn(activation, address). With a unit, fn
            sees and returns that head ``(B, N, E)`` or neuron ``(B, N)`` alone. The whole token
            axis is given. Within a step, edits apply in the order in which the block computes its
            sites.

        Yields
        ------
        How often each edit fired, by address. One that never fired raises when the context ends.
        """
        self._refuse_compiled()
        fired: Fired = {}
        added = []
        for key, fn in edits.items():
            address = self.address(key)
            if str(address) in fired:
                raise UserError(f"two edits of {address}: make them one function")
            fired[str(address)] = 0
            added.append((address, _change(address, fn, fired)))
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
        """Make `edits` the ones in force: all of a step are set together, so that they chain."""
        self._edit_hooks.close()
        self._edits = edits
        by_block: dict[Step, dict[str, list[Change]]] = {}
        for address, change in edits:
            block, name = self._block(address.site, address.step)
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
        loader : batches ``(images, labels)``, or of `bvit_interp.data.loader.Loader`; each process
            its own part.
        metrics : site or address -> metric. ``update`` gets the activations ``(B, T, ...)`` (an
            address: ``(B, ...)``), and the labels ``(B,)`` if it has an argument `labels` or
            `target`.

        Returns
        -------
        The same keys -> ``compute()``, on every process.
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
                places_of = sorted(self._places(key, steps))
                values = (
                    torch.stack([cache[place] for place in places_of], dim=1)
                    if _is_site(key)
                    else cache[key]
                )
                _update(metric, values, labels.to(device))
        return {key: metric.compute() for key, metric in metrics.items()}

    # ---- words -> places -------------------------------------------------------------------------

    def address(self, key: Key) -> Address:
        """The address with its step counted from 1, checked against this model."""
        address = Address(*key) if isinstance(key, tuple) else key
        address = Address.parse(address) if isinstance(address, str) else address
        step = check_step(address.step, self.num_steps)
        self._block(address.site, step)
        if address.unit is not None:
            word, units = self._units(address.site)
            if not 0 <= address.unit < units:
                raise UserError(f"{address}: no {word} {address.unit}; {word}s: 0..{units - 1}")
        return Address(address.site, step, address.unit)

    def _units(self, site: str) -> tuple[str, int]:
        """What a unit of the site is called, and how many there are."""
        axis = unit_axis(site)
        keys = self._shapes["k"]
        if place_of(site)[1] in ("k", "v") and not isinstance(keys, str):
            return "head", keys[2]  # fewer than of queries, if these come in groups
        if axis == "H":
            return "head", self.num_heads
        return ("neuron", self.num_neurons) if axis == "F" else ("channel", self.layout.width)

    def rows(self, tokens: Tokens, count: int) -> tuple[slice, bool]:
        """The slice of `count` tokens that `tokens` means, and whether it is one token whose axis
        is dropped."""
        if isinstance(tokens, str):
            if tokens not in TOKEN_WORDS:
                raise UserError(
                    f"unknown tokens {tokens!r}; tokens: {', '.join(TOKEN_WORDS)}, an int or a"
                    " slice"
                )
            prefix = self.layout.prefix
            if tokens == "cls" and "cls" not in prefix:
                raise UserError(
                    "this model has no CLS token; its tokens: patches, all, an int or a slice"
                )
            words = {"patches": slice(len(prefix), count), "all": slice(0, count)}
            first = prefix.index(tokens) if tokens in prefix else 0
            kind = slice(first, first + prefix.count(tokens))
            chosen, single = words.get(tokens, kind), tokens in ("cls", "dist")
        elif isinstance(tokens, slice):
            chosen, single = tokens, False
        else:
            index = range(count)[tokens] if -count <= tokens < count else count
            chosen, single = slice(index, index + 1), True
        if not range(count)[chosen]:
            raise UserError(
                f"tokens {tokens!r} selects none of the {count} tokens"
                f" ({self.num_prefix_tokens} of prefix)"
            )
        return chosen, single

    def kinds(self) -> dict[str, slice]:
        """The kinds of token the model has, and where each is: cls, reg, dist, patches."""
        having = [kind for kind in ("cls", "reg", "dist") if kind in self.layout.prefix]
        return {kind: self.rows(kind, self.layout.num_tokens)[0] for kind in (*having, "patches")}

    # ---- machinery -------------------------------------------------------------------------------

    def _recording(
        self,
        images: Images,
        sites: Key | Sequence[Key],
        steps: Iterable[int] | int | None,
        tokens: Tokens,
        stop: bool = False,
    ) -> tuple[Cache, ExitStack, list[tuple[str, int]]]:
        self._refuse_compiled()
        if images.ndim != 4:
            raise UserError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
        grid = self._grid_of(images)
        count = self.num_prefix_tokens + math.prod(grid)
        rows, single = self.rows(tokens, count)
        targets = self._targets(sites, steps)
        self._announce(images.shape[0], targets, len(range(count)[rows]), count)
        cache, hooks = Cache(grid, self.num_steps), ExitStack()
        with ExitStack() as pending:
            for site, step in targets:

                def keep(tensor: Tensor, site: str = site, step: int = step) -> None:
                    cache[site, step] = _own(tensor, site, single)
                    if stop and len(cache) == len(targets):
                        raise _Recorded

                block, name = (
                    (self._steps[0], "resid_pre") if step == 0 else self._block(site, step)
                )
                pending.callback(block.record(name, rows, keep).remove)
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

    def _check_seen(self, cache: Cache, targets: list[tuple[str, int]]) -> None:
        """Refuse a recording that lacks something."""
        unseen = [f"{site}[{step}]" for site, step in targets if (site, step) not in cache]
        if unseen:
            raise UserError(_unseen(choices(unseen)))

    def _targets(
        self, sites: Key | Sequence[Key], steps: Iterable[int] | int | None
    ) -> list[tuple[str, int]]:
        one = isinstance(sites, (str, Address)) or (
            isinstance(sites, tuple) and [*map(type, sites)] == [str, int]
        )
        listed: list[Key] = [cast(Key, sites)] if one else list(cast(Sequence[Key], sites))
        if not listed:
            raise UserError(f"no site chosen; sites: {', '.join(SITES)}")
        steps = list(steps) if isinstance(steps, Iterable) else steps
        return list(dict.fromkeys(place for key in listed for place in self._places(key, steps)))

    def _places(self, key: Key, steps: Sequence[int] | int | None) -> list[tuple[str, int]]:
        """The (site, step) pairs a site name at `steps`, or an address, means."""
        if not _is_site(key):
            address = self.address(key)
            return [(address.site, address.step)]
        site = check_site(str(key))
        chosen = check_steps(steps, self.num_steps, zero=site == "resid_post")
        update, _ = place_of(site)
        if steps is None and (
            having := [step for step in chosen if update <= len(self._steps[step - 1].inner)]
        ):
            chosen = having
        for step in chosen:
            self._block(site, step)
        return [(site, step) for step in chosen]

    def _block(self, site: str, step: int) -> tuple[Step, str]:
        """The block that has the site in a step (counted from 1), and the site's name there."""
        update, name = place_of(site)
        own = self._steps[step - 1]
        if update <= len(own.inner):
            block = own if update == 0 else own.inner[update - 1]
            block.require(name)
            return block, name
        having = [t for t, each in enumerate(self._steps, start=1) if update <= len(each.inner)]
        if having:
            there = choices(having, 24)
            raise UserError(
                f"{site}: step {step} has no inner update {update}; steps that have it: {there}"
            )
        most = max(len(each.inner) for each in self._steps)
        there = f"has inner1..inner{most} alone" if most else f"has none; sites: {', '.join(SITES)}"
        raise UserError(f"{site}: this model {there}")

    def _announce(self, batch: int, targets: list[tuple[str, int]], rows: int, count: int) -> None:
        """Refuse a cache beyond `max_bytes`, warn of a large one; 4 or the parameters' bytes a
        number."""
        axes = {axis for site, _ in targets for axis in axes_of(site)}
        sizes = {"B": batch, "N": rows, "Q": rows, "K": count, "D": self.layout.width}
        if "H" in axes:
            sizes["H"] = self.num_heads
        if "E" in axes:
            sizes["E"] = self.head_width
        if "F" in axes:
            sizes["F"] = self.num_neurons
        numbers = sum(math.prod(sizes[axis] for axis in axes_of(site)) for site, _ in targets)
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


def _unseen(sites: str) -> str:
    return (
        f"the forward ended without {sites}: the block does not call what the site stands for, or a"
        " module was replaced"
    )


def _is_site(key: Key) -> bool:
    return isinstance(key, str) and "[" not in key


def _own(tensor: Tensor, site: str, single: bool) -> Tensor:
    """The recorded tensor without its one-token axis, and never a view that keeps a larger one
    alive."""
    if single:
        tensor = tensor.squeeze(2 if place_of(site)[1] in ("scores", "pattern") else 1)
    kept = tensor.untyped_storage().nbytes()
    return tensor.clone() if kept > tensor.numel() * tensor.element_size() else tensor


def _change(address: Address, fn: Edit, fired: Fired) -> Change:
    """Apply `fn` to the whole activation, or to one unit of it, and count."""

    def change(activation: Tensor) -> Tensor | None:
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


def _update(metric: Any, values: Tensor, labels: Tensor) -> None:
    """Labels go by name, to those that ask: a MeanMetric's second argument is a weight, not a
    label."""
    parameters = inspect.signature(metric.update).parameters
    # a MetricCollection passes on what fits
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    metric.update(
        values, **{name: labels for name in ("labels", "target") if anything or name in parameters}
    )
