"""Finds the weights of a model in a file of any origin.

Training code wraps a state dict in mappings (`{"state_dict": ...}`), puts prefixes before its names
(`module.` of DDP and `AveragedModel`, `_orig_mod.` of `torch.compile`, `model.` of a Lightning
module), and stores averaged weights beside it. Every state dict in the file is tried under its most
frequent prefix, and is a candidate if its names and shapes are those of the model. Among the
candidates, the names of mappings and prefixes tell averaged weights from raw ones.
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bvit_interp.errors import CheckpointError, choices
from bvit_interp.results import rank_and_world

_log = logging.getLogger(__name__)
Filter = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""Converts a state dict of an older layout, or of another image size, to that of the model."""
# what torch's restricted unpickler says about a function or class (149 is STACK_GLOBAL)
_SIGNS_OF_CODE = ("unsupported global", "unsupported operand 149")
# parts that wrappers of single modules put into the middle of names
_INNER = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_COUNTER = "n_averaged"  # of `torch.optim.swa_utils.AveragedModel`
_AVERAGED = {"ema", "swa", "avg", "averaged", "average"}
# where training code puts the model itself, if other weights of its shapes are in the file
_USUAL = ("", "state_dict", "model", "model_state_dict", "module", "net", "network")
_DAMAGED = "truncated or no checkpoint"
_DEPTH = 3
_POSITIONS = ("pos_embed", "encoder.pos_embedding")  # of timm and torchvision


@dataclass(frozen=True)
class Found:
    """Weights of the model in a file.

    Attributes
    ----------
    where : keys of the mappings around the state dict.
    prefix : what was before the names.
    weights : the weights by the model's names.
    others : names in the same state dict that do not have the prefix.
    inner : what wrappers of modules had put into the names; it was removed.
    converted : whether the weights had another layout or size in the file.
    """

    where: tuple[str, ...]
    prefix: str
    weights: Mapping[str, Tensor]
    others: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    converted: bool = False

    @property
    def averaged(self) -> bool:
        """Whether these are weights averaged over training."""
        words = re.split(r"[._]", ".".join([*self.where, self.prefix]).lower())
        counters = (name for name in self.others if name.rpartition(".")[2] == _COUNTER)
        return bool(_AVERAGED.intersection(words)) or any(
            self.prefix.startswith(name.removesuffix(_COUNTER)) for name in counters
        )

    @property
    def usual(self) -> bool:
        """Whether training code usually stores the model itself under these names."""
        return all(part in _USUAL for part in (*self.where, *self.prefix.split(".")))


def fill(
    model: nn.Module,
    content: Any,
    path: Path,
    text: str,
    averaged: bool = False,
    convert: Filter | None = None,
    resample: bool = False,
) -> None:
    """Put the weights of a file into a model, and log what was stripped or left out.

    Parameters
    ----------
    content : what `read` returns for the file.
    path, text : the file and the spec, for messages.
    averaged : take the averaged weights of a file that holds both.
    convert : tried if the file's names or shapes are not the model's.
    resample : whether `convert` may change the number of positions.

    Raises
    ------
    CheckpointError
        For weights that do not fit; the message lists what does not.
    """
    own = model.state_dict()
    dicts = [*_state_dicts(content)]
    if not dicts:
        raise CheckpointError(f"{path}: no state dict inside (a mapping of names to tensors)")
    fitting = [found for where, each in dicts for found in _fits(own, where, each)]
    if not fitting and convert is not None:
        fitting = [
            found
            for where, each in dicts
            if (found := _converted(own, where, each, convert, resample)) is not None
        ]
    if not fitting:
        raise CheckpointError(f"{path} does not fit the model. {_closest(own, dicts)}")
    taken = _choose(fitting, path, averaged)
    for name, tensor in taken.weights.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is a meta, sparse or quantized tensor")
    model.load_state_dict(dict(taken.weights))
    _report(taken, fitting, path, text)


def read(path: Path) -> Any:
    """What a `.safetensors` file or a pickle of torch holds.

    Raises
    ------
    CheckpointError
        For a file that is missing or damaged, and for a pickle with code, which is never run.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file ({error})"
            ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises UnpicklingError, RuntimeError, EOFError, ..., depending on the damage
    except Exception as error:
        code = any(sign in str(error).lower() for sign in _SIGNS_OF_CODE)
        kind = f"it holds code, which is never run{_code_in(path)}" if code else _DAMAGED
        raise CheckpointError(f"{path}: not opened, {kind}") from error


def classes_in(content: Any, classifier: str) -> int | None:
    """The number of classes in a file, by the bias of its classifier; None if that is not clear."""
    name = f"{classifier}.bias"
    found = {
        len(tensor)
        for _, weights in _state_dicts(content)
        for key, tensor in weights.items()
        if f".{key}".endswith(f".{name}") and tensor.ndim == 1
    }
    return found.pop() if len(found) == 1 else None


def _code_in(path: Path) -> str:
    """The functions and classes that a pickle names, if torch can list them."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only torch's own zip files can be listed
        return ""
    return f" ({choices(sorted(named), 4)}): save its state dict alone" if named else ""


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What in `weights` does not fit a model with the state dict `own`; "" if everything fits."""
    kinds = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
            for key in sorted(own.keys() & weights.keys())
            if own[key].shape != weights[key].shape
        ],
    }
    return "; ".join(f"{kind}: {choices(keys)}" for kind, keys in kinds.items() if keys)


# ---- what is in a file ---------------------------------------------------------------------------


def _state_dicts(
    content: Any, where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The mappings of names to tensors in a file, with the keys that lead to them."""
    if not isinstance(content, Mapping) or not content or len(where) > _DEPTH:
        return
    if not all(isinstance(key, str) for key in content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    extra = [key for key in content if key.endswith("_extra_state")]
    if tensors and len(tensors) + len(extra) >= len(content):
        yield where, tensors
        return
    for key, value in content.items():
        yield from _state_dicts(value, (*where, key))


def _fits(
    own: Mapping[str, Tensor], where: tuple[str, ...], weights: Mapping[str, Tensor]
) -> Iterator[Found]:
    """The parts of a state dict that have the model's names, behind a prefix, and its shapes."""
    named, inner = _without_inner(own, weights)
    for prefix in _prefixes(own, named):
        part = _under(named, prefix)
        if not misfits(own, part):
            others = tuple(name for name in named if not name.startswith(prefix))
            yield Found(where, prefix, part, others, inner)


def _converted(
    own: Mapping[str, Tensor],
    where: tuple[str, ...],
    weights: Mapping[str, Tensor],
    convert: Filter,
    resample: bool,
) -> Found | None:
    """A state dict as the library's own filter changes it, if it then fits."""
    named, inner = _without_inner(own, weights)
    prefix = _prefixes(own, named)[0]
    part = _under(named, prefix)
    try:
        changed = dict(convert(dict(part)))
    except Exception:  # filters expect the layouts they know
        return None
    if misfits(own, changed):
        return None
    same = all(part[name].numel() == own[name].numel() for name in part.keys() & own.keys())
    if not same and not resample:
        return None
    others = tuple(name for name in named if not name.startswith(prefix))
    return Found(where, prefix, changed, others, inner, converted=True)


def _without_inner(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The weights without what wrappers of modules put into names, and what that was.

    Nothing is removed where the model itself has such names.
    """
    if any(_INNER.search(name) for name in own):
        return weights, ()
    removed = {match[2]: None for name in weights for match in _INNER.finditer(name)}
    named = {_INNER.sub("", name).lstrip("."): each for name, each in weights.items()}
    return named, tuple(removed)


def _prefixes(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What is most often before the model's names; several in a tie, "" if there is nothing."""
    counts = Counter(
        name.removesuffix(suffix)
        for name in weights
        for suffix in (".".join(name.split(".")[i:]) for i in range(name.count(".") + 1))
        if suffix in own
    )
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most] or [""]


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _choose(fitting: list[Found], path: Path, averaged: bool) -> Found:
    """The weights that are asked for; the averaged ones also if there are no others."""
    kinds = [found for found in fitting if found.averaged == averaged]
    if not kinds and averaged:
        raise CheckpointError(f"{path} has no averaged weights: leave out @ema for the raw ones")
    kinds = kinds or fitting
    best = [found for found in kinds if found.usual] or kinds
    if len(best) > 1:
        places = choices(".".join([*found.where, found.prefix]).strip(".") for found in best)
        raise CheckpointError(
            f"{path} holds several sets of weights that fit the model ({places}): save the one"
            " that is meant"
        )
    return best[0]


def _closest(
    own: Mapping[str, Tensor], dicts: list[tuple[tuple[str, ...], dict[str, Tensor]]]
) -> str:
    """What does not fit in the state dict that shares the most names with the model."""
    candidates = []
    for _, weights in dicts:
        named, _ = _without_inner(own, weights)
        candidates.append(_under(named, _prefixes(own, named)[0]))
    best = max(candidates, key=lambda each: len(each.keys() & own.keys()))
    found = misfits(own, best)
    others = {name: each for name, each in own.items() if name not in _POSITIONS}
    positions_alone = found and not misfits(others, {k: best[k] for k in best if k in others})
    if positions_alone and own.keys() == best.keys():
        return f"{found}; @size=N resamples position embeddings to N x N pixels"
    return found


def _report(taken: Found, fitting: list[Found], path: Path, text: str) -> None:
    """Log what was stripped from the names and what was left out, and name averaged weights."""
    parts = []
    stripped = [each for each in (taken.prefix, *(f"{word}." for word in taken.inner)) if each]
    if stripped:
        parts.append(f"stripped {' and '.join(stripped)} from the names of its weights")
    if taken.converted:
        parts.append("converted them from another layout or size")
    left = [name for name in taken.others if name.rpartition(".")[2] != _COUNTER]
    known = tuple(found.prefix for found in fitting if found.where == taken.where and found.prefix)
    left = [name for name in left if not name.startswith(known)]
    beside = [found for found in fitting if found.averaged and found is not taken]
    if taken.averaged:
        parts.append("took weights that are averaged over training")
    elif beside:
        source = re.sub(r"(@(loop|size)=[^@]*)*$", "", text)
        parts.append(f"took the raw weights; {source}@ema takes the averaged ones")
    if left:
        parts.append(f"left out {len(left)} other tensors ({choices(left, 4)})")
    if parts and rank_and_world()[0] == 0:
        _log.warning("%s: %s", path, "; ".join(parts))
