"""Gradients that are not dropped add up, in whatever order whole and partial backwards come."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.precision import Lowering, Precision
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import BATCH, GPT, momentum, tokens

STAGES = ("none", "stage1", "stage2", "stage3")
WAYS = [(stage, way) for stage in STAGES for way in ("hold", "reduce") if (stage, way) != ("none", "reduce")]

# What happens between two steps: r is a backward that reduces, h one inside no_reduce, u one there that nobody sees
# before the next, z drops the gradients.
SEQUENCES = ("r", "rr", "rrr", "hr", "hhr", "hrr", "rhr", "rhhr", "zr", "rzr", "rrzr", "hrzhr")
SEQUENCES += ("ur", "uuur", "huur", "uhr", "ruur", "uurzur")


def weights_after(engine: Engine, model: GPT, optimizer: torch.optim.Optimizer, sequence: str) -> torch.Tensor:
    share = BATCH // engine.exchange.size
    rows = slice(engine.exchange.rank * share, (engine.exchange.rank + 1) * share)
    for step in range(2):
        for number, what in enumerate(sequence):
            if what == "z":
                optimizer.zero_grad()
                continue
            loss = model.loss(tokens(10 * step + number, rows))
            held = engine.no_reduce(unseen=what == "u") if what in "hu" else contextlib.nullcontext()
            with held:
                engine.begin_backward(continues=number > 0 and sequence[number - 1] == "u")
                loss.backward()
                engine.end_backward()
            assert what == "u" or all(param.grad is None for param in model.parameters())
        engine.step()
    engine.detach()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def every_sequence(stage: str, way: str) -> dict[str, torch.Tensor]:
    found = {}
    for sequence in SEQUENCES:
        torch.manual_seed(0)
        model = GPT(layers=2).double()
        optimizer = momentum(model)
        exchange = open_exchange(Comm(), torch.device("cpu"))
        engine = Engine(model, [optimizer], zero=Zero(stage, accumulate=way), exchange=exchange)
        found[sequence] = weights_after(engine, model, optimizer, sequence)
    return found


def in_one_process(sequence: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = GPT(layers=2).double()
    optimizer = momentum(model)
    for step in range(2):
        for number, what in enumerate(sequence):
            if what == "z":
                optimizer.zero_grad()
            else:
                model.loss(tokens(10 * step + number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return {sequence: in_one_process(sequence) for sequence in SEQUENCES}


def test_what_is_dropped_and_what_is_kept_shows(expected):
    assert len({weights.sum().item() for weights in map(expected.get, ("r", "rr", "zr", "rzr", "rrr"))}) == 5


@pytest.mark.thorough("stage1", "none-")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("stage", "way"), WAYS)
def test_gradients_add_up_until_they_are_dropped(ranks, expected, stage, way, size):
    for found in ranks(size).run(every_sequence, stage, way):
        for sequence, weights in found.items():
            torch.testing.assert_close(weights, expected[sequence], rtol=1e-10, atol=1e-12, msg=sequence)


def peaks(way: str) -> dict[str, Any]:
    """Bytes of gradients that wait between two micro-batches."""
    model = GPT(vocab=31, dim=48, layers=8)
    exchange = open_exchange(Comm(), torch.device("cpu"))
    engine = Engine(model, [momentum(model)], zero=Zero("stage2", accumulate=way), exchange=exchange)
    with engine.no_reduce():
        engine.backward(model.loss(tokens(0)))
    reductions = exchange.counters.reductions
    engine.backward(model.loss(tokens(1)))
    found = {"between": reductions, "all": exchange.counters.reductions}
    engine.exchange.close()
    return found


def test_holding_reduces_once_and_reducing_reduces_every_time(ranks):
    for hold, reduce in zip(ranks(2).run(peaks, "hold"), ranks(2).run(peaks, "reduce"), strict=True):
        assert hold["between"] == 0 and hold["all"] > 0
        assert reduce["between"] == hold["all"] and reduce["all"] == 2 * hold["all"]


class Routes(torch.nn.Module):
    """Takes one way or another, looks up rows sparsely, and has a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding(16, 4, sparse=True)
        self.ways = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.ways[2].weight.requires_grad_(False)

    def loss(self, number: int) -> torch.Tensor:
        x = self.rows(torch.tensor([number, number + 1]))
        return self.ways[2](self.ways[number % 2](x)).square().mean()


def unseen_on_routes(sequence: str) -> tuple[list[torch.Tensor], list[int]]:
    torch.manual_seed(0)
    model = Routes()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    engine = Engine(model, [optimizer], zero=Zero("none"), exchange=open_exchange(Comm(), torch.device("cpu")))
    where = []
    for number, what in enumerate(sequence):
        with engine.no_reduce(unseen=True) if what == "u" else contextlib.nullcontext():
            engine.begin_backward(continues=number > 0)
            model.loss(number).backward()
            engine.end_backward()
        where.append(sum(param.grad is not None for param in model.parameters()))
    engine.step()
    engine.detach()
    return [param.detach() for param in model.parameters()], where


def test_unseen_gradients_stay_with_parameters_until_the_last_backward():
    torch.manual_seed(0)
    model = Routes()
    for number in range(4):
        model.loss(number).backward()
    expected = [p.detach() if p.grad is None else p.detach() - 0.5 * p.grad.to_dense() for p in model.parameters()]
    found, where = unseen_on_routes("uuur")
    assert where == [4, 6, 6, 0], "rows, the last bias, and a weight and a bias of each way that was taken"
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def landings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients of each backward are taken notice of: three that nobody sees, and one that reduces."""
    model = GPT(layers=2)
    engine = Engine(model, [], zero=Zero("none"), exchange=open_exchange(Comm(), torch.device("cpu")))
    noticed, taken, land = [], [0], engine._reducer.land

    def count(*args: Any) -> bool:
        taken[0] += 1
        return land(*args)

    monkeypatch.setattr(engine._reducer, "land", count)
    for number in range(4):
        taken[0] = 0
        with engine.no_reduce(unseen=True) if number < 3 else contextlib.nullcontext():
            engine.begin_backward(continues=number > 0)
            model.loss(tokens(number)).backward()
            engine.end_backward()
        noticed.append(taken[0])
    engine.detach()
    return noticed


def test_gradients_that_are_added_where_they_lie_come_unnoticed(monkeypatch):
    every = len(list(GPT(layers=2).parameters()))
    assert landings(monkeypatch) == [every, 0, 0, every]


def test_a_backward_that_fails_leaves_no_hook_asleep():
    model = GPT(layers=2)
    engine = Engine(model, [], zero=Zero("none"), exchange=open_exchange(Comm(), torch.device("cpu")))
    for number in range(2):
        with contextlib.suppress(OSError), engine.no_reduce(unseen=True):
            engine.begin_backward(continues=number > 0)
            model.loss(tokens(number)).backward()
            assert bool(engine._hooks._asleep) == (number == 1)
            if number == 1:
                raise OSError("gone")
            engine.end_backward()
    assert not engine._hooks._asleep
    engine.detach()


def residents(dtype: torch.dtype, gradient_dtype: str) -> tuple[int, int, bool]:
    """How many gradients stay with parameters between two unseen backwards; whether any does after the end."""
    model = GPT(layers=2).to(dtype)
    lowering = Lowering(Precision(reduce_dtype="compute", gradient_dtype=gradient_dtype), None)
    exchange = open_exchange(Comm(), torch.device("cpu"))
    engine = Engine(model, [], zero=Zero("stage3", accumulate="hold"), exchange=exchange, lowering=lowering)
    between = []
    for number in range(2):
        with engine.no_reduce(unseen=True):
            engine.begin_backward(continues=number > 0)
            model.loss(tokens(number)).backward()
            engine.end_backward()
        between.append(sum(param.grad is not None for param in model.parameters()))
    engine.detach()
    return between[0], between[1], any(param.grad is not None for param in model.parameters())


def test_gradients_that_are_divided_by_ranks_as_they_land_do_not_reside(ranks):
    every = len(list(GPT(layers=2).parameters()))
    for ours in ranks(2).run(residents, torch.bfloat16, "compute"):
        assert ours == (every, every, False), "2-byte gradients are divided after the sum"
    for ours in ranks(2).run(residents, torch.float32, "float32"):
        assert ours == (0, 0, False)
