"""The kernel of ``pack`` and ``unpack``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lit_zero.kernels.many import table_of
from lit_zero.kernels.table import ALIGN, HEAD
from lit_zero.kernels.triton_casts import DTYPES, narrow, widen

_BLOCK = 4096


@triton.jit
def _move(
    rows,
    owners,
    DTYPE: tl.constexpr,
    FLAT: tl.constexpr,
    TO_FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    row = rows + tl.load(owners + number) * WIDTH
    at = (number - tl.load(row + 2)) * BLOCK + tl.arange(0, BLOCK)  # int64, as the table is
    inside = at < tl.load(row)
    single = tl.load(row + HEAD).to(tl.pointer_type(DTYPE)) + at
    packed = tl.load(row + HEAD + 1).to(tl.pointer_type(FLAT)) + at
    if ALIGNED:  # what is read from a table says nothing of alignment by itself
        single = tl.max_contiguous(tl.multiple_of(single, 16), BLOCK)
        packed = tl.max_contiguous(tl.multiple_of(packed, 16), BLOCK)
    if TO_FLAT:
        tl.store(packed, narrow(widen(tl.load(single, mask=inside)), FLAT), mask=inside)
    else:
        tl.store(single, narrow(widen(tl.load(packed, mask=inside)), DTYPE), mask=inside)


def launch(tensors: Sequence[torch.Tensor], flat: torch.Tensor, starts: Sequence[int], to_flat: bool) -> None:
    """Run the kernel on tensors of one dtype, none of them empty."""
    places = [flat.data_ptr() + start * flat.element_size() for start in starts]
    table = table_of(tensors, _BLOCK, places)
    _move[(len(table.owners),)](
        table.rows,
        table.owners,
        DTYPE=DTYPES[tensors[0].dtype],
        FLAT=DTYPES[flat.dtype],
        TO_FLAT=to_flat,
        ALIGNED=all(address % ALIGN == 0 for address in [*places, *(tensor.data_ptr() for tensor in tensors)]),
        WIDTH=table.width,
        HEAD=HEAD,
        BLOCK=_BLOCK,
    )
