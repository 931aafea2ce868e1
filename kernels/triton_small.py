"""The launch that steps segments in small forms.

A program works on a few blocks of 256 elements, so that it sees whole blocks of 8-bit moments and can find their scales
by itself. What a form means is said in ``small``, ``split`` and ``moments``; counting is that of ``triton_walk``
[Note: the last block counts].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lit_zero.kernels import triton_rules
from lit_zero.kernels.moments import BLOCK, table
from lit_zero.kernels.noise import STEP, as_int32
from lit_zero.kernels.small import DITHERED, UNSIGNED, Array, SmallSegment
from lit_zero.kernels.table import HEAD, Row, Tables
from lit_zero.kernels.triton_blocks import DTYPES, OPTIONS, narrow
from lit_zero.kernels.triton_moments import bytes_of, random_16, rounded_up_or_down, scales_of
from lit_zero.kernels.triton_split import halves, joined

ROWS = 8  # blocks of a program
WARPS = 8
_STEP = tl.constexpr(as_int32(STEP))
_BLOCK = tl.constexpr(BLOCK)


def launch(
    rule: str,
    segments: Sequence[SmallSegment],
    groups: Sequence[Sequence[float]],
    tables: Tables,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """Launch one kernel over segments that are alike in their forms; none is empty."""
    first, device = segments[0], segments[0].grad.device
    rows = tables.table([_row(segment) for segment in segments], ROWS * BLOCK, device)
    seeds = tables.seeds([[_seed(moment) for moment in segment.moments] or [0] for segment in segments], device)
    numbers = tables.numbers(groups, device)
    forms = [moment.form for moment in first.moments] + [0, 0]
    with torch.cuda.device_of(first.grad):
        walk_small[(rows.owners.numel(),)](
            rows.rows,
            rows.owners,
            rows.counters,
            numbers,
            numbers if grad_scale is None else grad_scale,
            seeds,
            table(True, device),
            table(False, device),
            RULE=getattr(triton_rules, rule),
            STATES=len(first.moments),
            PARAM=first.param.form,
            GRAD=DTYPES[first.grad.dtype],
            FIRST=forms[0],
            SECOND=forms[1],
            COUNTED=first.step is not None,
            SCALED=grad_scale is not None,
            WIDTH=rows.width,
            NUMBERS=numbers.shape[1],
            SEEDS=seeds.shape[1],
            HEAD=HEAD,
            ROWS=ROWS,
            num_warps=WARPS,
            **OPTIONS,
        )


def _seed(moment: Array) -> int:
    """Return where an array's random bits start; 0 if it draws none, so that nothing changes from step to step."""
    return moment.seed if moment.form in (DITHERED, UNSIGNED) else 0


def _row(segment: SmallSegment) -> Row:
    def addresses(array: Array) -> tuple[int, int]:
        return array.values.data_ptr(), 0 if array.partner is None else array.partner.data_ptr()

    step = 0 if segment.step is None else segment.step.data_ptr()
    tensors = (addresses(segment.param), (segment.grad.data_ptr(), 0), *map(addresses, segment.moments))
    return Row(segment.group, step, segment.grad.numel(), tensors)


@triton.jit
def walk_small(  # type: ignore[no-untyped-def]
    rows,
    owners,
    counters,
    numbers,
    grad_scale,
    seeds,
    signed,
    unsigned,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    COUNTED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
    NUMBERS: tl.constexpr,
    SEEDS: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    segment = tl.load(owners + tl.program_id(0))
    row = rows + segment.to(tl.int64) * WIDTH
    numel = tl.load(row)
    numbers += tl.load(row + 1) * NUMBERS
    seeds += segment * SEEDS
    block = (tl.program_id(0).to(tl.int64) - tl.load(row + 2)) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(numbers)
    if SCALED:
        factor *= tl.load(grad_scale)
    count = 0.0
    step = 0
    if COUNTED:
        count = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))) + 1.0
        step = (count - 1.0).to(tl.int32) * _STEP
    addresses = row + HEAD
    index = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    here = index < numel
    param = _load(addresses, index, block, here, numel, PARAM, signed, unsigned)
    grads = tl.load(addresses + 2).to(tl.pointer_type(GRAD))
    grad = tl.load(grads + index, mask=here, other=0.0).to(tl.float32) * factor
    first = param
    second = param
    if STATES > 0:
        first = _load(addresses + 4, index, block, here, numel, FIRST, signed, unsigned)
    if STATES > 1:
        second = _load(addresses + 6, index, block, here, numel, SECOND, signed, unsigned)
    param, first, second, _ = RULE(param, grad, first, second, param, numbers, count, STATES)
    _store(addresses, param, index, block, here, numel, 0, PARAM)
    if STATES > 0:
        _store(addresses + 4, first, index, block, here, numel, tl.load(seeds) + step, FIRST)
    if STATES > 1:
        _store(addresses + 6, second, index, block, here, numel, tl.load(seeds + 1) + step, SECOND)
    if COUNTED:
        tl.debug_barrier()
        ticket = tl.atomic_add(counters + segment, 1)
        if ticket == (numel + ROWS * _BLOCK - 1) // (ROWS * _BLOCK) - 1:
            tl.store(counters + segment, 0)
            tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), count)


@triton.jit
def _load(address, index, block, here, numel, FORM: tl.constexpr, signed, unsigned):  # type: ignore[no-untyped-def]
    """Return elements in fp32, zeros behind the end."""
    values, partner = tl.load(address), tl.load(address + 1)
    if FORM == 0:
        found = tl.load(values.to(tl.pointer_type(tl.float32)) + index, mask=here, other=0.0)
    elif FORM == 1:
        high = tl.load(values.to(tl.pointer_type(tl.int16)) + index, mask=here, other=0)
        found = joined(high, tl.load(partner.to(tl.pointer_type(tl.int16)) + index, mask=here, other=0))
    elif FORM < 4:
        found = tl.load(values.to(tl.pointer_type(tl.bfloat16)) + index, mask=here, other=0.0).to(tl.float32)
    else:
        code = tl.load(values.to(tl.pointer_type(tl.uint8)) + index, mask=here, other=0).to(tl.int32)
        scale = tl.load(partner.to(tl.pointer_type(tl.float32)) + block, mask=block * _BLOCK < numel, other=0.0)
        meanings = signed if FORM == 4 else unsigned
        found = tl.where(here, tl.load(meanings + code) * scale[:, None], 0.0)
    return found


@triton.jit
def _store(address, found, index, block, here, numel, seed, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write elements in their form; ``seed``: where the random bits of element 0 start in this step."""
    values, partner = tl.load(address), tl.load(address + 1)
    if FORM == 0:
        tl.store(values.to(tl.pointer_type(tl.float32)) + index, found, mask=here)
    elif FORM == 1:
        high, low = halves(found)
        tl.store(values.to(tl.pointer_type(tl.int16)) + index, high, mask=here)
        tl.store(partner.to(tl.pointer_type(tl.int16)) + index, low, mask=here)
    elif FORM == 2:
        tl.store(values.to(tl.pointer_type(tl.bfloat16)) + index, narrow(found, tl.bfloat16), mask=here)
    elif FORM == 3:
        bits = rounded_up_or_down(found, random_16(seed, index))
        tl.store(values.to(tl.pointer_type(tl.int16)) + index, bits, mask=here)
    else:
        found = tl.where(here, found, 0.0)
        scale = scales_of(found)
        code = bytes_of(found, scale, seed, index, FORM == 4, FORM == 5)
        within = (block * _BLOCK < numel)[:, None] & (index >= 0)  # the last block is written to its end
        tl.store(values.to(tl.pointer_type(tl.int8)) + index, code, mask=within)
        tl.store(partner.to(tl.pointer_type(tl.float32)) + block, scale, mask=block * _BLOCK < numel)
