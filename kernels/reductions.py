"""Reductions over many flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_SMALL = 1 << 16  # elements: up to here one operation on all of them is fastest
_PORTION = 1 << 18  # elements: as fp64 they are still in a cache when they are squared


def sum_of_powers(tensors: Sequence[torch.Tensor], power: float, device: torch.device) -> torch.Tensor:
    """Return the sum of ``|x| ** power`` over all elements of all tensors; 0-d, fp64.

    Partial sums are fp64 and added in the order of the tensors, so the result depends neither on how elements are
    grouped into tensors by more than fp64 rounding, nor on timing. Nothing waits for the device.

    Args:
        tensors: any shapes, any floating dtype, on any device; may be empty.
        power: at least 1.
        device: where the result lies.
    """
    parts = [_sum_of_powers(tensor, power).to(device) for tensor in tensors if tensor.numel()]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=device)


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares of all elements of a tensor, formed and added in fp64; 0-d."""
    return _sum_of_powers(tensor, 2.0)


def _sum_of_powers(tensor: torch.Tensor, power: float) -> torch.Tensor:
    if tensor.device.type != "cpu" or tensor.numel() <= _SMALL:
        norm = torch.linalg.vector_norm(tensor, power, dtype=torch.float64)
        return norm.square() if power == 2.0 else norm**power
    # On a CPU torch would first make a copy of the whole in fp64, which takes twice its memory and up to ten times the
    # time of the sum. With one buffer for all portions, the bits of a sum do not depend on where a tensor lies either.
    flat = tensor.detach().reshape(-1)
    # The device is said: another one may be the default.
    room = torch.empty(min(flat.numel(), _PORTION), dtype=torch.float64, device="cpu")
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for portion in flat.split(_PORTION):
        wide = room[: portion.numel()].copy_(portion)
        total += torch.dot(wide, wide) if power == 2.0 else torch.linalg.vector_norm(wide, power) ** power
    return total
