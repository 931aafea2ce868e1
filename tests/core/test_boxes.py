"""Every range of every shape, against the elements that a tensor of positions shows."""

from __future__ import annotations

import math

import pytest
import torch

from lit_zero.core.boxes import Box, boxes

SHAPES = [
    (),
    (1,),
    (7,),
    (1, 1),
    (6, 5),
    (1, 9),
    (9, 1),
    (5, 4, 3),
    (4, 1, 3),
    (1, 4, 1, 3),
    (2, 3, 2, 2),
    (2, 1, 3, 1, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_hold_exactly_the_range_in_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    positions = torch.arange(numel).reshape(shape)
    most = 0
    for start in range(numel + 1):
        for end in range(start, numel + 1):
            found = boxes(shape, start, end)
            most = max(most, len(found))
            elements: list[int] = []
            for box in found:
                part = positions[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
                assert part.reshape(-1).tolist() == list(range(box.start, box.start + box.length))
                elements += part.reshape(-1).tolist()
            assert elements == list(range(start, end)), (start, end)
    assert most <= max(1, 2 * len(shape) - 1)


def test_the_bound_is_reached() -> None:
    assert len(boxes((6, 5), 3, 28)) == 3
    assert len(boxes((5, 4, 3), 1, 59)) == 5
    assert len(boxes((3, 3, 3, 3), 1, 80)) == 7


def test_an_empty_tensor_has_no_box() -> None:
    assert boxes((0,), 0, 0) == []
    assert boxes((3, 0, 2), 0, 0) == []


def test_a_scalar_is_one_box() -> None:
    assert boxes((), 0, 1) == [Box((), (), 0, 1)]


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 7), (4, 3), (7, 7)])
def test_a_range_outside_is_refused(start: int, end: int) -> None:
    with pytest.raises(
        ValueError, match=rf"\[{start}, {end}\) does not lie inside a tensor of shape \(2, 3\) with 6 elements"
    ):
        boxes((2, 3), start, end)
