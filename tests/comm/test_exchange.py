"""Both exchanges against sums and gathers written out, on 2 and 4 gloo ranks.

Every rank can compute what every other one contributes, so each compares its own results: a function returns the cases
that went wrong on its rank.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lit_zero.comm import direct
from lit_zero.comm.direct import DirectExchange
from lit_zero.comm.exchange import Exchange, Gather, Reduce
from lit_zero.comm.native import NativeExchange
from lit_zero.comm.shared import Address, Neighbour
from tests.pool import RankFailure

CPU = torch.device("cpu")
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# "direct" sends messages, "shared" reads in shared memory, "machines" does both, as two machines with half of the ranks
# each would; on CPU the native one has nothing to overlap.
KINDS = [("direct", True), ("direct", False), ("shared", True), ("shared", False), ("machines", True), ("native", True)]
LARGE = 1 << 12  # bytes; the longer lanes here are large, the shorter are not
LONG = 150_001  # elements of a part; more than a MiB in fp64 and fp32 alike, and a multiple of nothing


def make(
    kind: str, overlap: bool = True, reduce_dtype: torch.dtype | None = FP32, timeout: float | None = None
) -> Exchange:
    def group() -> Any:
        return dist.new_group(backend="gloo", timeout=None if timeout is None else timedelta(seconds=timeout))

    if kind == "machines":
        with mock.patch.object(direct, "Neighbour", Machines(dist.get_rank(), dist.get_world_size())):
            return DirectExchange(group(), overlap, reduce_dtype, large=LARGE)
    if kind in ("direct", "shared"):
        return DirectExchange(group(), overlap, reduce_dtype, shared_memory=kind == "shared", large=LARGE)
    return NativeExchange(group(), group(), CPU, overlap, reduce_dtype)


class Machines:
    """Makes neighbours of the ranks in one half of the world only."""

    def __init__(self, rank: int, size: int) -> None:
        self.peers = iter([peer for peer in range(size) if peer != rank])
        self.mine = [peer for peer in range(size) if peer * 2 // size == rank * 2 // size]

    def __call__(self, address: Address) -> Neighbour:
        if next(self.peers) not in self.mine:
            raise FileNotFoundError("on another machine")
        return Neighbour(address)


def placed(exchange: Exchange, value: torch.Tensor) -> torch.Tensor:
    """Return ``value`` in memory of the exchange."""
    return exchange.zeros(value.numel(), value.dtype, CPU).copy_(value)


@functools.cache
def noise(rank: int) -> torch.Tensor:
    """Return a rank's random numbers: drawn once, because drawing takes longer than what is tested."""
    return torch.randn(5 * LONG, generator=torch.Generator().manual_seed(rank))


def contribution(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """Return ``numel`` random elements of a rank, up to ``4 * LONG``; others for every salt up to 1000."""
    return noise(rank)[137 * salt :][:numel].to(dtype, copy=True)


def added_in_rank_order(
    size: int, numel: int, dtype: torch.dtype, salt: int, reduce_dtype: torch.dtype | None
) -> torch.Tensor:
    """Return the sum of all ranks' contributions, in the dtype of the sum."""
    wide = reduce_dtype if reduce_dtype is not None and dtype.itemsize < 4 else dtype
    total = contribution(0, numel, dtype, salt).to(wide)
    for rank in range(1, size):
        total = total + contribution(rank, numel, dtype, salt).to(wide)
    return total


def agree(kind: str, one: torch.Tensor, other: torch.Tensor, added_in: torch.dtype | None = None) -> bool:
    """Return whether two sums agree: bit for bit, except that gloo's own collectives add in an order of their own."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if kind != "native":
        return torch.equal(one, other)
    tolerance = max({FP64: 1e-14, FP32: 1e-6, BF16: 2e-2, FP16: 2e-3}[dtype] for dtype in (one.dtype, added_in or FP64))
    return torch.allclose(one, other, rtol=tolerance, atol=4 * tolerance)


REDUCTIONS = [
    # dtype of the gradients, dtype of the result, elements of a part
    *itertools.product((FP64, FP32, BF16, FP16), (FP32,), (4, 1000)),
    (FP64, FP64, LONG),
    (FP32, FP32, LONG),
    (BF16, FP32, LONG),
    (BF16, BF16, 1000),
    (FP16, FP16, 63),
    (FP32, BF16, 63),
]


def reduce_everything(kind: str, overlap: bool, reduce_dtype: torch.dtype | None) -> list[Any]:
    exchange, wrong = make(kind, overlap, reduce_dtype), []
    rank, size = exchange.rank, exchange.size
    for salt, (case, accumulate, scale) in enumerate(itertools.product(REDUCTIONS, (False, True), (1.0, 0.37))):
        dtype, own_dtype, part = case
        total = added_in_rank_order(size, part * size, dtype, salt, reduce_dtype)
        mine = total.view(size, -1)[rank]
        before = torch.full((part,), 0.5, dtype=own_dtype)
        if accumulate:
            expected = before.clone().add_(mine.to(own_dtype), alpha=scale)
        else:
            expected = (mine * scale if scale != 1.0 else mine).to(own_dtype)
        own = before.clone()
        full = placed(exchange, contribution(rank, part * size, dtype, salt))
        exchange.reduce_scatter([Reduce(full, own, scale, accumulate)]).wait()
        if not agree(kind, own, expected, total.dtype):
            wrong.append(("apart", case, accumulate, scale, (own - expected).abs().max().item()))
    for salt, (dtype, part, whole, scale) in enumerate(
        itertools.product((FP64, FP32, BF16), (4, 1000, LONG), (False, True), (1.0, 0.25)), start=100
    ):
        full = placed(exchange, contribution(rank, part * size, dtype, salt))
        own = full.view(size, -1)[rank]
        exchange.reduce_scatter([Reduce(full, own, scale, whole=whole)]).wait()
        expected = added_in_rank_order(size, part * size, dtype, salt, reduce_dtype)
        expected = (expected * scale).to(dtype).view(size, -1)
        right = agree(kind, full.view(size, -1), expected) if whole else agree(kind, own, expected[rank])
        if not right:
            wrong.append(("in place", dtype, part, whole, scale))
    exchange.close()
    return wrong


@pytest.mark.thorough("their own dtype-4", "False-in fp32-4")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("reduce_dtype", [FP32, None], ids=["in fp32", "in their own dtype"])
@pytest.mark.parametrize(("kind", "overlap"), KINDS)
def test_reduce_scatter_equals_the_sum(ranks, kind, reduce_dtype, overlap, size):
    for wrong in ranks(size).run(reduce_everything, kind, overlap, reduce_dtype):
        assert wrong == []


def gather_everything(kind: str, overlap: bool) -> list[Any]:
    exchange, wrong = make(kind, overlap), []
    rank, size = exchange.rank, exchange.size
    dtypes = (FP64, FP32, BF16, FP16, torch.int64, torch.uint8)
    for salt, (dtype, part, inside) in enumerate(itertools.product(dtypes, (1, 1000, LONG), (False, True))):
        expected = torch.cat([(100 * contribution(each, part, FP32, salt)).abs().to(dtype) for each in range(size)])
        full = exchange.zeros(part * size, dtype, CPU)
        own = full.view(size, -1)[rank] if inside else exchange.zeros(part, dtype, CPU)
        own.copy_(expected.view(size, -1)[rank])
        exchange.all_gather([Gather(full, own)]).wait()
        if not torch.equal(full, expected):
            wrong.append((dtype, part, inside))
    exchange.close()
    return wrong


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("kind", "overlap"), KINDS)
def test_all_gather_lays_the_parts_in_rank_order(ranks, kind, overlap, size):
    for wrong in ranks(size).run(gather_everything, kind, overlap):
        assert wrong == []


def several_lanes(kind: str) -> list[Any]:
    """Lanes of several dtypes and lengths travel in one call, and several calls are under way at once."""
    exchange = make(kind)
    rank, size = exchange.rank, exchange.size
    lanes = list(enumerate([(FP32, 1000), (FP64, 3), (BF16, 70_001), (FP32, LONG)]))
    reduces = [
        Reduce(
            placed(exchange, contribution(rank, part * size, dtype, salt)),
            torch.zeros(part, dtype=FP32 if dtype == BF16 else dtype),
        )
        for salt, (dtype, part) in lanes
    ]
    gathers = []
    for salt, (dtype, part) in lanes:
        own = placed(exchange, contribution(rank, part, dtype, 50 + salt))
        gathers.append(Gather(torch.zeros(part * size, dtype=dtype), own))
    tickets = [
        exchange.reduce_scatter(reduces[:2]),
        exchange.all_gather(gathers),
        exchange.reduce_scatter(reduces[2:]),
    ]
    for ticket in reversed(tickets):
        ticket.wait()
    wrong = []
    for salt, (dtype, part) in lanes:
        total = added_in_rank_order(size, part * size, dtype, salt, FP32).view(size, -1)[rank]
        if not agree(kind, reduces[salt].own, total.to(reduces[salt].own.dtype)):
            wrong.append(("reduce", salt))
        parts = torch.cat([contribution(each, part, dtype, 50 + salt) for each in range(size)])
        if not torch.equal(gathers[salt].full, parts):
            wrong.append(("gather", salt))
    exchange.close()
    return wrong


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["direct", "shared", "machines", "native"])
def test_lanes_and_calls_do_not_mix(ranks, kind, size):
    for wrong in ranks(size).run(several_lanes, kind):
        assert wrong == []


def reduced_with_a_late_rank(late: int) -> torch.Tensor:
    exchange = make("shared")
    full = placed(exchange, contribution(exchange.rank, 5000 * exchange.size, FP32))
    own = torch.empty(5000)
    if exchange.rank == late:
        time.sleep(0.2)
    exchange.reduce_scatter([Reduce(full, own)]).wait()
    exchange.close()
    return own


def test_a_sum_does_not_depend_on_who_comes_first(ranks):
    outcomes = [ranks(4).run(reduced_with_a_late_rank, late) for late in (-1, 0, 3)]
    plain = added_in_rank_order(4, 20_000, FP32, 0, None).view(4, -1)
    backwards = contribution(3, 20_000, FP32)
    for rank in (2, 1, 0):
        backwards = backwards + contribution(rank, 20_000, FP32)
    assert not torch.equal(plain, backwards.view(4, -1)), "with these numbers the order shows"
    for outcome in outcomes:
        assert all(torch.equal(own, plain[rank]) for rank, own in enumerate(outcome))


def test_the_dtype_of_the_sum_shows(ranks):
    """512 + 1 + 1 is 514 in fp32, and 512 in bf16, where 513 rounds back."""
    for kind in ("direct", "native"):
        assert all(value == 515.0 for value in ranks(4).run(sum_of_unequal_sizes, kind, FP32))
    assert all(value == 512.0 for value in ranks(4).run(sum_of_unequal_sizes, "direct", None))


def sum_of_unequal_sizes(kind: str, reduce_dtype: torch.dtype | None) -> float:
    exchange = make(kind, reduce_dtype=reduce_dtype)
    own = torch.zeros(4)
    full = torch.full((4 * exchange.size,), 512.0 if exchange.rank == 0 else 1.0, dtype=BF16)
    exchange.reduce_scatter([Reduce(full, own)]).wait()
    exchange.close()
    return own[0].item()


# ---- small exchanges


def small_exchanges(kind: str) -> dict[str, Any]:
    exchange = make(kind)
    values = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=FP64)
    one = values[exchange.rank]
    several = torch.stack([one, -one, one * 0 + exchange.rank])
    strided = torch.full((3, 4), float(exchange.rank)).t()
    sent = [torch.full((2, 3), float(exchange.rank)), torch.tensor(exchange.rank == 0), strided]
    for value in sent:
        exchange.broadcast(value)
    found = {
        "scalar": exchange.sum_in_rank_order(one),
        "vector": exchange.sum_in_rank_order(several),
        "maximum": exchange.maximum(several.float().view(3, 1)),
        "flag": exchange.maximum(torch.tensor([exchange.rank == 1, False]).to(torch.uint8)),
        "nothing": exchange.maximum(torch.empty(0)),
        "sent": [value.clone() for value in sent],
    }
    exchange.close()
    return found


@pytest.mark.parametrize("kind", ["direct", "native"])
def test_small_sums_are_in_rank_order_and_equal_on_every_rank(ranks, kind):
    for found in ranks(4).run(small_exchanges, kind):
        # ((1e16 + 1) - 1e16) + 1 = 1, as 1e16 + 1 rounds to 1e16; other orders give 0 or 2
        assert found["scalar"].shape == () and found["scalar"].item() == 1.0
        assert found["vector"].tolist() == [1.0, -1.0, 6.0]


@pytest.mark.parametrize("kind", ["direct", "native"])
def test_maximum_and_broadcast(ranks, kind):
    for found in ranks(4).run(small_exchanges, kind):
        assert found["maximum"].tolist() == [[torch.tensor(1e16).item()], [torch.tensor(1e16).item()], [3.0]]
        assert found["flag"].tolist() == [1, 0] and found["flag"].dtype == torch.uint8
        assert found["nothing"].shape == (0,)
        first, second, strided = found["sent"]
        assert torch.equal(first, torch.zeros(2, 3)) and second.item() is True
        assert torch.equal(strided, torch.zeros(4, 3))


# ---- counters


def counted(kind: str) -> list[tuple[int, int, int, int]]:
    exchange = make(kind)
    size, seen = exchange.size, []

    def note() -> None:
        c = exchange.counters
        seen.append((c.sent_elements, c.sent_bytes, c.gathers, c.reductions))
        c.reset()

    exchange.all_gather(
        [Gather(torch.zeros(5 * size), torch.zeros(5)), Gather(torch.zeros(size), torch.zeros(1))]
    ).wait()
    note()
    exchange.reduce_scatter([Reduce(torch.zeros(5 * size, dtype=FP64), torch.zeros(5, dtype=FP64))]).wait()
    note()
    full = torch.zeros(5 * size)
    exchange.reduce_scatter([Reduce(full, full.view(size, -1)[exchange.rank], whole=True)]).wait()
    note()
    exchange.reduce_scatter([Reduce(torch.zeros(5 * size, dtype=BF16), torch.zeros(5))]).wait()
    note()
    exchange.close()
    return seen


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["direct", "native"])
def test_counters_tell_what_was_sent(ranks, kind, size):
    peers = size - 1
    # A collective that adds in fp32 must be sent fp32; sent directly, two bytes suffice and the receiver casts.
    two_bytes = 2 if kind == "direct" else 4
    for seen in ranks(size).run(counted, kind):
        assert seen == [
            (6 * peers, 24 * peers, 1, 0),
            (5 * peers, 40 * peers, 0, 1),
            (10 * peers, 40 * peers, 0, 1),
            (5 * peers, 5 * two_bytes * peers, 0, 1),
        ]


# ---- failures and the end


def alone(kind: str) -> tuple[str, float]:
    """Rank 1 never takes part."""
    exchange = make(kind, timeout=1.0)
    message, began = "", time.monotonic()
    if exchange.rank == 0:
        try:
            exchange.all_gather([Gather(torch.zeros(8), torch.zeros(4))]).wait()
        except RuntimeError as error:
            message = str(error)
    seconds = time.monotonic() - began
    dist.barrier()
    exchange.close()
    return message, seconds


@pytest.mark.parametrize("kind", ["direct", "native"])
def test_a_rank_that_does_not_come_is_an_error_after_the_timeout(ranks, kind):
    message, seconds = ranks(2).run(alone, kind)[0]
    assert "imed out" in message or "imeout" in message
    assert 0.5 < seconds < 20


def forsaken() -> None:
    """Rank 1 dies while rank 0 waits for it: long before the timeout of half an hour."""
    exchange = make("direct")
    if exchange.rank == 1:
        time.sleep(0.3)
        os._exit(3)
    exchange.reduce_scatter([Reduce(torch.zeros(8), torch.zeros(4))]).wait()


def test_a_rank_that_dies_is_an_error_in_wait(ranks):
    with pytest.raises(RankFailure, match=r"It died \(exit code 3\)(.|\n)*After that rank 0 failed: RuntimeError"):
        ranks(2).run(forsaken)


def closing() -> tuple[bool, bool, list[str]]:
    exchange = make("direct")
    full = torch.zeros(LONG * exchange.size)
    own = torch.full((LONG,), float(exchange.rank + 1))
    exchange.all_gather([Gather(full, own)])
    before = any(thread.name == "lit_zero-exchange" for thread in threading.enumerate())
    exchange.close()
    exchange.close()  # twice is harmless
    arrived = torch.equal(full.view(exchange.size, -1)[:, 0], torch.arange(1.0, exchange.size + 1))
    dist.barrier()
    return before, arrived, [thread.name for thread in threading.enumerate() if "lit_zero" in thread.name]


def test_close_waits_for_what_is_under_way_and_ends_the_thread(ranks):
    assert ranks(2).run(closing) == [(True, True, [])] * 2


def without_overlap() -> tuple[bool, list[str]]:
    exchange = make("direct", overlap=False)
    full, own = torch.zeros(4 * exchange.size), torch.full((4,), float(exchange.rank))
    exchange.all_gather([Gather(full, own)])  # complete when it returns: no wait
    threads = [thread.name for thread in threading.enumerate() if "lit_zero" in thread.name]
    return full.view(exchange.size, -1)[:, 0].tolist() == [0.0, 1.0], threads


def test_without_overlap_a_call_is_complete_when_it_returns(ranks):
    assert ranks(2).run(without_overlap) == [(True, [])] * 2


def gradient_switch() -> tuple[bool, bool]:
    """The communication thread has its own gradient switch; the caller's stays as it was."""
    exchange = make("direct")
    own = torch.ones(4, requires_grad=True)
    full = torch.zeros(4 * exchange.size)
    exchange.all_gather([Gather(full, own.detach())]).wait()
    exchange.close()
    return torch.is_grad_enabled(), full.requires_grad


def test_nothing_is_recorded_for_autograd(ranks):
    assert ranks(2).run(gradient_switch) == [(True, False)] * 2
