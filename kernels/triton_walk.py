"""The launch that steps many segments, whatever the optimizer: walk, load, apply the rule, store.

[Note: formats] The format of each tensor is a constant of the kernel, so each combination is a kernel of its own, and
``_load`` and ``_store`` are the only places that know formats. A format that needs more than the values (scales of
8-bit moments, the remainder of a split master) finds the second address of the tensor in the row.

[Note: the last block counts] All programs of a segment read its step count, and the one that is done last writes it: a
ticket, drawn behind a barrier that no thread passes before it has read the count, tells which one that is. So a step
needs no second launch, and skips it with the rest where ``found_inf`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from lit_zero.kernels.segments import Segment, by_format
from lit_zero.kernels.table import HEAD, Row, Table, Tables
from lit_zero.kernels.triton_blocks import DTYPES, OPTIONS, fetch, put

BLOCK = 2048  # elements
WARPS = 8
_FORMATS = {**DTYPES, None: tl.float32}  # by_format says None where there is no copy


def walk_segments(
    rule: Any,
    segments: Sequence[Segment],
    groups: Sequence[Sequence[float]],
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """Step segments by ``rule``, those of one combination of formats in one launch.

    Args:
        rule: of ``triton_rules``.
        segments: all on one device.
        groups: hyper-parameters by the segments' group numbers; the first number is the sign of the gradient.
        grad_scale: gradients are multiplied by it; 0-d fp32 on the device.
        found_inf: not zero: nothing changes; 0-d fp32 on the device.
        tables: keeps what was uploaded for the next step.
    """
    tables = tables or Tables()
    device = segments[0].param.device
    numbers = tables.numbers(groups, device)
    with torch.cuda.device_of(segments[0].param):  # which need not be the current one
        for formats, each in by_format(segments).items():
            table = tables.table([_row(segment) for segment in each], BLOCK, device)
            if table.owners.numel():
                launch(rule, table, formats, numbers, grad_scale, found_inf, each[0].step is not None)
    for segment in segments:
        if segment.step is not None and not segment.param.numel():  # it has no block that would count
            segment.step.add_(1.0 if found_inf is None else (found_inf == 0).float())
    torch.autograd.graph.increment_version([segment.param for segment in segments])  # a kernel writes behind its back


def launch(
    rule: Any,
    table: Table,
    formats: Sequence[torch.dtype | None],
    numbers: torch.Tensor,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    counted: bool,
) -> None:
    """Launch one kernel over a table; ``formats``: of parameter, gradient, copy and states."""
    states = len(formats) - 3
    known = [_FORMATS[each] for each in formats] + [tl.float32] * (3 - states)
    walk[(table.owners.numel(),)](
        table.rows,
        table.owners,
        table.counters,
        numbers,
        numbers if grad_scale is None else grad_scale,
        numbers if found_inf is None else found_inf,
        RULE=rule,
        STATES=states,
        PARAM=known[0],
        GRAD=known[1],
        COPY=known[2],
        FIRST=known[3],
        SECOND=known[4],
        THIRD=known[5],
        COPIED=formats[2] is not None,
        COUNTED=counted,
        SCALED=grad_scale is not None,
        CHECKED=found_inf is not None,
        WIDTH=table.width,
        NUMBERS=numbers.shape[1],
        HEAD=HEAD,
        BLOCK=BLOCK,
        num_warps=WARPS,
        **OPTIONS,
    )


def _row(segment: Segment) -> Row:
    tensors = tuple((0 if tensor is None else tensor.data_ptr(), 0) for tensor in segment.tensors)
    step = 0 if segment.step is None else segment.step.data_ptr()
    return Row(segment.group, step, segment.param.numel(), tensors)


@triton.jit
def walk(
    rows,
    owners,
    counters,
    numbers,
    grad_scale,
    found_inf,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    COPIED: tl.constexpr,
    COUNTED: tl.constexpr,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    WIDTH: tl.constexpr,
    NUMBERS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if CHECKED:  # noqa: SIM102 (what is known when a kernel is compiled stands apart)
        if tl.load(found_inf) != 0:
            return
    segment = tl.load(owners + tl.program_id(0))
    row = rows + segment.to(tl.int64) * WIDTH
    numel = tl.load(row)
    numbers += tl.load(row + 1) * NUMBERS
    begin = (tl.program_id(0).to(tl.int64) - tl.load(row + 2)) * BLOCK
    factor = tl.load(numbers)
    if SCALED:
        factor *= tl.load(grad_scale)
    count = 0.0
    if COUNTED:
        count = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))) + 1.0
    addresses = row + HEAD
    if (tl.load(row + 3) != 0) & (begin + BLOCK <= numel):
        _block(
            addresses, numbers, factor, count, begin, numel, True,
            RULE, STATES, PARAM, GRAD, COPY, FIRST, SECOND, THIRD, COPIED, BLOCK,
        )  # fmt: skip
    else:
        _block(
            addresses, numbers, factor, count, begin, numel, False,
            RULE, STATES, PARAM, GRAD, COPY, FIRST, SECOND, THIRD, COPIED, BLOCK,
        )  # fmt: skip
    if COUNTED:  # [Note: the last block counts]
        tl.debug_barrier()
        ticket = tl.atomic_add(counters + segment, 1)
        if ticket == (numel + BLOCK - 1) // BLOCK - 1:
            tl.store(counters + segment, 0)
            tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), count)


@triton.jit
def _block(
    addresses,
    numbers,
    factor,
    count,
    begin,
    numel,
    WHOLE: tl.constexpr,  # nothing is left over at the end, and all tensors are aligned
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    COPIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    param = _load(addresses, begin, numel, PARAM, WHOLE, BLOCK)
    grad = _load(addresses + 2, begin, numel, GRAD, WHOLE, BLOCK) * factor
    first = param
    second = param
    third = param
    if STATES > 0:
        first = _load(addresses + 6, begin, numel, FIRST, WHOLE, BLOCK)
    if STATES > 1:
        second = _load(addresses + 8, begin, numel, SECOND, WHOLE, BLOCK)
    if STATES > 2:
        third = _load(addresses + 10, begin, numel, THIRD, WHOLE, BLOCK)
    param, first, second, third = RULE(param, grad, first, second, third, numbers, count, STATES)
    _store(addresses, param, begin, numel, PARAM, WHOLE, BLOCK)
    if STATES > 0:
        _store(addresses + 6, first, begin, numel, FIRST, WHOLE, BLOCK)
    if STATES > 1:
        _store(addresses + 8, second, begin, numel, SECOND, WHOLE, BLOCK)
    if STATES > 2:
        _store(addresses + 10, third, begin, numel, THIRD, WHOLE, BLOCK)
    if COPIED:  # noqa: SIM102
        if tl.load(addresses + 4) != 0:  # others of this launch may have one
            _store(addresses + 4, param, begin, numel, COPY, WHOLE, BLOCK)


@triton.jit
def _load(address, begin, numel, FORMAT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of values in fp32 [Note: formats]."""
    at = begin + tl.arange(0, BLOCK)
    return fetch(tl.load(address).to(tl.pointer_type(FORMAT)), at, at < numel, WHOLE, BLOCK)


@triton.jit
def _store(address, values, begin, numel, FORMAT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Round a block of fp32 values and write it [Note: formats]."""
    at = begin + tl.arange(0, BLOCK)
    put(tl.load(address).to(tl.pointer_type(FORMAT)), at, values, at < numel, FORMAT, WHOLE, BLOCK)
