"""Flat layouts on many random shapes: nothing is lost, nothing lies twice, everything is aligned."""

from __future__ import annotations

import math
import random

import pytest

from lit_zero.core.layout import FlatLayout

WORLDS = (1, 2, 3, 4, 7, 16)
ALIGNS = (1, 4, 8)


def random_layout(seed: int) -> FlatLayout:
    rng = random.Random(seed)
    shapes = [
        tuple(rng.choice((1, 2, 3, 5, 8, 17)) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 9))
    ]
    groups = sorted(rng.randint(-1, 2) for _ in shapes)
    named = [(f"p{number}", shape, group) for number, (shape, group) in enumerate(zip(shapes, groups, strict=True))]
    return FlatLayout.pack(named, rng.choice(WORLDS), rng.choice(ALIGNS))


@pytest.fixture(params=range(60))
def layout(request: pytest.FixtureRequest) -> FlatLayout:
    return random_layout(request.param)


def align_of(layout: FlatLayout) -> int:
    """Return the largest alignment that the layout keeps."""
    return math.gcd(layout.shard_numel, *(entry.offset for entry in layout.entries))


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_parameter_and_every_shard_starts_aligned(world, align):
    layout = FlatLayout.pack([("a", (3, 5), 0), ("b", (), 0), ("c", (7,), 1)], world, align)
    assert align_of(layout) % align == 0


def test_shards_tile_the_buffer(layout):
    ends = 0
    for rank in range(layout.world):
        start, end = layout.shard(rank)
        assert (start, end - start) == (ends, layout.shard_numel)
        ends = end
    assert ends == layout.numel


def test_entries_follow_one_another_without_overlap(layout):
    end = 0
    for entry in layout.entries:
        assert entry.offset >= end
        assert entry.end - entry.offset == entry.numel == math.prod(entry.shape)
        end = entry.end
    assert end <= layout.numel


@pytest.mark.parametrize("seed", range(60))
def test_padding_is_at_most_one_alignment_unit_per_parameter_and_rank(seed):
    rng = random.Random(seed)
    world, align = rng.choice(WORLDS), rng.choice(ALIGNS)
    sizes = [rng.randint(1, 40) for _ in range(rng.randint(1, 9))]
    layout = FlatLayout.pack([(str(i), (n,), 0) for i, n in enumerate(sizes)], world, align)
    assert 0 <= layout.numel - sum(sizes) <= (align - 1) * len(sizes) + world * align - 1


def test_overlaps_with_the_shards_tile_every_entry(layout):
    parts = {entry.name: [] for entry in layout.entries}
    for rank in range(layout.world):
        start, end = layout.shard(rank)
        overlaps = layout.overlaps(start, end)
        assert [part.entry for part in overlaps] == list(layout.entries), "one for every entry, in order"
        for part in overlaps:
            if part.length:
                assert start + part.local == part.entry.offset + part.start, "both counts mean the same element"
                assert part.local + part.length <= end - start
                parts[part.entry.name].append((part.start, part.length))
    for entry in layout.entries:
        end = 0
        for start, length in parts[entry.name]:
            assert start == end
            end = start + length
        assert end == entry.numel


def test_an_entry_outside_the_range_overlaps_by_nothing():
    layout = FlatLayout.pack([("a", (4,), 0), ("b", (4,), 0)], 2, 4)
    first, second = layout.overlaps(*layout.shard(1))
    assert (first.length, second.length, second.local, second.start) == (0, 4, 0, 0)


def test_group_runs_cover_exactly_the_grouped_parameters(layout):
    for rank in range(layout.world):
        start, end = layout.shard(rank)
        runs = layout.group_runs(start, end)
        group_of = {}
        for group, first, last in runs:
            assert 0 <= first < last <= end - start
            for position in range(start + first, start + last):
                assert position not in group_of, "runs do not overlap"
                group_of[position] = group
        wanted = {
            position: entry.group
            for entry in layout.entries
            for position in range(max(entry.offset, start), min(entry.end, end))
        }
        for position, group in wanted.items():
            assert group_of.get(position, -1) == group
        gaps = set(group_of) - set(wanted)
        inside = {p for entry in layout.entries for p in range(entry.offset, entry.end)}
        assert not gaps & inside, "what a run covers besides is padding"


def test_neighbours_of_one_group_are_one_run():
    layout = FlatLayout.pack([("a", (3,), 0), ("b", (5,), 0), ("c", (2,), 1), ("d", (2,), -1), ("e", (2,), 1)], 1, 4)
    # a: 0..3, b: 4..9, c: 12..14, d: 16..18, e: 20..22; d is in no optimizer, so nothing may step over it
    assert layout.group_runs(0, layout.numel) == [(0, 0, 9), (1, 12, 14), (1, 20, 22)]


def test_group_runs_never_pass_over_a_parameter_of_another_group():
    rng = random.Random(0)
    for _ in range(50):
        groups = [rng.randint(-1, 2) for _ in range(6)]
        layout = FlatLayout.pack([(str(i), (3,), g) for i, g in enumerate(groups)], rng.choice(WORLDS), 4)
        for rank in range(layout.world):
            start, end = layout.shard(rank)
            for group, first, last in layout.group_runs(start, end):
                for part in layout.overlaps(start + first, start + last):
                    assert not part.length or part.entry.group == group


def test_a_scalar_takes_one_element():
    layout = FlatLayout.pack([("scalar", (), 0)], 4, 4)
    assert (layout.entries[0].numel, layout.shard_numel, layout.numel) == (1, 4, 16)


def test_more_ranks_than_elements_leave_the_last_ranks_without_any():
    layout = FlatLayout.pack([("w", (2,), 0)], 4, 4)
    assert [sum(part.length for part in layout.overlaps(*layout.shard(rank))) for rank in range(4)] == [2, 0, 0, 0]
    assert layout.group_runs(*layout.shard(3)) == []
