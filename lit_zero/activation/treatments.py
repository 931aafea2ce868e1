"""What a block may do with the tensors that its calls save: one small object for each way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lit_zero.activation.compiling import UNTRACED
from lit_zero.activation.host import Host, Moved, Shelf
from lit_zero.activation.operators import keeping
from lit_zero.activation.plan import Facts
from lit_zero.activation.recompute import Kept, Repetition, changed_in_place
from lit_zero.activation.surroundings import Buffers, Call, Surroundings, version_of
from lit_zero.core.nested import tensors_in

Run = Callable[..., Any]


class Treatment:
    """Autograd keeps everything. Base class of the others.

    Args:
        title: the block, for messages.
        module: the block.
    """

    def __init__(self, title: str, module: nn.Module) -> None:
        self.title, self.module = title, module

    def __call__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block with gradient."""
        return run(*args, **kwargs)


class Recomputed(Treatment):
    """Autograd keeps the arguments; the rest is computed again.

    Args:
        title: the block, for messages.
        module: the block.
        keep: makes of the arguments what is kept of them.
        operators: those whose results are kept too.
    """

    def __init__(
        self,
        title: str,
        module: nn.Module,
        keep: Callable[[Call, str], Any] = Kept,
        operators: frozenset[Any] = frozenset(),
    ) -> None:
        super().__init__(title, module)
        self._keep, self._operators = keep, operators
        self._surroundings, self._buffers = Surroundings(module), Buffers(module, title)

    def __call__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block so that it can be computed again."""
        return self.repetition(run).forward(args, kwargs)

    def repetition(self, run: Run, saved: Callable[[torch.Tensor], None] | None = None) -> Repetition:
        """Return what runs the block once, and again in the backward."""
        contexts = keeping(self._operators) if self._operators else None
        return Repetition(self.title, run, self._surroundings, self._buffers, self._keep, contexts, saved)


class Offloaded(Treatment):
    """What is large enough lies in host memory between forward and backward; parameters and buffers stay.

    Args:
        title: the block, for messages.
        module: the block.
        host: where it lies.
    """

    def __init__(self, title: str, module: nn.Module, host: Host) -> None:
        super().__init__(title, module)
        self._host = host

    def __call__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block."""
        call = _Moves(self.title, self._host, memory_of(self.module))
        with saved_tensors_hooks(call.pack, call.unpack):
            output = run(*args, **kwargs)
        call.known.clear()
        return output


class _Stays:
    """Stands in the graph for a tensor that stays. Autograd does not compare versions of what hooks give it."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor, version_of(tensor)


class _Moves:
    """What one call of a block moves.

    Args:
        title: the block, for messages.
        host: where to.
        staying: storages that stay.

    Attributes:
        known: what has been moved. A tensor that is saved twice is moved once; the original stays until the forward is
            over, since its memory would else be given to another tensor, which could not be told from it.
    """

    def __init__(self, title: str, host: Host, staying: set[int]) -> None:
        self._title, self._host, self._staying, self._shelf = title, host, staying, Shelf(host)
        self.known: dict[Any, tuple[torch.Tensor, Moved]] = {}

    @torch.compiler.disable(reason=UNTRACED)
    def pack(self, tensor: torch.Tensor) -> _Stays | Moved:
        """Return what stands in the graph for a saved tensor."""
        if not self._host.takes(tensor) or tensor.untyped_storage().data_ptr() in self._staying:
            return _Stays(tensor)
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        if key not in self.known:
            self.known[key] = tensor, self._host.move(tensor, self._shelf)
            self._shelf.add(self.known[key][1])
        return self.known[key][1]

    @torch.compiler.disable(reason=UNTRACED)
    def unpack(self, place: _Stays | Moved) -> torch.Tensor:
        """Return the tensor."""
        if isinstance(place, Moved):
            return self._host.take(place)
        if version_of(place.tensor) != place.version:
            raise changed_in_place(self._title, place.tensor)
        return place.tensor


class Watched(Recomputed):
    """Computed again, and looked at: what it saves and how long it takes.

    Args:
        title: the block, for messages.
        module: the block.
        host: says which tensors could be moved.

    Attributes:
        found: what its calls have shown, added up.
    """

    def __init__(self, title: str, module: nn.Module, host: Host) -> None:
        super().__init__(title, module)
        self._host = host
        self.found = Facts()

    def __call__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block, and take its time."""
        saved: list[torch.Tensor] = []
        _finish(self._host)
        start = time.perf_counter_ns()
        output = self.repetition(run, saved.append).forward(args, kwargs)
        _finish(self._host)
        self._note(saved, (args, kwargs), time.perf_counter_ns() - start)
        return output

    def _note(self, saved: list[torch.Tensor], call: Call, duration: int) -> None:
        staying = memory_of(self.module)
        own = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in staying]
        moved = [tensor for tensor in own if self._host.takes(tensor)]
        small = [tensor for tensor in own if not self._host.takes(tensor)]
        moves = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t.nbytes for t in moved}
        self.found = self.found.plus(
            Facts(
                kept=storage_bytes(own),
                inputs=storage_bytes(list(tensors_in(call))),
                small=storage_bytes(small),
                moved=sum(moves.values()),
                forward=duration,
            )
        )


def _finish(host: Host) -> None:
    if host.overlaps:
        torch.cuda.synchronize()


def memory_of(module: nn.Module) -> set[int]:
    """Return where a module's parameters and buffers lie: views of them are found by their storage."""
    found = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    return found - {0}


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of memory behind tensors; what several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
