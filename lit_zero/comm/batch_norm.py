"""Batch normalisation over the batches of all ranks, where torch has none: on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks. Every rank's loss depends on it, so the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's ``SyncBatchNorm``, which also normalises tensors on the CPU; torch's own refuses them.

    Source: Ioffe and Szegedy, "Batch Normalization", section 3, with mean and variance over the batches of all ranks.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input``, shape ``[N, C, ...]``, normalised per channel."""
        if input.device.type != "cpu" or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        x = input.float() if input.dtype.itemsize < 4 else input
        others = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1, *(1 for _ in others[1:])]
        count = _total(x.new_tensor(x.numel() // x.size(1))).item()  # elements per channel; batches may differ
        if count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        mean = _total(x.sum(others)) / count  # [C]
        x = x - mean.view(shape)
        # From the deviations, not from the mean of squares: that would be a small difference of large numbers.
        variance = _total(x.square().sum(others)) / count  # [C]
        x = x * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            x = x * self.weight.view(shape)
        if self.bias is not None:
            x = x + self.bias.view(shape)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        return x.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Let the running statistics follow those of one batch, each of shape ``[C]``."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def _total(value: torch.Tensor) -> torch.Tensor:
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return value if alone else _SumOverRanks.apply(value)


def serve_the_cpu(module: nn.Module) -> None:
    """Let every ``nn.SyncBatchNorm`` in ``module``, and what others derive from it, work on the CPU too."""
    for each in module.modules():
        kind = type(each)
        if isinstance(each, nn.SyncBatchNorm) and not isinstance(each, SyncBatchNorm):
            # Not a copy: parameters, buffers and hooks stay as they are. A derived class finds ours above its own.
            each.__class__ = (
                SyncBatchNorm if kind is nn.SyncBatchNorm else type(kind.__name__, (kind, SyncBatchNorm), {})
            )
