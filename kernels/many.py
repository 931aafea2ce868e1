"""Many flat tensors in one launch, for what keeps nothing from one call to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lit_zero.kernels.table import Row, Table, Tables

_TABLES = Tables()  # of the last calls: the same tensors again upload nothing


def table_of(tensors: Sequence[torch.Tensor], block: int, partners: Sequence[int] = (), reverse: bool = False) -> Table:
    """Return the table of some tensors.

    Args:
        tensors: contiguous, on one device, of one dtype; none is empty.
        block: elements of a block.
        partners: a second address for each.
        reverse: it comes before the tensor's own.

    Raises:
        ValueError: for a tensor with gaps, whose memory a kernel would walk through all the same.
    """
    check_contiguous(tensors)
    places = [tensor.data_ptr() for tensor in tensors]
    pairs = list(zip(places, partners or [0] * len(tensors), strict=True))
    rows = [
        Row(0, 0, tensor.numel(), (pair[::-1] if reverse else pair,))
        for tensor, pair in zip(tensors, pairs, strict=True)
    ]
    return _TABLES.table(rows, block, tensors[0].device)


def check_contiguous(tensors: Sequence[torch.Tensor]) -> None:
    """Check that a kernel may walk through the tensors' memory.

    Raises:
        ValueError: for one with gaps.
    """
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"A tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not contiguous, and flat "
                "kernels take contiguous tensors only. Pass tensor.contiguous(), and copy back what was written."
            )


def by_dtype(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the positions of the tensors that are not empty, in a list for each dtype; one launch takes one dtype."""
    found: dict[torch.dtype, list[int]] = {}
    for position, tensor in enumerate(tensors):
        if tensor.numel():
            found.setdefault(tensor.dtype, []).append(position)
    return list(found.values())
