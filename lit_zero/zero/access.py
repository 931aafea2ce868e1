"""Single parameters, whole: their values, gradients and optimizer states, whatever is sharded.

Every function is called by all ranks together and gives every rank the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_zero.comm.exchange import Gather
from lit_zero.core.errors import LitZeroError, did_you_mean
from lit_zero.zero.binding import Binding, Segment
from lit_zero.zero.lane import Lane

if TYPE_CHECKING:
    from lit_zero.zero.engine import Engine


class Access:
    """Reads and writes whole parameters of an engine.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def parameter(self, which: str | nn.Parameter) -> torch.Tensor:
        """Return a copy of a parameter's master, in its own shape and dtype (fp32 in mixed modes)."""
        lane, index = self._find(which)
        return self._whole(lane, index, lambda lo, hi: lane.master[lo:hi], lane.master_dtype)

    def set_parameter(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite a parameter with ``value``, which has its shape and is the same on every rank."""
        lane, index = self._find(which)
        self._write(lane, index, value, lambda lo, hi: lane.master[lo:hi])
        self._engine.refresh([lane])

    def gradient(self, which: str | nn.Parameter) -> torch.Tensor | None:
        """Return a copy of a parameter's reduced gradient (the mean over ranks, times the loss scale as long as that
        has not been taken off), ``None`` if it has none.
        """
        lane, index = self._find(which)
        segments = self._segments(lane, index, "gradient")
        if not self._anywhere(any(segment.param.grad is not None for segment in segments)):
            return None
        return self._whole(lane, index, lambda lo, hi: _read(segments, lo, hi, _grad), lane.master_dtype)

    def set_gradient(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite a parameter's gradient, as the optimizer will see it.

        Raises:
            LitZeroError: if it has no gradient.
        """
        lane, index = self._find(which)
        segments = self._segments(lane, index, "gradient")
        if not self._anywhere(any(segment.param.grad is not None for segment in segments)):
            raise LitZeroError(f"{lane.infos[index].name!r} has no gradient to overwrite; run a backward first.")
        self._write(lane, index, value, lambda lo, hi: _cut(segments, lo, hi, _grad))

    def state(self, which: str | nn.Parameter, key: str) -> torch.Tensor:
        """Return a copy of an element-wise optimizer state (``"exp_avg"``, ...), in the parameter's shape.

        Raises:
            LitZeroError: if the optimizer keeps no such state, or has not stepped yet.
        """
        lane, index = self._find(which)
        segments = self._segments(lane, index, "state")
        read = self._state_reader(lane, index, key)
        dtype = next((self._states(segment)[key].dtype for segment in segments if key in self._states(segment)), None)
        return self._whole(lane, index, lambda lo, hi: _read(segments, lo, hi, read), dtype or lane.master_dtype)

    def set_state(self, which: str | nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Overwrite an element-wise optimizer state."""
        lane, index = self._find(which)
        segments = self._segments(lane, index, "state")
        read = self._state_reader(lane, index, key)
        self._write(lane, index, value, lambda lo, hi: _cut(segments, lo, hi, read))

    # ---- where things are

    def _find(self, which: str | nn.Parameter) -> tuple[Lane, int]:
        name = self._engine.aliases.get(which, which) if isinstance(which, str) else None
        known = []
        for lane in self._engine.lanes:
            for index, info in enumerate(lane.infos):
                if info.name == name or info.param is which:
                    return lane, index
                known.append(info.name)
        if name is None:
            raise LitZeroError("This tensor is not a parameter of the module that the strategy trains.")
        raise LitZeroError(f"There is no parameter {name!r}. {did_you_mean(name, known)}")

    def _binding(self, lane: Lane) -> Binding | None:
        return self._engine.bindings[lane.optimizer] if 0 <= lane.optimizer < len(self._engine.bindings) else None

    def _segments(self, lane: Lane, index: int, what: str) -> list[Segment]:
        """Return the optimizer's segments on this rank that hold part of a parameter, each with an empty one for a
        rank that has none.
        """
        binding = self._binding(lane)
        if binding is None:
            name = lane.infos[index].name
            raise LitZeroError(f"{name!r} is in no optimizer, so it has no {what}: it is frozen, or was left out.")
        return [segment for segment in binding.segments if segment.lane is lane]

    def _states(self, segment: Segment) -> dict[str, torch.Tensor]:
        binding = self._binding(segment.lane)
        assert binding is not None
        found = binding.optimizer.state.get(segment.param, {})
        return {
            key: value
            for key, value in found.items()
            if isinstance(value, torch.Tensor) and value.dim() and value.shape == segment.param.shape
        }

    def _state_reader(self, lane: Lane, index: int, key: str) -> Callable[[Segment], torch.Tensor]:
        segments = self._segments(lane, index, "state")
        here = any(key in self._states(segment) for segment in segments)
        if not self._anywhere(here):
            found = sorted({known for segment in segments for known in self._states(segment)})
            raise LitZeroError(
                f"The optimizer keeps no state {key!r} of {lane.infos[index].name!r}"
                + (f". {did_you_mean(key, found)}" if found else "; it has not stepped yet, or keeps none.")
            )
        return lambda segment: self._states(segment)[key].view(-1)

    # ---- whole and part

    def _range(self, lane: Lane, index: int) -> tuple[int, int]:
        """Return the elements of a parameter that this rank answers for, counted from the start of its master."""
        entry = lane.layout.entries[index]
        lo, hi = max(entry.offset, lane.start), min(entry.end, lane.end)
        return lo - lane.master_start, max(lo, hi) - lane.master_start

    def _whole(
        self, lane: Lane, index: int, read: Callable[[int, int], torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        exchange, entry = self._engine.exchange, lane.layout.entries[index]
        own = torch.zeros(lane.shard_numel, dtype=dtype, device=lane.device)
        lo, hi = self._range(lane, index)
        shift = lane.start - lane.master_start
        if lo < hi:
            own[lo - shift : hi - shift].copy_(read(lo, hi))
        full = torch.zeros(lane.numel, dtype=dtype, device=lane.device)
        exchange.all_gather([Gather(full, own)]).wait()
        return full[entry.offset : entry.end].view(entry.shape).clone()

    def _write(
        self,
        lane: Lane,
        index: int,
        value: torch.Tensor,
        cut: Callable[[int, int], list[tuple[int, torch.Tensor]] | torch.Tensor],
    ) -> None:
        entry = lane.layout.entries[index]
        if tuple(value.shape) != tuple(entry.shape):
            raise LitZeroError(
                f"{entry.name!r} has shape {tuple(entry.shape)}, but the new value has shape {tuple(value.shape)}."
            )
        flat = value.detach().reshape(-1).to(lane.device)
        lo = max(entry.offset, lane.master_start)
        hi = min(entry.end, lane.master_end)
        if lo >= hi:
            return
        found = cut(lo - lane.master_start, hi - lane.master_start)
        pieces = [(0, found)] if isinstance(found, torch.Tensor) else found
        for start, piece in pieces:
            first = lo - entry.offset + start
            piece.copy_(flat[first : first + piece.numel()])

    def _anywhere(self, here: bool) -> bool:
        """Return whether it holds on any rank."""
        flag = torch.tensor([here], dtype=torch.uint8, device=self._engine.device)
        return bool(self._engine.everyone.maximum(flag).item())


def _grad(segment: Segment) -> torch.Tensor:
    grad = segment.param.grad
    assert grad is not None
    return grad.view(-1)


def _cut(
    segments: list[Segment], lo: int, hi: int, read: Callable[[Segment], torch.Tensor]
) -> list[tuple[int, torch.Tensor]]:
    """Return the parts of ``[lo, hi)`` of the lane's master that segments hold, each with its start in the range."""
    parts = []
    for segment in segments:
        first, last = max(lo, segment.first), min(hi, segment.last)
        if first < last:
            parts.append((first - lo, read(segment)[first - segment.first : last - segment.first]))
    return parts


def _read(segments: list[Segment], lo: int, hi: int, read: Callable[[Segment], torch.Tensor]) -> torch.Tensor:
    return torch.cat([part for _, part in _cut(segments, lo, hi, read)])
