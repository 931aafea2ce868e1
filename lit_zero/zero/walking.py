"""The step of an optimizer on masters that live elsewhere.

[Note: the step inside the step] The user's optimizer is stepped by Lightning, a loss scaler or the user, with hooks and
schedulers around it, and the backward may run inside, in its closure. So its own ``step`` is called as ever, with a
closure that runs last: it steps what lives elsewhere, with a twin of the optimizer and portion by portion, and takes
those gradients away. The optimizer then steps what is left, or nothing.

The twin is an object of the optimizer's class with the present hyper-parameters, one portion as its only parameter, and
no hooks. That is right for element-wise optimizers, and only those get masters that can live elsewhere (``probe``).
Each portion starts from the same counters; those of the last one are kept.

[Note: the step beside the next forward] ``optimizer.step`` may return before what lives elsewhere has been stepped: a
thread goes through it, unit by unit in the order in which the next forward needs them, and each gather waits for its
lane (``Lane.stepped``). Whoever reads masters, states or gradients waits for all (``Engine.join``), the next backward
included. With manual optimization gradients stay after the step, and the step is over when it returns.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

from lit_zero.core.keeping import Keeping
from lit_zero.core.ticket import Ticket
from lit_zero.zero.segment import Segment, copied_value, is_elementwise

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
        # Copies: a scheduler may change them before the step is over.
        settings = [{k: copied_value(v) for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        groups = {
            id(param): group
            for group, held in zip(settings, self.optimizer.param_groups, strict=True)
            for param in held["params"]
        }
        self._taken = []
        for segment in self.segments:  # unit by unit, as the next forward needs them
            grad = segment.param.grad
            if grad is None or not segment.lane.keeper.away:
                continue
            self._taken.append((segment, grad))
            segment.param.grad = None
            if segment.first < segment.last:
                segment.lane.stepped = self._run(partial(self._step, segment, groups[id(segment.param)], grad))

    def restore(self) -> None:
        """Hold the gradients again that the last step has taken away."""
        for segment, grad in self._taken:
            segment.param.grad = grad
        self._taken = []

    def _step(self, segment: Segment, group: dict[str, Any], grad: torch.Tensor) -> None:
        lane, state = segment.lane, self.optimizer.state.get(segment.param, {})
        counters = {key: value for key, value in state.items() if key not in segment.kept}
        arrays = {_MASTER: lane.master.part(segment.first, segment.last), **segment.kept}
        settings = fastest(self.optimizer, group, segment.param.dtype)
        after: dict[str, Any] = {}
        for first, last, views in lane.keeper.walk(arrays, 0 if state else self.to_come(group, segment)):
            param = nn.Parameter(views[_MASTER])
            param.grad = grad[first:last]
            given = {key: view for key, view in views.items() if key != _MASTER}
            given |= {key: copied_value(value) for key, value in counters.items()}
            after = self._twin_step(param, settings, given)
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

    def _twin_step(self, param: nn.Parameter, settings: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Step ``param`` with ``state`` as the optimizer would; return the state after."""
        kind = type(self.optimizer)
        twin = object.__new__(kind)
        twin.__dict__.update({key: value for key, value in vars(self.optimizer).items() if key != "step"})
        twin.param_groups, twin.state = [{**settings, "params": [param]}], defaultdict(dict)
        if state:
            twin.state[param] = state
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(twin, hooks, OrderedDict())
        step: Any = kind.step  # the class's own: schedulers and profilers wrap the instance's
        step(twin)
        found: dict[str, Any] = twin.state[param]
        return found

    def reserve(self, keeping: Keeping) -> None:
        """Make sure that there will be room for the states and gradients that live elsewhere."""
        groups = {id(param): group for group in self.optimizer.param_groups for param in group["params"]}
        for segment in self.segments:
            size, keeper = segment.last - segment.first, segment.lane.keeper
            if keeper.away and size:
                keeping.reserve(keeper, "optimizer state", size * self.to_come(groups[id(segment.param)], segment))
                keeping.reserve(keeper, "gradients", size * segment.param.element_size())

    def to_come(self, group: dict[str, Any], like: Segment) -> int:
        """Return the bytes of state for each element that the optimizer is going to keep, found by trying."""
        return sum(dtype.itemsize for dtype in self.state_dtypes(group, like.param.dtype))

    def state_dtypes(self, group: dict[str, Any], dtype: torch.dtype) -> Sequence[torch.dtype]:
        """Return the dtypes of the element-wise states that the optimizer keeps for a parameter of ``dtype``."""
        param = nn.Parameter(torch.ones(6, dtype=dtype))
        param.grad = torch.ones_like(param)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            state = self._twin_step(param, {**group, "params": []}, {})
        return [value.dtype for value in state.values() if is_elementwise(value, param)]


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


def fastest(optimizer: torch.optim.Optimizer, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings of ``group`` under which a step on the CPU is fastest: torch's fused kernel for a plain Adam
    or AdamW. Who has said ``foreach=`` or ``fused=`` gets that.
    """
    plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and dtype.is_floating_point
    said = any(group.get(key) is not None for key in ("foreach", "fused"))
    if not plain or said or group.get("capturable") or group.get("differentiable"):
        return group
    return {**group, "fused": True}
