"""The tied unroll by calls, for any block in any loop.

A user's module that calls one block T times keeps its own forward. In the view each block of the
loop is replaced by a `Switch`, which hands call t to clone t, the module of step t. The clones
share the parameters of the block. What the forward does around the calls (an input that is injected
at every step, step embeddings, masks, layers before and after the loop) stays as it is. A stack of
blocks is treated in the same way, with one call per block.
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

from bvit_interp.errors import UserError, first_line
from bvit_interp.models import arguments
from bvit_interp.models.dry_run import dry
from bvit_interp.models.layout import Layout
from bvit_interp.models.nested import Path, first_tensor, is_tensor, map_tensors, with_first
from bvit_interp.models.prefix import find_layout
from bvit_interp.models.tied import clone, tensors_of

Images = Float[Tensor, "batch channels height width"]
_ANSWERS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
"""Where the output tensor is in what a model returns; the first name that exists is used."""


class CalledSteps(nn.Module):
    """The tied unroll of a model by its calls.

    It is made by `bvit_interp.unroll`.

    Parameters
    ----------
    model : the model; it is not changed.
    calls : path of the block of each call, in order.
    images : two images for a dry run.
    output : what the model returns for them.
    fixed : for each token that enters the first block, whether it is the same for both images.
    prefix, grid : as in `Layout`, if the model does not tell them.
    tokens : path to the tokens in the arguments of each call, from `find_tokens`.

    Attributes
    ----------
    blocks : the module of each step, in call order: step t is ``blocks[t - 1]``.
    model : a copy of the user's model, whose calls go to `blocks`.
    layout : image size, patch grid, kinds of prefix tokens, width and classes.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[str],
        images: Images,
        output: Any,
        fixed: Sequence[bool] = (),
        prefix: Sequence[str] | None = None,
        grid: tuple[int, int] | None = None,
        tokens: Sequence[Path | None] | None = None,
    ) -> None:
        super().__init__()
        shared = tensors_of(model)
        by_path = {path: model.get_submodule(path) for path in dict.fromkeys(calls)}
        self.blocks = nn.ModuleList([clone(by_path[path], shared) for path in calls])
        arguments.tell(self.blocks, tokens or [None] * len(calls))
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
            try:
                self._check_same(type(model).__name__, answer_of(output), images)
                seen = self._run(images, Run(self, keep=True))
            except UserError:
                raise
            except Exception as error:
                name = type(model).__name__
                raise UserError(f"unrolled by call, {name} fails: {first_line(error)}") from error
            self.layout = find_layout(
                model, images, seen.inputs, _num_classes(model, output), prefix, grid, fixed
            )
            self.gives_tokens = isinstance(seen.outputs[-1], Tensor)
            self.needs_history = self._depends_on_earlier(images, seen)

    def _check_same(self, name: str, wanted: Tensor, images: Images) -> None:
        """Refuse a model whose output the view does not give: twice, as a block may count calls."""
        for _ in range(2):
            answer = self(images)
            same = answer.shape == wanted.shape and (
                wanted.is_meta
                or torch.allclose(
                    answer.float(), wanted.float(), rtol=1e-3, atol=1e-4, equal_nan=True
                )
            )
            if not same:
                raise UserError(
                    f"unrolled by call, {name} answers otherwise than before: its"
                    f" {' and '.join(self.loop)} keeps something from call to call, or is used"
                    " otherwise than by calling it; hand what changes to the block as an argument"
                )

    def cut(self, steps: int) -> CalledSteps:
        """The same model with its first `steps` steps: its read-out gets the state after them."""
        view = copy.deepcopy(self, tensors_of(self))
        view.blocks = view.blocks[:steps]
        return view

    # ---- running ---------------------------------------------------------------------------------

    def forward(self, images: Images) -> Tensor:
        """The model's logits ``(B, classes)``, or its features if it has no logits."""
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
        """A run whose first calls return `outputs`, and which ends after call `stop`.

        Parameters
        ----------
        outputs : what each of the first calls returns.
        entry : tokens that the first call reads, instead of those of the images.
        stop : the last call that runs, from 1; None for all.
        """
        return self._run(images, Run(self, given=outputs, entry=entry, stop=stop, keep=True))

    def read(self, images: Images, outputs: Sequence[Any], tokens: Tensor) -> Tensor:
        """The model's output if the first calls return `outputs`, and the last one `tokens`."""
        if not outputs and not self.gives_tokens:  # the rest is from step 1
            like = self.resume(images, [], entry=tokens, stop=1).outputs[0]
        else:
            like = outputs[-1] if outputs else tokens
        last = with_first(like, tokens)
        given = [*outputs, *[last] * (len(self._order) - len(outputs))]
        return answer_of(self.resume(images, given).output)

    def _run(self, images: Images, run: Run) -> Run:
        before = getattr(_local, "run", None)
        _local.run = run
        run.batch = len(images) if isinstance(images, Tensor) else 0
        try:
            run.output = self.model(images)
        except _Stopped:
            return run
        finally:
            _local.run = before
        run.check_complete()
        return run

    def _depends_on_earlier(self, images: Images, seen: Run) -> bool:
        """Whether a call, or the read-out, reads more than the images and the call before it."""
        if images.is_meta:
            return True  # nothing can be compared
        for i in range(2, len(self._order) + 1):
            *earlier, last = seen.outputs[:i]
            noise = [map_tensors(each, torch.zeros_like) for each in earlier]
            stop = i + 1 if i < len(self._order) else None
            again = self.resume(images, [*noise, last], stop=stop)
            now = answer_of(again.output) if stop is None else first_tensor(again.outputs[i])
            then = answer_of(seen.output) if stop is None else first_tensor(seen.outputs[i])
            if not torch.equal(now, then):  # type: ignore[arg-type]
                return True
        return False

    # ---- names of timm ---------------------------------------------------------------------------

    @property
    def embed_dim(self) -> int:
        """D, width of the token state."""
        return self.layout.width

    @property
    def num_classes(self) -> int:
        """Number of classes of the logits; 0 for features."""
        return self.layout.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return self.layout.num_prefix_tokens

    @property
    def pretrained_cfg(self) -> Any:
        """That of the model, with mean, std and class names; empty if it has none."""
        return getattr(self.model, "pretrained_cfg", {})


Model = VisionTransformer | CalledSteps
"""What analyses take: a model whose blocks, run in turn, are its steps (see `with_steps`)."""


class Switch(nn.Module):
    """Takes the place of a block of the loop, and hands each call to the module of its step."""

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
            return getattr(self._next(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model's forward sets on its block is set on the module of the next call."""
        if getattr(_local, "run", None) is None or "like" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._next(), name, value)

    def _next(self) -> nn.Module:
        """The module that the next call of this block goes to."""
        run: Run | None = getattr(_local, "run", None)
        module: nn.Module = self.like[0] if run is None else run.next_of(self)
        return module


class _Stopped(Exception):
    """Raised to end the forward when the last step that is asked for has run."""


class Run:
    """One forward of the view: which call comes next, and what earlier calls returned."""

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
        self.done, self.batch = 0, 0
        self.inputs = torch.empty(0)
        self.last: Any = self.outputs[-1] if self.outputs else None
        self.output: Any = None

    def call(self, switch: Switch, args: Any, kwargs: Any) -> Any:
        """The output of the next call: the given one, or that of its step's module."""
        i, order = self.done, self.view._order
        self.done += 1
        if i >= len(order) or order[i] is not switch:
            raise UserError(
                f"call {i + 1} is of {switch.path}, unlike in the dry run, which made {len(order)}"
                " calls: the steps are not the same in each forward (they depend on the input, on"
                " chance or on the mode), so a step has no module"
            )
        module = self.view.blocks[i] if i < len(self.view.blocks) else None
        if module is not None:
            self.check_batch(arguments.tokens_of(module, args, kwargs))
        if i < self.given:  # cloned: the next block may change it in place
            output = self.outputs[i]
            return map_tensors(output, torch.clone) if i == self.given - 1 else output
        if module is None:  # the step was cut off
            return self.last
        if i == 0:
            if self.entry is not None:
                args, kwargs = arguments.with_tokens(module, args, kwargs, self.entry.clone())
            tokens = arguments.tokens_of(module, args, kwargs)
            assert tokens is not None  # a block is called with its tokens
            self.inputs = tokens.clone()
        if self.stop == i:
            raise _Stopped
        output = self.last = module(*args, **kwargs)
        if self.keep:  # a later block may change it in place
            self.outputs.append(map_tensors(output, torch.clone))
        if self.stop == i + 1:
            raise _Stopped
        return output

    def next_of(self, switch: Switch) -> nn.Module:
        """The module of the next call of a block; that of its first call if none follows."""
        order, blocks = self.view._order, self.view.blocks
        following = (i for i in range(self.done, len(blocks)) if order[i] is switch)
        return blocks[next(following, order.index(switch))]

    def check_batch(self, tokens: Any) -> None:
        """Refuse a call that does not get all images."""
        if isinstance(tokens, Tensor) and tokens.ndim and len(tokens) != self.batch:
            raise UserError(
                f"call {self.done} is of {len(tokens)} states for {self.batch} images: images leave"
                " the loop, and a recording could not tell which is which"
            )

    def check_complete(self) -> None:
        """Refuse a forward that made fewer calls than the dry run."""
        if self.done < len(self.view._order):
            raise UserError(
                f"{' and '.join(self.view.loop)} ran {self.done} times, not {len(self.view._order)}"
                " as in the dry run: the number of steps depends on the input, on chance or on the"
                " mode, so a step has no module"
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
    """Number of classes of a model's output; 0 if the output is features."""
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    is_logits = isinstance(output, (Tensor, tuple, list)) or named is not None
    answer = answer_of(output)
    if answer.ndim != 2 or not is_logits or getattr(model, "num_classes", None) == 0:
        return 0
    return answer.shape[-1]
