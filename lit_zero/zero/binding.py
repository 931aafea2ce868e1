"""The user's optimizer, pointed at flat master shards.

``configure_optimizers`` sees real parameters. Afterwards each parameter group holds *segments* instead: runs of a
lane's master that belong to the group. An element-wise optimizer does to a segment exactly what it would do to the
parameters in it. Hyper-parameters stay in the user's group dictionaries, so schedulers work unchanged; state is
translated to and from single parameters where a checkpoint asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import CheckpointError, LitZeroError
from lit_zero.core.piece import ParamState, Piece
from lit_zero.zero.lane import Lane
from lit_zero.zero.policy import Placement
from lit_zero.zero.probe import require_elementwise as require_elementwise


@dataclass(eq=False)
class Segment:
    """A run of one lane's master that one parameter group updates.

    Attributes:
        lane: where it lies.
        first: first element, counted from the start of the lane's master.
        last: one past the last.
        param: what the optimizer holds, a view of the master of shape ``[last - first]``.
        copied: version of the gradient that was handed over, if it is a copy: what is done to it does not reach the
            gradient that the next backward adds to.
    """

    lane: Lane
    first: int
    last: int
    param: nn.Parameter
    copied: int | None = None


class Binding:
    """One optimizer and its segments.

    Args:
        optimizer: the user's optimizer; its groups are re-pointed.
        names: for every group, the names of the parameters it was given, in order.
        first_group: number of its first group, counted over all optimizers.
        lanes: all trainable lanes.
        shaped: give every parameter a segment of its own in its real shape (whole masters only): serves any optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Sequence[Sequence[str]],
        first_group: int,
        lanes: Sequence[Lane],
        shaped: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.group_names = [list(group) for group in names]
        self._first_group = first_group
        numbers = range(first_group, first_group + len(names))
        self._lanes = [lane for lane in lanes if any(info.group in numbers for info in lane.infos)]
        self.segments: list[Segment] = []
        self.granular = self._shaped = shaped
        self._point(self._entries() if shaped else self._runs())

    # ---- segments

    def _runs(self) -> Iterable[tuple[Lane, int, int, int]]:
        for lane in self._lanes:
            for group, first, last in lane.layout.group_runs(lane.master_start, lane.master_end):
                yield lane, group, first, last

    def _entries(self) -> Iterable[tuple[Lane, int, int, int]]:
        for lane in self._lanes:
            for part in lane.master_overlaps():
                if part.length:
                    yield lane, part.entry.group, part.local, part.local + part.length

    def _point(self, runs: Iterable[tuple[Lane, int, int, int]]) -> None:
        self.segments = []
        for hyper in self.optimizer.param_groups:
            hyper["params"] = []
        for lane, group, first, last in runs:
            number = group - self._first_group
            if 0 <= number < len(self.group_names):
                view = lane.master[first:last]
                if self._shaped:
                    view = view.view(next(e.shape for e in lane.layout.entries if e.offset == first))
                self._hold(Segment(lane, first, last, nn.Parameter(view)), number)
        if not self.segments and self._lanes and self.group_names:
            # This rank's shards hold nothing of the optimizer's. An empty segment tells it when gradients are dropped.
            self._hold(Segment(self._lanes[0], 0, 0, nn.Parameter(self._lanes[0].master[:0])), 0)

    def _hold(self, segment: Segment, number: int) -> None:
        self.segments.append(segment)
        self.optimizer.param_groups[number]["params"].append(segment.param)

    def split(self) -> None:
        """Give every parameter a segment of its own, so that single parameters can be left out of a step; state
        moves along.
        """
        if self.granular:
            return
        before, state = self.segments, self.optimizer.state
        self.granular = True
        self._point(self._entries())
        for segment in self.segments:
            for old in before:
                if (
                    old.lane is segment.lane
                    and old.first <= segment.first
                    and segment.last <= old.last
                    and old.param in state
                ):
                    cut = slice(segment.first - old.first, segment.last - old.first)
                    state[segment.param] = {
                        key: value[cut].clone() if _is_elementwise(value, old.param) else _copy(value)
                        for key, value in state[old.param].items()
                    }
        for old in before:
            state.pop(old.param, None)

    # ---- gradients

    @property
    def cleared(self) -> bool:
        """Whether the optimizer holds no gradients (``zero_grad`` has been called, or nothing has been reduced yet).

        Raises:
            LitZeroError: if a gradient that is a copy has been changed: the next backward would add to what it was.
        """
        kept = [segment for segment in self.segments if segment.param.grad is not None]
        for segment in kept:
            assert segment.param.grad is not None
            if segment.copied is not None and segment.param.grad._version != segment.copied:
                raise LitZeroError(
                    "Gradients were changed in place (by zero_grad(set_to_none=False), or by clipping) and then "
                    "another backward followed without a step. In this mode the optimizer sees a copy of them, so the "
                    "change would be lost. Use zero_grad(set_to_none=True), and clip right before the step."
                )
        return not kept

    def attach(self, unreached: set[str]) -> None:
        """Hand the reduced gradients to the optimizer.

        Args:
            unreached: parameters that no rank's loss has reached; they get no gradient, as in one process.

        Raises:
            LitZeroError: if the optimizer's groups hold something else than the segments.
        """
        self._check_groups()
        grads: dict[Lane, torch.Tensor] = {}
        for segment in self.segments:
            if unreached and self._name(segment) in unreached:
                segment.param.grad = None
                continue
            if segment.lane not in grads:
                grads[segment.lane] = segment.lane.master_grad()
            grad = grads[segment.lane]
            segment.param.grad = grad[segment.first : segment.last].view_as(segment.param)
            segment.copied = None if _is_live(segment.lane, grad) else segment.param.grad._version

    def _check_groups(self) -> None:
        held = [param for group in self.optimizer.param_groups for param in group["params"]]
        if len(held) != len(self.segments) or {id(p) for p in held} != {id(s.param) for s in self.segments}:
            raise LitZeroError(
                f"The parameter groups of {type(self.optimizer).__name__} were changed after setup (by "
                "add_param_group, or a finetuning callback that calls it). Ranks would train copies of their own. Give "
                "configure_optimizers all parameters that will ever be trained."
            )

    def drop_gradients(self) -> None:
        """Let go of the gradients that a step has used."""
        for segment in self.segments:
            segment.param.grad = None
        for lane in self._lanes:
            lane.drop_gradients()

    def _name(self, segment: Segment) -> str | None:
        """Return the parameter that a granular segment is part of."""
        position = segment.lane.master_start + segment.first
        return next((e.name for e in segment.lane.layout.entries if e.offset <= position < e.end), None)

    @property
    def has_fp64(self) -> bool:
        """Whether any of its masters is fp64."""
        return any(lane.master_dtype == torch.float64 for lane in self._lanes)

    def grads(self) -> list[torch.Tensor]:
        """Return the gradients of all segments."""
        return [segment.param.grad for segment in self.segments if segment.param.grad is not None]

    def state_tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the optimizer's state that are not single numbers."""
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, torch.Tensor) and value.dim()]

    def own_grads(self) -> list[torch.Tensor]:
        """Return the gradients of the elements that this rank owns; over all ranks every element comes once."""
        grads = []
        for segment in self.segments:
            grad = segment.param.grad
            if grad is None:
                continue
            if segment.lane.row.optimizer is Placement.REPLICATE:
                lo = max(segment.first, segment.lane.start)
                hi = min(segment.last, segment.lane.end)
                if lo >= hi:
                    continue
                grad = grad.view(-1)[lo - segment.first : hi - segment.first]
            grads.append(grad)
        return grads

    # ---- state, parameter by parameter

    def describe(self) -> dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]]:
        """Return, for every parameter with state on this rank, ``({tensor key: dtype}, {scalar key: value})``."""
        found = {}
        for segment, part in self._parts():
            state = self.optimizer.state.get(segment.param)
            if state:
                tensors = {key: value.dtype for key, value in state.items() if _is_elementwise(value, segment.param)}
                found[part.entry.name] = (tensors, {key: value for key, value in state.items() if key not in tensors})
        return found

    def states(
        self, described: dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]], whole_if_replicated: bool
    ) -> list[ParamState]:
        """Return every parameter's state as pieces of this rank.

        Args:
            described: the union of all ranks' ``describe()``.
            whole_if_replicated: a replicated state gives its whole range instead of the rank's own part.
        """
        pieces: dict[str, dict[str, Piece]] = {}
        for segment, part in self._parts():
            lane, entry = segment.lane, part.entry
            lo, hi = max(part.local, segment.first), min(part.local + part.length, segment.last)
            if lane.row.optimizer is Placement.REPLICATE and not whole_if_replicated:
                lo, hi = max(lo, lane.start), min(hi, lane.end)
            if lo >= hi:
                continue
            for key, value in self.optimizer.state.get(segment.param, {}).items():
                if _is_elementwise(value, segment.param):
                    start = lane.master_start + lo - entry.offset
                    data = value.view(-1)[lo - segment.first : hi - segment.first]
                    pieces.setdefault(entry.name, {})[key] = Piece(entry.name, entry.shape, start, data)
        shapes = {entry.name: (entry.shape, lane.device) for lane in self._lanes for entry in lane.layout.entries}
        result = []
        for index, name in enumerate(name for group in self.group_names for name in group):
            if name not in described or name not in shapes:
                continue
            dtypes, scalars = described[name]
            shape, device = shapes[name]
            nothing = {
                key: Piece(name, shape, 0, torch.empty(0, dtype=dtype, device=device)) for key, dtype in dtypes.items()
            }
            result.append(ParamState(index, name, {**nothing, **pieces.get(name, {})}, dict(scalars)))
        return result

    def prepare_states(self, described: dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]]) -> None:
        """Allocate the state that ``described`` tells of, so that ``states`` gives destinations to load into."""
        for segment in self.segments:
            inside = [described.get(part.entry.name) for seg, part in self._parts() if seg is segment]
            if any(not _same(inside[0], other) for other in inside[1:]):
                self.split()  # parameters of one run have taken different numbers of steps
                break
        self.optimizer.state.clear()
        for segment, part in self._parts():
            found = described.get(part.entry.name)
            if found is not None and segment.param not in self.optimizer.state:
                dtypes, scalars = found
                self.optimizer.state[segment.param] = self._empty_state(segment, dtypes, scalars)

    def _empty_state(self, segment: Segment, dtypes: dict[str, torch.dtype], scalars: dict[str, Any]) -> dict[str, Any]:
        """Return zeros for the state tensors of ``segment``, in its dtype as torch does on loading, and the scalars
        where the step wants them.
        """
        group = next(g for g in self.optimizer.param_groups if any(p is segment.param for p in g["params"]))
        on_device = group.get("fused") or group.get("capturable")
        state: dict[str, Any] = {}
        for key, dtype in dtypes.items():
            dtype = segment.param.dtype if dtype.is_floating_point else dtype
            state[key] = torch.zeros_like(segment.param, dtype=dtype, requires_grad=False)
        for key, value in scalars.items():
            value = _copy(value)
            state[key] = value.to(segment.param.device) if on_device and isinstance(value, torch.Tensor) else value
        return state

    def _parts(self) -> Iterable[tuple[Segment, Any]]:
        """Yield every segment with every parameter that has elements in it."""
        for segment in self.segments:
            for part in segment.lane.master_overlaps():
                if part.length and part.local < segment.last and part.local + part.length > segment.first:
                    yield segment, part

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups as torch's ``state_dict`` has them: hyper-parameters, and indices for
        ``params``.
        """
        result, index = [], 0
        for group, names in zip(self.optimizer.param_groups, self.group_names, strict=True):
            result.append(
                {**{k: v for k, v in group.items() if k != "params"}, "params": list(range(index, index + len(names)))}
            )
            index += len(names)
        return result

    def load_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over hyper-parameters from a ``state_dict``'s groups.

        Raises:
            CheckpointError: if the number or size of groups differs.
        """
        came, expected = [len(g["params"]) for g in groups], [len(n) for n in self.group_names]
        if came != expected:
            raise CheckpointError(
                f"The checkpoint's optimizer has parameter groups of {came} parameters, this run's "
                f"configure_optimizers gives {expected}. "
                "Load with the same groups, or load only the weights."
            )
        for mine, theirs in zip(self.optimizer.param_groups, groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})


def _is_live(lane: Lane, grad: torch.Tensor) -> bool:
    """Return whether what is done to ``grad`` is done to all that the next backward will add to."""
    whole = lane.row.optimizer is Placement.REPLICATE or lane.accumulated  # else only one rank's part of a sum to come
    stored = [one.untyped_storage().data_ptr() for one in (lane.grad_full, lane.grad_own) if one is not None]
    return whole and grad.untyped_storage().data_ptr() in stored


def _is_elementwise(value: Any, param: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == param.shape


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return (
        one[0] == other[0] and one[1].keys() == other[1].keys() and all(bool(one[1][k] == other[1][k]) for k in one[1])
    )
