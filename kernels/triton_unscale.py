"""The kernel of ``unscale``."""

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
def _unscale(
    rows,
    owners,
    scale,
    found,
    sums,
    DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    FINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = rows + tl.load(owners + tl.program_id(0)) * WIDTH
    begin = (tl.program_id(0) - tl.load(row + 2)) * BLOCK  # int64, as the table is
    if (tl.load(row + 3) != 0) & (begin + BLOCK <= tl.load(row)):  # [Note: whole blocks]
        _block(row + HEAD, begin, tl.load(row), scale, found, sums, True, DTYPE, SCALES, FINDS, BLOCK)
    else:
        _block(row + HEAD, begin, tl.load(row), scale, found, sums, False, DTYPE, SCALES, FINDS, BLOCK)


@triton.jit
def _block(
    address,
    begin,
    numel,
    scale,
    found,
    sums,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    FINDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = begin + tl.arange(0, BLOCK)
    base = tl.load(address).to(tl.pointer_type(DTYPE))
    value = fetch(base, at, at < numel, WHOLE, BLOCK)
    if FINDS:
        worst = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), axis=0)
        tl.store(found, 1.0, mask=worst > 0)  # whoever stores, stores the same
    if SCALES:
        value = value * tl.load(scale).to(value.dtype)
        put(base, at, value, at < numel, DTYPE, WHOLE, BLOCK)
    value = value.to(tl.float64)  # neither too large to be squared, nor dependent on where blocks begin
    tl.store(sums + tl.program_id(0), tl.sum(value * value, axis=0))


def launch(tensors: Sequence[torch.Tensor], scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> torch.Tensor:
    """Run the kernel on tensors of one dtype, none of them empty; return the sum of squares, 0-d, fp64."""
    dtype, table = tensors[0].dtype, table_of(tensors, _BLOCK)
    sums = torch.empty(len(table.owners), dtype=torch.float64, device=tensors[0].device)
    with torch.cuda.device_of(sums):
        _unscale[(len(sums),)](
            table.rows,
            table.owners,
            sums if scale is None else scale,
            sums if found_inf is None else found_inf,
            sums,
            DTYPE=DTYPES[dtype],
            SCALES=scale is not None,
            FINDS=found_inf is not None,
            WIDTH=table.width,
            HEAD=HEAD,
            BLOCK=_BLOCK,
            **OPTIONS,
        )
    return sums.sum()
