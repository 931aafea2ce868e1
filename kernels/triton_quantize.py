"""The kernels of block-wise quantisation. A program works on some blocks, as rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lit_zero.kernels.codes import BITS, LEVELS, code_of_zero, table_on
from lit_zero.kernels.quantize import Quantized, Scheme
from lit_zero.kernels.triton_blocks import DTYPES, OPTIONS, narrow

_TILE = 2048  # bytes of codes that a program writes, at least one block


@triton.jit
def _code(value, scale, up, table, zero, LEVELS: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of ``value`` (``[rows, elements]``) by the rows' ``scale``; ``up`` decides for a neighbour."""
    usable = (scale > 0) & (scale < float("inf"))
    if LEVELS > 0:
        step = tl.div_rn(scale, tl.full(scale.shape, LEVELS, tl.float32))
        usable = usable & (step > 0)
        step = tl.where(usable, step, 1.0)
        wanted = tl.floor(tl.div_rn(value, tl.broadcast_to(step[:, None], value.shape)) + up)
        code = tl.minimum(tl.maximum(wanted, -1.0 * LEVELS), 1.0 * LEVELS)
        code = tl.where(usable[:, None], code, 0.0).to(tl.int32)
    else:
        divisor = tl.broadcast_to(tl.where(usable, scale, 1.0)[:, None], value.shape)
        relative = tl.where(usable[:, None], tl.div_rn(value, divisor), 0.0)
        lower = tl.zeros(value.shape, tl.int32)  # the last entry that is not above, by halves
        for step in tl.static_range(BITS):
            ahead = lower + (1 << (BITS - 1 - step))
            lower = tl.where(tl.load(table + ahead) <= relative, ahead, lower)
        upper = tl.minimum(lower + 1, (1 << BITS) - 1)
        below = tl.load(table + lower)
        rises = relative - below >= (1.0 - up) * (tl.load(table + upper) - below)
        code = tl.where(usable[:, None], tl.where(rises, upper, lower), zero)
    return code & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["seed"])
def _quantize(
    values,
    codes,
    scales,
    table,
    numel,
    blocks,
    seed,
    zero,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = tl.arange(0, COLUMNS * PER_BYTE)
    at = row[:, None] * BLOCK + element[None, :]
    within = (row < blocks)[:, None] & (element < BLOCK)[None, :] & (at < numel)
    value = tl.load(values + at, mask=within, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1)
    wrong = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), axis=1)
    scale = tl.where(wrong > 0, float("nan"), largest)
    tl.store(scales + row, scale, mask=row < blocks)
    up = tl.full(value.shape, 0.5, tl.float32)
    if STOCHASTIC:
        up = tl.rand(seed, at).to(tl.float32)
    byte = tl.where(within, _code(value, scale, up, table, zero, LEVELS, BITS), 0)
    if PER_BYTE == 2:
        first, second = tl.split(tl.reshape(byte, (ROWS, COLUMNS, 2)))
        byte = first | (second << BITS)
    column = tl.arange(0, COLUMNS)
    first_at = row[:, None] * BLOCK + column[None, :] * PER_BYTE
    inside = (row < blocks)[:, None] & (column < BLOCK // PER_BYTE)[None, :] & (first_at < numel)
    tl.store(codes + row[:, None] * (BLOCK // PER_BYTE) + column[None, :], byte.to(tl.uint8), mask=inside)


@triton.jit
def _dequantize(
    codes,
    scales,
    table,
    out,
    numel,
    blocks,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    first_at = row[:, None] * BLOCK + column[None, :] * PER_BYTE
    inside = (row < blocks)[:, None] & (column < BLOCK // PER_BYTE)[None, :] & (first_at < numel)
    code = tl.load(codes + row[:, None] * (BLOCK // PER_BYTE) + column[None, :], mask=inside, other=0).to(tl.int32)
    if PER_BYTE == 2:
        code = tl.reshape(tl.join(code & ((1 << BITS) - 1), code >> BITS), (ROWS, COLUMNS * 2))
    scale = tl.load(scales + row, mask=row < blocks, other=0.0)
    if LEVELS > 0:
        signed = tl.where(code >= (1 << (BITS - 1)), code - (1 << BITS), code)
        value = signed.to(tl.float32) * tl.div_rn(scale, tl.full(scale.shape, LEVELS, tl.float32))[:, None]
    else:
        value = tl.load(table + code) * scale[:, None]
    element = tl.arange(0, COLUMNS * PER_BYTE)
    at = row[:, None] * BLOCK + element[None, :]
    within = (row < blocks)[:, None] & (element < BLOCK)[None, :] & (at < numel)
    tl.store(out + at, narrow(value, DTYPE), mask=within)


def launch_quantize(flat: torch.Tensor, scheme: Scheme, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales; see ``quantize``. Without a seed it rounds to nearest."""
    numel, blocks = flat.numel(), -(-flat.numel() // scheme.block)
    codes = torch.empty(-(-numel // scheme.per_byte), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    if numel:
        tile, grid = _tile(scheme, blocks)
        table, zero = _table(scheme, flat.device)
        with torch.cuda.device_of(flat):
            _quantize[grid](
                flat,
                codes,
                scales,
                table,
                numel,
                blocks,
                seed or 0,
                zero,
                **tile,
                STOCHASTIC=seed is not None,
                **OPTIONS,
            )
    return codes, scales


def launch_dequantize(quantized: Quantized, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out``; see ``dequantize``."""
    if quantized.numel:
        tile, grid = _tile(quantized.scheme, scales.numel())
        table, _ = _table(quantized.scheme, out.device)
        with torch.cuda.device_of(out):
            _dequantize[grid](
                quantized.codes,
                scales,
                table,
                out,
                quantized.numel,
                scales.numel(),
                **tile,
                DTYPE=DTYPES[out.dtype],
                **OPTIONS,
            )


def _tile(scheme: Scheme, blocks: int) -> tuple[dict[str, int], tuple[int]]:
    columns = triton.next_power_of_2(scheme.block // scheme.per_byte)
    rows = max(1, _TILE // columns)
    settings = {"BLOCK": scheme.block, "LEVELS": LEVELS.get(scheme.code, 0), "BITS": BITS[scheme.code]}
    return {**settings, "ROWS": rows, "COLUMNS": columns}, (triton.cdiv(blocks, rows),)


def _table(scheme: Scheme, device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the table of a mapped code, anything for a linear one, and the code of zero."""
    return table_on("nf4" if scheme.code in LEVELS else scheme.code, device), code_of_zero(scheme.code)
