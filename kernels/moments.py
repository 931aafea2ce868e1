"""An optimizer's moments in 2 bytes or in one.

[Note: which rounding] A second moment moves by ``1 - beta2`` of itself in a step: by less than the 1/512 that would
carry a bf16 number to its neighbour, so rounded to nearest it stands still. It is rounded up or down at random, so that
it is right on average (``noise``). A first moment moves by ``1 - beta1``, mostly 10 %, and is rounded to nearest.

[Note: dynamic quantisation] Blocks of 256 elements are divided by their largest magnitude, and each quotient takes one
byte: its decade, and as many of its digits as the decade leaves bits for. A decade further down has half as many codes.
With sign: 64 codes for (0.1, 1], 32 for (0.01, 0.1], ..., 1 for 1e-6, and as many below zero; without: 128, 64, ..., 1
for 1e-7. Zero has a code of its own, and the largest magnitude has, so a block that is decoded and encoded again stays
the same. As a function of the value, the code is made of straight lines whose slopes fall: it is the least of them,
which takes neither tables nor branches. A second moment that is not zero never becomes zero: the update is divided by
its root.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (2021), sections 1.2, 2.1
and 2.2.
"""

from __future__ import annotations

import functools

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.noise import random_bits

BLOCK = 256  # elements that share a scale
TINY = 2.0**-126  # least scale

Draw = tuple[int, int | torch.Tensor, int]  # key, step and first position of random bits, see ``noise``


def to_bfloat16(values: torch.Tensor, out: torch.Tensor, draw: Draw | None) -> None:
    """Write ``values`` (fp32, shape ``[n]``) to ``out`` (bf16, shape ``[n]``).

    Args:
        values: what to round.
        out: where to.
        draw: round up or down at random, up the more likely the nearer; ``None``: round to nearest.
    """
    if draw is None:
        out.copy_(values)
    elif runs_kernel(values):
        from lit_zero.kernels.triton_moments import to_bfloat16 as kernel

        kernel(values, out, draw)
    else:
        to_bfloat16_reference(values, out, draw)


def to_bfloat16_reference(values: torch.Tensor, out: torch.Tensor, draw: Draw) -> None:
    """Do what :func:`to_bfloat16` does with random bits, in plain torch."""
    bits = random_bits(values.numel(), *draw, values.device).add_(values.view(torch.int32))
    out.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
    out.masked_fill_(values.isnan(), float("nan"))  # adding bits may have made a zero or an infinity of it


def to_int8(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, signed: bool, draw: Draw | None = None
) -> None:
    """Quantise blocks [Note: dynamic quantisation].

    Args:
        values: fp32, shape ``[blocks * 256]``.
        codes: int8, same shape; receives the codes, less 128 without sign.
        scales: fp32, shape ``[blocks]``; receives the largest magnitude of each block.
        signed: with sign; else ``values`` are not negative.
        draw: round at random; ``None``: to nearest.
    """
    if runs_kernel(values):
        from lit_zero.kernels.triton_moments import to_int8 as kernel

        kernel(values, codes, scales, signed, draw)
    else:
        to_int8_reference(values, codes, scales, signed, draw)


def to_int8_reference(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, signed: bool, draw: Draw | None = None
) -> None:
    """Do what :func:`to_int8` does, in plain torch."""
    blocks = values.view(-1, BLOCK)
    size = blocks.abs()
    torch.amax(size, 1, out=scales)
    scales.clamp_(min=TINY)
    size.div_(scales.view(-1, 1))
    code, line = torch.full_like(size, 127.0 if signed else 255.0), torch.empty_like(size)
    for slope, intercept in lines(signed):
        torch.minimum(code, torch.add(_scalar(intercept, size.device), size, alpha=slope, out=line), out=code)
    if draw is None:
        code.add_(0.5).floor_()
    else:
        code.add_(random_bits(values.numel(), *draw, values.device).view_as(code), alpha=2.0**-16).floor_()
    if signed:
        code.copysign_(blocks)
    else:
        torch.maximum(code, blocks.sign(), out=code).sub_(128.0)
    codes.view_as(code).copy_(code)


def from_int8(codes: torch.Tensor, scales: torch.Tensor, signed: bool, out: torch.Tensor) -> torch.Tensor:
    """Write to ``out`` (fp32, shape ``[blocks * 256]``) what ``codes`` and ``scales`` stand for, and return it."""
    if runs_kernel(out):
        from lit_zero.kernels.triton_moments import from_int8 as kernel

        kernel(codes, scales, signed, out)
        return out
    return from_int8_reference(codes, scales, signed, out)


def from_int8_reference(codes: torch.Tensor, scales: torch.Tensor, signed: bool, out: torch.Tensor) -> torch.Tensor:
    """Do what :func:`from_int8` does, in plain torch."""
    torch.index_select(table(signed, codes.device), 0, codes.view(torch.uint8).to(torch.int32), out=out)
    out.view(-1, BLOCK).mul_(scales.view(-1, 1))
    return out


def lines(signed: bool) -> list[tuple[float, float]]:
    """Return slope and intercept of the straight lines whose least is the code of a magnitude."""
    bits = 6 if signed else 7  # of the digits of the largest decade
    found = [(10.0**bits, 0.0)]  # from zero to the last decade, of one code
    for decade in range(bits):
        top, count = 2.0 ** (bits + 1 - decade) - 1, 2.0 ** (bits - decade)
        slope = count / 0.9 * 10.0**decade
        found.append((slope, top - slope * 10.0**-decade))
    return found


@functools.cache
def table(signed: bool, device: torch.device) -> torch.Tensor:
    """Return what each code stands for, fp32, shape ``[256]``, by its byte read without sign."""
    bits = 6 if signed else 7
    values = [0.0, 10.0**-bits]
    for decade in reversed(range(bits)):
        count = 1 << (bits - decade)
        values += [10.0**-decade * (1 - 0.9 * (count - number) / count) for number in range(1, count + 1)]
    if signed:
        values += [-1.0, *(-value for value in reversed(values[1:]))]  # the lowest code is not used
    else:
        values = values[128:] + values[:128]
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def _scalar(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, device=device)
