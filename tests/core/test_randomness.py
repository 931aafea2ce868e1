"""Random states: read, compared, sent, put back."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lit_zero.core.randomness import (
    drawn_since,
    generator_state,
    generators_in,
    random_marks,
    random_states,
    seed_everything,
    set_generator_state,
    set_random_states,
)

DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "random": random.random,
    "numpy": lambda: float(np.random.normal()),  # keeps a second number for the next call
}


def draw() -> list[float]:
    return [each() for each in DRAWS.values()]


def test_everybody_goes_on_from_where_they_were() -> None:
    draw()
    sent = pickle.loads(pickle.dumps(random_states()))
    expected = draw()
    assert draw() != expected
    set_random_states(sent)
    assert draw() == expected


@pytest.mark.parametrize("name", DRAWS)
def test_only_what_has_moved_differs_and_only_what_is_named_is_put_back(name: str) -> None:
    before = random_states()
    assert random_states() == before
    first = DRAWS[name]()
    moved = {key: state for key, state in random_states().items() if state != before[key]}
    assert list(moved) == [name]
    others = [each() for key, each in DRAWS.items() if key != name]
    set_random_states({name: before[name]})
    assert DRAWS[name]() == first
    set_random_states(before)
    assert [each() for key, each in DRAWS.items() if key != name] == others


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("times", [1, 2, 700])  # a generator of 624 numbers begins anew in between
def test_whoever_has_drawn_since_the_seed_is_found(name: str, times: int) -> None:
    seed_everything(5)
    marks = random_marks()
    assert drawn_since(marks) == {}
    for _ in range(times):
        DRAWS[name]()
    found = drawn_since(marks)
    assert found == {name: random_states()[name]}
    seed_everything(5)
    assert drawn_since(marks) == {}


def test_a_seed_is_for_all() -> None:
    for seed in (3, (1 << 63) - 1):
        seed_everything(seed)
        first = draw()
        seed_everything(seed)
        assert draw() == first


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (torch.Generator, lambda g: torch.rand((), generator=g).item()),
        (random.Random, lambda g: g.random()),
        (np.random.default_rng, lambda g: g.random()),
        (np.random.RandomState, lambda g: g.rand()),
    ],
)
def test_generators_that_somebody_holds(make: Callable[[], Any], number: Callable[[Any], float]) -> None:
    held = make()
    assert generators_in([3, held, None, torch.zeros(1)]) == [held]
    state = generator_state(held)
    first = number(held)
    set_generator_state(held, state)
    assert number(held) == first
