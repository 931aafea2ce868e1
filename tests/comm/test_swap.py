"""Every rank sends something of its own to every other one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_zero.comm.exchange import Exchange, Swap
from tests.comm.test_exchange import KINDS, make


def message(source: int, to: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what rank ``source`` sends to rank ``to``: lengths differ, and some are zero."""
    return torch.arange((3 * source + 5 * to) % 4 * 1000, dtype=dtype) % 97 + source * 10 + to


def wrong(kind: str, overlap: bool) -> tuple[list[Any], tuple[int, int, int]]:
    exchange = make(kind, overlap)
    rank, ranks, found = exchange.rank, range(exchange.size), []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        sent = [message(rank, to, dtype) for to in ranks]
        received = [torch.full_like(message(source, rank, dtype), 99) for source in ranks]
        exchange.all_to_all(Swap(sent, received)).wait()
        expected = [message(source, rank, dtype) for source in ranks]
        found += [dtype for got, each in zip(received, expected, strict=True) if not torch.equal(got, each)]
    counters = exchange.counters
    exchange.close()
    return found, (counters.swaps, counters.sent_elements, counters.sent_bytes)


@pytest.mark.parametrize(("kind", "overlap"), KINDS)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_every_rank_gets_what_was_sent_to_it(ranks, size, kind, overlap):
    for rank, (found, counted) in enumerate(ranks(size).run(wrong, kind, overlap)):
        assert found == []
        elements = sum(message(rank, to, torch.float32).numel() for to in range(size) if to != rank)
        assert counted == (3, 3 * elements, elements * (8 + 4 + 2)), "to others, in the bytes of each dtype"


def test_one_rank_sends_to_itself():
    received = [torch.zeros(3)]
    Exchange().all_to_all(Swap([torch.arange(3.0)], received)).wait()
    assert received[0].tolist() == [0.0, 1.0, 2.0]
