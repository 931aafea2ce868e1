"""The shortest way to torch's fused kernels for a CPU, for what lies as they expect.

[Note: what stands around a kernel] In torch's classes a step takes some 4 microseconds for each tensor beside the
kernel's work, and looking at what only some tensors need costs as much again: together as long as the kernel takes for
10,000 elements. A flat segment that has been stepped before needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ONE = torch.ones((), device="cpu")  # whatever the default device is


@dataclass
class Gathered:
    """What a kernel steps in one call.

    Attributes:
        params: contiguous, all of one dtype.
        grads: alike.
        states: a list of tensors for each of the optimizer's states, alike.
        steps: steps taken so far, 0-d fp32; none for an optimizer that does not count.
    """

    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    states: list[list[torch.Tensor]] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)

    def count(self) -> None:
        """Count a step."""
        if self.steps:  # by a list: for one number torch makes a tensor of it for each anew
            torch._foreach_add_(self.steps, [_ONE] * len(self.steps))


def gather(
    params: Sequence[nn.Parameter], state: Mapping[Any, Any], keys: Sequence[str], counts: bool
) -> Gathered | None:
    """Return all that have a gradient, or ``None`` if one of them has to be looked at more closely.

    Args:
        params: of a group.
        state: the optimizer's.
        keys: of the states that have an element for each of a parameter's.
        counts: there is a number of steps among the states.
    """
    found, dtype = Gathered(states=[[] for _ in keys]), None
    kinds = list(zip(keys, found.states, strict=True))
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        kept, dtype = state.get(param, {}), dtype or param.dtype
        if not _fits(param, dtype) or grad.layout is not torch.strided or not _fits(grad, dtype):
            return None
        for key, values in kinds:
            value = kept.get(key)
            if value is None or not _fits(value, dtype):
                return None
            values.append(value)
        if counts:
            step = kept.get("step")
            if type(step) is not torch.Tensor or step.dtype is not torch.float32 or not step.is_cpu:
                return None
            found.steps.append(step)
        found.params.append(param)
        found.grads.append(grad)
    return found if dtype is None or dtype in _DTYPES else None


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()
