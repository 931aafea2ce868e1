"""Who works on which tensor: integers."""

from __future__ import annotations

import itertools

from lit_zero.core.layout import FlatLayout
from lit_zero.core.ownership import Ownership


def block(dim: int, world: int, layers: int) -> list[list[tuple[int, int]]]:
    """Return what each rank holds of the matrices of transformer blocks."""
    shapes = [
        ("qkv", (3 * dim, dim), 0),
        ("out", (dim, dim), 0),
        ("up", (4 * dim, dim), 0),
        ("down", (dim, 4 * dim), 0),
    ]
    layout = FlatLayout.pack(shapes, world, 4)
    return [layout.ranges(entry) for _ in range(layers) for entry in layout.entries]


def test_ranges_tile_every_parameter():
    layout = FlatLayout.pack([("a", (5, 3), 0), ("b", (2,), 0), ("c", (7, 7), 0)], 4, 4)
    for entry in layout.entries:
        held = [each for each in layout.ranges(entry) if each[0] < each[1]]
        assert held[0][0] == 0 and held[-1][1] == entry.numel
        assert all(before[1] == after[0] for before, after in itertools.pairwise(held))
    assert layout.ranges(layout.entries[1]) == [(0, 2), (0, 0), (0, 0), (0, 0)]


def test_what_lies_on_one_rank_stays_there():
    plan = Ownership.of([[(0, 10), (0, 0)], [(0, 3), (3, 9)], [(0, 0), (0, 4)]])
    assert (plan.owners[0], plan.owners[2]) == (0, 1)
    assert plan.given(0, 1) + plan.given(1, 0) == [1], "the one that a boundary cuts travels, one way"


def test_the_same_block_many_times_is_shared_out_evenly():
    for world in (2, 3, 4, 8):
        plan = Ownership.of(block(16, world, layers=24))
        work = [sum(plan.length(n, r) for n in plan.owned(rank) for r in range(world)) for rank in range(world)]
        assert max(work) <= 1.15 * sum(work) / world, (world, work)
        assert sorted(number for rank in range(world) for number in plan.owned(rank)) == list(range(4 * 24))


def test_less_travels_than_a_gather_of_everything_would_send():
    for world in (2, 4):
        ranges = block(16, world, layers=24)
        plan = Ownership.of(ranges)
        total = sum(last - first for parts in ranges for first, last in parts)
        sent = sum(plan.length(n, s) for s in range(world) for to in range(world) for n in plan.given(s, to))
        assert sent < 0.6 * total, "where every shard has whole matrices and parts of others"
        assert plan.given(1, 1) == []


def test_nothing_is_owned_by_nobody():
    assert Ownership.of([]).owners == ()
    assert Ownership.of([[(0, 0), (0, 0)]]).owners == (0,), "a tensor without elements"
