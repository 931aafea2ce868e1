"""Layer norm and RMS norm in Triton: one program a row forward, one for a group of rows backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 512  # of a backward: so many partial sums of the weight's gradient are added up afterwards


@triton.jit
def _forward(
    x, weight, bias, y, means, rstds, stride, width, eps, offset,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(value, 0) / width
        tl.store(means + row, mean)
        value = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(rstds + row, rstd)
    value = value * rstd
    if WEIGHT:
        value = value * (tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset)
    if BIAS:
        value = value + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, weight, means, rstds, grad_x, grad_weight, grad_bias, grad_stride, stride, rows, each, width, offset,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * each
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if WEIGHT:
        scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    row, end = first, tl.minimum(first + each, rows)
    while row < end:  # no ``range``: triton 3.6 cannot interpret one of tensors
        g = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        unit = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row)
        if CENTRED:
            unit = tl.where(inside, unit - tl.load(means + row), 0.0)
        unit = unit * rstd
        weight_sum += g * unit
        bias_sum += g
        inner = g * scale
        along = tl.sum(inner * unit, 0) / width
        if CENTRED:
            inner = inner - tl.sum(inner, 0) / width
        result = (inner - unit * along) * rstd
        tl.store(grad_x + row * width + columns, result.to(grad_x.dtype.element_ty), mask=inside)
        row += 1
    tl.store(grad_weight + program * width + columns, weight_sum, mask=inside)
    tl.store(grad_bias + program * width + columns, bias_sum, mask=inside)


def _shape(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def normalized(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool, dtype: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See ``normalization.normalized``."""
    count, width = rows.shape
    y = torch.empty(count, width, dtype=dtype, device=rows.device)
    rstd = torch.empty(count, dtype=torch.float32, device=rows.device)
    mean = torch.empty_like(rstd) if centred else None
    flags = {"CENTRED": centred, "WEIGHT": weight is not None, "BIAS": bias is not None}
    columns = [None if t is None else t.contiguous() for t in (weight, bias)]
    with torch.cuda.device_of(rows):
        _forward[(count,)](
            rows, *columns, y, mean, rstd, rows.stride(0), width, eps, offset, **flags, **_shape(width)
        )  # fmt: skip
    return y, mean, rstd


def normalized_backward(
    grad: Tensor, rows: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``normalization.normalized_backward``."""
    count, width = rows.shape
    each = triton.cdiv(count, _PROGRAMS)
    programs = triton.cdiv(count, each)
    grad_rows = torch.empty(count, width, dtype=rows.dtype, device=rows.device)
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=rows.device)
    flags = {"CENTRED": mean is not None, "WEIGHT": weight is not None}
    column = None if weight is None else weight.contiguous()
    with torch.cuda.device_of(rows):
        _backward[(programs,)](
            grad, rows, column, mean, rstd, grad_rows, sums[0], sums[1], grad.stride(0), rows.stride(0), count, each,
            width, offset, **flags, **_shape(width),
        )  # fmt: skip
    return grad_rows, sums[0].sum(0), sums[1].sum(0)
