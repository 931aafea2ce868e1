"""The kernel of ``unscale``."""

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
def _unscale(
    rows,
    owners,
    scale,
    found,
    sums,
    DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    FINDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    row = rows + tl.load(owners + number) * WIDTH
    at = (number - tl.load(row + 2)) * BLOCK + tl.arange(0, BLOCK)  # int64, as the table is
    inside = at < tl.load(row)
    places = tl.load(row + HEAD).to(tl.pointer_type(DTYPE)) + at
    if ALIGNED:  # what is read from a table says nothing of alignment by itself
        places = tl.max_contiguous(tl.multiple_of(places, 16), BLOCK)
    value = widen(tl.load(places, mask=inside, other=0.0))
    if FINDS:
        worst = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), axis=0)
        tl.store(found, 1.0, mask=worst > 0)  # whoever stores, stores the same
    if SCALES:
        value = value * tl.load(scale).to(value.dtype)
        tl.store(places, narrow(value, DTYPE), mask=inside)
    tl.store(sums + number, tl.sum(value * value, axis=0))


def launch(tensors: Sequence[torch.Tensor], scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> torch.Tensor:
    """Run the kernel on tensors of one dtype, none of them empty; return the sum of squares, 0-d, fp64."""
    dtype, table = tensors[0].dtype, table_of(tensors, _BLOCK)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.empty(len(table.owners), dtype=wide, device=tensors[0].device)
    _unscale[(len(sums),)](
        table.rows,
        table.owners,
        sums if scale is None else scale,
        sums if found_inf is None else found_inf,
        sums,
        DTYPE=DTYPES[dtype],
        SCALES=scale is not None,
        FINDS=found_inf is not None,
        ALIGNED=all(tensor.data_ptr() % ALIGN == 0 for tensor in tensors),
        WIDTH=table.width,
        HEAD=HEAD,
        BLOCK=_BLOCK,
    )
    return sums.sum(dtype=torch.float64)
