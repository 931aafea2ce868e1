"""Which rank works on which tensor, where each holds but parts of them. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]  # first element of a flattened tensor, and one past the last; equal for nothing


@dataclass(frozen=True)
class Ownership:
    """Tensors that are divided over ranks, and the one rank that each is brought to.

    Attributes:
        ranges: for every tensor the part that each rank holds; together they tile it, or each is all of it.
        owners: for every tensor its rank.
    """

    ranges: tuple[tuple[Range, ...], ...]
    owners: tuple[int, ...]

    @classmethod
    def of(cls, ranges: Sequence[Sequence[Range]]) -> Ownership:
        """Choose owners: of the ranks that hold some of a tensor the one with least to do so far.

        Tensors with the least choice come first, large ones before small ones. What lies on one rank stays there, so
        only tensors that a boundary cuts travel, and since shards are equally large, so is the work. Ranks that compute
        this by themselves agree.
        """
        load = [0] * (len(ranges[0]) if ranges else 0)
        owners = [0] * len(ranges)
        sizes = [sum(last - first for first, last in parts) for parts in ranges]
        holders = [[rank for rank, (first, last) in enumerate(parts) if first < last] or [0] for parts in ranges]
        for number in sorted(range(len(ranges)), key=lambda n: (len(holders[n]), -sizes[n], n)):
            held = [last - first for first, last in ranges[number]]
            owner = min(holders[number], key=lambda rank: (load[rank], -held[rank], rank))
            owners[number] = owner
            load[owner] += sizes[number]
        return cls(tuple(tuple(parts) for parts in ranges), tuple(owners))

    def given(self, source: int, to: int) -> list[int]:
        """Return the tensors of which rank ``source`` has a part that rank ``to`` owns, in order; nothing between a
        rank and itself.
        """
        if source == to:
            return []
        return [number for number, owner in enumerate(self.owners) if owner == to and self.length(number, source)]

    def owned(self, rank: int) -> list[int]:
        """Return the tensors that a rank owns, in order."""
        return [number for number, owner in enumerate(self.owners) if owner == rank]

    def cut(self, number: int, rank: int) -> slice:
        """Return which elements of a tensor a rank holds."""
        return slice(*self.ranges[number][rank])

    def length(self, number: int, rank: int) -> int:
        """Return how many elements of a tensor a rank holds."""
        first, last = self.ranges[number][rank]
        return last - first
