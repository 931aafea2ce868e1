"""Run a block again in the backward, in place of keeping what autograd saves in it.

[Note: once for all backwards] torch's own checkpoint computes a block again for every backward that asks, and lets go
of each tensor at the first question. A pipeline that splits its backward (``zero_bubble``) runs several on one forward:
one for the inputs and one for every group of weights. So here a call is computed again once; what comes of it stays
where the forward's own tensors would be, and goes when autograd lets go of them: node by node in an ordinary backward.

[Note: which parameters a repetition reads] The repetition calls the block's own forward, past its hooks. A unit of
sharded parameters is brought, before anything in its backward, by the hook on its output, and stays until the backward
has left it; the first tensor that is asked for comes in between. So one gather serves the repetition and the backward.
Units inside the block are called with their hooks, which see that a backward is running.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; the numbering of saved tensors and the early
stop are those of ``torch.utils.checkpoint`` without reentrance, and so is ``selective``'s pair of modes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from lit_zero.activation.compiling import UNTRACED
from lit_zero.activation.operators import Contexts
from lit_zero.activation.surroundings import Buffers, Call, Surroundings, version_of
from lit_zero.core.errors import LitZeroError
from lit_zero.core.nested import tensors_in


class _Enough(BaseException):
    """Ends a repetition that has given all; no ``Exception``, so that the user's ``except`` does not catch it."""


class _Saved:
    """Stands in the graph for a saved tensor.

    Attributes:
        value: the tensor, once the block has run again.
        version: of the tensor when it was saved then. Autograd does not compare them for what hooks give it.
    """

    __slots__ = ("__weakref__", "value", "version")

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self.version = 0


class Kept:
    """Arguments, as they are now: in containers of their own, which nobody else fills with something else.

    Args:
        call: ``(args, kwargs)`` of a block.
        title: the block, for messages.
    """

    def __init__(self, call: Call, title: str) -> None:
        self._call: Call = _own(call)
        self._title = title
        self._versions = [(t, version_of(t)) for t in tensors_in(self._call)]

    def back(self) -> Call:
        """Return the arguments.

        Raises:
            LitZeroError: if a tensor in them has been written to since, or an object has another one in its place.
        """
        now = {id(tensor) for tensor in tensors_in(self._call)}
        if any(id(tensor) not in now for tensor, _ in self._versions):
            raise LitZeroError(
                f"Block {self._title!r} is to be computed again, but an object among its arguments holds other tensors "
                "than it did. Give it one that does not change, or leave the block out with activation.blocks."
            )
        for tensor, version in self._versions:
            if version_of(tensor) != version:
                raise LitZeroError(
                    f"Block {self._title!r} is to be computed again, but an argument of it, shape "
                    f"{list(tensor.shape)}, has been written to since. Do not change it in place, or leave the block "
                    "out with activation.blocks."
                )
        return self._call


def _own(value: Any) -> Any:
    """Return plain containers anew, with the same in them."""
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own(item) for item in value)
    return value


class Repetition:
    """One call of a block, which can be computed again.

    Args:
        title: the block, for messages.
        run: its forward.
        surroundings: of the block.
        buffers: of the block.
        keep: makes of the arguments what is kept of them.
        contexts: what the forward and its repetition run in; see ``operators.keeping``.
        saved: is given every tensor that autograd saves in the forward.
    """

    def __init__(
        self,
        title: str,
        run: Callable[..., Any],
        surroundings: Surroundings,
        buffers: Buffers,
        keep: Callable[[Call, str], Any] = Kept,
        contexts: Contexts | None = None,
        saved: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._title, self._run, self._keep, self._saved = title, run, keep, saved
        self._surroundings, self._buffers = surroundings, buffers
        plain: Contexts = contextlib.nullcontext(), contextlib.nullcontext()
        self._first, self._second = contexts or plain
        self._places: list[weakref.ref[_Saved]] = []
        self._facts: list[tuple[Any, ...]] = []
        self._filled = 0  # places

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block."""
        self._moment = self._surroundings.now((args, kwargs))
        before = self._buffers.before()
        self._inputs = self._keep((args, kwargs), self._title)
        with saved_tensors_hooks(self._pack, self._unpack), self._first:
            output = self._run(*args, **kwargs)
        self._written = self._buffers.written(before)
        if not self._places:  # nobody will ask
            self._inputs = None
        del self._first, self._saved
        return output

    @torch.compiler.disable(reason=UNTRACED)
    def _pack(self, tensor: torch.Tensor) -> _Saved:
        place = _Saved()
        self._places.append(weakref.ref(place))
        self._facts.append(_facts(tensor))
        if self._saved is not None:
            self._saved(tensor)
        return place

    @torch.compiler.disable(reason=UNTRACED)
    def _unpack(self, place: _Saved) -> torch.Tensor:
        if place.value is None:
            self._again()
        assert place.value is not None
        if version_of(place.value) != place.version:
            raise changed_in_place(self._title, place.value)
        return place.value

    def _again(self) -> None:
        if self._inputs is None:
            raise self._refusal("a tensor is asked for that it has not given")
        (args, kwargs), self._inputs = self._inputs.back(), None
        with (
            self._moment.again(),
            self._buffers.as_before(self._written),
            torch.enable_grad(),
            self._second,
            saved_tensors_hooks(self._fill, _as_it_is),
            contextlib.suppress(_Enough),
        ):
            try:
                self._run(*args, **kwargs)
            except Exception as error:  # the user's own, or memory has run out
                if not isinstance(error, LitZeroError):
                    error.add_note(str(self._refusal("it did not fail in the forward, and now it has")))
                raise
        if self._filled < len(self._places):
            raise self._refusal(f"it saved {len(self._places)} tensors, and now {self._filled}")
        del self._second  # and the results that selective has kept

    @torch.compiler.disable(reason=UNTRACED)
    def _fill(self, tensor: torch.Tensor) -> torch.Tensor:
        number, tensor = self._filled, tensor.detach()
        if _facts(tensor) != self._facts[number]:
            was, now = (f"{list(shape)} {dtype}" for shape, dtype, _ in (self._facts[number], _facts(tensor)))
            raise self._refusal(f"the saved tensor {number} was {was}, and now is {now}")
        place = self._places[number]()
        if place is not None:  # else this part of the graph is gone already
            place.value, place.version = tensor, version_of(tensor)
        self._filled += 1
        if self._filled == len(self._places):
            raise _Enough
        return tensor

    def _refusal(self, what: str) -> LitZeroError:
        return LitZeroError(
            f"Block {self._title!r} does something else when it is computed again: {what}. What it does may depend on "
            "its arguments, parameters and random numbers only, not on what it has stored elsewhere (a cache: "
            "use_cache=False; a counter). Leave the block out with activation.blocks, or use activation='offload'."
        )


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def changed_in_place(title: str, tensor: torch.Tensor) -> LitZeroError:
    """Return what says that a saved tensor is not any more what it was when it was saved."""
    return LitZeroError(
        f"Block {title!r} has saved a tensor of shape {list(tensor.shape)} for its backward, which has been changed in "
        "place since. Use the operation that is not in place: torch refuses this one without activation too."
    )
