"""One step of Adagrad over flat segments.

Source: Duchi et al., "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", section 1.3, the
diagonal form; the decay of the learning rate is that of ``torch.optim.Adagrad``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.segments import Segment, in_portions, is_kernels_own, put_back, scaled, worked
from lit_zero.kernels.table import Tables


class AdagradGroup(NamedTuple):
    """Hyper-parameters of one group."""

    lr: float
    lr_decay: float = 0.0
    eps: float = 1e-10
    weight_decay: float = 0.0
    maximize: bool = False

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernel's table holds."""
        return (-1.0 if self.maximize else 1.0, self.lr, self.lr_decay, self.weight_decay, self.eps)


def adagrad_step(
    segments: Sequence[Segment],
    groups: Sequence[AdagradGroup],
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """Step segments in place: in one launch for all of one format where kernels run, else by
    :func:`adagrad_reference`.

    Args:
        segments: all on one device; ``states`` is ``sum``, of squares; ``step`` is counted.
        groups: hyper-parameters by the segments' group numbers.
        grad_scale: gradients are multiplied by it; 0-d fp32 on the device.
        found_inf: not zero: nothing changes, counts included; 0-d fp32 on the device.
        tables: keeps what was uploaded for the next step.
    """
    if segments and runs_kernel(segments[0].param) and is_kernels_own(segments):
        from lit_zero.kernels.triton_rules import adagrad_rule
        from lit_zero.kernels.triton_walk import walk_segments

        walk_segments(adagrad_rule, segments, [g.numbers() for g in groups], grad_scale, found_inf, tables)
        return
    for segment in segments:
        in_portions(segment, partial(adagrad_reference, group=groups[segment.group], grad_scale=grad_scale), found_inf)


def adagrad_reference(segment: Segment, group: AdagradGroup, grad_scale: torch.Tensor | None = None) -> None:
    """Do to a segment what defines a step; ``segment.step`` counts this step already."""
    assert segment.step is not None
    param, grad, total = worked([segment.param, segment.grad, *segment.states], segment.param)
    grad = scaled(grad, -1.0 if group.maximize else 1.0, grad_scale)
    if group.weight_decay:
        grad = grad + group.weight_decay * param
    total.addcmul_(grad, grad)
    lr = group.lr / (1.0 + (float(segment.step) - 1.0) * group.lr_decay)
    param.addcdiv_(grad, total.sqrt().add_(group.eps), value=-lr)
    put_back(segment, param, [total])
