"""Gradients before a step: scale them, see whether all are finite, and sum their squares, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.many import by_dtype
from lit_zero.kernels.reductions import sum_of_squares


def unscale(
    tensors: Sequence[torch.Tensor],
    scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Multiply all tensors by ``scale``, in place, and return the sum of the squares of the products; 0-d, fp64.

    Tensors are read once and, with a scale, written once; nothing waits for the device. Products are formed in fp32
    (fp64 for fp64) and rounded once to the tensor's dtype; what is squared is the product before that.

    The sum is one of fp64 squares: how elements are grouped into tensors changes it by no more than fp64 rounding.

    Args:
        tensors: contiguous, on one device, of any shapes and floating dtypes; may be empty.
        scale: 0-d, fp32, on the tensors' device; ``None``: only look.
        found_inf: 0-d, fp32, on the tensors' device: becomes 1 if an element was infinite or NaN before it was scaled,
            and stays as it is otherwise.
        device: where the sum of no tensors is to lie; that of empty ones lies where they do.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    if filled and runs_kernel(filled[0]):
        from lit_zero.kernels.triton_unscale import launch

        return torch.stack([launch([filled[n] for n in same], scale, found_inf) for same in by_dtype(filled)]).sum()
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else device)
    return unscale_reference(filled, scale, found_inf)


def unscale_reference(
    tensors: Sequence[torch.Tensor], scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> torch.Tensor:
    """Do what :func:`unscale` does, tensor by tensor."""
    sums = []
    for tensor in tensors:
        product = tensor if tensor.dtype == torch.float64 else tensor.float()
        if found_inf is not None:
            found_inf.copy_(torch.maximum(found_inf, (~product.isfinite()).any().to(found_inf.dtype)))
        if scale is not None:
            product = product * scale.to(product.dtype)
            tensor.copy_(product)
        sums.append(sum_of_squares(product))
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
