"""Where parameters lie in a flat buffer, and which part of it each rank owns. Integers only; no tensor, no process
group.

One flat buffer holds the parameters that travel together in one dtype. Its length is a multiple of the number of ranks,
and rank ``r`` owns the ``r``-th equal part. A parameter may straddle any number of rank boundaries: shards are cut
between elements, not between parameters, so the padding is at most one alignment unit per rank and per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALIGN_BYTES = 16  # vector loads of every kernel we use want 16-byte aligned starts


@dataclass(frozen=True)
class Entry:
    """One parameter's place in a flat buffer.

    Attributes:
        name: fully-qualified name.
        shape: global shape.
        offset: first element in the flat buffer.
        group: index of the optimizer's parameter group, -1 if no optimizer holds it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    group: int = -1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last element in the flat buffer."""
        return self.offset + self.numel


@dataclass(frozen=True)
class Overlap:
    """The part of one parameter that lies inside a range of the flat buffer.

    Attributes:
        entry: the parameter.
        local: first element, counted from the start of the range.
        start: first element, counted from the start of the flattened parameter.
        length: number of elements; 0 if the parameter does not touch the range.
    """

    entry: Entry
    local: int
    start: int
    length: int


@dataclass(frozen=True)
class FlatLayout:
    """Parameters laid end to end over ``world`` equal shards.

    Attributes:
        entries: the parameters in the order in which they lie.
        world: number of ranks that share the buffer.
        shard_numel: elements per rank.
    """

    entries: tuple[Entry, ...]
    world: int
    shard_numel: int

    @classmethod
    def pack(cls, params: Iterable[tuple[str, tuple[int, ...], int]], world: int, align: int) -> FlatLayout:
        """Lay parameters end to end.

        Args:
            params: ``(name, shape, group)`` in the wanted order; keep equal groups adjacent, so that a group is one
                run.
            world: number of ranks.
            align: every parameter and every shard starts at a multiple of this many elements.
        """
        entries: list[Entry] = []
        end = 0
        for name, shape, group in params:
            entries.append(Entry(name, tuple(shape), end, group))
            end = _round_up(end + math.prod(shape), align)
        return cls(tuple(entries), world, _round_up(-(-end // world), align))

    @property
    def numel(self) -> int:
        """Elements of the whole flat buffer, padding included."""
        return self.shard_numel * self.world

    def shard(self, rank: int) -> tuple[int, int]:
        """Return ``[start, end)`` of ``rank``'s shard in the flat buffer, in elements."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def overlaps(self, start: int, end: int) -> list[Overlap]:
        """Return, for every entry in order, its part inside ``[start, end)`` of the flat buffer (length 0 if none)."""
        found = []
        for entry in self.entries:
            lo, hi = max(entry.offset, start), min(entry.end, end)
            if lo < hi:
                found.append(Overlap(entry, lo - start, lo - entry.offset, hi - lo))
            else:
                found.append(Overlap(entry, 0, 0, 0))
        return found

    def ranges(self, entry: Entry) -> list[tuple[int, int]]:
        """Return the ``[first, last)`` elements of one flattened parameter that each rank's shard holds, ``(0, 0)`` for
        none.
        """
        found = []
        for start, end in map(self.shard, range(self.world)):
            lo, hi = max(entry.offset, start), min(entry.end, end)
            found.append((lo - entry.offset, hi - entry.offset) if lo < hi else (0, 0))
        return found

    def group_runs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return ``(group, first, last)`` runs that cover the parameters of ``[start, end)``.

        Neighbours of one group join into one run, the alignment gaps between them included (gaps stay zero for ever),
        so a run is as long as the group allows. Positions are elements from ``start``. Entries without a group are left
        out.
        """
        runs: list[tuple[int, int, int]] = []
        before = -1  # group of the parameter before this one
        for part in self.overlaps(start, end):
            if part.length == 0:
                continue
            group, first, last = part.entry.group, part.local, part.local + part.length
            if group >= 0:
                if group == before:
                    first = runs.pop()[1]
                runs.append((group, first, last))
            before = group
        return runs


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
