"""What an optimizer that looks at whole parameters is told of the segments that it holds in their place.

A step of such an optimizer takes a sum of a small tensor (LAMB), or two rounds of messages (Muon): parts of matrices to
the ranks that own them, and parts of the results back. Where every rank holds all, only the results travel, and the
work is shared out all the same. All of it goes over the ranks that divide the parameters, so
each position of a pipeline does it for what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lit_zero.comm.exchange import Exchange, Swap
from lit_zero.core.layout import Entry
from lit_zero.core.ownership import Ownership
from lit_zero.core.shards import Shards
from lit_zero.zero.policy import Placement
from lit_zero.zero.segment import Segment


class SegmentShards(Shards):
    """Answers for one optimizer.

    Args:
        segments: returns what the optimizer holds now, one segment for each parameter.
        exchange: the ranks that divide the parameters.
    """

    def __init__(self, segments: Callable[[], Sequence[Segment]], exchange: Exchange) -> None:
        self._segments, self._exchange = segments, exchange
        self._found: dict[torch.Tensor, Segment] = {}
        self._last: tuple[list[Segment], Ownership] | None = None

    def shape(self, param: torch.Tensor) -> tuple[int, ...]:
        return _entry(self._segment(param)).shape

    def own(self, param: torch.Tensor) -> slice:
        return self._segment(param).own

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return self._exchange.sum_in_rank_order(values)

    def collect(self, params: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        if not params or self._exchange.size == 1:
            return super().collect(params, parts)
        plan, rank, ranks = self._plan(params), self._exchange.rank, range(self._exchange.size)
        if self._whole(params[0]):
            return {number: parts[number].view(self.shape(params[number])) for number in plan.owned(rank)}
        outgoing = [[parts[number].view(-1) for number in plan.given(rank, to)] for to in ranks]
        lengths = [[plan.length(number, source) for number in plan.given(source, rank)] for source in ranks]
        incoming = self._swap(outgoing, lengths, parts[0].dtype, parts[0].device)
        wholes = {}
        for number in plan.owned(rank):
            shape = self.shape(params[number])
            if plan.length(number, rank) == math.prod(shape):
                wholes[number] = parts[number].view(shape)
                continue
            wholes[number] = parts[number].new_empty(shape)
            wholes[number].view(-1)[plan.cut(number, rank)] = parts[number].view(-1)
        for source in ranks:
            for number, part in zip(plan.given(source, rank), incoming[source], strict=True):
                wholes[number].view(-1)[plan.cut(number, source)] = part
        return wholes

    def spread(
        self, params: Sequence[torch.Tensor], wholes: Mapping[int, torch.Tensor], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        if not params or self._exchange.size == 1:
            return super().spread(params, wholes, dtype)
        plan, rank, ranks = self._plan(params), self._exchange.rank, range(self._exchange.size)
        outgoing = [[wholes[number].view(-1)[plan.cut(number, to)] for number in plan.given(to, rank)] for to in ranks]
        lengths = [[plan.length(number, rank) for number in plan.given(rank, owner)] for owner in ranks]
        incoming = self._swap(outgoing, lengths, dtype, params[0].device)
        parts = {number: wholes[number].view(-1)[plan.cut(number, rank)] for number in plan.owned(rank)}
        for owner in ranks:
            parts.update(zip(plan.given(rank, owner), incoming[owner], strict=True))
        nothing = torch.empty(0, dtype=dtype, device=params[0].device)
        return [parts.get(number, nothing).view(param.shape) for number, param in enumerate(params)]

    def _swap(
        self,
        outgoing: Sequence[Sequence[torch.Tensor]],
        lengths: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Send flat tensors to every rank, in one message each; return those of each rank, of the given lengths."""
        sent = [torch.cat([torch.empty(0, dtype=dtype, device=device), *each]) for each in outgoing]
        received = [torch.empty(sum(each), dtype=dtype, device=device) for each in lengths]
        self._exchange.all_to_all(Swap(sent, received)).wait()
        return [whole.split(list(each)) for whole, each in zip(received, lengths, strict=True)]

    def _whole(self, param: torch.Tensor) -> bool:
        """Return whether every rank holds all of a parameter; then so it is with the others."""
        return self._segment(param).lane.row.optimizer is Placement.REPLICATE

    def _plan(self, params: Sequence[torch.Tensor]) -> Ownership:
        """Return who owns which of ``params``; the same as last time if they are the same."""
        segments = [self._segment(param) for param in params]
        if self._last is None or self._last[0] != segments:
            self._last = segments, Ownership.of([self._ranges(segment) for segment in segments])
        return self._last[1]

    def _ranges(self, segment: Segment) -> list[tuple[int, int]]:
        entry = _entry(segment)
        if self._whole(segment.param):
            return [(0, entry.numel)] * self._exchange.size
        return segment.lane.layout.ranges(entry)

    def _segment(self, param: torch.Tensor) -> Segment:
        if param not in self._found:
            self._found = {segment.param: segment for segment in self._segments()}
        return self._found[param]


def _entry(segment: Segment) -> Entry:
    assert segment.entry is not None, "such an optimizer has a segment for each parameter"
    return segment.entry
