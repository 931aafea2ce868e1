"""Tensors are found wherever a module may put them, each occurrence once."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.core.nested import tensors_in


@dataclass
class Point:
    x: Any
    y: Any = None


Named = collections.namedtuple("Named", "first second")


class Plain:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Lazy(Mapping[str, Any]):
    """Makes its values when they are asked for."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, key: str) -> list[torch.Tensor]:
        return [self.tensors[int(key)]]

    def __iter__(self) -> Iterator[str]:
        return iter([str(number) for number in range(len(self.tensors))])

    def __len__(self) -> int:
        return len(self.tensors)


def found(value: Any) -> set[int]:
    return {id(tensor) for tensor in tensors_in(value)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (1, t),
        lambda t: [[None, (t,)]],
        lambda t: {"a": {"b": [t]}},
        lambda t: collections.OrderedDict(a=t),
        lambda t: collections.deque([t]),
        lambda t: {t},
        lambda t: frozenset([t]),
        lambda t: Point(1, Point([t])),
        lambda t: Named("x", t),
        lambda t: SimpleNamespace(hidden=t),
        lambda t: Plain(states={"a": [t]}),
        lambda t: [Point({"k": Plain(t=t)})],
        lambda t: torch.nn.utils.rnn.pack_padded_sequence(t, [1]),
    ],
)
def test_finds_a_tensor_in(wrap):
    tensor = torch.ones(1, 1)
    value = wrap(tensor)
    expected = value.data if isinstance(value, torch.nn.utils.rnn.PackedSequence) else tensor
    assert id(expected) in found(value)


def test_finds_parameters_and_subclasses():
    parameter = nn.Parameter(torch.ones(1))
    assert found([parameter]) == {id(parameter)}


@pytest.mark.parametrize("value", [None, 3, 2.5, "text", b"bytes", True, 1j, nn.Linear(2, 2), Point, object(), [], {}])
def test_finds_nothing_in(value):
    assert list(tensors_in(value)) == []


def test_modules_are_not_looked_into_even_as_attributes():
    assert list(tensors_in(Plain(module=nn.Linear(2, 2), config={"module": nn.Linear(2, 2)}))) == []


def test_plain_objects_are_looked_into_one_level_deep():
    near, far = torch.ones(1), torch.ones(1)
    assert found(Plain(near=near, inner=Plain(far=far))) == {id(near)}


def test_cycles_end():
    tensor = torch.ones(1)
    knot: list[Any] = [tensor]
    knot.append(knot)
    assert found(knot) == {id(tensor)}


def test_a_tensor_that_comes_twice_is_given_twice():
    # The engine waits for as many gradients as tensors went in.
    tensor = torch.ones(1)
    assert len(list(tensors_in((tensor, {"again": tensor})))) == 2


def test_values_made_on_the_way_do_not_hide_one_another():
    tensors = [torch.ones(1) for _ in range(50)]
    assert found([Lazy(tensors)]) == {id(tensor) for tensor in tensors}


def test_a_dataclass_without_a_field_set_is_no_error():
    point = Point(torch.ones(1))
    del point.y
    assert len(list(tensors_in(point))) == 1
