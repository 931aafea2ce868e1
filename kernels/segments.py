"""What an element-wise optimizer steps: flat tensors of one length, and where they differ in format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

PORTION = 1 << 15  # elements: what a step reads and writes of them stays in a core's cache
STEPPED = (torch.float32, torch.bfloat16, torch.float16)  # what a kernel loads and stores


@dataclass(frozen=True)
class Segment:
    """Flat tensors of one length ``n`` that are stepped by one group of hyper-parameters.

    Attributes:
        group: number of the group.
        param: ``[n]``, updated.
        grad: ``[n]``, only read.
        states: what the optimizer keeps for each element, each ``[n]``, updated.
        step: steps taken so far, 0-d fp32 on the device; ``None`` for an optimizer that does not count.
        copy: ``[n]``, takes the parameter's new values in its own dtype; ``None`` for no copy.
    """

    group: int
    param: torch.Tensor
    grad: torch.Tensor
    states: tuple[torch.Tensor, ...] = ()
    step: torch.Tensor | None = None
    copy: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All flat tensors, in the order in which a table lists them."""
        return self.param, self.grad, self.copy, *self.states

    def part(self, first: int, last: int) -> Segment:
        """Return elements ``[first, last)`` as a segment of the same memory."""
        cut = slice(first, last)
        return replace(
            self,
            param=self.param[cut],
            grad=self.grad[cut],
            states=tuple(state[cut] for state in self.states),
            copy=None if self.copy is None else self.copy[cut],
        )


Formats = tuple[torch.dtype | None, ...]


def by_format(segments: Iterable[Segment]) -> dict[Formats, list[Segment]]:
    """Return the segments by the dtypes of their tensors: each entry can be one launch. Those without a copy go with
    others that are like them in the rest.
    """
    found: dict[Formats, list[Segment]] = {}
    without: dict[Formats, list[Segment]] = {}
    for segment in segments:
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in segment.tensors)
        (without if segment.copy is None else found).setdefault(dtypes, []).append(segment)
    for dtypes, each in without.items():
        alike = next((key for key in found if key[:2] + key[3:] == dtypes[:2] + dtypes[3:]), dtypes)
        found.setdefault(alike, []).extend(each)
    return found


def is_kernels_own(segments: Sequence[Segment]) -> bool:
    """Return whether kernels know all formats: fp64 is torch's alone."""
    return all(tensor is None or tensor.dtype in STEPPED for each in segments for tensor in each.tensors)


def in_portions(
    segment: Segment, reference: Callable[[Segment], None], found_inf: torch.Tensor | None, size: int = PORTION
) -> None:
    """Step one segment by a plain-torch ``reference``, portion by portion, and count the step.

    Args:
        segment: what is stepped.
        reference: steps a segment; it finds the number of the coming step in ``segment.step``.
        found_inf: 0-d; not zero: nothing changes.
        size: elements of a portion.
    """
    if found_inf is not None and bool(found_inf):
        return
    if segment.step is not None:
        segment.step.add_(1)
    for first in range(0, segment.param.numel(), size):
        reference(segment.part(first, first + size))


def worked(tensors: Iterable[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors in the dtype that a reference computes in, fp64 for an fp64 parameter and else fp32:
    themselves where they have it.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def scaled(grad: torch.Tensor, factor: float, grad_scale: torch.Tensor | None) -> torch.Tensor:
    """Return a gradient times ``factor`` and ``grad_scale``; itself where both are one."""
    if grad_scale is not None:
        return grad * (grad_scale.to(grad) * factor)
    return grad if factor == 1.0 else grad * factor


def put_back(segment: Segment, param: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
    """Round what was computed to the formats of ``segment``, the copy included."""
    for stored, new in zip((segment.param, *segment.states), (param, *states), strict=True):
        if stored is not new:
            stored.copy_(new)
    if segment.copy is not None:
        segment.copy.copy_(param)
