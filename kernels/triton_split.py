"""Triton kernels of ``split``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def halves(master):  # type: ignore[no-untyped-def]
    """Return the bits of the copy and the remainder of fp32 values, both int16."""
    bits = master.to(tl.int32, bitcast=True)
    rounded = bits + 0x8000
    flipped = (bits ^ rounded) >> 31
    return ((rounded >> 16) + flipped).to(tl.int16), bits.to(tl.int16)


@triton.jit
def joined(copy, remainder):  # type: ignore[no-untyped-def]
    """Return the fp32 values of the copy's bits and the remainder, both int16."""
    return ((copy.to(tl.int32) << 16) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split(master, copy, remainder, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    high, low = halves(tl.load(master + index, mask=index < numel, other=0.0))
    tl.store(copy + index, high, mask=index < numel)
    tl.store(remainder + index, low, mask=index < numel)


@triton.jit
def _join(copy, remainder, out, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    high = tl.load(copy + index, mask=index < numel, other=0)
    low = tl.load(remainder + index, mask=index < numel, other=0)
    tl.store(out + index, joined(high, low), mask=index < numel)


def split(master: torch.Tensor, copy: torch.Tensor, remainder: torch.Tensor) -> None:
    """Run the kernel of ``split.split``."""
    if numel := master.numel():
        with torch.cuda.device_of(master):
            _split[(triton.cdiv(numel, _BLOCK),)](master, copy.view(torch.int16), remainder, numel, BLOCK=_BLOCK)


def join(copy: torch.Tensor, remainder: torch.Tensor, out: torch.Tensor) -> None:
    """Run the kernel of ``split.join``."""
    if numel := out.numel():
        with torch.cuda.device_of(out):
            _join[(triton.cdiv(numel, _BLOCK),)](copy.view(torch.int16), remainder, out, numel, BLOCK=_BLOCK)
