"""The step of an optimizer on masters that live elsewhere, or are kept in another form.

[Note: the step inside the step] The user's optimizer is stepped by Lightning, a loss scaler or the user, with hooks and
schedulers around it, and the backward may run inside, in its closure. So its own ``step`` is called as ever, with a
closure that runs last: it steps those masters, portion by portion, and takes their gradients away. The optimizer
then steps what is left, or nothing. Each portion is stepped by a ``Twin`` and starts from the same counters; those of
the last one are kept.

[Note: the step beside the next forward] ``optimizer.step`` may return before what lives elsewhere has been stepped: a
thread goes through it, unit by unit in the order in which the next forward needs them, and each gather waits for its
lane (``Lane.stepped``). Whoever reads masters, states or gradients waits for all (``Engine.join``), the next backward
included. With manual optimization gradients stay after the step, and the step is over when it returns.

[Note: the step inside the backward] The backward runs inside the closure, so its optimizer may step a lane as soon as
the lane's gradients are reduced, with the hyper-parameters that hold when the closure begins. A rank does so if each of
the lane's parameters has got a gradient from its own loss: then the parameter counts as reached on every rank.
Otherwise only the comparison of all ranks at the end of the backward tells whether it is to be stepped at all, and the
lane waits for it. What a rank steps is its own, so ranks need not do so at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import LitZeroError
from lit_zero.core.forms import Form, Formed, Origin, StepsForms
from lit_zero.core.keeping import Content
from lit_zero.core.owing import Owed
from lit_zero.core.ticket import Failed, Ticket
from lit_zero.zero.lane import Lane
from lit_zero.zero.segment import Segment, copied_value, is_elementwise
from lit_zero.zero.twin import Twin

_MASTER = ""  # among the names of states


class Walking:
    """Steps the segments of a binding whose masters live elsewhere or in another form.

    Attributes:
        optimizer: the user's.
        segments: what its groups hold.
        owed: what their gradients are still to be multiplied by.
        had_backward: the closure that runs has run a backward, which has stepped.
    """

    optimizer: torch.optim.Optimizer
    segments: list[Segment]
    owed: Owed
    _run: Callable[[Callable[[], None]], Ticket]
    _taken: list[tuple[Segment, torch.Tensor]]  # what the last step has used
    _last: Twin | None = None  # knows what states the optimizer keeps
    _early: Twin | None = None  # steps lanes while the closure of a step runs
    _steps: int = 0  # that this run has taken, for optimizers that do not count
    had_backward = False
    _began = False  # the closure has stepped a lane

    def wrap_step(self, run: Callable[[Callable[[], None]], Ticket], early: bool = False) -> Unwrap:
        """Let ``optimizer.step`` step in portions too [Note: the step inside the step].

        Args:
            run: does the steps, one after the other [Note: the step beside the next forward].
            early: lanes are stepped in the closure [Note: the step inside the backward].
        """
        self._run = run
        handle, inner, walk = Unwrap(self.optimizer), self.optimizer.step, self.walk
        begin = self._begin_closure if early else lambda: None

        @wraps(inner)
        def step(_: Any, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            def last() -> Any:
                begin()
                try:
                    loss = None if closure is None else closure()
                    walk()
                except BaseException as error:
                    self._fail(error)
                    raise
                finally:
                    self._early = None
                return loss

            return inner(last, *args, **kwargs)

        self.optimizer.step = MethodType(step, self.optimizer)  # type: ignore[method-assign]
        return handle

    @torch.no_grad()
    def walk(self) -> None:
        """Step what is stepped in portions, and take its gradients away."""
        self._end_closure()
        twin, todo = self._twin(), dict[Lane, list[Callable[[], None]]]()
        self._taken = []
        with self.owed.lent() as factor:
            for segment in self.segments:  # unit by unit, as the next forward needs them
                grad = segment.param.grad
                if grad is not None and segment.lane.keeper.walks:
                    self._taken.append((segment, grad))
            filled = [(segment, grad) for segment, grad in self._taken if segment.first < segment.last]
            formed = self._step_forms(filled, factor)
        if not formed:
            self.owed.settle()
        for segment, _ in self._taken:
            segment.param.grad = None
        for segment, grad in [] if formed else filled:
            todo.setdefault(segment.lane, []).append(partial(self._step, twin, segment, grad))
        for lane, steps in todo.items():
            lane.stepped = self._run(partial(_all, steps))
        self._steps += 1

    def _twin(self) -> Twin:
        away = any(segment.lane.keeper.away for segment in self.segments)
        self._last = Twin(self.optimizer, away, self._last)
        return self._last

    # ---- inside the backward

    def _begin_closure(self) -> None:
        self._early, self.had_backward, self._began = self._twin(), False, False

    def _fail(self, error: BaseException) -> None:
        """Note that a closure has failed: what it has stepped is not taken back, so nothing goes on from there."""
        if not self._began:
            return
        half = LitZeroError(
            f"{type(error).__name__} came up in a backward that had stepped some of the parameters, as "
            "precision.step='backward' does: the model is half stepped, and neither saved nor trained on. Go on from "
            "the last checkpoint in a new run, or set precision.step='after'."
        )
        half.__cause__ = error
        for segment in self.segments:
            segment.lane.stepped = Failed(half)
        self._began = False

    def _end_closure(self) -> None:
        early, self._early = self._early, None
        if early is not None and not early.same_settings(self.optimizer):
            raise LitZeroError(
                f"The settings of {type(self.optimizer).__name__} were changed between the backward and its step, but "
                "with precision.step='backward' most of the step is over by then. Change them before the step begins "
                "(on_train_batch_start), or set precision.step='after'."
            )

    @property
    def may_step(self) -> bool:
        """Whether a backward that runs now belongs to a step."""
        return self._early is not None

    @torch.no_grad()
    def step_lane(self, lane: Lane) -> None:
        """Step a lane whose gradients are complete, and let go of them [Note: the step inside the backward]."""
        assert self._early is not None
        self._began = True
        grad = lane.master_grad()
        mine = [each for each in self.segments if each.lane is lane and each.first < each.last]
        filled = [(segment, grad[segment.first : segment.last]) for segment in mine]
        if not self._step_forms(filled):
            for segment, part in filled:
                self._step(self._early, segment, part)
        lane.drop_gradients()
        lane.count_step()

    def _step_forms(self, filled: Sequence[tuple[Segment, torch.Tensor]], factor: torch.Tensor | None = None) -> bool:
        """Let the optimizer step segments as they lie, if it can, with their gradients times ``factor``; return whether
        it has.
        """
        if not filled or not isinstance(self.optimizer, StepsForms):
            return False
        if any(segment.lane.keeper.away for segment, _ in filled):
            return False
        parts = [self._formed(segment, grad) for segment, grad in filled]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not self.optimizer.step_forms(known, factor):
            return False
        for segment, _ in filled:
            if not segment.lane.split:
                segment.lane.spread(segment.first, segment.lane.master.part(segment.first, segment.last).read())
        return True

    def _formed(self, segment: Segment, grad: torch.Tensor) -> Formed | None:
        """Return a segment as its arrays lie; ``None`` if they are not all known, as before the first step."""
        state = self.optimizer.state.get(segment.param, {})
        master = segment.lane.master.part(segment.first, segment.last).form()
        states: dict[str, Form] = {}
        for key, value in state.items():
            if is_elementwise(value, segment.param):
                form = segment.values(key, value).form()
                if form is None:
                    return None
                states[key] = form
        if master is None or not state:
            return None
        return Formed(segment.param, grad, master, states, self._origin(segment, state))

    # ---- one segment

    def restore(self) -> None:
        """Hold the gradients again that the last step has taken away."""
        with self.owed.lent():  # they are owed what they were
            for segment, grad in self._taken:
                segment.param.grad = grad
        self._taken = []

    def _step(self, twin: Twin, segment: Segment, grad: torch.Tensor) -> None:
        lane, state = segment.lane, self.optimizer.state.get(segment.param, {})
        to_come = sum(dtype.itemsize for dtype in self._dtypes_to_come(twin, segment))
        counters = {key: value for key, value in state.items() if key not in segment.kept}
        arrays = {_MASTER: lane.master.part(segment.first, segment.last)}
        if state:  # else what is kept is old: a checkpoint without it has been loaded since
            arrays |= segment.kept
        after: dict[str, Any] = {}
        for first, last, views in lane.keeper.walk(arrays, to_come, self._origin(segment, state)):
            param = nn.Parameter(views[_MASTER])
            param.grad = grad[first:last].to(param.dtype)
            given = {key: view for key, view in views.items() if key != _MASTER}
            given |= {key: copied_value(value) for key, value in counters.items()}
            after = twin.step(segment.param, param, given)
            for key, value in after.items():
                if is_elementwise(value, param) and value is not given.get(key):
                    self._take(twin, segment, key, value, first, views)
            lane.spread(segment.first + first, param.data)
        self.optimizer.state[segment.param] = {
            key: segment.kept[key].stand_in() if key in segment.kept else value for key, value in after.items()
        }

    def _origin(self, segment: Segment, state: dict[str, Any]) -> Origin:
        counted = state.get("step")
        if counted is None:
            group = next((g for g in self.optimizer.param_groups if any(p is segment.param for p in g["params"])), {})
            # An optimizer without a number of steps begins anew with a run: what it rounds at random is then rounded
            # with bits of earlier steps, on average as right as with others.
            counted = group.get("step", self._steps)
        return Origin(segment.lane.infos[0].name, segment.lane.master_start + segment.first, _whole(counted))

    def _take(
        self,
        twin: Twin,
        segment: Segment,
        key: str,
        value: torch.Tensor,
        first: int,
        views: dict[str, torch.Tensor],
    ) -> None:
        """Take over a state that the step has made anew, for the portion that begins at ``first``."""
        if key in views:
            views[key].copy_(value)
        else:
            segment.keep(key, value.dtype, _content(twin, segment, key))
            segment.kept[key].write(first, value)

    def states_to_come(self) -> list[int]:
        """Return the bytes of each array that the optimizer is still going to make elsewhere, with its first step."""
        twin = self._twin()
        return [
            (segment.last - segment.first) * dtype.itemsize
            for segment in self.segments
            if segment.lane.keeper.away and segment.first < segment.last
            for dtype in self._dtypes_to_come(twin, segment)
        ]

    def _dtypes_to_come(self, twin: Twin, segment: Segment) -> Sequence[torch.dtype]:
        if self.optimizer.state.get(segment.param):
            return []
        return [dtype for dtype, _ in twin.states(segment.param).values()]

    def content_of(self, segment: Segment, key: str) -> Content:
        """Return what the optimizer's state ``key`` holds; what it does not keep by itself counts as weights."""
        return _content(self._twin(), segment, key)

    def contents(self) -> list[Content]:
        """Return what the optimizer's fp32 states hold, of all segments."""
        twin = self._twin()
        found = (twin.states(segment.param).values() for segment in self.segments)
        return [content for states in found for dtype, content in states if dtype == torch.float32]


def _content(twin: Twin, segment: Segment, key: str) -> Content:
    return twin.states(segment.param).get(key, (None, Content.WEIGHTS))[1]


def _whole(step: Any) -> int | torch.Tensor:
    """Return the number of a step; on a GPU it stays there."""
    if isinstance(step, torch.Tensor):
        return step if step.is_cuda else int(step)
    return int(step)


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
