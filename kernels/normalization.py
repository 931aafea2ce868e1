"""Layer norm and RMS norm: a row minus its mean (layer norm only), divided by its standard deviation or root mean
square, times a weight.

Between forward and backward a row's input and one or two numbers stay; the normalised row is computed again.

Source: Ba et al., "Layer Normalization" (2016), section 3; Zhang and Sennrich, "Root Mean Square Layer Normalization"
(2019), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lit_zero.kernels.derivative import first_only
from lit_zero.kernels.rows import rows_of, runs_on_rows, wide
from torch import Tensor

WIDEST = 32768  # elements of a row that one program of the Triton kernel holds; wider rows run the reference


def normalized(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool, dtype: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return normalised rows, and the means (layer norm only) and reciprocal deviations that they were made with.

    Args:
        rows: [rows, width]; computed in float32, float64 in itself.
        weight: [width], or None for ones.
        bias: [width], or None for zeros.
        eps: added to the mean square.
        offset: added to the weight.
        centred: subtract the mean first (layer norm).
        dtype: of the normalised rows.
    """
    to = wide(rows.dtype)
    x = rows.to(to)
    mean = x.mean(1, keepdim=True) if centred else None
    if mean is not None:
        x = x - mean
    square = torch.linalg.vector_norm(x, dim=1, keepdim=True).square() / x.shape[1]
    rstd = torch.rsqrt(square + eps)  # [rows, 1]
    y = x * rstd
    if weight is not None:
        y.mul_(weight.to(to) + offset if offset else weight.to(to))
    if bias is not None:
        y.add_(bias.to(to))
    return y.to(dtype), None if mean is None else mean[:, 0], rstd[:, 0]


def normalized_backward(
    grad: Tensor, rows: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the rows, of the weight and of the bias; the last two in the dtype of computation.

    Args:
        grad: of the normalised rows [rows, width].
        rows: as given to the forward.
        weight: as given to the forward.
        mean: as returned by the forward [rows].
        rstd: as returned by the forward [rows].
        offset: as given to the forward.
    """
    to = wide(rows.dtype)
    g, x = grad.to(to), rows.to(to)
    unit = (x if mean is None else x - mean[:, None]) * rstd[:, None]  # the normalised row, before the weight
    grad_weight, grad_bias = (g * unit).sum(0), g.sum(0)
    inner = g.clone() if weight is None else g * (weight.to(to) + offset)  # gradient of the normalised row
    along = (inner * unit).mean(1, keepdim=True)
    if mean is not None:
        inner.sub_(inner.mean(1, keepdim=True))
    grad_rows = inner.addcmul_(unit, along, value=-1).mul_(rstd[:, None])
    return grad_rows.to(rows.dtype), grad_weight, grad_bias


class _Normalization(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, shape: tuple[int, ...], *settings: Any) -> Tensor:
        width = math.prod(shape)
        rows = rows_of(x, width)
        ctx.kernel = _runs(width, x, weight, bias)
        compute = normalized
        if ctx.kernel:
            from lit_zero.kernels.triton_normalization import normalized as compute
        flat, shift = (None if t is None else t.reshape(width) for t in (weight, bias))
        y, mean, rstd = compute(rows, flat, shift, *settings)
        ctx.shape, ctx.offset, ctx.bias_dtype = shape, settings[1], None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, mean, rstd)
        return y.view(x.shape)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        width = math.prod(ctx.shape)
        compute = normalized_backward
        if ctx.kernel:
            from lit_zero.kernels.triton_normalization import normalized_backward as compute
        flat = None if weight is None else weight.reshape(width)
        grad_x, grad_weight, grad_bias = compute(
            rows_of(grad, width), rows_of(x, width), flat, mean, rstd, ctx.offset
        )  # fmt: skip
        needs = ctx.needs_input_grad
        return (
            grad_x.view(x.shape) if needs[0] else None,
            grad_weight.to(weight.dtype).view(ctx.shape) if needs[1] else None,
            grad_bias.to(ctx.bias_dtype).view(ctx.shape) if needs[2] else None,
            *[None] * 5,
        )


def _runs(width: int, *tensors: Tensor | None) -> bool:
    return runs_on_rows(*tensors) and width <= WIDEST


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return what ``torch.nn.functional.layer_norm`` returns.

    Args:
        x: [..., *normalized_shape].
        normalized_shape: the last dimensions, over which mean and variance are taken.
        weight: of that shape, or None for ones.
        bias: of that shape, or None for zeros.
        eps: added to the variance.

    Returns:
        The normalised tensor, in the dtype of ``x`` (float32 under CUDA's autocast, as torch).

    Raises:
        ValueError: if shapes do not fit.
    """
    shape = _checked(x, normalized_shape, weight, bias)
    if not _runs(math.prod(shape), x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)  # one pass over each row on a CPU, forward and backward
    return _Normalization.apply(x, weight, bias, shape, eps, 0.0, True, _result(x))


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what ``torch.nn.functional.rms_norm`` returns.

    Args:
        x: [..., *normalized_shape].
        normalized_shape: the last dimensions, over which the mean square is taken.
        weight: of that shape, or None for ones.
        eps: added to the mean square; None: the spacing of numbers near 1 in the dtype of computation.
        offset: added to the weight (1 for Gemma, whose weights are stored around 0).
        dtype: of the result; None: that of ``x`` (float32 under CUDA's autocast, as torch).

    Raises:
        ValueError: if shapes do not fit.
    """
    shape = _checked(x, normalized_shape, weight, None)
    least = torch.finfo(wide(x.dtype)).eps if eps is None else eps
    return _Normalization.apply(x, weight, None, shape, least, offset, False, dtype or _result(x))


def _result(x: Tensor) -> torch.dtype:
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        return torch.float32  # torch's autocast computes norms in float32 there and leaves their results so
    return x.dtype


def _checked(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    shape = tuple(normalized_shape)
    given = {"x": tuple(x.shape[max(x.dim() - len(shape), 0) :])}
    given |= {name: tuple(t.shape) for name, t in (("weight", weight), ("bias", bias)) if t is not None}
    for name, came in given.items():
        if came != shape or not shape:
            raise ValueError(f"normalized_shape={list(shape)} does not fit {name}, whose last dimensions are {came}.")
    return shape
