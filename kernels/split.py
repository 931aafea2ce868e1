"""An fp32 number as a bf16 number and a 16-bit remainder: 4 bytes for a master and its 2-byte copy, instead of 6.

The copy is the master rounded to the nearest bf16 number, what mixed precision computes with anyway; the remainder is
what has to be added to the copy's bits, as an integer, to get the master's bits: the lower half of the master, as a
signed number.

[Note: exactly half-way] 65,537 fp32 numbers round to a bf16 number with an even last bit if ties go to even, and 16
bits tell only 65,536 apart. So here a number that lies exactly half-way between two bf16 numbers is rounded away from
zero, which is the other one for one number in 131,072; both are equally near. The master itself is exact in any case.

[Note: what is no number] Infinities are exact. A NaN stays a NaN, in the master always, in the copy unless only the
lower half of its bits says so (the copy is then infinite); no arithmetic makes such. A NaN that rounding up would turn
into a zero (the GPU's own, 0x7fffffff, is one) is not rounded, and comes back with other bits.

Source: the remainder beside a bf16 parameter is an idea of NVIDIA Apex's distributed optimizers
(``store_param_remainders``).
"""

from __future__ import annotations

import torch
from lit_zero.kernels.choice import runs_kernel

_HALF = 0x8000


def split(master: torch.Tensor, copy: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write ``master`` as its two halves.

    Args:
        master: fp32, shape ``[n]``.
        copy: bf16, shape ``[n]``; receives the master rounded to nearest, ties away from zero.
        remainder: int16, shape ``[n]``; receives the rest.
    """
    if runs_kernel(master):
        from lit_zero.kernels.triton_split import split as kernel

        kernel(master, copy, remainder)
        return
    split_reference(master, copy, remainder)


def join(copy: torch.Tensor, remainder: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write to ``out`` (fp32, shape ``[n]``) what :func:`split` was given, and return it."""
    if runs_kernel(out):
        from lit_zero.kernels.triton_split import join as kernel

        kernel(copy, remainder, out)
        return out
    return join_reference(copy, remainder, out)


def split_reference(master: torch.Tensor, copy: torch.Tensor, remainder: torch.Tensor) -> None:
    """Do what :func:`split` does, in plain torch."""
    bits = master.view(torch.int32)
    rounded = bits + _HALF  # wraps round for those NaNs whose upper half is full: their sign flips
    flipped = torch.bitwise_xor(bits, rounded).bitwise_right_shift_(31)  # -1 for them, else 0
    copy.view(torch.int16).copy_(rounded.bitwise_right_shift_(16).add_(flipped))
    remainder.copy_(bits)  # int32 to int16 keeps the lower half


def join_reference(copy: torch.Tensor, remainder: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Do what :func:`join` does, in plain torch."""
    bits = out.view(torch.int32)
    bits.copy_(copy.view(torch.int16))
    bits.bitwise_left_shift_(16).add_(remainder.to(torch.int32))
    return out
