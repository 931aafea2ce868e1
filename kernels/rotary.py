"""Rotary position embedding: pairs of elements of a head, turned by an angle that grows with the position.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.4.2.
"""

from __future__ import annotations

from typing import Any

import torch
from lit_zero.kernels.derivative import first_only
from lit_zero.kernels.rows import runs_on_rows
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """Return ``x`` turned.

    Args:
        x: [..., dim].
        cos: broadcast to the shape of ``x``.
        sin: broadcast to the shape of ``x``.
        interleaved: whether pairs are neighbours, or the elements i and i + dim / 2.
        dtype: of the result, and of what is between.
    """
    (x1, x2), (c1, c2), (s1, s2) = (_halves(t, interleaved) for t in (x, cos, sin))
    y = torch.empty_like(x, dtype=dtype)
    y1, y2 = _halves(y, interleaved)
    torch.mul(x1, c1, out=y1).addcmul_(x2, s1, value=-1)
    torch.mul(x2, c2, out=y2).addcmul_(x1, s2)
    return y


def rotated_backward(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """Return the gradient of ``x``: the transposed turn.

    Args:
        grad: of the result.
        cos: as given to the forward.
        sin: as given to the forward.
        interleaved: as given to the forward.
        dtype: of ``x``.
    """
    (g1, g2), (c1, c2), (s1, s2) = (_halves(t, interleaved) for t in (grad, cos, sin))
    x = torch.empty_like(grad)
    x1, x2 = _halves(x, interleaved)
    torch.mul(g1, c1, out=x1).addcmul_(g2, s2)
    torch.mul(g2, c2, out=x2).addcmul_(g1, s1, value=-1)
    return x.to(dtype)


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
        ctx.kernel = runs_on_rows(x, cos, sin) and x.dim() == 4
        ctx.interleaved, ctx.dtype = interleaved, x.dtype
        ctx.save_for_backward(cos, sin)
        compute = rotated
        if ctx.kernel:
            from lit_zero.kernels.triton_rotary import rotated as compute
        return compute(x, cos, sin, interleaved, dtype)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        compute = rotated_backward
        if ctx.kernel:
            from lit_zero.kernels.triton_rotary import rotated_backward as compute
        return compute(grad, *ctx.saved_tensors, ctx.interleaved, ctx.dtype), None, None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Return queries or keys turned by the angles of their positions.

    Args:
        x: [batch, heads, time, dim], in any order of strides; the Triton kernel takes four dimensions, the reference
            any number.
        cos: of the angles; of a shape that broadcasts to that of ``x``, such as [batch, 1, time, dim].
        sin: of the angles, of the shape of ``cos``.
        interleaved: whether the elements of a pair are neighbours (GPT-J), or half of ``dim`` apart (Llama).

    Returns:
        In the dtype that ``x * cos`` would have.

    Raises:
        ValueError: if shapes do not fit, or if ``cos`` or ``sin`` needs a gradient, which is not computed.
    """
    if not _fits(x, cos, sin):
        raise ValueError(
            f"x is {list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)}: expected cos and sin of one shape "
            "that broadcasts to that of x, and the same even last dimension in all three."
        )
    if not turns(x, cos, sin):
        raise ValueError("cos or sin needs a gradient, which rotary does not compute. Detach them, or use plain torch.")
    return _Rotary.apply(x, cos, sin, interleaved, torch.promote_types(x.dtype, cos.dtype))


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether ``rotary`` takes these: shapes fit, and no angle needs a gradient.

    Args:
        x: see ``rotary``; and so are the others.
        cos: of the angles.
        sin: of the angles.
    """
    return _fits(x, cos, sin) and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        0 < cos.dim() <= x.dim()
        and x.shape[-1] % 2 == 0
        and cos.shape == sin.shape
        and cos.shape[-1] == x.shape[-1]
        and all(c in (1, n) for c, n in zip(reversed(cos.shape), reversed(x.shape), strict=False))
    )


def angles(length: int, dim: int, base: float = 10000.0, device: Any = None) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the angles of ``length`` positions [length, dim], float32, for pairs that are
    half of ``dim`` apart.

    Args:
        length: positions.
        dim: elements of a head; even.
        base: the slowest pair turns once in about ``2 * pi * base`` positions.
        device: where they are made.
    """
    inverse = base ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    turned = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse).repeat(1, 2)
    return turned.cos(), turned.sin()
