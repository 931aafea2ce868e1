"""One bit an element: the signs of a flat tensor, a scale for each block, and the error that is made up for later.

Source: Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
Speech DNNs", section 3.1 (error feedback); Tang et al., "1-bit Adam", section 4 (one magnitude for all: the mean).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.many import check_contiguous


@dataclass(frozen=True)
class Signs:
    """A flat tensor in one bit an element.

    Attributes:
        numel: elements.
        block: elements that share a scale.
        bits: uint8 ``[ceil(numel / 8)]``; the lowest bit of a byte is the first element's, 1 for zero and above. Those
            behind the last element are 0.
        scales: mean magnitude of each block, fp32 ``[blocks]``.
    """

    numel: int
    block: int
    bits: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of it all."""
        return self.bits.nbytes + self.scales.nbytes


def pack_signs(values: torch.Tensor, error: torch.Tensor, block: int = 2048) -> Signs:
    """Return the signs of ``values + error``, and leave in ``error`` what they do not say of it.

    Over many calls what is sent adds up to what was given: the error of one call is part of the next one's input.

    Args:
        values: contiguous, shape ``[n]``, fp32, bf16 or fp16; only read.
        error: fp32, shape ``[n]``; zeros before the first call.
        block: elements that share a scale, a multiple of 8.

    Raises:
        ValueError: for a block that is none, or tensors that do not fit.
    """
    if block < 8 or block % 8:
        raise ValueError(f"block={block} is not valid: expected a positive multiple of 8 elements.")
    if error.dtype != torch.float32 or error.numel() != values.numel():
        raise ValueError(
            f"error has {error.numel()} elements of {error.dtype}: expected {values.numel()} of torch.float32, one for "
            "each value."
        )
    check_contiguous([values, error])
    if runs_kernel(values):
        from lit_zero.kernels.triton_signs import launch_pack

        bits, scales = launch_pack(values, error, block)
    else:
        bits, scales = pack_signs_reference(values, error, block)
    return Signs(values.numel(), block, bits, scales)


def unpack_signs(signs: Signs, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return each element's sign times its block's scale.

    Args:
        signs: the bits.
        out: receives them, contiguous, shape ``[n]``, fp32, bf16 or fp16; by default fp32.

    Raises:
        ValueError: for an ``out`` of another length, or with gaps.
    """
    if out is None:
        out = torch.empty(signs.numel, dtype=torch.float32, device=signs.bits.device)
    if out.numel() != signs.numel:
        raise ValueError(f"out has {out.numel()} elements: expected {signs.numel}, one for each sign.")
    check_contiguous([out])
    if runs_kernel(out):
        from lit_zero.kernels.triton_signs import launch_unpack

        launch_unpack(signs, out)
    else:
        out.copy_(unpack_signs_reference(signs))
    return out


def pack_signs_reference(values: torch.Tensor, error: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bits and scales, and update ``error``; see :func:`pack_signs`."""
    numel = values.numel()
    wanted = values.float() + error
    padded = torch.nn.functional.pad(wanted, (0, -numel % block)).view(-1, block)
    counts = torch.full((len(padded),), float(block), device=values.device)
    if numel % block:
        counts[-1] = numel % block
    scales = padded.abs().sum(1) / counts
    positive = wanted >= 0
    error.copy_(wanted - torch.where(positive, 1.0, -1.0) * scales.repeat_interleave(block)[:numel])
    octets = torch.nn.functional.pad(positive.to(torch.int32), (0, -numel % 8)).view(-1, 8)
    bits = (octets << torch.arange(8, device=values.device, dtype=torch.int32)).sum(1).to(torch.uint8)
    return bits, scales


def unpack_signs_reference(signs: Signs) -> torch.Tensor:
    """Return signs times scales, fp32, shape ``[n]``; see :func:`unpack_signs`."""
    places = torch.arange(8, device=signs.bits.device, dtype=torch.uint8)
    positive = ((signs.bits[:, None] >> places) & 1).view(-1)[: signs.numel]
    return torch.where(positive > 0, 1.0, -1.0) * signs.scales.repeat_interleave(signs.block)[: signs.numel]
