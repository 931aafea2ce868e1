"""The kernel of ``pack`` and ``unpack``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lit_zero.kernels.many import table_of
from lit_zero.kernels.table import HEAD
from lit_zero.kernels.triton_blocks import DTYPES, OPTIONS, fetch, put

_BLOCK = 4096


@triton.jit
def _move(
    rows,
    owners,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = rows + tl.load(owners + tl.program_id(0)) * WIDTH
    begin = (tl.program_id(0) - tl.load(row + 2)) * BLOCK  # int64, as the table is
    if (tl.load(row + 3) != 0) & (begin + BLOCK <= tl.load(row)):  # [Note: whole blocks]
        _block(row + HEAD, begin, tl.load(row), True, SOURCE, TARGET, BLOCK)
    else:
        _block(row + HEAD, begin, tl.load(row), False, SOURCE, TARGET, BLOCK)


@triton.jit
def _block(
    addresses,
    begin,
    numel,
    WHOLE: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = begin + tl.arange(0, BLOCK)
    source = tl.load(addresses).to(tl.pointer_type(SOURCE))
    target = tl.load(addresses + 1).to(tl.pointer_type(TARGET))
    put(target, at, fetch(source, at, at < numel, WHOLE, BLOCK), at < numel, TARGET, WHOLE, BLOCK)


def launch(tensors: Sequence[torch.Tensor], flat: torch.Tensor, starts: Sequence[int], to_flat: bool) -> None:
    """Run the kernel on tensors of one dtype, none of them empty."""
    places = [flat.data_ptr() + start * flat.element_size() for start in starts]
    table = table_of(tensors, _BLOCK, places, reverse=not to_flat)
    ends = (tensors[0].dtype, flat.dtype) if to_flat else (flat.dtype, tensors[0].dtype)
    with torch.cuda.device_of(flat):
        _move[(len(table.owners),)](
            table.rows,
            table.owners,
            SOURCE=DTYPES[ends[0]],
            TARGET=DTYPES[ends[1]],
            WIDTH=table.width,
            HEAD=HEAD,
            BLOCK=_BLOCK,
            **OPTIONS,
        )
