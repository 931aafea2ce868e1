"""``activation(gate) * up`` in Triton: one program for a piece of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns that one program takes
_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _value_and_slope(x, KIND: tl.constexpr):
    """Return the activation and its derivative; no name of the library of one device is used, so that every backend
    and the interpreter have them."""
    if KIND == 0:
        half = tl.sigmoid(x)
        value = x * half
        slope = half * (1.0 + x * (1.0 - half))
    elif KIND == 1:
        half = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * half
        slope = half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # twice sqrt(2 / pi): 1 + tanh(u) = 2 sigmoid(2 u)
        half = tl.sigmoid(inner)
        value = x * half
        slope = half + x * half * (1.0 - half) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def _forward(gate, up, y, gate_stride, up_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(g, KIND)
    tl.store(y + row * width + columns, (value * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, width,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    d = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(g, KIND)
    place = row * width + columns
    tl.store(grad_gate + place, (d * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + place, (d * value).to(grad_up.dtype.element_ty), mask=inside)


def activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See ``gated.activated``; for rows [rows, width]."""
    rows, width = gate.shape
    y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    with torch.cuda.device_of(gate):
        _forward[(rows, triton.cdiv(width, _BLOCK))](
            gate, up, y, gate.stride(0), up.stride(0), width, KIND=_KINDS[activation], BLOCK=_BLOCK
        )  # fmt: skip
    return y


def activated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See ``gated.activated_backward``; for rows [rows, width]."""
    rows, width = gate.shape
    grad_gate, grad_up = (torch.empty(rows, width, dtype=t.dtype, device=t.device) for t in (gate, up))
    strides = (t.stride(0) for t in (grad, gate, up))
    with torch.cuda.device_of(gate):
        _backward[(rows, triton.cdiv(width, _BLOCK))](
            grad, gate, up, grad_gate, grad_up, *strides, width, KIND=_KINDS[activation], BLOCK=_BLOCK
        )  # fmt: skip
    return grad_gate, grad_up
