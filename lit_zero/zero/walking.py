"""The step of an optimizer on masters that live elsewhere.

[Note: the step inside the step] The user's optimizer is stepped by Lightning, a loss scaler or the user, with hooks and
schedulers around it, and the backward may run inside, in its closure. So its own ``step`` is called as ever, with a
closure that runs last: it steps what lives elsewhere, portion by portion, and takes those gradients away. The optimizer
then steps what is left, or nothing. Each portion is stepped by a ``Twin`` and starts from the same counters; those of
the last one are kept.

[Note: the step beside the next forward] ``optimizer.step`` may return before what lives elsewhere has been stepped: a
thread goes through it, unit by unit in the order in which the next forward needs them, and each gather waits for its
lane (``Lane.stepped``). Whoever reads masters, states or gradients waits for all (``Engine.join``), the next backward
included. With manual optimization gradients stay after the step, and the step is over when it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

from lit_zero.core.ticket import Ticket
from lit_zero.zero.lane import Lane
from lit_zero.zero.segment import Segment, copied_value, is_elementwise
from lit_zero.zero.twin import Twin

_MASTER = ""  # among the names of states


class Walking:
    """Steps the segments of a binding whose masters live elsewhere.

    Attributes:
        optimizer: the user's.
        segments: what its groups hold.
    """

    optimizer: torch.optim.Optimizer
    segments: list[Segment]
    _run: Callable[[Callable[[], None]], Ticket]
    _taken: list[tuple[Segment, torch.Tensor]]  # what the last step has used

    def wrap_step(self, run: Callable[[Callable[[], None]], Ticket]) -> Unwrap:
        """Let ``optimizer.step`` step what lives elsewhere too [Note: the step inside the step].

        Args:
            run: does the steps, one after the other [Note: the step beside the next forward].
        """
        self._run = run
        handle, inner, walk = Unwrap(self.optimizer), self.optimizer.step, self.walk

        @wraps(inner)
        def step(_: Any, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            def last() -> Any:
                loss = None if closure is None else closure()
                walk()
                return loss

            return inner(last, *args, **kwargs)

        self.optimizer.step = MethodType(step, self.optimizer)  # type: ignore[method-assign]
        return handle

    @torch.no_grad()
    def walk(self) -> None:
        """Step what lives elsewhere and take its gradients away."""
        twin, todo = Twin(self.optimizer), dict[Lane, list[Callable[[], None]]]()
        self._taken = []
        for segment in self.segments:  # unit by unit, as the next forward needs them
            grad = segment.param.grad
            if grad is None or not segment.lane.keeper.away:
                continue
            self._taken.append((segment, grad))
            segment.param.grad = None
            if segment.first < segment.last:
                to_come = sum(dtype.itemsize for dtype in self._dtypes_to_come(twin, segment))
                step = partial(self._step, twin, segment, grad, to_come)
                todo.setdefault(segment.lane, []).append(step)
        for lane, steps in todo.items():
            lane.stepped = self._run(partial(_all, steps))

    def restore(self) -> None:
        """Hold the gradients again that the last step has taken away."""
        for segment, grad in self._taken:
            segment.param.grad = grad
        self._taken = []

    def _step(self, twin: Twin, segment: Segment, grad: torch.Tensor, to_come: int) -> None:
        lane, state = segment.lane, self.optimizer.state.get(segment.param, {})
        counters = {key: value for key, value in state.items() if key not in segment.kept}
        arrays = {_MASTER: lane.master.part(segment.first, segment.last)}
        if state:  # else what is kept is old: a checkpoint without it has been loaded since
            arrays |= segment.kept
        after: dict[str, Any] = {}
        for first, last, views in lane.keeper.walk(arrays, to_come):
            param = nn.Parameter(views[_MASTER])
            param.grad = grad[first:last]
            given = {key: view for key, view in views.items() if key != _MASTER}
            given |= {key: copied_value(value) for key, value in counters.items()}
            after = twin.step(segment.param, param, given)
            for key, value in after.items():
                if is_elementwise(value, param) and value is not given.get(key):
                    self._take(segment, key, value, first, views)
            lane.spread(segment.first + first, param.data)
        self.optimizer.state[segment.param] = {
            key: segment.kept[key].stand_in() if key in segment.kept else value for key, value in after.items()
        }

    def _take(
        self, segment: Segment, key: str, value: torch.Tensor, first: int, views: dict[str, torch.Tensor]
    ) -> None:
        """Take over a state that the step has made anew, for the portion that begins at ``first``."""
        if key in views:
            views[key].copy_(value)
        else:
            segment.keep(key, value.dtype)
            segment.kept[key].write(first, value)

    def states_to_come(self) -> list[int]:
        """Return the bytes of each array that the optimizer is still going to make elsewhere, with its first step."""
        twin = Twin(self.optimizer)
        return [
            (segment.last - segment.first) * dtype.itemsize
            for segment in self.segments
            if segment.lane.keeper.away and segment.first < segment.last
            for dtype in self._dtypes_to_come(twin, segment)
        ]

    def _dtypes_to_come(self, twin: Twin, segment: Segment) -> Sequence[torch.dtype]:
        return [] if self.optimizer.state.get(segment.param) else twin.state_dtypes(segment.param)


def _all(steps: Sequence[Callable[[], None]]) -> None:
    for step in steps:
        step()


class Unwrap:
    """Undoes what has been put in the place of ``optimizer.step``.

    Args:
        optimizer: as it is before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._before = optimizer, vars(optimizer).get("step")

    def remove(self) -> None:
        """Undo it."""
        if self._before is None:
            vars(self._optimizer).pop("step", None)
        else:
            vars(self._optimizer)["step"] = self._before
