"""The state of the user's optimizer, parameter by parameter: what a checkpoint saves and loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lit_zero.core.errors import CheckpointError
from lit_zero.core.keeping import Content, Kept
from lit_zero.core.piece import ParamState, Piece
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.lane import Lane
from lit_zero.zero.segment import Segment, copied_value, is_elementwise, same_state


class States:
    """What can be asked of an optimizer's state.

    Attributes:
        optimizer: the user's.
        segments: what its groups hold.
        group_names: for every group, the names of the parameters that it was given.
    """

    optimizer: torch.optim.Optimizer
    segments: list[Segment]
    group_names: list[list[str]]
    _lanes: Sequence[Lane]
    _absent: Sequence[ParamInfo]

    def split(self) -> None:
        """Give every parameter a segment of its own."""
        raise NotImplementedError

    def content_of(self, segment: Segment, key: str) -> Content:
        """Return what the optimizer's state ``key`` holds."""
        raise NotImplementedError

    def state_tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the optimizer's state that lie on the device and are not single numbers."""
        found: list[torch.Tensor] = []
        for segment in self.segments:
            if segment.lane.keeper.away:
                continue
            for key, value in self.optimizer.state.get(segment.param, {}).items():
                if key in segment.kept:
                    found += segment.kept[key].tensors()
                elif isinstance(value, torch.Tensor) and value.dim():
                    found.append(value)
        return found

    def kept(self) -> list[Kept]:
        """Return the arrays of the optimizer's state that live elsewhere."""
        return [kept for segment in self.segments if segment.lane.keeper.away for kept in segment.kept.values()]

    def describe(self) -> dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]]:
        """Return, for every parameter with state on this rank, ``({tensor key: dtype}, {scalar key: value})``."""
        found = {}
        for segment, part in self._parts():
            state = self.optimizer.state.get(segment.param)
            if state:
                tensors = {key: value.dtype for key, value in state.items() if is_elementwise(value, segment.param)}
                found[part.entry.name] = (tensors, {key: value for key, value in state.items() if key not in tensors})
        return found

    def states(
        self, described: dict[str, tuple[dict[str, torch.dtype], dict[str, Any]]], to_load: bool
    ) -> list[ParamState]:
        """Return every parameter's state as pieces of this rank.

        Args:
            described: the union of all ranks' ``describe()``.
            to_load: all that this rank holds, instead of what it answers for.
        """
        pieces: dict[str, dict[str, Piece]] = {}
        for segment, part in self._parts():
            lane, entry = segment.lane, part.entry
            lo, hi = max(part.local, segment.first), min(part.local + part.length, segment.last)
            first, last = (bound - lane.master_start for bound in lane.answers_for(to_load))
            lo, hi = max(lo, first), min(hi, last)
            if lo >= hi:
                continue
            for key, value in self.optimizer.state.get(segment.param, {}).items():
                if is_elementwise(value, segment.param):
                    start = lane.master_start + lo - entry.offset
                    held = segment.values(key, value).part(lo - segment.first, hi - segment.first)
                    data = held.read() if held.live else held
                    pieces.setdefault(entry.name, {})[key] = Piece(entry.name, entry.shape, start, data)
        shapes = {info.name: (info.shape, info.param.device) for info in self._absent}
        shapes |= {entry.name: (entry.shape, lane.device) for lane in self._lanes for entry in lane.layout.entries}
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
            if any(not same_state(inside[0], other) for other in inside[1:]):
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
            if segment.lane.keeper.walks:
                state[key] = segment.keep(key, dtype, self.content_of(segment, key))
            else:
                state[key] = torch.zeros_like(segment.param, dtype=dtype, requires_grad=False)
        for key, value in scalars.items():
            value = copied_value(value)
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
