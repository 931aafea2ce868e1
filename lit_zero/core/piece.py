"""What the engine shows to a checkpoint: named ranges of full tensors, with no trace of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Piece:
    """One rank's contiguous part of one full tensor.

    Attributes:
        name: fully-qualified parameter name, as in ``module.state_dict()``.
        shape: global shape.
        start: first element held here, counted in the row-major flattened full tensor.
        data: the elements held here, shape ``[n]``, ``n`` may be 0; a view, so writing to it writes the model.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor


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
