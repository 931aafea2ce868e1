"""Block-wise quantisation: each block of a flat tensor in codes of 8 or 4 bits and one scale.

A block's scale is its largest magnitude. Divided by it, numbers lie between -1 and 1, and each becomes the code of the
nearest number that there is one for, or with stochastic rounding that of the one below or above, so that on the average
nothing is lost. A block of zeros stays zero; one with an infinity or NaN in it comes back as NaN, whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.codes import BITS, LEVELS, code_of_zero, table_on

SCALES_BLOCK = 256  # scales that share a scale in double quantisation


@dataclass(frozen=True)
class Scheme:
    """How numbers are coded.

    Args:
        code: ``int8`` and ``int4`` (even steps), ``dynamic8`` (seven decades), ``nf4`` (normally distributed weights).
        block: elements that share a scale; even for codes of 4 bits.
        double: the scales are coded in turn, less their mean, as ``dynamic8`` in blocks of 256.

    Raises:
        ValueError: for an unknown code, or a block that cannot be.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", section 2; "QLoRA", section 3.
    """

    code: str = "int8"
    block: int = 256
    double: bool = False

    def __post_init__(self) -> None:
        if self.code not in BITS:
            raise ValueError(f"code={self.code!r} is not known. Choose one of: {', '.join(BITS)}.")
        if self.block < 1 or self.block % self.per_byte:
            kind = "an even" if self.per_byte > 1 else "a positive"
            raise ValueError(f"block={self.block} is not valid for {self.code}: expected {kind} number of elements.")

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // BITS[self.code]

    def bytes_for(self, numel: int) -> int:
        """Return the bytes of codes and scales for so many elements."""
        blocks = -(-numel // self.block)
        scales = Scheme("dynamic8", SCALES_BLOCK).bytes_for(blocks) + 4 if self.double else 4 * blocks
        return -(-numel // self.per_byte) + scales


@dataclass(frozen=True)
class Quantized:
    """A flat tensor in codes.

    Attributes:
        scheme: how.
        numel: elements.
        codes: uint8, shape ``[ceil(numel / per byte)]``. Linear codes are signed (two's complement); of two codes in a
            byte, the lower bits hold the first.
        scales: fp32, shape ``[blocks]``, or coded themselves.
        centre: what was taken from the scales before they were coded; fp32, 0-d.
    """

    scheme: Scheme
    numel: int
    codes: torch.Tensor
    scales: torch.Tensor | Quantized
    centre: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of it all."""
        centre = 0 if self.centre is None else self.centre.nbytes
        return self.codes.nbytes + self.scales.nbytes + centre

    def plain_scales(self) -> torch.Tensor:
        """Return the scales as numbers, fp32, shape ``[blocks]``."""
        if isinstance(self.scales, torch.Tensor):
            return self.scales
        assert self.centre is not None
        return dequantize(self.scales) + self.centre


def quantize(values: torch.Tensor, scheme: Scheme, generator: torch.Generator | None = None) -> Quantized:
    """Return ``values`` in codes.

    The kernel gives the reference's bits where it rounds to nearest. Stochastic rounding draws other numbers there
    (Philox, by element) than in the reference; both are unbiased.

    Args:
        values: contiguous, any shape, fp32, bf16 or fp16.
        scheme: the code and its blocks.
        generator: round stochastically with what it draws; on the CPU for a kernel, so that nothing waits for the
            device. ``None``: to nearest.
    """
    flat = values.detach().view(-1)
    if runs_kernel(flat):
        from lit_zero.kernels.triton_quantize import launch_quantize

        codes, scales = launch_quantize(flat, scheme, _seed(generator))
    else:
        codes, scales = quantize_reference(flat, scheme, generator)
    found = Quantized(replace(scheme, double=False), flat.numel(), codes, scales)
    if not scheme.double:
        return found
    centre = scales.mean() if scales.numel() else scales.new_zeros(())
    return replace(
        found, scheme=scheme, scales=quantize(scales - centre, Scheme("dynamic8", SCALES_BLOCK)), centre=centre
    )


def dequantize(quantized: Quantized, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the numbers that the codes stand for.

    Args:
        quantized: the codes.
        out: receives them, contiguous, any shape, fp32, bf16 or fp16; by default fp32 of shape ``[numel]``.
    """
    if out is None:
        out = torch.empty(quantized.numel, dtype=torch.float32, device=quantized.codes.device)
    scales = quantized.plain_scales()
    if runs_kernel(out):
        from lit_zero.kernels.triton_quantize import launch_dequantize

        launch_dequantize(quantized, scales, out.view(-1))
    else:
        out.view(-1).copy_(dequantize_reference(quantized, scales))
    return out


def quantize_reference(
    flat: torch.Tensor, scheme: Scheme, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales; see :func:`quantize`."""
    rows = _blocks(flat.float(), scheme.block)  # [blocks, block]
    scales = rows.abs().amax(1)
    scales = torch.where(rows.isfinite().all(1), scales, torch.nan)
    usable = scales > 0  # else every code is that of zero
    if generator is None:
        up = torch.full_like(rows, 0.5)
    else:
        up = torch.rand(rows.shape, generator=generator, device=generator.device).to(rows.device)
    if scheme.code in LEVELS:
        levels = LEVELS[scheme.code]
        steps = torch.where(usable, scales / levels, 1.0)
        usable &= steps > 0  # magnitudes that have no seventh are nothing
        steps = torch.where(steps > 0, steps, 1.0)
        codes = torch.floor(rows / steps[:, None] + up).clamp(-levels, levels).to(torch.int32)
    else:
        table = table_on(scheme.code, flat.device)
        relative = torch.where(usable[:, None], rows / torch.where(usable, scales, 1.0)[:, None], 0.0).contiguous()
        lower = torch.searchsorted(table, relative, right=True).sub_(1).clamp_(min=0)
        upper = (lower + 1).clamp_(max=len(table) - 1)
        rises = relative - table[lower] >= (1 - up) * (table[upper] - table[lower])
        codes = torch.where(rises, upper, lower).to(torch.int32)
    codes = torch.where(usable[:, None], codes, code_of_zero(scheme.code))
    return _packed(codes.view(-1)[: flat.numel()], scheme), scales


def dequantize_reference(quantized: Quantized, scales: torch.Tensor) -> torch.Tensor:
    """Return the numbers, fp32, shape ``[numel]``; see :func:`dequantize`."""
    scheme = quantized.scheme
    bits = BITS[scheme.code]
    fields = [(quantized.codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    codes = torch.stack(fields, 1).view(-1)[: quantized.numel].to(torch.int64)
    each = scales.repeat_interleave(scheme.block)[: quantized.numel]
    if scheme.code in LEVELS:
        signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
        return signed * (each / LEVELS[scheme.code])
    return table_on(scheme.code, codes.device)[codes] * each


def _blocks(flat: torch.Tensor, block: int) -> torch.Tensor:
    """Return ``flat`` as rows of one block each, the last one filled up with zeros."""
    missing = -flat.numel() % block
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block)


def _packed(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    bits = BITS[scheme.code]
    fields = _blocks(codes & (2**bits - 1), scheme.per_byte)  # [bytes, per byte]
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32)
    return (fields << shifts).sum(1).to(torch.uint8)


def _seed(generator: torch.Generator | None) -> int | None:
    if generator is None:
        return None
    return int(torch.randint(math.floor(2**62), (), generator=generator).item())
