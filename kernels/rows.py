"""Tensors as rows of their last dimension, which is how the kernels of layers see them."""

from __future__ import annotations

import math

import torch
from lit_zero.kernels.choice import runs_kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_on_rows(*tensors: torch.Tensor | None) -> bool:
    """Return whether a Triton kernel works on these tensors: where it runs, on dtypes that it knows (the reference
    computes float64), and if there is anything to compute.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    return all(runs_kernel(t) and t.dtype in _DTYPES and t.numel() for t in present)


def rows_of(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Return ``tensor`` as [rows, width] with neighbouring columns; a view where its strides permit one.

    Args:
        tensor: [..., width], or [..., a, b] with ``a * b == width``.
        width: elements of a row.
    """
    rows = tensor.reshape(math.prod(tensor.shape) // width if width else 0, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are computed: float32, or float64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32
