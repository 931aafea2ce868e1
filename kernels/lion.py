"""One step of Lion over flat segments.

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.segments import Segment, in_portions, is_kernels_own, put_back, scaled, worked
from lit_zero.kernels.table import Tables


class LionGroup(NamedTuple):
    """Hyper-parameters of one group."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    maximize: bool = False

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernel's table holds."""
        kept, betas = 1.0 - self.lr * self.weight_decay, (self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2)
        return (-1.0 if self.maximize else 1.0, self.lr, kept, *betas)


def lion_step(
    segments: Sequence[Segment],
    groups: Sequence[LionGroup],
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """Step segments in place: in one launch for all of one format where kernels run, else by :func:`lion_reference`.

    Args:
        segments: all on one device; ``states`` is ``exp_avg``; nothing is counted.
        groups: hyper-parameters by the segments' group numbers.
        grad_scale: gradients are multiplied by it; 0-d fp32 on the device.
        found_inf: not zero: nothing changes; 0-d fp32 on the device.
        tables: keeps what was uploaded for the next step.
    """
    if segments and runs_kernel(segments[0].param) and is_kernels_own(segments):
        from lit_zero.kernels.triton_rules import lion_rule
        from lit_zero.kernels.triton_walk import walk_segments

        walk_segments(lion_rule, segments, [g.numbers() for g in groups], grad_scale, found_inf, tables)
        return
    for segment in segments:
        in_portions(segment, partial(lion_reference, group=groups[segment.group], grad_scale=grad_scale), found_inf)


def lion_reference(segment: Segment, group: LionGroup, grad_scale: torch.Tensor | None = None) -> None:
    """Do to a segment what defines a step."""
    param, grad, exp_avg = worked([segment.param, segment.grad, *segment.states], segment.param)
    grad = scaled(grad, -1.0 if group.maximize else 1.0, grad_scale)
    mixed = exp_avg.lerp(grad, 1.0 - group.beta1)
    update = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign of NaN is 0, which would hide it
    param.mul_(1.0 - group.lr * group.weight_decay).add_(update, alpha=-group.lr)
    exp_avg.lerp_(grad, 1.0 - group.beta2)
    put_back(segment, param, [exp_avg])
