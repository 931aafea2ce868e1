"""Softmax cross-entropy in Triton: one program reads a row of logits twice and writes its gradient over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # columns that are in registers at a time


@triton.jit
def _losses(
    logits, targets, losses, scales, stride, scale_stride, width, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    target = tl.load(targets + row)
    counts = target != ignore_index
    picked = tl.load(base + tl.where(counts, target, 0)).to(tl.float32)
    # The largest so far starts at the smallest finite number: minus infinity less itself would be no number.
    highest = tl.full([], -3.4028234663852886e38, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    whole = tl.full([], 0.0, tl.float32)
    start = tl.full([], 0, tl.int32)
    while start < width:  # no ``range``: triton 3.6 cannot interpret one of tensors
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        if SMOOTH:
            whole += tl.sum(tl.where(inside, x, 0.0), 0)
        highest = higher
        start += BLOCK
    normaliser = tl.log(total) + highest
    loss = normaliser - (1.0 - smoothing) * picked + z_loss * normaliser * normaliser
    if SMOOTH:  # not 0 times the sum, which may be infinite
        loss -= smoothing * whole / width
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        scale = tl.where(counts, tl.load(scales + row * scale_stride), 0.0)
        slope = 1.0 + 2.0 * z_loss * normaliser
        start = tl.full([], 0, tl.int32)
        while start < width:
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            x = tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)
            result = tl.exp(x - normaliser) * slope - smoothing / width
            result = scale * tl.where(columns == target, result - (1.0 - smoothing), result)
            tl.store(base + columns, result.to(logits.dtype.element_ty), mask=inside)
            start += BLOCK


def losses_(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float, scale: Tensor | None
) -> Tensor:
    """See ``cross_entropy.losses_``."""
    rows, width = logits.shape
    logits_stride, column_stride = logits.stride()
    if column_stride != 1:
        raise ValueError("The columns of logits must be neighbours: they are overwritten in place.")
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    step = 0 if scale is None or scale.numel() == 1 else scale.stride(0)
    flags = {"SMOOTH": smoothing > 0, "GRADIENT": scale is not None}
    block = min(_BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(logits):
        _losses[(rows,)](
            logits, targets.contiguous(), losses, scale, logits_stride, step, width, ignore_index, smoothing, z_loss,
            **flags, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return losses
