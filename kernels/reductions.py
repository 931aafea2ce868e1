"""Reductions over many flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sum_of_powers(tensors: Sequence[torch.Tensor], power: float, device: torch.device) -> torch.Tensor:
    """Return the sum of ``|x| ** power`` over all elements of all tensors; 0-d, fp64.

    Partial sums are fp64 and added in the order of the tensors, so the result depends neither on how elements are
    grouped into tensors by more than fp64 rounding, nor on timing. Nothing waits for the device.

    Args:
        tensors: any shapes, any floating dtype, on any device; may be empty.
        power: at least 1.
        device: where the result lies.
    """
    norms = [torch.linalg.vector_norm(t, power, dtype=torch.float64) for t in tensors if t.numel()]
    parts = [(norm**power).to(device) for norm in norms]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=device)
