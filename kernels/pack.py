"""Many tensors to and from one flat buffer, cast on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.many import by_dtype, check_contiguous


def pack(tensors: Sequence[torch.Tensor], flat: torch.Tensor, starts: Sequence[int] | None = None) -> None:
    """Write all tensors into ``flat``, rounded to its dtype; what lies between them stays as it is.

    Args:
        tensors: contiguous, of any shapes and floating dtypes; may be empty.
        flat: shape ``[n]``, contiguous, any floating dtype, on the same device.
        starts: the element of ``flat`` at which each tensor begins; by default they lie end to end from 0.

    Raises:
        ValueError: for a place outside ``flat``, or a tensor that is not contiguous.
    """
    _move(tensors, flat, starts, to_flat=True)


def unpack(flat: torch.Tensor, tensors: Sequence[torch.Tensor], starts: Sequence[int] | None = None) -> None:
    """Fill all tensors from ``flat``, rounded to their dtypes: what :func:`pack` has written comes back."""
    _move(tensors, flat, starts, to_flat=False)


def _move(tensors: Sequence[torch.Tensor], flat: torch.Tensor, starts: Sequence[int] | None, to_flat: bool) -> None:
    check_contiguous([flat])
    starts = end_to_end(tensors) if starts is None else starts
    for tensor, start in zip(tensors, starts, strict=True):
        if not 0 <= start <= flat.numel() - tensor.numel():
            raise ValueError(
                f"A tensor of {tensor.numel()} elements was to lie from element {start} on in a flat buffer of "
                f"{flat.numel()}. Make the buffer larger, or give other starts."
            )
    if runs_kernel(flat):
        from lit_zero.kernels.triton_pack import launch

        for same in by_dtype(tensors):
            launch([tensors[n] for n in same], flat, [starts[n] for n in same], to_flat)
    else:
        move_reference(tensors, flat, starts, to_flat)


def end_to_end(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return where each tensor begins if they lie end to end."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += tensor.numel()
    return starts


def move_reference(tensors: Sequence[torch.Tensor], flat: torch.Tensor, starts: Sequence[int], to_flat: bool) -> None:
    """Do what :func:`pack` (``to_flat``) or :func:`unpack` does, tensor by tensor."""
    for tensor, start in zip(tensors, starts, strict=True):
        part = flat[start : start + tensor.numel()].view(tensor.shape)
        part.copy_(tensor) if to_flat else tensor.copy_(part)
