"""One step of AdamW or Adam over flat segments.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2; Kingma and Ba, "Adam", algorithm 1;
Reddi et al., "On the Convergence of Adam and Beyond", algorithm 2 (``max_exp_avg_sq``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.segments import Segment, in_portions, is_kernels_own, put_back, scaled, worked
from lit_zero.kernels.table import Tables


class AdamGroup(NamedTuple):
    """Hyper-parameters of one group; ``decoupled``: the weight decay of AdamW, else that of Adam (L2)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernel's table holds. A complement is computed here: 1 - 0.999 in fp32 is off by 1e-5."""
        kept = 1.0 - self.lr * self.weight_decay if self.decoupled else 1.0
        penalty = 0.0 if self.decoupled else self.weight_decay
        betas = [each for beta in (self.beta1, self.beta2) for each in (beta, 1.0 - beta, _log(beta))]
        return (-1.0 if self.maximize else 1.0, self.lr, kept, penalty, self.eps, *betas)


def adamw_step(
    segments: Sequence[Segment],
    groups: Sequence[AdamGroup],
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """Step segments in place: in one launch for all of one format where kernels run, else by :func:`adamw_reference`.

    Args:
        segments: all on one device; ``states`` are ``exp_avg``, ``exp_avg_sq`` and with AMSGrad ``max_exp_avg_sq``;
            ``step`` is counted.
        groups: hyper-parameters by the segments' group numbers.
        grad_scale: gradients are multiplied by it; 0-d fp32 on the device.
        found_inf: not zero: nothing changes, counts included; 0-d fp32 on the device.
        tables: keeps what was uploaded for the next step.
    """
    if segments and runs_kernel(segments[0].param) and is_kernels_own(segments):
        from lit_zero.kernels.triton_rules import adamw_rule
        from lit_zero.kernels.triton_walk import walk_segments

        walk_segments(adamw_rule, segments, [g.numbers() for g in groups], grad_scale, found_inf, tables)
        return
    for segment in segments:
        in_portions(segment, partial(adamw_reference, group=groups[segment.group], grad_scale=grad_scale), found_inf)


def adamw_reference(segment: Segment, group: AdamGroup, grad_scale: torch.Tensor | None = None) -> None:
    """Do to a segment what defines a step; ``segment.step`` counts this step already."""
    assert segment.step is not None
    param, grad, exp_avg, exp_avg_sq, *peak = worked([segment.param, segment.grad, *segment.states], segment.param)
    grad = scaled(grad, -1.0 if group.maximize else 1.0, grad_scale)
    if group.decoupled:
        param.mul_(1.0 - group.lr * group.weight_decay)
    elif group.weight_decay:
        grad = grad + group.weight_decay * param
    exp_avg.lerp_(grad, 1.0 - group.beta1)
    exp_avg_sq.mul_(group.beta2).addcmul_(grad, grad, value=1.0 - group.beta2)
    second = torch.maximum(peak[0], exp_avg_sq, out=peak[0]) if peak else exp_avg_sq
    count = float(segment.step)
    denominator = (second.sqrt() / math.sqrt(1.0 - group.beta2**count)).add_(group.eps)
    param.addcdiv_(exp_avg, denominator, value=-group.lr / (1.0 - group.beta1**count))
    put_back(segment, param, [exp_avg, exp_avg_sq, *peak])


def _log(beta: float) -> float:
    return max(math.log(beta), -100.0) if beta > 0 else -100.0  # exp(-100) is nothing beside one
