"""Many flat tensors as one: the table through which a single launch walks them.

A launch has one program for each block of each segment. Program ``i`` finds in ``owners[i]`` whose block it is, and in
that row of ``rows`` where the segment's tensors lie. Hyper-parameters lie in a small table of their own, a row for each
group, since they change from step to step while addresses mostly stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

_T = TypeVar("_T")

ALIGN = 16  # bytes: what a GPU loads at once
HEAD = 5  # numbers of a row before its addresses: elements, group, first block, aligned, address of the step count
# Rows of tables that are kept: of many small launches each keeps its own, and gradients may come to lie in a few places
# by turns.
_KEPT = 1 << 14


@dataclass(frozen=True)
class Table:
    """What a launch walks through.

    Attributes:
        rows: int64 ``[segments, HEAD + 2 * tensors]``. Each tensor has two addresses, 0 for none: that of its values,
            and that of what belongs to them (the scales of 8-bit values, the remainder of a split master).
        owners: int32 ``[blocks]``, the segment of each block.
        counters: int32 ``[segments]``, zeros between launches: how many blocks of a segment are done.
    """

    rows: torch.Tensor
    owners: torch.Tensor
    counters: torch.Tensor

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.rows.shape[1]


@dataclass(frozen=True)
class Row:
    """A segment as a table lists it.

    Attributes:
        group: number of its group.
        step: address of its step count, 0 for none.
        tensors: its tensors, each with what belongs to it.
        numel: elements of each.
    """

    group: int
    step: int
    numel: int
    tensors: tuple[tuple[int, int], ...]

    @property
    def aligned(self) -> bool:
        """Whether all tensors begin where a GPU can load several elements at once."""
        return all(address % ALIGN == 0 for pair in self.tensors for address in pair)


class Tables:
    """Makes tables, and keeps the last ones: they are uploaded again only when an address or a number has changed."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
        self._owners: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()  # long, and the same by turns
        self._numbers: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()
        self._seeds: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()

    def table(self, rows: Sequence[Row], block: int, device: torch.device) -> Table:
        """Return the table of ``rows``, for blocks of ``block`` elements; empty segments have no block."""
        key = (block, device, *rows)
        if key not in self._tables:
            blocks = (device, *(-(-row.numel // block) for row in rows))
            if blocks not in self._owners:
                self._owners[blocks] = _owners(blocks[1:], device)
            self._tables[key] = _table(rows, block, _kept(self._owners, blocks))
        return _kept(self._tables, key)

    def numbers(self, groups: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
        """Return the hyper-parameters of all groups, fp32 ``[groups, numbers]`` on the device."""
        key = (device, *map(tuple, groups))
        if key not in self._numbers:
            self._numbers[key] = _upload(torch.tensor(groups, dtype=torch.float32, device="cpu"), device)
        return _kept(self._numbers, key)

    def seeds(self, seeds: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
        """Return small whole numbers, int32 ``[segments, numbers]`` on the device."""
        key = (device, *map(tuple, seeds))
        if key not in self._seeds:
            self._seeds[key] = _upload(torch.tensor(seeds, dtype=torch.int32, device="cpu"), device)
        return _kept(self._seeds, key)


def _table(rows: Sequence[Row], block: int, owners: torch.Tensor) -> Table:
    lines, first, device = [], 0, owners.device
    for row in rows:
        lines.append([row.numel, row.group, first, int(row.aligned), row.step, *sum(row.tensors, ())])
        first += -(-row.numel // block)
    return Table(
        _upload(torch.tensor(lines, dtype=torch.int64, device="cpu"), device),
        owners,
        torch.zeros(len(rows), dtype=torch.int32, device=device),
    )


def _owners(blocks: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the segment of each block; made on the device, since it is long."""
    sizes = _upload(torch.tensor(blocks, dtype=torch.int64, device="cpu"), device)
    numbers = torch.arange(len(blocks), dtype=torch.int32, device=device)
    return torch.repeat_interleave(numbers, sizes, output_size=sum(blocks))


def _upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device; nobody waits for it: torch uses pinned memory anew only when it has gone."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _kept(found: OrderedDict[tuple[object, ...], _T], key: tuple[object, ...]) -> _T:
    if next(reversed(found)) != key:
        found.move_to_end(key)
    while len(found) > 1 and len(found) * len(key) > _KEPT:  # keys are about as long as each other
        found.popitem(last=False)
    return found[key]
