"""What the engine shows to a checkpoint: named ranges of full tensors, with no trace of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lit_zero.core.keeping import Kept


@dataclass
class Piece:
    """One rank's contiguous part of one full tensor.

    Attributes:
        name: fully-qualified parameter name, as in ``module.state_dict()``.
        shape: global shape.
        start: first element held here, counted in the row-major flattened full tensor.
        data: the elements held here, shape ``[n]``, ``n`` may be 0; a view, so writing to it writes the model. What
            does not lie in memory is an array that is read when it is asked for.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor | Kept

    @property
    def numel(self) -> int:
        """Number of elements held here."""
        return self.data.numel() if isinstance(self.data, torch.Tensor) else self.data.numel

    @property
    def end(self) -> int:
        """One past the last element held here."""
        return self.start + self.numel

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.data.dtype

    @property
    def live(self) -> bool:
        """Whether what ``read`` gives is the model itself."""
        return isinstance(self.data, torch.Tensor)

    def read(self) -> torch.Tensor:
        """Return the elements, shape ``[n]``."""
        return self.data if isinstance(self.data, torch.Tensor) else self.data.read()

    def part(self, first: int, last: int) -> torch.Tensor:
        """Return elements ``[first, last)``, counted from ``start``."""
        return self.data[first:last] if isinstance(self.data, torch.Tensor) else self.data.part(first, last).read()

    def write(self, values: torch.Tensor) -> None:
        """Overwrite the elements with ``values`` (shape ``[n]``, any dtype)."""
        with torch.no_grad():
            if isinstance(self.data, torch.Tensor):
                self.data.copy_(values)
            else:
                self.data.write(0, values)


@dataclass
class ParamState:
    """One parameter's optimizer state on one rank.

    Attributes:
        index: position of the parameter in the user's own parameter groups, counted over all groups in order.
        name: fully-qualified parameter name.
        tensors: state tensors that have the parameter's shape (``exp_avg``, ...), as pieces.
        scalars: everything else (``step``, ...), equal on every rank.
    """

    index: int
    name: str
    tensors: dict[str, Piece] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
