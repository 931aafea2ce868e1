"""Triton kernels of ``moments``, and of the random bits of ``noise``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from lit_zero.kernels.moments import TINY, Draw, table
from lit_zero.kernels.noise import FIRST, POSITION, SECOND, as_int32, seed_of

_BLOCK = 1024
_ROWS = 8  # blocks of a moment that one program works on
_POSITION = tl.constexpr(as_int32(POSITION))
_FIRST, _SECOND = tl.constexpr(as_int32(FIRST)), tl.constexpr(as_int32(SECOND))
_TINY = tl.constexpr(TINY)


@triton.jit
def random_16(seed, position):  # type: ignore[no-untyped-def]
    """Return 16 random bits for each position (int64), as int32; ``seed`` as ``noise.seed_of`` gives it."""
    bits = position.to(tl.int32) * _POSITION + seed
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * _FIRST
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * _SECOND
    return (bits >> 16) & 0xFFFF


@triton.jit
def rounded_up_or_down(values, bits):  # type: ignore[no-untyped-def]
    """Return the bits (int16) of the bf16 numbers to which fp32 values are rounded with 16 random bits each."""
    rounded = (values.to(tl.int32, bitcast=True) + bits) >> 16
    return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)  # to what is no number nothing is added


@triton.jit
def code_of(size, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the code, not rounded yet, of magnitudes from 0 to 1: the least of the lines."""
    BITS: tl.constexpr = 6 if SIGNED else 7
    code = tl.minimum(size * (10.0**BITS), 127.0 if SIGNED else 255.0)
    for decade in tl.static_range(BITS):
        slope = 2.0 ** (BITS - decade) / 0.9 * 10.0**decade
        intercept = 2.0 ** (BITS + 1 - decade) - 1.0 - slope * 10.0 ** (-decade)
        code = tl.minimum(code, size * slope + intercept)
    return code


@triton.jit
def scales_of(found):  # type: ignore[no-untyped-def]
    """Return the scale of each row of values."""
    scale = tl.maximum(tl.max(tl.abs(found), 1), _TINY)
    unknown = tl.max((found != found).to(tl.int32), 1)  # a maximum does not show what is no number
    return tl.where(unknown > 0, float("nan"), scale)


@triton.jit
def bytes_of(found, scale, seed, index, SIGNED: tl.constexpr, RANDOM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes (int8) of rows of values, rounded to nearest or with the random bits of ``index``."""
    code = code_of(tl.div_rn(tl.abs(found), tl.broadcast_to(scale[:, None], found.shape)), SIGNED)
    if RANDOM:
        code = tl.floor(code + random_16(seed, index).to(tl.float32) * 0.0000152587890625)
    else:
        code = tl.floor(code + 0.5)
    if SIGNED:  # noqa: SIM108 (what is known when a kernel is compiled)
        code = tl.where(found < 0, -code, code)
    else:
        code = tl.maximum(code, tl.where(found > 0, 1.0, 0.0)) - 128.0
    return code.to(tl.int8)


@triton.jit
def _to_bfloat16(values, out, seed, numel, DEVICE_SEED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(seed) if DEVICE_SEED else seed
    found = tl.load(values + index, mask=index < numel, other=0.0)
    tl.store(out + index, rounded_up_or_down(found, random_16(start, index)), mask=index < numel)


@triton.jit
def _to_int8(  # type: ignore[no-untyped-def]
    values,
    codes,
    scales,
    seed,
    blocks,
    SIGNED: tl.constexpr,
    RANDOM: tl.constexpr,
    DEVICE_SEED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    here = (row < blocks)[:, None]
    found = tl.load(values + index, mask=here, other=0.0)
    scale = scales_of(found)
    start = tl.load(seed) if DEVICE_SEED else seed
    tl.store(codes + index, bytes_of(found, scale, start, index, SIGNED, RANDOM), mask=here)
    tl.store(scales + row, scale, mask=row < blocks)


@triton.jit
def _from_int8(codes, scales, values, out, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + index, mask=index < numel, other=0).to(tl.int32)
    scale = tl.load(scales + index // 256, mask=index < numel, other=0.0)
    tl.store(out + index, tl.load(values + (code & 255)) * scale, mask=index < numel)


def _seed(draw: Draw) -> tuple[Any, bool]:
    """Return the seed of random bits, and whether it lies on the device."""
    seed = seed_of(*draw)
    return seed, isinstance(seed, torch.Tensor)


def to_bfloat16(values: torch.Tensor, out: torch.Tensor, draw: Draw) -> None:
    """Run the kernel of ``moments.to_bfloat16``."""
    numel, (seed, on_device) = values.numel(), _seed(draw)
    if numel:
        grid = (triton.cdiv(numel, _BLOCK),)
        with torch.cuda.device_of(values):
            _to_bfloat16[grid](values, out.view(torch.int16), seed, numel, DEVICE_SEED=on_device, BLOCK=_BLOCK)


def to_int8(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, signed: bool, draw: Draw | None) -> None:
    """Run the kernel of ``moments.to_int8``."""
    seed, on_device = (0, False) if draw is None else _seed(draw)
    if blocks := scales.numel():
        with torch.cuda.device_of(values):
            _to_int8[(triton.cdiv(blocks, _ROWS),)](
                values,
                codes,
                scales,
                seed,
                blocks,
                SIGNED=signed,
                RANDOM=draw is not None,
                DEVICE_SEED=on_device,
                ROWS=_ROWS,
            )


def from_int8(codes: torch.Tensor, scales: torch.Tensor, signed: bool, out: torch.Tensor) -> None:
    """Run the kernel of ``moments.from_int8``."""
    if numel := out.numel():
        values = table(signed, out.device)
        with torch.cuda.device_of(out):
            _from_int8[(triton.cdiv(numel, _BLOCK),)](codes, scales, values, out, numel, BLOCK=_BLOCK)
