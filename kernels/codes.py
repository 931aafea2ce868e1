"""The numbers that a code of few bits stands for.

A *linear* code of n bits is a signed integer: ``int8`` and ``int4`` stand for -127 to 127 and -7 to 7 steps. A *mapped*
code is a position in a table of ascending numbers from -1 to 1: ``dynamic8`` and ``nf4``.
"""

from __future__ import annotations

import functools

import torch

LEVELS = {"int8": 127, "int4": 7}  # of linear codes, on each side of zero
BITS = {"int8": 8, "dynamic8": 8, "int4": 4, "nf4": 4}


def table(code: str) -> torch.Tensor:
    """Return the numbers of a mapped code, ascending; fp32, shape ``[2 ** bits]``."""
    return _TABLES[code]()


@functools.cache
def table_on(code: str, device: torch.device) -> torch.Tensor:
    """Return ``table(code)`` on a device, the same tensor every time."""
    return table(code).to(device)


@functools.cache
def code_of_zero(code: str) -> int:
    """Return the code that stands for zero."""
    return 0 if code in LEVELS else int((table(code) == 0).nonzero().item())


def _dynamic8() -> torch.Tensor:
    """Return the dynamic map of 8 bits with a sign.

    After the sign, as many zeros as there are before the first 1 say by which power of ten the number is to be divided,
    and the bits behind that 1 divide the tenths from 0.1 to 1 evenly: few bits for small numbers, many for large ones,
    over seven decades. Two codes are left over, and stand for 0 and 1.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", section 1.3 and figure 2.
    """
    magnitudes = []
    for fraction_bits in range(7):
        edges = torch.linspace(0.1, 1.0, 2**fraction_bits + 1, dtype=torch.float64)
        magnitudes.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (fraction_bits - 6))
    positive = torch.cat(magnitudes)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.ones(1)]).float()


def _nf4() -> torch.Tensor:
    """Return the 4-bit numbers that normally distributed weights use evenly: quantiles of the normal distribution,
    eight above zero, seven below and zero itself, scaled to 1.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", section 3 and appendix E.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2  # the probability in whose middle the last quantile lies
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    return (torch.cat([below, torch.zeros(1), above.flip(0)]) / above[0]).float()


_TABLES = {"dynamic8": _dynamic8, "nf4": _nf4}
