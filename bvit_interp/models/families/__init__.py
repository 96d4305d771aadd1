"""Where the sites of a block are, for each known block.

A block map names the modules of a block whose input or output is a site. The sites of attention
need no names: they are seen at the kernel (`bvit_interp.models.attention`). Each family of models
has a module here; `register_block` adds the user's own block. Any other block still has
`resid_pre`, `resid_post` and the sites of its attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.models.attention import Combine

OF_MODULES = ("attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out")
"""The sites that are inputs or outputs of modules inside a block."""
_FAMILIES = {
    "bvit": "bvit_interp",
    "timm_vit": "timm",
    "timm_eva": "timm",
    "timm_beit": "timm",
    "torch_encoder": "torch",
    "torchvision_vit": "torchvision",
    "huggingface": "transformers",
}
"""Module of this package -> the library whose blocks it knows."""


@dataclass(frozen=True)
class BlockMap:
    """Where the sites of a block are.

    Parameters
    ----------
    sites : site -> the dotted name of a module of the block with ``.in`` or ``.out``: the site is
        that module's first input, or its output (the first one, if it returns a tuple). If
        ``resid_mid`` is an input, the residual must carry the same state past the FFN. A site may
        be left out.
    missing : site -> why the block does not have it, as the user is told.
    combine : how several attentions of a block become one, see `Attention`.
    tokens : name of the argument of the block's forward that is the token state, if several
        arguments have its shape.

    Raises
    ------
    UserError
        For an unknown site, or a place that ends in neither ``.in`` nor ``.out``.
    """

    sites: Mapping[str, str]
    missing: Mapping[str, str] = field(default_factory=dict)
    combine: Combine | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        for site, place in self.sites.items():
            if site not in OF_MODULES:
                raise UserError(f"a block map has no {site!r}; its sites: {', '.join(OF_MODULES)}")
            if place.rpartition(".")[2] not in ("in", "out"):
                raise UserError(f"{site}: {place!r} does not end in .in or .out")


Mapper = Callable[[nn.Module], BlockMap]
"""Returns the map of one block: blocks of one class may differ."""
_mappers: dict[type[nn.Module] | str, Mapper] = {}


def register_block(
    block: type[nn.Module] | str,
    sites: Mapping[str, str] | Mapper,
    *,
    tokens: str | None = None,
) -> None:
    """Register where the sites of a class of blocks are.

    Parameters
    ----------
    block : the class, or its full name ``"package.module.Class"``, which imports nothing. A
        subclass has the same map as long as it does not override `forward`.
    sites : as in `BlockMap`, or a function of a block that returns its `BlockMap`.
    tokens : as in `BlockMap`; if `sites` is a function, its `BlockMap` has the name.

    Raises
    ------
    UserError
        As `BlockMap`, and for `tokens` together with a function.

    Examples
    --------
    >>> register_block(MyBlock, {
    ...     "attn_out": "attn.out", "resid_mid": "norm2.in",
    ...     "mlp_pre": "mlp.0.out", "mlp_post": "mlp.2.in", "mlp_out": "mlp.out",
    ... })
    """
    if callable(sites):
        if tokens is not None:
            raise UserError("tokens: the function of a block has to give it, in its BlockMap")
        _mappers[block] = sites
    else:
        known = BlockMap(dict(sites), tokens=tokens)
        _mappers[block] = lambda _: known


def map_of(block: nn.Module) -> BlockMap:
    """The map of a block; it has no sites if the class is not registered or overrides `forward`."""
    _load_families(type(block))
    name = type(block).__name__
    for base in type(block).__mro__:
        mapper = _mappers.get(base) or _mappers.get(f"{base.__module__}.{base.__qualname__}")
        if mapper is None:
            continue
        if type(block).forward is base.forward and "forward" not in vars(block):
            return _completed(mapper(block), block)
        reason = f"{name} computes its forward otherwise than {base.__name__}"
        break
    else:
        reason = f"no block map is registered for {name}: see register_block"
    return BlockMap({}, dict.fromkeys(OF_MODULES, reason))


def _completed(given: BlockMap, block: nn.Module) -> BlockMap:
    """The map without the modules that the block lacks, and with a reason for every missing
    site."""
    name = type(block).__name__
    there = {path for path, _ in block.named_modules()}
    sites, missing = {}, dict(given.missing)
    for site in OF_MODULES:
        module = given.sites.get(site, "").rpartition(".")[0]
        if site in given.sites and module in there:
            sites[site] = given.sites[site]
        elif site in given.sites:
            missing[site] = f"this {name} has no {module!r}, where its block map looks for it"
        else:
            missing.setdefault(site, f"the block map of {name} does not name it")
    return BlockMap(sites, missing, given.combine, given.tokens)


def _load_families(block: type[nn.Module]) -> None:
    """Import the modules of this package for the library that the block comes from."""
    roots = {base.__module__.partition(".")[0] for base in block.__mro__}
    for family, library in _FAMILIES.items():
        if library in roots:
            importlib.import_module(f"{__name__}.{family}")
