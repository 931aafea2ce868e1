"""Random bits that depend on a key, a step and a position, and on nothing else.

Whoever rounds element ``i`` in step ``t`` draws the same bits, whichever rank does it, in portions of whatever size, in
a run that was resumed too; torch's own generators are not touched.

Source: the multipliers of the hash are those of Wellons, "Prospecting for Hash Functions" (lowbias32).
"""

from __future__ import annotations

import torch

STEP, POSITION = 0x85EBCA6B, 0x9E3779B1  # odd, so that no two steps or positions of 32 bits meet
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


def as_int32(value: int) -> int:
    """Return the signed number with the same lower 32 bits."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def seed_of(key: int, step: int | torch.Tensor, first: int) -> int | torch.Tensor:
    """Return what the bits of a run of positions start from, int32.

    Args:
        key: tells streams of bits apart.
        step: its number; a tensor (0-d) stays on its device.
        first: the first position.
    """
    start = key + first * POSITION
    if isinstance(step, torch.Tensor):
        return step.to(torch.int32) * as_int32(STEP) + as_int32(start)
    return as_int32(start + step * STEP)


def random_bits(numel: int, key: int, step: int | torch.Tensor, first: int, device: torch.device) -> torch.Tensor:
    """Return 16 random bits for each of ``numel`` positions from ``first`` on: int32, from 0 to 65,535.

    Args:
        numel: how many.
        key: tells streams of bits apart.
        step: number of the step.
        first: the first position.
        device: where the bits are needed.
    """
    bits = torch.arange(numel, dtype=torch.int32, device=device)
    bits.mul_(as_int32(POSITION)).add_(seed_of(key, step, first))
    for shift, factor in ((16, FIRST), (15, SECOND)):
        # int32 shifts copies of the sign in, which the mask takes away.
        bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1))
        bits.mul_(as_int32(factor))
    return bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
