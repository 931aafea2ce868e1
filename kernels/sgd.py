"""One step of SGD, with or without momentum, over flat segments.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", section 2 (Nesterov); the
form is that of ``torch.optim.SGD``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.segments import Segment, in_portions, is_kernels_own, put_back, scaled, worked
from lit_zero.kernels.table import Tables


class SGDGroup(NamedTuple):
    """Hyper-parameters of one group; ``first``: the momentum begins with this step, as the gradient itself."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    first: bool = False

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernel's table holds."""
        old, new = (0.0, 1.0) if self.first else (self.momentum, 1.0 - self.dampening)
        sign = -1.0 if self.maximize else 1.0
        return (sign, self.lr, self.weight_decay, old, new, self.momentum if self.nesterov else 0.0)


def sgd_step(
    segments: Sequence[Segment],
    groups: Sequence[SGDGroup],
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """Step segments in place: in one launch for all of one format where kernels run, else by :func:`sgd_reference`.

    Args:
        segments: all on one device; ``states`` is ``momentum_buffer``, or nothing without momentum; nothing is counted.
        groups: hyper-parameters by the segments' group numbers.
        grad_scale: gradients are multiplied by it; 0-d fp32 on the device.
        found_inf: not zero: nothing changes; 0-d fp32 on the device.
        tables: keeps what was uploaded for the next step.
    """
    if segments and runs_kernel(segments[0].param) and is_kernels_own(segments):
        from lit_zero.kernels.triton_rules import sgd_rule
        from lit_zero.kernels.triton_walk import walk_segments

        walk_segments(sgd_rule, segments, [g.numbers() for g in groups], grad_scale, found_inf, tables)
        return
    for segment in segments:
        in_portions(segment, partial(sgd_reference, group=groups[segment.group], grad_scale=grad_scale), found_inf)


def sgd_reference(segment: Segment, group: SGDGroup, grad_scale: torch.Tensor | None = None) -> None:
    """Do to a segment what defines a step."""
    param, grad, *buffers = worked([segment.param, segment.grad, *segment.states], segment.param)
    grad = scaled(grad, -1.0 if group.maximize else 1.0, grad_scale)
    if group.weight_decay:
        grad = grad + group.weight_decay * param
    update = grad
    for buffer in buffers:
        if group.first:
            buffer.copy_(grad)
        else:
            buffer.mul_(group.momentum).add_(grad, alpha=1.0 - group.dampening)
        update = grad.add(buffer, alpha=group.momentum) if group.nesterov else buffer
    param.add_(update, alpha=-group.lr)
    put_back(segment, param, buffers)
