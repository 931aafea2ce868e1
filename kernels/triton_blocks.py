"""What kernels over flat tensors share: blocks that are read, rounded and written.

[Note: whole blocks] A mask that ends anywhere keeps the compiler from loading several elements at once, and so does an
address from a table, of which it knows nothing. So a kernel asks for each block whether it is whole and lies in aligned
memory, and goes two ways. Rounding to bf16 is done by integers: the interpreter cuts off instead.
"""

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
# Said, since triton changes its mind in 3.10: a product and a sum that are fused round once less.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def fetch(base, at, inside, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Return elements ``at`` in the dtype that they are computed in: fp32, or fp64 where they are that."""
    pointers = base + at  # here: what is said of an argument of a function is lost
    if WHOLE:
        value = tl.load(tl.max_contiguous(tl.multiple_of(pointers, 16), BLOCK))
    else:
        value = tl.load(pointers, mask=inside, other=0.0)
    return widen(value)


@triton.jit
def put(base, at, value, inside, DTYPE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Round elements ``at`` to ``DTYPE`` and write them."""
    pointers = base + at
    if WHOLE:
        tl.store(tl.max_contiguous(tl.multiple_of(pointers, 16), BLOCK), narrow(value, DTYPE))
    else:
        tl.store(pointers, narrow(value, DTYPE), mask=inside)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round ``x`` to the nearest number of ``DTYPE``, ties to even."""
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
    """Return ``x`` in fp32, or fp64 where it is that."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)
