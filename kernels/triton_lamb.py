"""The kernels of LAMB: one launch updates the moments and sums squares, one adds the sums of each piece's blocks in a
fixed order, and after the ranks have added theirs one moves the parameters.

The elements that count in the sums and the others of a piece are rows of their own in the first launch's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from lit_zero.kernels.lamb import LambPiece
from lit_zero.kernels.table import HEAD, Row, Table, Tables
from lit_zero.kernels.triton_blocks import DTYPES, OPTIONS, fetch, narrow, put

_BLOCK = 2048  # elements
_SUMS = 1024  # blocks whose sums are added at once
_TABLES = Tables()  # of the last steps


@triton.jit
def _update(param, exp_avg, exp_avg_sq, row, group):
    """Return the update before it is scaled; the count of steps is that of this step."""
    step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
    # In fp64: in fp32 the first steps of 0.999 would be off by 1e-5.
    first = (1.0 - tl.exp(step * tl.load(group + 5).to(tl.float64))).to(tl.float32)
    second = (1.0 - tl.exp(step * tl.load(group + 6).to(tl.float64))).to(tl.float32)
    denominator = tl.sqrt(exp_avg_sq / second) + tl.load(group + 7)
    return exp_avg / denominator / first + tl.load(group + 8) * param


@triton.jit
def _moments(
    rows,
    owners,
    groups,
    sums,
    grad_scale,
    found_inf,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    NUMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
):
    if CHECKED:  # noqa: SIM102 (what is known when a kernel is compiled stands apart)
        if tl.load(found_inf) != 0:
            return
    factor = 1.0
    if SCALED:
        factor *= tl.load(grad_scale)
    row = rows + tl.load(owners + tl.program_id(0)) * WIDTH
    group = groups + tl.load(row + 1) * NUMBERS
    begin = (tl.program_id(0) - tl.load(row + 2)) * BLOCK  # int64, as the table is
    if (tl.load(row + 3) != 0) & (begin + BLOCK <= tl.load(row)):  # [Note: whole blocks]
        _moments_of_block(row, row + HEAD, group, begin, sums, factor, True, PARAM, GRAD, STATE, BLOCK)
    else:
        _moments_of_block(row, row + HEAD, group, begin, sums, factor, False, PARAM, GRAD, STATE, BLOCK)


@triton.jit
def _moments_of_block(
    row,
    addresses,
    group,
    begin,
    sums,
    factor,
    WHOLE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = begin + tl.arange(0, BLOCK)
    inside = at < tl.load(row)
    param = fetch(tl.load(addresses).to(tl.pointer_type(PARAM)), at, inside, WHOLE, BLOCK)
    grad = fetch(tl.load(addresses + 2).to(tl.pointer_type(GRAD)), at, inside, WHOLE, BLOCK) * factor
    firsts = tl.load(addresses + 4).to(tl.pointer_type(STATE))
    seconds = tl.load(addresses + 6).to(tl.pointer_type(STATE))
    exp_avg = tl.load(group + 1) * fetch(firsts, at, inside, WHOLE, BLOCK) + tl.load(group + 2) * grad
    exp_avg_sq = tl.load(group + 3) * fetch(seconds, at, inside, WHOLE, BLOCK) + tl.load(group + 4) * grad * grad
    put(firsts, at, exp_avg, inside, STATE, WHOLE, BLOCK)
    put(seconds, at, exp_avg_sq, inside, STATE, WHOLE, BLOCK)
    # From the moments as they are kept: the second half will find no others.
    kept, kept_sq = narrow(exp_avg, STATE).to(tl.float32), narrow(exp_avg_sq, STATE).to(tl.float32)
    update = tl.where(inside, _update(param, kept, kept_sq, row, group), 0.0)
    number = tl.program_id(0).to(tl.int64)
    tl.store(sums + 2 * number, tl.sum(param * param, axis=0))
    tl.store(sums + 2 * number + 1, tl.sum(update * update, axis=0))


@triton.jit
def _add_up(rows, sums, totals, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    """Add the sums of one row's blocks, in fp64 and in order."""
    number = tl.program_id(0)
    row = rows + number.to(tl.int64) * WIDTH
    first, blocks = tl.load(row + 2), tl.cdiv(tl.load(row), BLOCK)
    params, updates = tl.zeros((SUMS,), tl.float64), tl.zeros((SUMS,), tl.float64)
    begin = tl.full([], 0, tl.int64)
    while begin < blocks:  # no ``range``: triton 3.6 cannot interpret one of tensors
        at = begin + tl.arange(0, SUMS)
        params += tl.load(sums + 2 * (first + at), mask=at < blocks, other=0.0).to(tl.float64)
        updates += tl.load(sums + 2 * (first + at) + 1, mask=at < blocks, other=0.0).to(tl.float64)
        begin += SUMS
    tl.store(totals + 2 * number, tl.sum(params, axis=0))
    tl.store(totals + 2 * number + 1, tl.sum(updates, axis=0))


@triton.jit
def _apply(
    rows,
    owners,
    groups,
    ratios,
    found_inf,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    NUMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
):
    if CHECKED:  # noqa: SIM102 (what is known when a kernel is compiled stands apart)
        if tl.load(found_inf) != 0:
            return
    owner = tl.load(owners + tl.program_id(0))
    row = rows + owner * WIDTH
    group = groups + tl.load(row + 1) * NUMBERS
    rate = tl.load(group) * tl.where(tl.load(group + 9) > 0, tl.load(ratios + owner), 1.0)
    begin = (tl.program_id(0) - tl.load(row + 2)) * BLOCK  # int64, as the table is
    if (tl.load(row + 3) != 0) & (begin + BLOCK <= tl.load(row)):  # [Note: whole blocks]
        _apply_to_block(row, row + HEAD, group, begin, rate, True, PARAM, STATE, BLOCK)
    else:
        _apply_to_block(row, row + HEAD, group, begin, rate, False, PARAM, STATE, BLOCK)


@triton.jit
def _apply_to_block(
    row,
    addresses,
    group,
    begin,
    rate,
    WHOLE: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = begin + tl.arange(0, BLOCK)
    inside = at < tl.load(row)
    params = tl.load(addresses).to(tl.pointer_type(PARAM))
    param = fetch(params, at, inside, WHOLE, BLOCK)
    exp_avg = fetch(tl.load(addresses + 4).to(tl.pointer_type(STATE)), at, inside, WHOLE, BLOCK)
    exp_avg_sq = fetch(tl.load(addresses + 6).to(tl.pointer_type(STATE)), at, inside, WHOLE, BLOCK)
    update = _update(param, exp_avg, exp_avg_sq, row, group)
    put(params, at, param - rate * update, inside, PARAM, WHOLE, BLOCK)


def launch_moments(
    pieces: Sequence[LambPiece], grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> torch.Tensor:
    """Do the first half for pieces of one format; the steps are counted already. See ``lamb_moments``."""
    device, numbers = pieces[0].param.device, _numbers(pieces)
    # Rows of what counts come first, one for each piece; it may be empty.
    runs = [(piece, *run) for piece in pieces for run in piece.runs()]
    rows = [
        _row(piece, first, last, numbers)
        for kind in (True, False)
        for piece, first, last, counts in runs
        if counts is kind
    ]
    table = _TABLES.table(rows, _BLOCK, device)
    totals = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
    if len(table.owners):
        sums = torch.empty(len(table.owners), 2, dtype=torch.float32, device=device)
        with torch.cuda.device_of(totals):
            _moments[(len(table.owners),)](
                table.rows,
                table.owners,
                _uploaded(numbers, device),
                sums,
                sums if grad_scale is None else grad_scale,
                sums if found_inf is None else found_inf,
                SCALED=grad_scale is not None,
                CHECKED=found_inf is not None,
                **_formats(pieces),
                **_sizes(table),
            )
            _add_up[(len(rows),)](table.rows, sums, totals, WIDTH=table.width, BLOCK=_BLOCK, SUMS=_SUMS, **OPTIONS)
    return totals[: len(pieces)]


def launch_apply(pieces: Sequence[LambPiece], ratios: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
    """Do the second half for pieces of one format.

    Args:
        pieces: as in :func:`launch_moments`.
        ratios: of the parameter's norm to the update's, fp32 ``[pieces]``.
        found_inf: not zero: nothing changes.
    """
    device, numbers = pieces[0].param.device, _numbers(pieces)
    table = _TABLES.table([_row(piece, 0, piece.param.numel(), numbers) for piece in pieces], _BLOCK, device)
    if len(table.owners):
        formats = {key: value for key, value in _formats(pieces).items() if key != "GRAD"}
        with torch.cuda.device_of(ratios):
            _apply[(len(table.owners),)](
                table.rows,
                table.owners,
                _uploaded(numbers, device),
                ratios,
                ratios if found_inf is None else found_inf,
                CHECKED=found_inf is not None,
                **formats,
                **_sizes(table),
            )


def _row(piece: LambPiece, first: int, last: int, numbers: dict[tuple[float, ...], int]) -> Row:
    tensors = (piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq)
    addresses = tuple((tensor.data_ptr() + first * tensor.element_size(), 0) for tensor in tensors)
    return Row(numbers[piece.group.numbers()], piece.step.data_ptr(), last - first, addresses)


def _numbers(pieces: Sequence[LambPiece]) -> dict[tuple[float, ...], int]:
    """Return the groups' hyper-parameters, each with its number in the table."""
    found: dict[tuple[float, ...], int] = {}
    for piece in pieces:
        found.setdefault(piece.group.numbers(), len(found))
    return found


def _uploaded(numbers: dict[tuple[float, ...], int], device: torch.device) -> torch.Tensor:
    return _TABLES.numbers(list(numbers), device)


def _formats(pieces: Sequence[LambPiece]) -> dict[str, tl.dtype]:
    first = pieces[0]
    return {"PARAM": DTYPES[first.param.dtype], "GRAD": DTYPES[first.grad.dtype], "STATE": DTYPES[first.exp_avg.dtype]}


def _sizes(table: Table) -> dict[str, Any]:
    return {"NUMBERS": 10, "WIDTH": table.width, "HEAD": HEAD, "BLOCK": _BLOCK, **OPTIONS}
