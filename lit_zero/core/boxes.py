"""A contiguous range of a flattened tensor as a few boxes of the unflattened one. Integers only.

A rank holds ``[start, end)`` of a row-major flattened tensor. Checkpoint formats speak of boxes (an offset and a size
per dimension). Such a range is at most ``2 * ndim - 1`` boxes: the rest of a started row, the whole rows, and the
beginning of the last row, where the two broken rows are taken apart in the same way one dimension further down. Every
box is itself contiguous in the flattened tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """One box of a tensor.

    Attributes:
        offsets: first index per dimension.
        sizes: number of indices per dimension; the product is ``length``.
        start: first element, counted in the row-major flattened tensor.
        length: number of elements.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    length: int


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Cut ``[start, end)`` of a flattened tensor into boxes, in the order in which they lie.

    Args:
        shape: the tensor's shape; ``()`` is a scalar of one element.
        start: first element of the range.
        end: one past the last element of the range.

    Returns:
        At most ``2 * ndim - 1`` boxes (1 for a scalar), none if the range is empty.

    Raises:
        ValueError: if the range does not lie inside the tensor.
    """
    if not 0 <= start <= end <= math.prod(shape):
        raise ValueError(
            f"[{start}, {end}) does not lie inside a tensor of shape {shape} with {math.prod(shape)} elements"
        )
    if start == end:
        return []
    if not shape:
        return [Box((), (), 0, 1)]
    rest = shape[1:]
    row = math.prod(rest)
    first, last = -(-start // row), end // row  # whole rows are [first, last)
    if first > last:  # the range begins and ends inside one row
        return _in_row(last, rest, start - last * row, end - last * row)
    found: list[Box] = []
    if start < first * row:
        found += _in_row(first - 1, rest, start - (first - 1) * row, row)
    if first < last:
        found.append(Box((first, *(0 for _ in rest)), (last - first, *rest), first * row, (last - first) * row))
    if last * row < end:
        found += _in_row(last, rest, 0, end - last * row)
    return found


def _in_row(index: int, rest: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Cut ``[start, end)`` of row ``index``, whose own shape is ``rest``."""
    skip = index * math.prod(rest)
    return [Box((index, *b.offsets), (1, *b.sizes), skip + b.start, b.length) for b in boxes(rest, start, end)]
