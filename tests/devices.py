"""A device that is not there: tensors that stay on the CPU, marked as on it, and an error where the
two meet.

`Pretended()` is a context in which "cuda" exists. What is moved to it is a copy on the CPU whose
storage is marked; `.device` says cuda:0, and what a GPU would refuse is refused: an operation on
marked and unmarked tensors, numpy of a marked one, a CPU generator for a draw on the device.
Numbers are those of the CPU, to the last bit.

Two modes of torch do it. The function mode sees what Python asks for (`.device`, `.to`, factories
with `device=`). The dispatch mode sees every operation that is run, in backward passes too. Marks
belong to storages: a view has its own. A tensor that C++ makes on its way, told by no call from
Python, is of neither side and meets both.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, THERE, NEITHER = "cpu", "cuda", "neither"
DEVICE = torch.device("cuda", 0)
CROSSING = {
    "copy_",
    "_to_copy",
    "to",
    "_copy_from",
    "set_",
    "is_same_size",
    "_has_compatible_shallow_copy_type",
}
"""Operations that may see both sides."""
STRICT = {
    "cat",
    "stack",
    "equal",
    "index_select",
    "gather",
    "searchsorted",
    "bucketize",
    "scatter",
    "scatter_add",
}
"""Operations to which a number on the CPU, a tensor of no axes, is not a number but a tensor."""
SYNCING = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}


class WrongDevice(RuntimeError):
    """What a GPU would have refused."""


class Pretended:
    """Within it "cuda" is a device, on the CPU.

    Attributes
    ----------
    moved : how many tensors were moved there.
    drawn : operations that drew random numbers there, whose stream is not that of the CPU.
    waits : line of the package -> how often it made the CPU wait for the device.
    """

    def __init__(self) -> None:
        self._states: dict[int, tuple[StorageWeakRef, str]] = {}
        self.within = 0  # calls from Python that are under way
        self.moved, self.drawn, self.waits = 0, Counter[str](), Counter[str]()

    def __enter__(self) -> Pretended:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
            stack.enter_context(mock.patch.object(torch, "autocast", _autocast))
            for name, answer in _OF_CUDA.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
            stack.enter_context(
                mock.patch.object(torch.autograd, "_engine_run_backward", self._backward)
            )
            stack.enter_context(_Operations(self))
            stack.enter_context(_Calls(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _backward(self, *given: Any, **named: Any) -> Any:
        """What a backward pass asks for in Python is seen too: torch calls it from a call that is
        seen already."""
        with _Calls(self):
            return _run_backward(*given, **named)

    # ---- marks -----------------------------------------------------------------------------------

    def state(self, tensor: Tensor) -> str:
        """cpu, cuda or neither; of a tensor never seen, cpu."""
        found = self._states.get(_storage(tensor)._cdata)
        return CPU if found is None else found[1]

    def known(self, tensor: Tensor) -> bool:
        """Whether it is of one side for certain."""
        found = self._states.get(_storage(tensor)._cdata)
        return found is not None and found[1] != NEITHER

    def mark(self, tensor: Tensor, state: str) -> None:
        """Put the tensor's storage on a side."""
        if len(self._states) > 20_000:
            self._states = {
                key: kept for key, kept in self._states.items() if not kept[0].expired()
            }
        storage = _storage(tensor)
        # the weak reference keeps the address from being used again
        self._states[storage._cdata] = (StorageWeakRef(storage), state)

    def placed(self, tensor: Tensor, state: str) -> Tensor:
        """The tensor on that side: itself, or a marked copy."""
        if self.known(tensor) and self.state(tensor) == state:
            return tensor
        if self.state(tensor) != CPU or state != CPU:
            tensor = (
                _Move.apply(tensor, self, self.state(tensor))
                if tensor.requires_grad
                else tensor.clone()
            )
        self.mark(tensor, state)
        self.moved += state == THERE
        return tensor

    def device(self, tensor: Tensor) -> torch.device:
        """What `.device` says."""
        return DEVICE if self.state(tensor) == THERE else torch.device("cpu")


class _Move(torch.autograd.Function):
    """A copy whose gradient goes back to the side it came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, of: Pretended, side: str) -> Tensor:
        ctx.of, ctx.side = of, side
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.clone()
        ctx.of.mark(gradient, ctx.side)
        return gradient, None, None


class _Calls(TorchFunctionMode):
    """What Python asks for."""

    def __init__(self, pretended: Pretended) -> None:
        super().__init__()
        self.of = pretended

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, of = dict(kwargs or {}), self.of
        # an operation that is run, of which `_Operations` knows
        if isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if func in _GETTERS:
            return _GETTERS[func](of, args[0])
        name = getattr(func, "__name__", "")
        own = args[0] if args and isinstance(args[0], Tensor) else None
        numpy = own is not None and name in ("numpy", "__array__") and not kwargs.get("force")
        if numpy and of.state(own) == THERE:
            raise WrongDevice("numpy of a tensor on the device: copy it to the CPU first")
        if own is not None and name in ("to", "cpu", "cuda", "pin_memory"):
            return self._moved(name, own, args[1:], kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(of.state(tensor) == THERE for tensor in given)
        wanted = kwargs.pop("device", None)
        of.within += 1
        try:
            result = func(*args, **kwargs)
        finally:
            of.within -= 1
        if wanted is not None:
            side = _side(wanted)
            result = torch.utils._pytree.tree_map_only(Tensor, lambda t: of.placed(t, side), result)
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if wanted is None and not of.known(tensor):
                of.mark(tensor, THERE if there else CPU)
            generator = kwargs.get("generator")
            if generator is not None and _side(generator.device) != of.state(tensor):
                raise WrongDevice(
                    f"{name}: a generator on {generator.device} draws a tensor on"
                    f" {of.device(tensor)}"
                )
        return result

    def _moved(
        self, name: str, own: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        of, result = self.of, own
        if name == "pin_memory":
            if of.state(own) == THERE:
                raise WrongDevice("only tensors on the CPU can be pinned")
            return own
        if name != "to":
            side = CPU if name == "cpu" else THERE
        elif (like := kwargs.get("other", rest[0] if rest else None)) is not None and isinstance(
            like, Tensor
        ):
            side, result = of.state(like), own.to(dtype=like.dtype)
        else:
            device, dtype, _, layout = torch._C._nn._parse_to(*rest, **kwargs)
            side = of.state(own) if device is None else _side(device)
            result = own.to(dtype=dtype or own.dtype, memory_format=layout or torch.preserve_format)
        if not of.known(result):
            of.mark(result, of.state(own))
        if of.state(own) == THERE and side == CPU:
            of.waits[_line()] += 1
        return of.placed(result, side)


class _Operations(TorchDispatchMode):
    """What is run."""

    def __init__(self, pretended: Pretended) -> None:
        super().__init__()
        self.of = pretended

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, of = kwargs or {}, self.of
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if of.state(tensor) == THERE]
        if there and name not in CROSSING:
            self._check(name, args, given)
        if there and name in SYNCING:
            of.waits[_line()] += 1
        idle = "attention" in name or (name == "dropout" and not (args[1] and args[2]))
        if there and torch.Tag.nondeterministic_seeded in func.tags and not idle:
            of.drawn[f"{name} {_line()}"] += 1
        result = func(*args, **kwargs)
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if not of.known(tensor):
                side = CPU if not of.within or (given and all(map(of.known, given))) else NEITHER
                of.mark(tensor, THERE if there else side)
        return result

    def _check(self, name: str, args: tuple[Any, ...], given: Iterable[Tensor]) -> None:
        of = self.of
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            if of.state(args[0]) == THERE:  # then indices may be on the CPU
                given = [
                    tensor for tensor in given if not any(tensor is index for index in indices)
                ]
        left = [tensor for tensor in given if of.state(tensor) == CPU]
        changed = args[0] if name.endswith("_") and isinstance(args[0], Tensor) else None
        for tensor in left:
            if tensor.ndim or name in STRICT or tensor is changed:
                raise WrongDevice(
                    f"{name}: tensors on the device and on the CPU,"
                    f" {[tuple(t.shape) for t in left]}"
                )


class Rounded(TorchDispatchMode):
    """Another machine's rounding, on the CPU: what two correct computations of the same table may
    differ by.

    Results of `ROUNDED` operations in float32 are off by a millionth, the vectors of a
    decomposition have other signs, and of equal values another one comes first. A table that
    changes under it depends on one of these.
    """

    ROUNDED: ClassVar[set[str]] = {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "linear",
        "matmul",
        "conv2d",
        "softmax",
        "_softmax",
        "gelu",
        "_scaled_dot_product_flash_attention_for_cpu",
        "scaled_dot_product_attention",
        "log_softmax",
        "_log_softmax",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "exp",
        "mean",
    }

    def __init__(self, by: float = 1e-6, seed: int = 0) -> None:
        super().__init__()
        self.by, self.generator = by, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name in ("sort", "topk", "argsort", "argmax", "argmin") and not kwargs.get("stable"):
            return self._last_of_equals(func, name, args, kwargs)
        result = func(*args, **kwargs)
        if name in self.ROUNDED:
            parts = list(result) if isinstance(result, tuple) else [result]
            if parts[0].dtype == torch.float32:
                parts[0] = parts[0] * (
                    1 + self.by * torch.randn(parts[0].shape, generator=self.generator)
                )
            return tuple(parts) if isinstance(result, tuple) else parts[0]
        if name in ("_linalg_svd", "linalg_svd", "linalg_qr", "_linalg_eigh", "linalg_eigh"):
            return self._flipped(name, result)
        return result

    def _last_of_equals(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = {
            key.name: value for key, value in zip(func._schema.arguments, args, strict=False)
        } | kwargs
        tensor, dim = (
            given.pop("self"),
            given.get("dim", None if name.startswith("arg") and name != "argsort" else -1),
        )
        if tensor.ndim == 0 or given.get("stable"):
            return func(*args, **kwargs)
        result = func(tensor.flatten().flip(0) if dim is None else tensor.flip(dim), **given)
        last = (tensor.numel() if dim is None else tensor.shape[dim]) - 1
        return (
            type(result)((result[0], last - result[1]))
            if isinstance(result, tuple)
            else last - result
        )

    def _flipped(self, name: str, result: Any) -> Any:
        vectors = result[1] if "eigh" in name else result[0]
        if vectors.numel() == 0:
            return result
        shape = (*vectors.shape[:-2], 1, vectors.shape[-1])
        signs = torch.randint(0, 2, shape, generator=self.generator).to(vectors.dtype) * 2 - 1
        if "eigh" in name:
            return type(result)((result[0], result[1] * signs, *result[2:]))
        across = signs.transpose(-2, -1)[..., : result[-1].shape[-2], :]
        return type(result)((vectors * signs, *result[1:-1], result[-1] * across))


class _Generator(torch.Generator):
    """A generator that knows for which device it draws."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.wanted = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.wanted


def _side(device: Any) -> str:
    return (
        CPU if device is None else THERE if isinstance(device, int) else torch.device(device).type
    )


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction():
        while _functorch.is_functorch_wrapped_tensor(tensor):
            tensor = _functorch.get_unwrapped(tensor)
        return tensor.untyped_storage()


def _line() -> str:
    """The line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        if "/bvit_interp/" in frame.f_code.co_filename:
            return f"{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


_OF_CUDA = {
    "synchronize": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "max_memory_allocated": 2**20,
    "memory_allocated": 2**20,
    "get_device_name": "none",
    "is_initialized": False,
    "get_device_properties": SimpleNamespace(total_memory=2**36),
    "Stream": mock.Mock(),
    "stream": nullcontext(),
}
_real_autocast = torch.autocast
_run_backward = torch.autograd._engine_run_backward


def _autocast(device: str, *rest: Any, **options: Any) -> torch.autocast:
    return _real_autocast("cpu", *rest, **options)


_GETTERS: dict[Any, Callable[[Pretended, Tensor], Any]] = {
    Tensor.device.__get__: lambda of, tensor: of.device(tensor),
    Tensor.is_cuda.__get__: lambda of, tensor: of.state(tensor) == THERE,
    Tensor.is_cpu.__get__: lambda of, tensor: of.state(tensor) != THERE,
    Tensor.get_device: lambda of, tensor: 0 if of.state(tensor) == THERE else -1,
}
