"""Messages between the ranks of a pipeline arrive as they were sent, whatever their shape, order and size."""

from __future__ import annotations

import io
from collections import OrderedDict
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from lit_zero.comm.messages import Message
from lit_zero.comm.transport import Transport
from lit_zero.core.errors import LitZeroError
from tests.pool import RankFailure

CPU = torch.device("cpu")
SOON = timedelta(seconds=30)


@pytest.fixture(params=[True, False], ids=["memory", "gloo"])
def near(request: Any) -> bool:
    """Whether messages go through memory or over gloo."""
    return bool(request.param)


def tensors() -> list[torch.Tensor]:
    """One of each kind that is easily lost."""
    return [
        torch.arange(12.0).reshape(3, 4).t(),  # not contiguous
        torch.tensor(7, dtype=torch.int64),
        torch.zeros(0, 5),
        torch.tensor([True, False]),
        torch.randn(300, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.bfloat16),
        torch.tensor([1 + 2j]),
    ]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and repr(one) == repr(other)


def exchange(near: bool) -> None:
    """Everyone sends to everyone: what has one key is by turns longer and shorter, and longer than a frame."""
    rank, size = dist.get_rank(), dist.get_world_size()
    transport = Transport([range(size)], CPU, SOON, near)
    others = [other for other in range(size) if other != rank]
    turns = 4
    for turn in range(turns):
        for other in others:
            for number in range(4):
                transport.post((number, other), other)
        for number in range(4):
            for other in others:
                note = "x" * (20_000 * number * (turn % 2)), other
                sent = [t.requires_grad_(t.is_floating_point()) for t in tensors()][(number + turn) % 4 :]
                transport.send(Message((number, rank), sent, note), other)
                for tensor in sent:
                    tensor.detach().zero_()  # it has been packed
        for number in reversed(range(4)):
            for other in others:
                found = transport.wait((number, other))
                assert found.note == ("x" * (20_000 * number * (turn % 2)), rank)
                for mine, theirs in zip(found.tensors, tensors()[(number + turn) % 4 :], strict=True):
                    assert same(mine.detach(), theirs)
                    assert mine.requires_grad == theirs.is_floating_point() and mine.is_leaf
                    mine.detach().zero_()  # its own memory, and its own count of versions
                versions = {t._version for t in found.tensors if t.numel()}
                assert versions <= {1}, "tensors of one message count their versions together"
        transport.flush()
    each = [sum(t.numel() * t.element_size() for t in tensors()[number:]) for number in range(4)]
    assert transport.sent_bytes == turns * len(others) * sum(each)


def acknowledge(near: bool) -> None:
    """Two ranks take turns; the memory of what has been received goes at once, without a flush."""
    rank = dist.get_rank()
    transport = Transport([[0, 1]], CPU, SOON, near)
    most = 0
    for turn in range(20):
        for sender in (0, 1):
            if rank == sender:
                transport.send(Message(turn, [torch.full((1000,), float(turn))]), 1 - rank)
                most = max(most, len(transport._lines[1 - rank].flying))
            else:
                transport.post(turn, sender)
                assert transport.wait(turn).tensors[0].eq(turn).all()
    assert most <= 2


NOTES = [None, (True, False), (True, False), (1, 0), (True,), None, {}, (False, True), (True, False), [True]]


def notes(near: bool) -> None:
    """One key, and by turns the same and another note, shape and need of a gradient; what comes may be written to."""
    rank = dist.get_rank()
    transport = Transport([[0, 1]], CPU, SOON, near)
    for number, note in enumerate([each for each in NOTES for _ in range(2)]):
        shape, needs = (3 + number // 7, 2), number % 5 > 1
        transport.post("key", 1 - rank)
        transport.send(Message("key", [torch.full(shape, float(number)).requires_grad_(needs)], note), 1 - rank)
        found = transport.wait("key")
        assert repr(found.note) == repr(note), "(1, 0) is not (True, False)"
        [tensor] = found.tensors
        assert tensor.requires_grad is needs and tensor.shape == shape and bool((tensor == number).all())
        if isinstance(found.note, (dict, list)):
            found.note.clear()
    transport.flush()


def test_what_a_message_says_of_itself_is_its_own(ranks: Any, near: bool) -> None:
    ranks(2).run(notes, near)


def test_what_was_received_takes_no_memory_at_the_sender(ranks: Any, near: bool) -> None:
    ranks(2).run(acknowledge, near)


@pytest.mark.parametrize("size", [2, 4])
def test_messages_arrive_as_they_were_sent(ranks: Any, near: bool, size: int) -> None:
    ranks(size).run(exchange, near)


class Pair(NamedTuple):
    first: Any
    second: Any


class Own(torch.Tensor):
    """A class of its own must not be lost."""


def value() -> Any:
    return {
        "nested": [tensors(), (Pair(torch.ones(2), "word"), None), OrderedDict(b=1, a={2, 3})],
        "own": torch.ones(2).as_subclass(Own),
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "large": torch.arange(1 << 20),
    }


def share_all(near: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    transport = Transport([range(size)], CPU, SOON, near)
    for source in [0, size - 1, 0, 0, 1]:
        here = value() if rank == source else None
        found = transport.share(here, source)
        if rank == source:
            assert found is here
            found["large"].zero_()  # its own from now on
            continue
        expected = value()
        pairs = zip(found["nested"][0], expected["nested"][0], strict=True)
        assert all(same(mine, theirs) for mine, theirs in pairs)
        pair, none = found["nested"][1]
        assert type(pair) is Pair and torch.equal(pair.first, torch.ones(2)) and pair.second == "word" and none is None
        assert list(found["nested"][2].items()) == [("b", 1), ("a", {2, 3})]
        assert type(found["own"]) is Own and type(found["parameter"]) is torch.nn.Parameter
        assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
        assert torch.equal(found["large"], torch.arange(1 << 20))
        torch.save(found["nested"][0], io.BytesIO())  # which refuses tensors of several dtypes in one storage
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in found["nested"][0])
    transport.flush()
    assert transport.sent_bytes == 0, "what is shared is not counted as activations"


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_shared_is_the_same_everywhere(ranks: Any, near: bool, size: int) -> None:
    ranks(size).run(share_all, near)


def share_alone() -> None:
    here = value()
    assert Transport([[0]], CPU, SOON).share(here, 0) is here


def test_a_rank_that_is_alone_shares_nothing(ranks: Any) -> None:
    ranks(1).run(share_alone)


def in_an_evaluation(near: bool) -> None:
    """What comes may need a gradient, and may be kept."""
    transport = Transport([[0, 1]], CPU, SOON, near)
    for _ in range(2):  # the second message fills its frame
        with torch.inference_mode():
            if dist.get_rank() == 0:
                with torch.inference_mode(False):
                    transport.send(Message("it", [torch.ones(1000, requires_grad=True)]), 1)
            else:
                transport.post("it", 0)
                [found] = transport.wait("it").tensors
                assert found.requires_grad and not found.is_inference()
    transport.flush()


def test_what_comes_in_an_evaluation_is_a_normal_tensor(ranks: Any, near: bool) -> None:
    ranks(2).run(in_an_evaluation, near)


def two_pipelines(near: bool) -> Any:
    transport = Transport([[0, 2], [1, 3]], CPU, SOON, near)
    return transport.position, transport.share(dist.get_rank(), 1)


def test_pipelines_do_not_hear_each_other(ranks: Any, near: bool) -> None:
    assert ranks(4).run(two_pipelines, near) == [(0, 2), (0, 3), (1, 2), (1, 3)]


def another_order(near: bool) -> None:
    transport = Transport([[0, 1]], CPU, SOON, near)
    if dist.get_rank() == 0:
        transport.send(Message("two", []), 1)
        transport.flush()
        return
    transport.post("one", 0)
    with pytest.raises(LitZeroError, match="Position 1 of the pipeline waited for one and got two: the ranks do not"):
        transport.wait("one")


def test_another_order_is_an_error(ranks: Any, near: bool) -> None:
    ranks(2).run(another_order, near)


def nobody_sends(near: bool) -> None:
    transport = Transport([[0, 1]], CPU, SOON if near else timedelta(seconds=3), near)
    if near:
        transport._lines[1 - dist.get_rank()]._timeout = timedelta(seconds=1)  # type: ignore[attr-defined]
    if dist.get_rank() == 1:
        transport.post("one", 0)
        transport.wait("one")
    dist.barrier()


def test_a_message_that_does_not_come_is_an_error(ranks: Any, near: bool) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(nobody_sends, near, timeout=30)
    assert failure.value.rank == 1 and "imed out" in str(failure.value)


def window() -> tuple[list[int], int]:
    """Rank 0 sends many long messages, in two turns; rank 1 asks for all of a turn before it waits for the first."""
    rank, number, length = dist.get_rank(), 8, 1 << 20
    transport = Transport([[0, 1]], CPU, SOON, shared_memory=False)
    line: Any = transport._lines[1 - rank]
    posted, memory = [], set()
    for turn in range(2):
        for key in range(number):
            if rank == 0:
                with torch.inference_mode(key % 2 == 1):  # what one has left behind serves the other
                    transport.send(Message(key, [torch.full((length,), float(turn + key))]), 1)
                memory.add(line.flying[-1].packed.memory.data_ptr())
            else:
                transport.post(key, 0)
        for key in range(number if rank else 0):
            [tensor] = transport.wait(key).tensors
            assert bool((tensor == turn + key).all())
            posted.append(len(line.posted))
        transport.flush()
    spare = line.spare_bytes
    assert rank or 0 < spare <= 16 << 20
    return posted, len(memory)


def forgotten(near: bool) -> None:
    """What is asked for and not waited for is forgotten, and nothing stands in the way of what comes next."""
    rank = dist.get_rank()
    transport = Transport([[0, 1]], CPU, SOON, near)
    if rank:
        for key in range(3):
            transport.post(key, 0)
        transport.forget()
    assert transport.share(["batch"] if rank == 0 else None, 0) == ["batch"]
    transport.flush()


def test_what_is_not_waited_for_is_forgotten(ranks: Any, near: bool) -> None:
    ranks(2).run(forgotten, near)


def test_no_more_is_posted_and_kept_than_has_room(ranks: Any) -> None:
    (_, memory), (posted, _) = ranks(2).run(window)
    assert posted[:8] == [7, 6, 5, 4, 3, 2, 1, 0], "how long messages are is not known yet"
    assert max(posted[8:]) == 2, "three of a little over 4 MiB fit, one of which has just come"
    assert memory < 16, "memory of messages that have come is used again"
