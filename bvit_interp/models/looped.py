"""Any block in any loop: the tied unroll by call.

A user's module that calls one block T times keeps its own forward. In the view each block of the
loop is replaced by a container of clones around the same parameters, and call t goes to clone t,
which is the module of step t. What the forward does around the calls (an input that is injected at
every step, step embeddings, masks, a prelude before the loop and a coda behind it) stays its own.
A stack of blocks is the same, with one call per block.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bvit_interp.errors import UserError, choices
from bvit_interp.models.dry_run import Ran, counts_of, dry
from bvit_interp.models.layout import Layout
from bvit_interp.models.nested import first_tensor, is_tensor, map_tensors, with_first
from bvit_interp.models.prefix import find_layout
from bvit_interp.models.tied import clone, tensors_of

Images = Float[Tensor, "batch channels height width"]
_ANSWERS = ("logits", "pooler_output", "last_hidden_state")
"""Where the answer is in what a model returns, the first that is there."""


class CalledSteps(nn.Module):
    """The tied unroll of a model by its calls.

    Made by `bvit_interp.unroll`.

    Parameters
    ----------
    model : the model; stays unchanged.
    calls : path of the block of each call, in order.
    images : two images for a dry run.
    prefix, grid : of the `Layout`, where the model does not tell.

    Attributes
    ----------
    blocks : the module of each step, in call order: step t is ``blocks[t - 1]``.
    model : the user's model, whose calls go to `blocks`.
    layout : what the model makes of an image.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[str],
        images: Images,
        prefix: Sequence[str] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        shared = tensors_of(model)
        by_path = {path: model.get_submodule(path) for path in dict.fromkeys(calls)}
        self.blocks = nn.ModuleList([clone(by_path[path], shared) for path in calls])
        switches = {
            path: Switch(path, self.blocks[calls.index(path)]) for path in dict.fromkeys(calls)
        }
        memo = {id(block): switches[path] for path, block in by_path.items()}
        self.model = copy.deepcopy(model, {**shared, **memo})
        self.loop = tuple(dict.fromkeys(calls))
        self.training = model.training
        self._order = [switches[path] for path in calls]
        self.layout: Layout = Layout((0, 0), 0, (0, 0), (), 0, 0)
        self.needs_history, self.gives_tokens = False, True
        with dry(self):
            seen = self._run(images, Run(self, keep=True))
            classes = _num_classes(model, seen.output)
            self.layout = find_layout(model, images, seen.inputs, classes, prefix, grid)
            self.gives_tokens = isinstance(seen.outputs[-1], Tensor)
            self.needs_history = len(calls) > 2 and self._depends_on_earlier(images, seen)

    def cut(self, steps: int) -> CalledSteps:
        """The same model up to a step: its read-out gets the state after that step."""
        view = copy.deepcopy(self, tensors_of(self))
        view.blocks = view.blocks[:steps]
        return view

    # ---- running ---------------------------------------------------------------------------------

    def forward(self, images: Images) -> Tensor:
        """The model's logits ``(B, classes)``; its features where it has no logits."""
        return answer_of(self._run(images, Run(self)).output)

    def embed(self, images: Images) -> Tensor:
        """The tokens ``(B, N, D)`` that enter the first step."""
        return self._run(images, Run(self, stop=0)).inputs

    def resume(
        self,
        images: Images,
        outputs: Sequence[Any],
        entry: Tensor | None = None,
        stop: int | None = None,
    ) -> Run:
        """A run whose first calls give `outputs`, until after call `stop`.

        Parameters
        ----------
        outputs : what each of the first calls gives.
        entry : tokens that the first call reads, instead of those of the images.
        """
        return self._run(images, Run(self, given=outputs, entry=entry, stop=stop, keep=True))

    def read(self, images: Images, outputs: Sequence[Any], tokens: Tensor) -> Tensor:
        """The answer, had the last call given `tokens`, and the first calls `outputs`."""
        if not outputs and not self.gives_tokens:  # what else the block gives is that of step 1
            like = self.resume(images, [], entry=tokens, stop=1).outputs[0]
        else:
            like = outputs[-1] if outputs else tokens
        last = with_first(like, tokens)
        given = [*outputs, *[last] * (len(self._order) - len(outputs))]
        return answer_of(self.resume(images, given).output)

    def _run(self, images: Images, run: Run) -> Run:
        before = getattr(_local, "run", None)
        _local.run = run
        try:
            run.output = self.model(images)
        except _Stopped:
            return run
        finally:
            _local.run = before
        run.check_complete()
        return run

    def _depends_on_earlier(self, images: Images, seen: Run) -> bool:
        """Whether the last call reads more than the images and the output before it."""
        *earlier, last = seen.outputs[:-1]
        if images.is_meta:
            return True  # nothing can be compared
        zeros = [map_tensors(each, torch.zeros_like) for each in earlier]
        again = self.resume(images, [*zeros, last])
        return not torch.equal(answer_of(again.output), answer_of(seen.output))

    # ---- names of timm ---------------------------------------------------------------------------

    @property
    def embed_dim(self) -> int:
        """D, width of the token state."""
        return self.layout.width

    @property
    def num_classes(self) -> int:
        """Classes of the logits; 0 for features."""
        return self.layout.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return self.layout.num_prefix_tokens

    @property
    def pretrained_cfg(self) -> Any:
        """As the model has it: mean, std and class names."""
        return getattr(self.model, "pretrained_cfg", {})


Model = VisionTransformer | CalledSteps
"""What analyses take: a model whose blocks, run in turn, are its steps (see `with_steps`)."""


class Switch(nn.Module):
    """Stands where a block of the loop stood, and hands each call to the module of its step."""

    def __init__(self, path: str, like: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.like = (like,)  # no child: the steps are registered once, in the view
        self.training = like.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run: Run | None = getattr(_local, "run", None)
        if run is None:
            raise UserError(
                f"{self.path} was called outside the forward of the unrolled model (by gradient"
                " checkpointing around it, or directly): call the view itself, and put a checkpoint"
                " inside the block"
            )
        return run.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "like" not in self.__dict__:
                raise
            return getattr(self.like[0], name)


class _Stopped(Exception):
    """The step asked for is there: the forward need not go on."""


class Run:
    """One forward of the view: which call comes next, and what the calls before it gave."""

    def __init__(
        self,
        view: CalledSteps,
        given: Sequence[Any] = (),
        entry: Tensor | None = None,
        stop: int | None = None,
        keep: bool = False,
    ) -> None:
        self.view, self.entry, self.stop, self.keep = view, entry, stop, keep
        self.outputs: list[Any] = list(given)
        self.given = len(self.outputs)
        self.done = 0
        self.inputs = torch.empty(0)
        self.last: Any = self.outputs[-1] if self.outputs else None
        self.output: Any = None

    def call(self, switch: Switch, args: Any, kwargs: Any) -> Any:
        """The output of the next call: as given, or of its step's module."""
        i, order = self.done, self.view._order
        self.done += 1
        if i >= len(order) or order[i] is not switch:
            raise UserError(
                f"call {i + 1} is of {switch.path}, unlike in the dry run, which made {len(order)}"
                " calls: the number of steps depends on the input, so a step has no module"
            )
        if i < self.given:
            return self.outputs[i]
        if i >= len(self.view.blocks):  # cut off
            return self.last
        if i == 0:
            if self.entry is not None:
                args, kwargs = with_first([args, kwargs], self.entry)
            tokens = first_tensor([args, kwargs])
            assert tokens is not None  # a block is called with its tokens
            self.inputs = tokens
        if self.stop == i:
            raise _Stopped
        output = self.last = self.view.blocks[i](*args, **kwargs)
        if self.keep:
            self.outputs.append(output)
        if self.stop == i + 1:
            raise _Stopped
        return output

    def check_complete(self) -> None:
        """Refuse a forward that made fewer calls than the dry run."""
        if self.done < len(self.view._order):
            raise UserError(
                f"{' and '.join(self.view.loop)} ran {self.done} times, not {len(self.view._order)}"
                " as in the dry run: the number of steps depends on the input, so a step has no"
                " module"
            )


_local = threading.local()


def answer_of(output: Any) -> Tensor:
    """The tensor of logits, or of features, in what a model returns."""
    if is_tensor(output):
        return output  # type: ignore[no-any-return]
    for name in _ANSWERS:
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    tensor = first_tensor(output)
    if tensor is None:
        raise UserError(f"the model returns a {type(output).__name__} without a tensor")
    return tensor


def _num_classes(model: nn.Module, output: Any) -> int:
    """Classes of what a model returns; 0 if these are features."""
    is_logits = isinstance(output, Tensor) or getattr(output, "logits", None) is not None
    answer = answer_of(output)
    if answer.ndim != 2 or not is_logits or getattr(model, "num_classes", None) == 0:
        return 0
    return answer.shape[-1]


# ---- which modules are the steps -----------------------------------------------------------------


def find_calls(model: nn.Module, runs: Sequence[Ran], loop: str | None) -> list[str]:
    """Path of the block of each call, in order.

    Parameters
    ----------
    model : what ran.
    runs : of its `dry_run`.
    loop : path of the block, or of the list of blocks, that the steps are; by default the blocks
        that run more than once, or else the longest list of blocks.

    Raises
    ------
    UserError
        Where that is not clear, with the modules that may be meant.
    """
    counts = counts_of(list(runs))
    paths = _looped(runs) if loop is None else _named(model, loop)
    if not paths:
        paths = _longest_stack(model, runs)
    never = [path for path in paths if not counts[path]]
    if never:
        often = ", ".join(f"{path} ({count})" for path, count in counts.most_common(6))
        raise UserError(f"{choices(never)} never ran in a forward; what ran how often: {often}")
    inside = {path for path in paths if any(path.startswith(f"{other}.") for other in paths)}
    return [run.path for run in runs if run.path in paths and run.path not in inside]


def _named(model: nn.Module, loop: str) -> list[str]:
    try:
        named = model.get_submodule(loop)
    except AttributeError:
        lists = [path for path, module in model.named_modules() if isinstance(module, _LISTS)]
        raise UserError(f"no module {loop!r}; lists of modules: {choices(lists)}") from None
    return [f"{loop}.{name}" for name, _ in named.named_children()] if _is_list(named) else [loop]


_LISTS = (nn.ModuleList, nn.Sequential)


def _is_list(module: nn.Module) -> bool:
    """Whether a module is no more than its children, one after the other."""
    return isinstance(module, _LISTS) and type(module).forward in {each.forward for each in _LISTS}


def _looped(runs: Sequence[Ran]) -> list[str]:
    """The outermost modules that keep the tokens' shape and run more than once."""
    counts = counts_of(list(runs))
    often = {run.path: run.module for run in runs if counts[run.path] > 1 and run.keeps_tokens}
    inner = {path for path, module in often.items() if _is_list(module)}
    often = {path: module for path, module in often.items() if path not in inner}
    outer = [path for path in often if not any(path.startswith(f"{other}.") for other in often)]
    if len({path.rpartition(".")[0] for path in outer}) > 1 or (
        len(outer) > 1 and len({type(often[path]) for path in outer}) > 1
    ):
        listed = ", ".join(f"{path} ({counts[path]} times)" for path in outer)
        raise UserError(
            f"more than one module runs again and again: {listed}; say which is the block with"
            " loop=PATH, or put what belongs to a step into one module"
        )
    return outer


def _longest_stack(model: nn.Module, runs: Sequence[Ran]) -> list[str]:
    """The children of the longest list whose children keep the tokens' shape and run once each."""
    kept = {run.path for run in runs if run.keeps_tokens}
    stacks = []
    for path, module in model.named_modules():
        children = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
        if isinstance(module, _LISTS) and children and kept.issuperset(children):
            stacks.append(children)
    if not stacks:
        raise UserError(
            f"no block of {type(model).__name__} takes and gives tokens (batch, tokens, width); say"
            " which module is the block with loop=PATH"
        )
    return max(stacks, key=len)
