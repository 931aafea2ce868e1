"""One step of AdamW, Adam, Lion or SGD with momentum straight on small forms: nothing is brought to fp32 in between.

The portion-wise way (decode, step, encode) is what defines the result. It moves every element several times more than
must be; here each is read once, stepped in registers, and written once, in one launch for all segments of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lit_zero.kernels.table import Tables

PLAIN, SPLIT, ROUNDED, DITHERED, SIGNED, UNSIGNED = range(6)  # forms, as the kernel knows them


@dataclass(frozen=True)
class Array:
    """An array of ``n`` elements in one of the forms.

    Attributes:
        form: ``PLAIN`` (fp32), ``SPLIT`` (a bf16 copy and an int16 remainder), ``ROUNDED`` and ``DITHERED`` (bf16,
            rounded to nearest or at random), ``SIGNED`` and ``UNSIGNED`` (a byte an element, a scale for each 256).
        values: what has an entry for each element, bytes up to a whole number of blocks of 256.
        partner: the remainders or scales.
        seed: int32, where the random bits of its first element in step 0 start (``noise.seed_of``).
    """

    form: int
    values: torch.Tensor
    partner: torch.Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class SmallSegment:
    """What one group of hyper-parameters steps.

    Attributes:
        group: number of the group.
        param: the master, ``PLAIN`` or ``SPLIT``.
        grad: ``[n]``, fp32, bf16 or fp16; only read.
        moments: the optimizer's states, at most two.
        step: steps taken so far, 0-d fp32 on the device; ``None`` for an optimizer that does not count.
    """

    group: int
    param: Array
    grad: torch.Tensor
    moments: tuple[Array, ...]
    step: torch.Tensor | None = None

    @property
    def forms(self) -> tuple[Any, ...]:
        """What must be equal for segments to go into one launch."""
        return self.param.form, self.grad.dtype, *(moment.form for moment in self.moments)


def small_step(
    rule: str,
    segments: Sequence[SmallSegment],
    groups: Sequence[Sequence[float]],
    tables: Tables | None = None,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """Step segments in place, those of one combination of forms in one launch. Where kernels run only.

    Args:
        rule: name of one of ``triton_rules``.
        segments: all on one device.
        groups: hyper-parameters by the segments' group numbers, as the rule reads them.
        tables: keeps what was uploaded for the next step.
        grad_scale: gradients are multiplied by it; 0-d fp32 on the device.
    """
    tables = tables or Tables()
    found: dict[tuple[Any, ...], list[SmallSegment]] = {}
    for segment in segments:
        if segment.grad.numel():
            found.setdefault(segment.forms, []).append(segment)
    if not found:
        return
    from lit_zero.kernels.triton_small import launch

    for each in found.values():
        launch(rule, each, groups, tables, grad_scale)
        torch.autograd.graph.increment_version([segment.param.values for segment in each])  # autograd has not seen it
