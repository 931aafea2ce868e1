"""The middle of a gated feed-forward layer: ``activation(gate) * up``.

Between forward and backward only ``gate`` and ``up`` stay; the activation is computed again.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2 (SwiGLU, GEGLU).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lit_zero.kernels.derivative import first_only
from lit_zero.kernels.rows import rows_of, runs_on_rows
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * up``.

    Args:
        gate: any shape; the activation is rounded to its dtype, and so is the product.
        up: of the same shape.
        activation: ``silu``, ``gelu``, or ``gelu_tanh`` (its approximation by tanh).
    """
    value = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=_approximation(activation))
    return value.mul_(up)


def activated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``gate`` and ``up``.

    Args:
        grad: of the product.
        gate: as given to the forward.
        up: as given to the forward.
        activation: as given to the forward.
    """
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
    approximate = _approximation(activation)
    grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate=approximate)
    return grad_gate, F.gelu(gate, approximate=approximate).mul_(grad)


def _approximation(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.activation, ctx.kernel = activation, runs_on_rows(gate, up)
        ctx.save_for_backward(gate, up)
        if not ctx.kernel:
            return activated(gate, up, activation)
        from lit_zero.kernels.triton_gated import activated as compute

        width = gate.shape[-1]
        return compute(rows_of(gate, width), rows_of(up, width), activation).view(gate.shape)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        if not ctx.kernel:
            return *activated_backward(grad, gate, up, ctx.activation), None
        from lit_zero.kernels.triton_gated import activated_backward as compute

        found = compute(*(rows_of(t, gate.shape[-1]) for t in (grad, gate, up)), ctx.activation)
        return *(each.view(gate.shape) for each in found), None


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Return ``activation(gate) * up``.

    Args:
        gate: [..., width].
        up: of the same shape and dtype.
        activation: ``silu`` (SwiGLU), ``gelu`` or ``gelu_tanh`` (GEGLU).

    Raises:
        ValueError: for another activation, or if shapes or dtypes differ.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known. Choose one of: {', '.join(ACTIVATIONS)}.")
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() == 0:
        raise ValueError(
            f"gate is {gate.dtype} {list(gate.shape)} and up is {up.dtype} {list(up.shape)}: expected the same dtype "
            "and the same shape of at least one dimension."
        )
    return _Gated.apply(gate, up, activation)
