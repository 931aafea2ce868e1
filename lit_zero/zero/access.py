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
from lit_zero.core.keeping import Kept
from lit_zero.zero.binding import Binding, Segment
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.lane import Lane

if TYPE_CHECKING:
    from lit_zero.zero.engine import Engine

_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


class Access:
    """Reads and writes whole parameters of an engine.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def parameter(self, which: str | nn.Parameter) -> torch.Tensor:
        """Return a copy of a parameter's master, in its own shape and dtype (fp32 in mixed modes)."""
        info = self._find(which)
        return self._whole(info, lambda lane: lambda lo, hi: lane.master.part(lo, hi).read(), info.master_dtype)

    def set_parameter(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite a parameter with ``value``, which has its shape and is the same on every rank."""
        info = self._find(which)
        place = self._place(info)
        self._write(info, value, lambda lane: lambda lo, hi: [(0, lane.master.part(lo, hi))])
        self._engine.refresh([] if place is None else [place[0]])

    def gradient(self, which: str | nn.Parameter) -> torch.Tensor | None:
        """Return a copy of a parameter's reduced gradient (the mean over ranks, times the loss scale as long as that
        has not been taken off), ``None`` if it has none.
        """
        info = self._find(which)
        segments = self._segments(info, "gradient")
        if not self._anywhere(any(segment.param.grad is not None for segment in segments)):
            return None
        return self._whole(info, lambda lane: lambda lo, hi: _read(segments, lo, hi, _grad), info.master_dtype)

    def set_gradient(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite a parameter's gradient, as the optimizer will see it.

        Raises:
            LitZeroError: if it has no gradient.
        """
        info = self._find(which)
        segments = self._segments(info, "gradient")
        if not self._anywhere(any(segment.param.grad is not None for segment in segments)):
            raise LitZeroError(f"{info.name!r} has no gradient to overwrite; run a backward first.")
        self._write(info, value, lambda lane: lambda lo, hi: _cut(segments, lo, hi, _grad))

    def state(self, which: str | nn.Parameter, key: str) -> torch.Tensor:
        """Return a copy of an element-wise optimizer state (``"exp_avg"``, ...), in the parameter's shape.

        Raises:
            LitZeroError: if the optimizer keeps no such state, or has not stepped yet.
        """
        info = self._find(which)
        segments = self._segments(info, "state")
        dtype = self._state_dtype(info, segments, key)
        read = self._state_reader(key)
        return self._whole(info, lambda lane: lambda lo, hi: _read(segments, lo, hi, read), dtype)

    def set_state(self, which: str | nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Overwrite an element-wise optimizer state."""
        info = self._find(which)
        segments = self._segments(info, "state")
        self._state_dtype(info, segments, key)
        read = self._state_reader(key)
        self._write(info, value, lambda lane: lambda lo, hi: _cut(segments, lo, hi, read))

    # ---- where things are

    def _find(self, which: str | nn.Parameter) -> ParamInfo:
        self._engine.join()
        name = self._engine.aliases.get(which, which) if isinstance(which, str) else None
        infos = self._engine.infos
        for info in infos:
            if info.name == name or info.param is which:
                return info
        if name is None:
            raise LitZeroError("This tensor is not a parameter of the module that the strategy trains.")
        raise LitZeroError(f"There is no parameter {name!r}. {did_you_mean(name, [info.name for info in infos])}")

    def _place(self, info: ParamInfo) -> tuple[Lane, int] | None:
        """Return the lane of a parameter and its number there, ``None`` if another rank of the pipeline holds it."""
        for lane in self._engine.lanes:
            for index, each in enumerate(lane.infos):
                if each is info:
                    return lane, index
        return None

    def _binding(self, info: ParamInfo) -> Binding | None:
        return self._engine.bindings[info.optimizer] if 0 <= info.optimizer < len(self._engine.bindings) else None

    def _segments(self, info: ParamInfo, what: str) -> list[Segment]:
        """Return the optimizer's segments on this rank that hold part of a parameter, each with an empty one for a
        rank that has none.
        """
        binding = self._binding(info)
        if binding is None:
            raise LitZeroError(f"{info.name!r} is in no optimizer, so it has no {what}: it is frozen, or was left out.")
        place = self._place(info)
        return [segment for segment in binding.segments if place is not None and segment.lane is place[0]]

    def _states(self, segment: Segment) -> dict[str, torch.Tensor]:
        found = self._engine.bindings[segment.lane.optimizer].optimizer.state.get(segment.param, {})
        return {
            key: value
            for key, value in found.items()
            if isinstance(value, torch.Tensor) and value.dim() and value.shape == segment.param.shape
        }

    def _state_dtype(self, info: ParamInfo, segments: list[Segment], key: str) -> torch.dtype:
        """Return the dtype of a state, which some rank has.

        Raises:
            LitZeroError: if none has it.
        """
        here = next((self._states(segment)[key].dtype for segment in segments if key in self._states(segment)), None)
        number = self._highest(0 if here is None else 1 + _DTYPES.index(here))
        if number == 0:
            found = sorted({known for segment in segments for known in self._states(segment)})
            raise LitZeroError(
                f"The optimizer keeps no state {key!r} of {info.name!r}"
                + (f". {did_you_mean(key, found)}" if found else "; it has not stepped yet, or keeps none.")
            )
        return _DTYPES[number - 1]

    def _state_reader(self, key: str) -> Callable[[Segment], Kept]:
        return lambda segment: segment.values(key, self._states(segment)[key])

    # ---- whole and part

    def _range(self, lane: Lane, index: int) -> tuple[int, int]:
        """Return the elements of a parameter that this rank answers for, counted from the start of its master."""
        entry = lane.layout.entries[index]
        lo, hi = max(entry.offset, lane.start), min(entry.end, lane.end)
        return lo - lane.master_start, max(lo, hi) - lane.master_start

    def _whole(
        self, info: ParamInfo, reader: Callable[[Lane], Callable[[int, int], torch.Tensor]], dtype: torch.dtype
    ) -> torch.Tensor:
        place = self._place(info)
        value = torch.zeros(info.shape, dtype=dtype, device=self._engine.device)
        if place is not None:
            value = self._together(*place, reader(place[0]), dtype)
        positions = self._engine.everyone.size // self._engine.exchange.size
        if len(info.holders) == positions:  # every rank has it
            return value
        # To those that hold nothing of it: they send zeros, and the highest byte of all is the holders'.
        whole: torch.Tensor = self._engine.everyone.maximum(value.contiguous().view(-1).view(torch.uint8))
        return whole.view(dtype).view(info.shape)

    def _together(
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
        info: ParamInfo,
        value: torch.Tensor,
        cutter: Callable[[Lane], Callable[[int, int], list[tuple[int, Kept]]]],
    ) -> None:
        if tuple(value.shape) != tuple(info.shape):
            raise LitZeroError(
                f"{info.name!r} has shape {tuple(info.shape)}, but the new value has shape {tuple(value.shape)}."
            )
        place = self._place(info)
        if place is None:
            return
        lane, index = place
        entry = lane.layout.entries[index]
        flat = value.detach().reshape(-1)
        lo = max(entry.offset, lane.master_start)
        hi = min(entry.end, lane.master_end)
        if lo >= hi:
            return
        for start, piece in cutter(lane)(lo - lane.master_start, hi - lane.master_start):
            first = lo - entry.offset + start
            piece.write(0, flat[first : first + piece.numel])

    def _anywhere(self, here: bool) -> bool:
        """Return whether it holds on any rank."""
        return bool(self._highest(int(here)))

    def _highest(self, number: int) -> int:
        """Return the highest number of all ranks, each below 256."""
        flag = torch.tensor([number], dtype=torch.uint8, device=self._engine.device)
        return int(self._engine.everyone.maximum(flag).item())


def _grad(segment: Segment) -> Kept:
    grad = segment.param.grad
    assert grad is not None
    return Kept(grad.view(-1))


def _cut(segments: list[Segment], lo: int, hi: int, read: Callable[[Segment], Kept]) -> list[tuple[int, Kept]]:
    """Return the parts of ``[lo, hi)`` of the lane's master that segments hold, each with its start in the range."""
    parts = []
    for segment in segments:
        first, last = max(lo, segment.first), min(hi, segment.last)
        if first < last:
            parts.append((first - lo, read(segment).part(first - segment.first, last - segment.first)))
    return parts


def _read(segments: list[Segment], lo: int, hi: int, read: Callable[[Segment], Kept]) -> torch.Tensor:
    return torch.cat([part.read() for _, part in _cut(segments, lo, hi, read)])
