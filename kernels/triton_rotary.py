"""Rotary position embedding in Triton: one program turns some heads at one position of one sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # that one program takes


@triton.jit
def _turn(
    x, cos, sin, y, x_b, x_h, x_t, c_b, c_h, c_t, s_b, s_h, s_t, y_b, y_h, y_t, times, heads, half,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // times).to(tl.int64)
    time = (tl.program_id(0) % times).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (pair < half)
    first = pair
    second = pair + half
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    x += batch * x_b + head * x_h + time * x_t
    y += batch * y_b + head * y_h + time * y_t
    cos += batch * c_b + head * c_h + time * c_t
    sin += batch * s_b + head * s_h + time * s_t
    x1 = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    c1 = tl.load(cos + first, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + second, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + first, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + second, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(y + first, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(y + second, y2.to(y.dtype.element_ty), mask=inside)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype, backward: bool) -> Tensor:
    batch, heads, times, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = ((t if t.stride(-1) == 1 else t.contiguous()).expand(x.shape) for t in (cos, sin))
    y = torch.empty_like(x, dtype=dtype)
    if y.stride(3) != 1:  # x overlaps itself, so its strides were not kept
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
    strides = [stride for t in (x, cos, sin, y) for stride in t.stride()[:3]]
    with torch.cuda.device_of(x):
        _turn[(batch * times, triton.cdiv(heads, _HEADS))](
            x, cos, sin, y, *strides, times, heads, dim // 2,
            INTERLEAVED=interleaved, BACKWARD=backward, HEADS=_HEADS, BLOCK=triton.next_power_of_2(dim // 2),
        )  # fmt: skip
    return y


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """See ``rotary.rotated``; for [batch, heads, time, dim]."""
    return _turned(x, cos, sin, interleaved, dtype, backward=False)


def rotated_backward(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """See ``rotary.rotated_backward``; for [batch, heads, time, dim]."""
    return _turned(grad, cos, sin, interleaved, dtype, backward=True)
