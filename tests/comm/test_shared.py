"""Memory that ranks of one machine read from one another: where it is, who finds it, and that it goes away."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lit_zero.comm import shared
from lit_zero.comm.direct import LARGE_BYTES, DirectExchange
from lit_zero.comm.exchange import Gather
from lit_zero.comm.shared import Address, Arena, Neighbour, Place, make_arena

CPU = torch.device("cpu")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_is_allocated_is_found_by_place():
    arena = Arena()
    first, second = arena.allocate(10).view(torch.uint8), arena.allocate(5000)
    assert first.sum() == second.sum() == 0
    assert arena.locate(first) == Place(0, 0)
    assert arena.locate(second) == Place(0, shared._ALIGN)
    assert arena.locate(second[100:]) == Place(0, shared._ALIGN + 100)
    assert arena.locate(torch.zeros(3)) is None
    assert second.untyped_storage().nbytes() == 5000, "counted by storages, an allocation is what was asked for"


def test_a_neighbour_sees_what_is_written():
    arena = Arena()
    mine = arena.allocate(4000).view(torch.float32)
    mine.copy_(torch.arange(1000.0))
    neighbour = Neighbour(arena.address)  # of the same process, through the same door as another's
    seen = neighbour.look(arena.locate(mine[10:]), 5, torch.float32)
    assert seen.tolist() == [10, 11, 12, 13, 14]
    mine[10] = -1
    assert seen[0] == -1


def test_the_arena_grows_and_neighbours_follow():
    arena = Arena(1 << 14)
    neighbour = Neighbour(arena.address)
    blocks = [arena.allocate(1 << 13) for _ in range(9)]
    big = arena.allocate(1 << 20)
    places = [arena.locate(block) for block in (*blocks, big)]
    assert len({place.segment for place in places}) > 3
    for number, (block, place) in enumerate(zip((*blocks, big), places, strict=True)):
        block.fill_(number + 1)
        assert neighbour.look(place, 100, torch.uint8).unique().tolist() == [number + 1]


def test_what_is_given_back_takes_no_memory_and_is_used_again():
    arena = Arena()
    buffer = arena.allocate(1 << 20).fill_(7)
    place = arena.locate(buffer)
    descriptor = arena._descriptors[1]
    assert os.fstat(descriptor).st_blocks * 512 >= 1 << 20
    arena.give_back(buffer)
    assert os.fstat(descriptor).st_blocks * 512 < 1 << 16
    again = arena.allocate(1 << 20)
    assert arena.locate(again) == place
    assert again.sum() == 0


def test_what_is_given_back_serves_what_is_nearly_as_long():
    arena = Arena()
    page = shared._ALIGN
    first = arena.allocate(66 * page)
    place = arena.locate(first)
    arena.give_back(first)
    other = arena.allocate(48 * page)
    assert arena.locate(other) != place, "a quarter would be left over"
    assert arena.locate(arena.allocate(65 * page - 5)) == place


def test_another_process_under_the_same_number_is_not_taken_for_a_neighbour():
    arena = Arena()
    with pytest.raises(OSError, match="another process|not the rank"):
        Neighbour(replace(arena.address, nonce=bytes(16)))
    with pytest.raises(OSError, match="No such file|No such process"):
        Neighbour(replace(arena.address, descriptor=99_999))


def test_an_address_travels_as_numbers():
    address = Address(12, 34, bytes(range(240, 256)))
    assert Address.decode(address.encode()) == address
    assert Address.decode(torch.zeros(4, dtype=torch.int64)) is None


def test_files_are_closed_with_the_arena_and_memory_stays_while_it_is_used():
    gc.collect()  # what earlier tests have left is not to be closed in the middle of this one
    before = open_files()
    arena = Arena()
    mine = arena.allocate(100).fill_(3)
    assert open_files() == before + 4, "a header and a segment, and what maps them keeps a file of its own"
    arena.close()
    assert open_files() == before + 2
    assert mine.sum() == 300
    del arena, mine
    gc.collect()
    assert open_files() == before
    forgotten = Arena()
    forgotten.allocate(100)
    del forgotten
    gc.collect()
    assert open_files() == before


def test_a_system_without_such_memory_has_no_arena():
    with mock.patch.object(os, "memfd_create", side_effect=OSError):
        assert make_arena() is None
    with mock.patch.object(shared, "os", new=object()):
        assert make_arena() is None


def near(arena: bool) -> list[int]:
    if dist.get_rank() == 1 and not arena:
        with mock.patch.object(os, "memfd_create", side_effect=OSError):
            exchange = DirectExchange(dist.new_group(backend="gloo"))
    else:
        exchange = DirectExchange(dist.new_group(backend="gloo"))
    n = LARGE_BYTES // 4
    own = exchange.zeros(n, torch.float32, CPU).fill_(exchange.rank)
    full = exchange.zeros(n * exchange.size, torch.float32, CPU)
    found = exchange.near
    exchange.all_gather([Gather(full, own)]).wait()
    assert full.view(-1, n)[:, -1].tolist() == list(range(exchange.size))
    exchange.close()
    return found


def test_ranks_of_one_machine_are_near(ranks):
    assert ranks(4).run(near, True) == [[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]]


def test_a_rank_without_an_arena_is_far_for_all_and_the_others_still_meet(ranks):
    assert ranks(4).run(near, False) == [[2, 3], [], [3, 0], [0, 2]]
