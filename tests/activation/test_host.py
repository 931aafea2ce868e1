"""Host memory: what is on its way, what comes back before it is asked for, and what is left."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from lit_zero import Zero
from lit_zero.activation.host import Host, Moved, Shelf
from lit_zero.activation.policy import Activation
from lit_zero.comm.exchange import Exchange
from lit_zero.strategy.activations import Activations
from tests.activation.harness import CPU, DropGPT, apply, gradients, same
from tests.zero.harness import tokens


def put(host: Host, shelf: Shelf, count: int) -> list[Moved]:
    found = []
    for number in range(count):
        found.append(host.move(torch.full((10,), float(number)), shelf))
        shelf.add(found[-1])
    return found


def test_what_was_moved_last_comes_back_first_within_the_limit() -> None:
    host = Host(CPU, threshold=1, in_flight=100)
    first = put(host, Shelf(host), 2)
    second = put(host, Shelf(host), 3)
    assert (host.held, host.moved, host.most) == (200, 200, 80), "two tensors of 40 bytes at a time"
    assert host.take(second[2])[0] == 2
    assert [each.tensor is not None for each in (*first, *second)] == [False, False, True, True, False]
    assert host.ahead == 80
    host.take(second[1])
    assert [each.tensor is not None for each in (*first, *second)] == [False, True, True, False, False], (
        "the call before"
    )
    for each in (second[0], first[1], first[0]):
        host.take(each)
    assert host.ahead == 0
    assert host.take(second[2])[0] == 2, "a graph that is kept asks again"
    assert [each.tensor for each in (*first, *second)] == [None] * 5, "and what has been taken is not brought again"
    del first, second, each
    assert host.held == 0


def test_what_came_back_for_nothing_is_forgotten() -> None:
    host = Host(CPU, threshold=1, in_flight=1000)
    moved = put(host, Shelf(host), 3)
    host.take(moved[2])
    assert host.ahead == 80
    del moved
    assert (host.ahead, host.held) == (0, 0)


def test_the_order_of_elements_in_memory_stays() -> None:
    host, tensor = Host(CPU, threshold=1, in_flight=1000), torch.randn(3, 4, 5).permute(2, 0, 1)
    back = host.take(host.move(tensor, Shelf(host)))
    assert back.stride() == tensor.stride() and torch.equal(back, tensor)
    assert back.data_ptr() != tensor.data_ptr()


def test_a_cpu_is_told_once_that_it_saves_nothing() -> None:
    for speaks in (False, True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            strategy = SimpleNamespace(root_device=CPU, is_global_zero=speaks, zero=Zero())
            Activations("offload").apply(strategy, DropGPT(), [[0, 1]])
        assert [str(each.message) for each in told] == speaks * [
            "activation=offload on a CPU: tensors are copied within the same, pageable memory. This shows what would "
            "be moved, and saves nothing."
        ]


def test_what_a_copy_would_make_larger_stays() -> None:
    host = Host(CPU, threshold=100, in_flight=1000)
    row = torch.zeros(30)
    assert host.takes(row) and host.takes(row.view(5, 6).T)
    assert not host.takes(row.expand(40, 30))


def test_parameters_and_their_views_stay() -> None:
    torch.manual_seed(0)
    model = DropGPT()
    applied = apply(model, Activation("offload", threshold=1))
    assert applied.host is not None
    moved: list[torch.Tensor] = []
    move = applied.host.move
    applied.host.move = lambda tensor, shelf: moved.append(tensor) or move(tensor, shelf)  # type: ignore[func-returns-value, method-assign]
    model.loss(tokens(0)).backward()
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    assert moved
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in moved}


def test_a_budget_takes_what_is_cheapest_of_all_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is gained by moving, so a budget does not; here it is made to believe so."""

    def train(budget: int | None) -> tuple[dict[str, torch.Tensor], set[str]]:
        torch.manual_seed(0)
        model = DropGPT(layers=6)
        if budget is None:
            return gradients(model, None, tokens(0)), set()
        applied = apply(model, Activation("budget", budget=budget, threshold=64, in_flight=10_000))
        for number in range(2):
            torch.manual_seed(number)
            loss = model(tokens(0)).square().mean()
            applied.step_is_over(Exchange())
            loss.backward()
        found = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        return found, set(applied.choices.values())

    expected, _ = train(None)
    found, choices = train(200_000)
    same(found, expected)
    assert choices == {"keep", "recompute"}
    monkeypatch.setattr(Host, "frees", True)
    monkeypatch.setattr(Host, "link", lambda _: 1 << 40)
    found, choices = train(200_000)
    same(found, expected)
    assert choices == {"keep", "offload"}
    monkeypatch.setattr(Host, "link", lambda _: 1)
    assert train(200_000)[1] == {"keep", "recompute"}
