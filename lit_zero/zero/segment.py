"""What an optimizer holds in place of parameters: runs of flat masters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lit_zero.core.keeping import Content, Kept
from lit_zero.core.layout import Entry
from lit_zero.zero.lane import Lane
from lit_zero.zero.policy import Placement


@dataclass(eq=False)
class Segment:
    """A run of one lane's master that one parameter group updates.

    Attributes:
        lane: where it lies.
        first: first element, counted from the start of the lane's master.
        last: one past the last.
        param: what the optimizer holds, a view of the master of shape ``[last - first]``.
        entry: the parameter that it is a part of; ``None`` for a run of several.
        copied: version of the gradient that was handed over, if it is a copy: what is done to it does not reach the
            gradient that the next backward adds to.
        attached: version of the gradient that was handed over last.
        kept: the optimizer's states where masters are stepped in portions; what stands for them in the optimizer is
            their ``stand_in``.
    """

    lane: Lane
    first: int
    last: int
    param: nn.Parameter
    entry: Entry | None = None
    copied: int | None = None
    attached: int | None = None
    kept: dict[str, Kept] = field(default_factory=dict)

    @property
    def own(self) -> slice:
        """Which of its elements this rank answers for, of all ranks that divide the lane."""
        if self.lane.row.optimizer is Placement.SHARD:
            return slice(0, self.last - self.first)
        lo, hi = max(self.first, self.lane.start), min(self.last, self.lane.end)
        return slice(lo - self.first, max(lo, hi) - self.first)

    def lies_in(self, other: Segment) -> bool:
        """Return whether its elements are all in ``other``; if it stands for one parameter and has none here, whether
        ``other`` stands for the same.
        """
        if self.lane is not other.lane:
            return False
        if self.entry is not None and other.entry is not None:
            return self.entry.name == other.entry.name
        return other.first <= self.first < self.last <= other.last

    def keep(self, key: str, dtype: torch.dtype, content: Content) -> torch.Tensor:
        """Make room for a state as the lane's keeper wants it; return what stands for it in the optimizer."""
        if key not in self.kept or self.kept[key].dtype != dtype:
            self.kept[key] = self.lane.keeper.keep(self.last - self.first, dtype, content)
        return self.kept[key].stand_in()

    def values(self, key: str, held: torch.Tensor) -> Kept:
        """Return a state as an array; ``held`` is what the optimizer holds."""
        return self.kept.get(key) or Kept(held.view(-1))


def is_live(lane: Lane, grad: torch.Tensor) -> bool:
    """Return whether what is done to ``grad`` is done to all that the next backward will add to."""
    whole = lane.row.optimizer is Placement.REPLICATE or lane.accumulated  # else only one rank's part of a sum to come
    stored = [one.untyped_storage().data_ptr() for one in (lane.grad_full, lane.grad_own) if one is not None]
    return whole and grad.untyped_storage().data_ptr() in stored


def is_elementwise(value: Any, param: torch.Tensor) -> bool:
    """Return whether an optimizer's state has an element for every element of ``param``."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == param.shape


def copied_value(value: Any) -> Any:
    """Return a state of its own for another segment."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def same_state(one: Any, other: Any) -> bool:
    """Return whether two parameters' states, as ``Binding.describe`` gives them, have the same keys and numbers."""
    if one is None or other is None:
        return one is other
    return (
        one[0] == other[0] and one[1].keys() == other[1].keys() and all(bool(one[1][k] == other[1][k]) for k in one[1])
    )
