"""The kernels of one bit an element. A program works on some blocks: rows of bytes of eight elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lit_zero.kernels.signs import Signs
from lit_zero.kernels.triton_blocks import DTYPES, OPTIONS, narrow

_TILE = 4096  # elements that a program works on, at least one block


@triton.jit
def _places(numel, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows of this program, every element's place (``[rows, bytes, 8]``) and whether there is one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    bit = tl.arange(0, 8)
    at = row[:, None, None] * BLOCK + column[None, :, None] * 8 + bit[None, None, :]
    within = (row < blocks)[:, None, None] & (column < BLOCK // 8)[None, :, None] & (at < numel)
    return row, at, within


@triton.jit
def _pack(
    values,
    error,
    bits,
    scales,
    numel,
    blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, at, within = _places(numel, blocks, BLOCK, ROWS, COLUMNS)
    wanted = tl.load(values + at, mask=within, other=0.0).to(tl.float32)
    wanted += tl.load(error + at, mask=within, other=0.0)
    total = tl.sum(tl.sum(tl.abs(wanted), axis=2), axis=1)
    count = tl.minimum(numel - row * BLOCK, BLOCK).to(tl.float32)
    scale = total / tl.maximum(count, 1.0)  # rows behind the last one have no element
    tl.store(scales + row, scale, mask=row < blocks)
    positive = wanted >= 0
    decoded = tl.where(positive, 1.0, -1.0) * scale[:, None, None]
    tl.store(error + at, wanted - decoded, mask=within)
    shifted = (positive & within).to(tl.int32) << tl.arange(0, 8)[None, None, :]
    byte = tl.sum(shifted, axis=2)  # [rows, bytes]
    column = tl.arange(0, COLUMNS)
    first = row[:, None] * BLOCK + column[None, :] * 8
    inside = (row < blocks)[:, None] & (column < BLOCK // 8)[None, :] & (first < numel)
    tl.store(bits + row[:, None] * (BLOCK // 8) + column[None, :], byte.to(tl.uint8), mask=inside)


@triton.jit
def _unpack(
    bits,
    scales,
    out,
    numel,
    blocks,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, at, within = _places(numel, blocks, BLOCK, ROWS, COLUMNS)
    byte = tl.load(bits + at // 8, mask=within, other=0).to(tl.int32)
    scale = tl.load(scales + row, mask=row < blocks, other=0.0)
    positive = ((byte >> (at % 8).to(tl.int32)) & 1) > 0
    tl.store(out + at, narrow(tl.where(positive, 1.0, -1.0) * scale[:, None, None], DTYPE), mask=within)


def launch_pack(values: torch.Tensor, error: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bits and scales, and update ``error``."""
    numel, blocks = values.numel(), -(-values.numel() // block)
    bits = torch.empty(-(-numel // 8), dtype=torch.uint8, device=values.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=values.device)
    if numel:
        tile, grid = _tile(block, blocks)
        with torch.cuda.device_of(values):
            _pack[grid](values, error, bits, scales, numel, blocks, **tile, **OPTIONS)
    return bits, scales


def launch_unpack(signs: Signs, out: torch.Tensor) -> None:
    """Fill ``out``."""
    if signs.numel:
        blocks = signs.scales.numel()
        tile, grid = _tile(signs.block, blocks)
        with torch.cuda.device_of(out):
            _unpack[grid](
                signs.bits, signs.scales, out, signs.numel, blocks, **tile, DTYPE=DTYPES[out.dtype], **OPTIONS
            )


def _tile(block: int, blocks: int) -> tuple[dict[str, int], tuple[int]]:
    columns = triton.next_power_of_2(block // 8)
    rows = max(1, _TILE // (8 * columns))
    return {"BLOCK": block, "ROWS": rows, "COLUMNS": columns}, (triton.cdiv(blocks, rows),)
