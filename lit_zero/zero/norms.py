"""The gradient norm: one number with one definition, whatever is sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_zero.comm.exchange import Exchange
from lit_zero.kernels import sum_of_powers
from lit_zero.zero.binding import Binding


def grad_norm(
    bindings: Sequence[Binding], exchange: Exchange, device: torch.device, norm_type: float = 2.0
) -> torch.Tensor:
    """Return the norm of all reduced gradients; 0-d, fp32 (fp64 if a gradient is), equal on every rank.

    Every gradient element counts once, and partial sums are added in rank order, so that all stages get the same bits.

    Args:
        bindings: all optimizers. All ranks must call this together.
        exchange: the ranks.
        device: where gradients lie.
        norm_type: 2, another power, or infinity for the largest element.
    """
    known, grads = list[torch.Tensor](), list[torch.Tensor]()
    for binding in bindings:
        squares = binding.squares() if norm_type == 2.0 else None
        if squares is None:
            grads += binding.own_grads()
        else:
            known.append(squares.to(device))
    dtype = torch.float64 if any(binding.has_fp64 for binding in bindings) else torch.float32
    if norm_type == float("inf"):
        peaks = [grad.abs().amax().to(device, dtype) for grad in grads if grad.numel()]
        peak = torch.stack(peaks).amax() if peaks else torch.zeros((), dtype=dtype, device=device)
        return exchange.maximum(peak)
    total = sum_of_powers(grads, norm_type, device)
    if known:
        total = total + torch.stack(known).sum()
    norm: torch.Tensor = exchange.sum_in_rank_order(total) ** (1.0 / norm_type)
    return norm.to(dtype)


def scale_to_norm(bindings: Sequence[Binding], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients of the given norm down to ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for binding in bindings:
        binding.scale(factor)
