"""Casts that give the same bits compiled and under Triton's interpreter, and the names of dtypes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round ``x`` to the nearest number of ``DTYPE``, ties to even: the interpreter would cut bf16 off."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300 - a constexpr compares with a dtype, not the other way
        single = x.to(tl.float32)
        bits = single.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(single == single, rounded, 0x7FC0)  # adding could carry a NaN over to an infinity
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif DTYPE == tl.float64:  # noqa: SIM300
        return x.to(tl.float64)
    else:
        return x.to(tl.float32).to(DTYPE)  # torch rounds fp64 to fp16 in two steps too


@triton.jit
def widen(x):
    """Return ``x`` in the dtype that it is computed in: fp32, or fp64 where it is that."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)
