"""Messages through memory: who sends so, what it takes, and what a rank hears of one that has ended."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lit_zero.comm import near as module
from lit_zero.comm.lines import FarLine, Line
from lit_zero.comm.messages import Message
from lit_zero.comm.near import NearLine
from lit_zero.comm.shared import Arena
from lit_zero.comm.transport import Transport
from lit_zero.core.errors import LostRankError
from tests.pool import RankFailure

CPU = torch.device("cpu")
SOON = timedelta(seconds=30)


def open_files() -> list[str]:
    """Files without a name, and pipes."""
    folder = "/proc/self/fd"
    found = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder) if os.path.islink(f"{folder}/{name}")]
    return sorted(name for name in found if name.startswith(("pipe:", "/memfd:lit_zero")))


@contextmanager
def hidden(rank: int) -> Iterator[None]:
    """Inside, a rank has no memory that others may read."""
    if dist.get_rank() != rank:
        yield
        return
    with mock.patch.object(os, "memfd_create", side_effect=OSError):
        yield


def kinds(far: int) -> list[str]:
    """Return how this rank sends to others where rank ``far`` has no such memory; messages between all arrive."""
    with hidden(far):
        transport = Transport([range(dist.get_world_size())], CPU, SOON)
    for source in range(transport.size):
        assert transport.share(torch.full((3,), float(source)), source).eq(source).all()
    transport.flush()
    assert all(type(line) in (NearLine, FarLine) for line in transport._lines.values())
    return ["near" if isinstance(line, NearLine) else "far" for line in transport._lines.values()]


def test_a_rank_without_such_memory_is_far_for_all_and_the_others_are_near(ranks: Any) -> None:
    assert ranks(3).run(kinds, -1) == [["near"] * 2] * 3
    assert ranks(3).run(kinds, 1) == [["far", "near"], ["far", "far"], ["near", "far"]]


def one_sided() -> list[str]:
    """Rank 1 cannot open what rank 0 can."""
    refused = mock.patch.object(module, "_open", side_effect=OSError)
    with refused if dist.get_rank() == 1 else contextlib.nullcontext():
        transport = Transport([[0, 1]], CPU, SOON)
    assert transport.share("word", 0) == "word" and transport.share("back", 1) == "back"
    transport.flush()
    return [type(line).__name__ for line in transport._lines.values()]


def test_ranks_are_near_only_if_both_can_open_the_others_memory(ranks: Any) -> None:
    assert ranks(2).run(one_sided) == [["FarLine"]] * 2


def files() -> None:
    """What a transport has opened is closed with it."""
    group = dist.new_group(backend="gloo")  # which has pipes of its own
    with mock.patch.object(dist, "new_group", return_value=group):
        for far in (-1, 1):
            gc.collect()
            before = open_files()
            with hidden(far):
                transport = Transport([[0, 1]], CPU, SOON)
            transport.share(torch.ones(1000), 0)
            transport.share("taken", 1)
            assert (open_files() != before) is (far == -1)
            dist.barrier()
            del transport
            gc.collect()
            assert open_files() == before


def test_files_are_closed_with_the_transport(ranks: Any) -> None:
    ranks(2).run(files)


def one_way(number: int, length: int) -> tuple[int, int, int]:
    """Rank 0 sends to a rank that never sends anything; they meet after every ten messages."""
    transport = Transport([[0, 1]], CPU, SOON)
    if dist.get_rank():
        for key in range(number):
            transport.post(key, 0)
            [tensor] = transport.wait(key).tensors
            assert bool((tensor == key).all())
            if key % 10 == 9:
                dist.barrier()
        return 0, 0, 0
    line: Any = transport._lines[1]
    places, most = set(), 0
    for key in range(number):
        transport.send(Message(key, [torch.full((length,), float(key))]), 1)
        places.add(line.flying[-1].packed.memory.data_ptr())
        most = max(most, len(line.flying))
        if key % 10 == 9:
            dist.barrier()
    return most, len(places), line.spare_bytes


def test_memory_is_used_again_also_where_nothing_comes_back(ranks: Any) -> None:
    most, places, _ = ranks(2).run(one_way, 100, 100)[0]
    assert 16 <= most <= 27 and places <= most + 1, "one may be spare"
    most, places, _ = ranks(2).run(one_way, 40, 1 << 18)[0]
    assert most <= 11 and places <= most + 16, "messages of a megabyte are told each"


def test_what_is_too_long_to_be_kept_is_given_back(ranks: Any) -> None:
    most, places, spare = ranks(2).run(one_way, 60, 5 << 20)[0]
    assert places <= most + 1 and spare == 0


def ends(said: Path) -> None:
    """Rank 1 sends more messages than are taken untold, and is gone when rank 0 looks."""
    transport = Transport([[0, 1]], CPU, SOON)
    line: Any = transport._lines[1 - transport.position]
    number = 40
    if transport.position == 1:
        for key in range(number):
            transport.send(Message(key, [torch.arange(1 << 15) + key]), 0)
        transport.send(Message("words", [], "farewell"), 0)
        transport.flush()
        os._exit(0)
    poll = select.poll()
    poll.register(line._ends.read, select.POLLIN)
    while not any(event & select.POLLHUP for _, event in poll.poll()):
        time.sleep(0.01)
    for key in (*range(number), "words", "more", "most"):
        transport.post(key, 1)
    assert all(transport.wait(key).tensors[0].equal(torch.arange(1 << 15) + key) for key in range(number))
    found = transport.wait("words").note
    for _ in range(2):
        with pytest.raises(LostRankError, match=r"Connection closed: position 1 of the pipeline \(rank 1\) has ended"):
            transport.wait("more")
        transport.forget()
        transport.post("more", 1)
    with pytest.raises(LostRankError, match="Connection closed: position 1"):
        transport.send(Message("answer", []), 1)
    said.write_text(found)


def test_what_was_sent_arrives_from_a_rank_that_has_ended_and_nothing_else_is_waited_for(
    ranks: Any, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match="It died"):
        ranks(2).run(ends, tmp_path / "said")
    assert (tmp_path / "said").read_text() == "farewell"


def small() -> Arena:
    arena = Arena(1 << 14)
    arena.allocate(1)
    return arena


def grows() -> tuple[int, int]:
    """Rank 0's memory grows while nobody has mapped the new one: its flush waits until rank 1 has."""
    with mock.patch.object(module, "make_arena", small):
        transport = Transport([[0, 1]], CPU, SOON)
    line: Any = transport._lines[1 - transport.position]
    length, number = 1 << 12, 12
    if transport.position == 1:
        for key in range(number):
            transport.post(key, 0)
        time.sleep(0.2)
        received = sum(float(transport.wait(key).tensors[0].mean()) == key for key in range(number))
        dist.barrier()
        return received, 0
    for key in range(number):
        transport.send(Message(key, [torch.full((length,), float(key))]), 1)
    transport.flush()
    segment = max(line._place(flying.packed).segment for flying in line.flying) if line.flying else 0
    taken = number - len(line.flying)
    assert taken and segment <= line._mapped and line._mapped > 0
    dist.barrier()
    return taken, line._mapped


def test_new_memory_is_mapped_before_this_rank_may_end(ranks: Any) -> None:
    (taken, mapped), (received, _) = ranks(2).run(grows)
    assert received == 12 and taken > 0 and mapped > 1


def many(number: int) -> str:
    """More messages than the pipes hold: first each sends, then each takes."""
    transport = Transport([[0, 1]], CPU, SOON)
    other = 1 - transport.position
    for key in range(number):
        transport.send(Message(key, []), other)
    for key in range(number):
        transport.post(key, other)
        transport.wait(key)
    dist.barrier()
    transport._lines[other]._timeout = timedelta(seconds=2)  # type: ignore[attr-defined]
    if transport.position == 1:
        dist.barrier()
        return ""
    try:
        for key in range(number):
            transport.send(Message(key, []), other)
    except LostRankError as error:
        return str(error)
    finally:
        dist.barrier()
    return "sent"


def test_ranks_that_send_more_than_the_pipes_hold_do_not_block_each_other_for_ever(ranks: Any) -> None:
    said, _ = ranks(2).run(many, 5000)
    assert said == (
        "Timed out: position 1 of the pipeline (rank 1) took no message for 2 seconds. It waits for something else, "
        "or works for longer than that."
    )


def test_an_interrupted_send_does_not_free_what_nobody_has_taken() -> None:
    line = Line()
    line._leave = mock.Mock(side_effect=[[], KeyboardInterrupt, []])  # type: ignore[method-assign]
    for key in range(3):
        with contextlib.suppress(KeyboardInterrupt):
            line.send(Message(key, [torch.ones(3)]))
    last = line.flying[-1]
    line.land(2)  # of the three the other rank has taken two: the first, and the second or the last
    assert last in line.flying


def test_an_interrupted_landing_does_not_free_what_nobody_has_taken() -> None:
    line = Line()
    line._leave = mock.Mock(return_value=[])  # type: ignore[method-assign]
    for key in range(3):
        line.send(Message(key, [torch.ones(3)]))
    last = line.flying[-1]
    with mock.patch.object(line, "_keep", side_effect=KeyboardInterrupt), contextlib.suppress(KeyboardInterrupt):
        line.land(2)
    line.land(2)
    assert last in line.flying


def ends_too_soon(said: Path) -> None:
    """Rank 1's memory has grown when it is killed: nobody can look there any more."""
    with mock.patch.object(module, "make_arena", small):
        transport = Transport([[0, 1]], CPU, SOON)
    if transport.position == 1:
        transport.send(Message("it", [torch.ones(1 << 16)]), 0)
        os._exit(1)
    line: Any = transport._lines[1]
    poll = select.poll()
    poll.register(line._ends.read, select.POLLIN)
    while not any(event & select.POLLHUP for _, event in poll.poll()):
        time.sleep(0.01)
    time.sleep(0.2)  # its files are closed one after the other
    transport.post("it", 1)
    with pytest.raises(LostRankError, match="Connection closed: position 1"):
        transport.wait("it")
    said.write_text("heard")


def test_a_rank_that_ends_without_a_flush_is_lost(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="It died"):
        ranks(2).run(ends_too_soon, tmp_path / "said")
    assert (tmp_path / "said").read_text() == "heard"
