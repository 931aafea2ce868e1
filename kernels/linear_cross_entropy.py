"""The cross-entropy of a linear layer's output, without that output ever standing whole.

The loss is computed for some rows at a time: their logits, their losses, and, where the losses are summed, the gradient
of the logits (which takes their place) and its products, the gradients of the rows and of the weight. So one chunk of
logits is all there is, and the backward only multiplies by the gradient of the loss.

[Note: what is scaled when] The gradients that the forward leaves are those of the sum of losses. The backward
multiplies them by the gradient of the loss (and by 1 / the number of targets) in float32: in float16 the gradient of a
mean over many rows would be lost before a loss scaler's factor arrives.

[Note: float16 sums] For the same reason nothing has been scaled down when a chunk's rows are added up for the weight's
gradient, and thousands of them may pass what float16 holds. So that product is in float32. A row's own gradient is a
mean of the weight's rows less one of them, which float16 holds.

[Note: unreduced losses] With ``reduction="none"`` every row has a gradient of its own, which is known in the backward
only. There the logits are computed once more, chunk by chunk.

Source: gradients in the forward, over chunks of rows: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM
Training" (2024), section 3.2; logits computed again in the backward: Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (2024), section 4.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lit_zero.kernels.cross_entropy import losses_
from lit_zero.kernels.derivative import first_only
from lit_zero.kernels.rows import wide
from torch import Tensor

_LOGITS = {"cpu": 1 << 22}  # elements of a chunk of logits, by kind of device
_LOGITS_ELSEWHERE = 1 << 26
_FEWEST_ROWS = 256  # of a chunk: below, matrix products read and write what has the weight's size too often
_WEIGHT_ROWS = 4096  # of the weight's gradient that are computed at a time, where they cannot be added in place


class Settings(NamedTuple):
    """What is asked for, besides tensors; see ``linear_cross_entropy``."""

    ignore_index: int
    smoothing: float
    z_loss: float
    reduction: str
    rows: int | None
    dtype: torch.dtype


class _Wanted(NamedTuple):
    """Sums over chunks; None where no gradient is wanted."""

    hidden: Tensor | None  # [rows, dim], in the dtype of computation
    weight: Tensor | None  # [vocabulary, dim], wide
    bias: Tensor | None  # [vocabulary], wide


@torch.compiler.disable(reason="lit_zero computes a loss in chunks that take turns in one memory")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    rows: int | None = None,
) -> Tensor:
    """Return ``cross_entropy(linear(hidden, weight, bias).float(), targets)`` without the logits standing whole.

    Args:
        hidden: what the linear layer takes [..., dim].
        weight: of the linear layer [vocabulary, dim]; an embedding's may be used.
        targets: class of each row [...], int64.
        bias: of the linear layer [vocabulary], or None.
        ignore_index: the target of a row that does not count.
        label_smoothing: share of the uniform distribution in the targets, from 0 to 1.
        z_loss: factor of the mean squared logarithm of the softmax's normaliser, which is added to the loss.
        reduction: ``mean`` over the rows that count (NaN if none does, as in torch), ``sum``, or ``none``.
        rows: whose logits stand at a time; None: as many as make a chunk of moderate size.

    Returns:
        The loss in float32 (float64 for float64): a number, or [...] with ``reduction="none"``.

    Raises:
        ValueError: for shapes, dtypes or settings that do not fit.
        IndexError: for a target outside of the vocabulary, on a CPU; on a GPU the device stops, as torch's own does.
    """
    _check(hidden, weight, targets, bias, label_smoothing, reduction, rows)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    elif weight.dtype != dtype:
        raise ValueError(f"hidden is {dtype} and weight is {weight.dtype}: expected one dtype, outside of autocast.")
    settings = Settings(ignore_index, label_smoothing, z_loss, reduction, rows, dtype)
    flat = targets.reshape(-1)
    _check_targets(flat, weight.shape[0], ignore_index)
    inputs = hidden.reshape(flat.numel(), hidden.shape[-1]), weight, bias
    # Whether a gradient is wanted cannot be asked inside: no gradients are recorded there.
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
    function = _Unreduced if reduction == "none" else _Reduced
    return function.apply(*inputs, flat, wanted, settings).reshape(targets.shape if reduction == "none" else ())


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, wanted: Any, settings: Settings
    ) -> Tensor:
        to = wide(hidden.dtype)
        sums = _empty(hidden, weight, wanted, settings)
        one = torch.ones(1, dtype=to, device=hidden.device) if any(wanted) else None
        losses = _chunks(hidden, weight, bias, targets, one, sums, settings)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        count = (targets != settings.ignore_index).sum()
        # With nothing to count torch's loss is 0 / 0 and its gradient 0.
        ctx.share = 1.0 / count.clamp(min=1).to(to) if settings.reduction == "mean" else None
        ctx.save_for_backward(*sums)
        return losses.sum() / count if settings.reduction == "mean" else losses.sum()

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        factor = grad if ctx.share is None else grad * ctx.share
        sums = ctx.saved_tensors
        if _graph_is_kept():  # there may be another backward, which needs them as they are
            found = [None if t is None else (t * factor).to(d) for t, d in zip(sums, ctx.dtypes, strict=True)]
        else:
            found = [None if t is None else _scaled_(t, factor).to(d) for t, d in zip(sums, ctx.dtypes, strict=True)]
        return *found, None, None, None


class _Unreduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, wanted: Any, settings: Settings
    ) -> Tensor:
        ctx.wanted, ctx.settings = wanted, settings
        ctx.save_for_backward(hidden, weight, bias, targets)
        return _chunks(hidden, weight, bias, targets, None, _Wanted(None, None, None), settings)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        sums = _empty(hidden, weight, ctx.wanted, ctx.settings)
        _chunks(hidden, weight, bias, targets, grad.contiguous(), sums, ctx.settings)
        inputs = (hidden, weight, bias)
        return *(None if s is None else s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)), None, None, None


def _empty(hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool], settings: Settings) -> _Wanted:
    to = wide(settings.dtype)
    make = torch.empty if hidden.numel() else torch.zeros  # the first chunk writes it
    return _Wanted(
        torch.empty_like(hidden, dtype=settings.dtype, memory_format=torch.contiguous_format) if wanted[0] else None,
        make(weight.shape, dtype=to, device=weight.device) if wanted[1] else None,
        torch.zeros(weight.shape[0], dtype=to, device=weight.device) if wanted[2] else None,
    )


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: Tensor | None,
    sums: _Wanted,
    settings: Settings,
) -> Tensor:
    """Return the losses [rows], and add to ``sums`` what chunk after chunk of rows contributes.

    Args:
        hidden: [rows, dim].
        weight: [vocabulary, dim].
        bias: [vocabulary], or None.
        targets: [rows].
        scale: gradient of each loss [rows], of all of them [1], or None if none is wanted.
        sums: gradients.
        settings: what is asked for.
    """
    count, vocabulary = hidden.shape[0], weight.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):  # casts are made here, once
        weight = weight.to(settings.dtype)
        bias = None if bias is None else bias.to(settings.dtype)
        rows = max(1, min(count, settings.rows or _rows(vocabulary, hidden.device)))
        logits = torch.empty(rows, vocabulary, dtype=settings.dtype, device=hidden.device)
        losses = torch.empty(count, dtype=wide(settings.dtype), device=hidden.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            x, here = hidden[part].to(settings.dtype), logits[: part.stop - start]
            if bias is None:
                torch.mm(x, weight.t(), out=here)
            else:
                torch.addmm(bias, x, weight.t(), out=here)
            scales = scale if scale is None or scale.numel() == 1 else scale[part]
            losses[part] = losses_(
                here, targets[part], settings.ignore_index, settings.smoothing, settings.z_loss, scales
            )  # fmt: skip
            if sums.hidden is not None:
                torch.mm(here, weight, out=sums.hidden[part])
            if sums.weight is not None:
                _add_product(sums.weight, here, x, first=start == 0)
            if sums.bias is not None:
                sums.bias.add_(here.sum(0, dtype=sums.bias.dtype))
    return losses


def _add_product(total: Tensor, grad: Tensor, x: Tensor, first: bool) -> None:
    """Add ``grad.t() @ x`` to ``total``, or write the first one to it; in pieces where the product comes in another
    dtype than the sum.
    """
    if total.dtype == x.dtype:
        total.addmm_(grad.t(), x, beta=0 if first else 1)
        return
    for piece, columns in zip(total.split(_WEIGHT_ROWS), grad.split(_WEIGHT_ROWS, dim=1), strict=True):
        (piece.copy_ if first else piece.add_)(_product(columns.t(), x))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of half precision, in a dtype that holds it [Note: float16 sums]."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)  # torch has this for CUDA only
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


def _rows(vocabulary: int, device: torch.device) -> int:
    return max(_FEWEST_ROWS, _LOGITS.get(device.type, _LOGITS_ELSEWHERE) // vocabulary)


def _scaled_(sum_: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place, in float32 at least."""
    return sum_.mul_(factor) if sum_.dtype == wide(sum_.dtype) else sum_.copy_(sum_ * factor)


def _graph_is_kept() -> bool:
    """Return whether the backward that is running leaves the graph for another one; in doubt, it does."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # private
    return asked is None or asked()


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    smoothing: float,
    reduction: str,
    rows: int | None,
) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}: expected [..., dim] and "
            "[vocabulary, dim]."
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets are {targets.dtype} {list(targets.shape)}: expected one class, torch.int64, for each row of "
            f"hidden: {list(hidden.shape[:-1])}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}: expected one number for each of {weight.shape[0]} classes.")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing={smoothing} is not valid: expected a number from 0 to 1.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not known. Choose one of: mean, sum, none.")
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows} is not valid: expected a whole number of at least 1.")


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    fits = ((targets == ignore_index) | ((targets >= 0) & (targets < vocabulary))).all()
    if targets.device.type == "meta":
        return
    if targets.is_cuda:
        torch._assert_async(fits, "A target is outside of the vocabulary.")  # the host need not wait
    elif not fits:
        raise IndexError(f"Targets reach from {targets.min()} to {targets.max()}: expected 0 to {vocabulary - 1}.")


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **settings: Any) -> Tensor:
    """Return the same loss by torch's own functions, with whole logits; it defines what is right.

    Args:
        hidden: see ``linear_cross_entropy``; and so are the others.
        weight: [vocabulary, dim].
        targets: [...].
        bias: [vocabulary], or None.
        settings: ``ignore_index``, ``label_smoothing``, ``z_loss``, ``reduction``.
    """
    z_loss, reduction = settings.pop("z_loss", 0.0), settings.get("reduction", "mean")
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(wide(logits.dtype)).flatten(0, -2)
    flat = targets.flatten()
    loss = F.cross_entropy(logits, flat, **settings)
    if z_loss:
        counts = flat != settings.get("ignore_index", -100)
        extra = torch.where(counts, z_loss * logits.logsumexp(1).square(), 0.0)
        loss = loss + (extra if reduction == "none" else extra.sum() / (counts.sum() if reduction == "mean" else 1))
    return loss.reshape(targets.shape) if reduction == "none" else loss
