"""The exchange of one rank, the choice of an exchange, and names that torch changes."""

from __future__ import annotations

import runpy
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lit_zero.comm import Comm, compat
from lit_zero.comm.direct import DirectExchange
from lit_zero.comm.exchange import Exchange, Gather, Reduce
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_one_rank_reduces_to_its_own_gradient(accumulate, scale, dtypes):
    full, own = torch.arange(4.0).to(dtypes[0]), torch.ones(4, dtype=dtypes[1])
    Exchange().reduce_scatter([Reduce(full, own, scale, accumulate)]).wait()
    assert own.tolist() == [value * scale + accumulate for value in (0.0, 1.0, 2.0, 3.0)]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_one_rank_reduces_in_place(scale):
    full = torch.arange(4.0)
    Exchange().reduce_scatter([Reduce(full, full[0:4], scale, whole=True)]).wait()
    assert full.tolist() == [0.0, scale, 2 * scale, 3 * scale]


def test_one_rank_gathers_by_copying_unless_it_is_there():
    full, own = torch.zeros(4), torch.arange(4.0)
    Exchange().all_gather([Gather(full, own)]).wait()
    assert torch.equal(full, own)
    Exchange().all_gather([Gather(full, full[0:4])]).wait()
    assert torch.equal(full, own)


def test_one_rank_sends_nothing():
    exchange = Exchange()
    value = torch.tensor([3.0, -1.0])
    assert (exchange.rank, exchange.size) == (0, 1)
    assert torch.equal(exchange.sum_in_rank_order(value), value)
    assert torch.equal(exchange.maximum(value), value)
    exchange.broadcast(value)
    exchange.close()
    assert value.tolist() == [3.0, -1.0]
    assert exchange.counters.sent_bytes == exchange.counters.sent_elements == 0


def test_counters_of_two_exchanges_are_apart():
    one, other = Exchange(), Exchange()
    one.counters.count(torch.zeros(3), 2)
    assert (one.counters.sent_elements, one.counters.sent_bytes) == (6, 24)
    assert other.counters.sent_elements == 0


def test_without_a_process_group_a_rank_is_alone():
    assert type(open_exchange(Comm(), CPU)) is Exchange


def opened(overlap: bool, seconds: float | None) -> tuple[type, int, int, str]:
    timeout = None if seconds is None else timedelta(seconds=seconds)
    exchange = open_exchange(Comm(overlap=overlap), CPU, timeout=timeout)
    message = ""
    if seconds is not None and exchange.rank == 0:
        try:
            exchange.maximum(torch.zeros(1))
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    exchange.close()
    return type(exchange), exchange.rank, exchange.size, message


def test_on_cpu_ranks_exchange_directly(ranks):
    assert ranks(1).run(opened, True, None) == [(Exchange, 0, 1, "")]
    for overlap in (True, False):
        assert ranks(2).run(opened, overlap, None) == [(DirectExchange, 0, 2, ""), (DirectExchange, 1, 2, "")]


def test_the_timeout_reaches_the_exchange(ranks):
    assert "imed out" in ranks(2).run(opened, True, 0.5)[0][3]


@pytest.mark.parametrize("overlap", ["yes", 1, None])
def test_overlap_is_a_bool(overlap):
    with pytest.raises(ConfigError) as caught:
        Comm(overlap=overlap)
    assert str(caught.value) == f"comm.overlap={overlap!r} is not valid: expected true or false."


# ---- names that torch changes


def old(*args: object, **kwargs: object) -> None:
    """Stands for the name that older releases have."""


def new(*args: object, **kwargs: object) -> None:
    """Stands for the name that newer releases have."""


NAMES = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}


def loaded() -> dict[str, object]:
    """Run the module anew, as an import with this torch.distributed would."""
    return runpy.run_path(compat.__file__)


def test_the_new_name_is_used_where_there_is_one(monkeypatch):
    for name, before in NAMES.items():
        monkeypatch.setattr(dist, name, new, raising=False)
        monkeypatch.setattr(dist, before, old, raising=False)
    found = loaded()
    assert all(found[name] is new for name in NAMES)


def test_the_old_name_is_used_where_there_is_no_new_one(monkeypatch):
    for name, before in NAMES.items():
        monkeypatch.delattr(dist, name, raising=False)
        monkeypatch.setattr(dist, before, old, raising=False)
    found = loaded()
    assert all(found[name] is old for name in NAMES)


def test_a_torch_with_neither_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(compat, "dist", SimpleNamespace())
    with pytest.raises(
        ImportError, match="torch.distributed has none of one, two; lit_zero supports torch 2.11 to 2.13"
    ):
        compat._first("one", "two")


def test_this_torch_has_one_of_the_names():
    for name, before in NAMES.items():
        assert getattr(compat, name) in (getattr(dist, name, None), getattr(dist, before, None))
