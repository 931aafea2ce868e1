"""Softmax cross-entropy of rows of logits, whose gradient takes the place of the logits.

Source: in place, in one kernel, as in Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024),
section 3.2; label smoothing by Szegedy et al., "Rethinking the Inception Architecture" (2015), section 7; the term on
the logarithm of the normaliser ("z-loss") by Chowdhery et al., "PaLM" (2022), section 5.
"""

from __future__ import annotations

import torch
from lit_zero.kernels.rows import runs_on_rows, wide
from torch import Tensor


def losses_(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    scale: Tensor | None,
) -> Tensor:
    """Return the loss of each row [rows], 0 where it is ignored; ``logits`` are overwritten.

    Where ``scale`` is given, by the gradient of ``(losses * scale).sum()``; else by what need not be read.

    Args:
        logits: [rows, vocabulary], whose rows may lie apart; computed in float32, float64 in itself.
        targets: class of each row [rows], int64.
        ignore_index: the target of a row that does not count.
        smoothing: of the labels; each row's target becomes that share of the uniform distribution.
        z_loss: factor of the squared logarithm of the normaliser, which is added to the loss.
        scale: of each row [rows], or of all of them [1], in the dtype of computation; None: no gradient is asked for.
    """
    compute = _losses_
    if runs_on_rows(logits, scale):
        from lit_zero.kernels.triton_cross_entropy import losses_ as compute
    return compute(logits, targets, ignore_index, smoothing, z_loss, scale)


def _losses_(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float, scale: Tensor | None
) -> Tensor:
    x = logits.to(wide(logits.dtype))  # the logits themselves, where they have that dtype
    counts = targets != ignore_index
    column = torch.where(counts, targets, 0)[:, None]  # [rows, 1]
    picked = x.gather(1, column)[:, 0]
    mean = x.mean(1) if smoothing else None
    highest = x.amax(1, keepdim=True)
    total = x.sub_(highest).exp_().sum(1)  # x is now softmax times total
    normaliser = total.log() + highest[:, 0]
    losses = normaliser - (1.0 - smoothing) * picked
    if mean is not None:
        losses -= smoothing * mean
    if z_loss:
        losses += z_loss * normaliser.square()
    losses = torch.where(counts, losses, 0.0)
    if scale is not None:
        factor = torch.where(counts, scale, 0.0)  # [rows]
        x.mul_((factor * (1.0 + 2.0 * z_loss * normaliser) / total)[:, None])
        if smoothing:
            x.sub_((factor * (smoothing / x.shape[1]))[:, None])
        x.scatter_add_(1, column, (factor * (smoothing - 1.0))[:, None])
        if x is not logits:
            logits.copy_(x)
    return losses
