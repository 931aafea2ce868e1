"""A parameter as the engine knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class ParamInfo:
    """A parameter that the engine manages.

    Attributes:
        name: first fully-qualified name.
        param: the user's parameter; its identity never changes, its memory becomes a view of the lane.
        compute_dtype: dtype in which forward and backward see it.
        master_dtype: dtype of the authoritative copy and of checkpoints.
        aliases: further names of the same parameter (tied weights).
        group: number of the optimizer's parameter group, -1 for none.
        optimizer: number of the optimizer, -1 for none.
        trainable: ``requires_grad`` at setup.
        lowered_dtype: ``compute_dtype`` as the mode of the run wants it.
        holders: positions of a pipeline that hold it, ascending.
        shape: its shape; the parameter's own is not to be asked for while it waits for memory.
    """

    name: str
    param: nn.Parameter
    compute_dtype: torch.dtype
    master_dtype: torch.dtype
    aliases: list[str] = field(default_factory=list)
    group: int = -1
    optimizer: int = -1
    trainable: bool = True
    holders: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        self.lowered_dtype = self.compute_dtype
        self.shape = tuple(self.param.shape)
