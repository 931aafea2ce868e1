"""What a ZeRO engine can ask of an optimizer: to write the parameters' 2-byte copy while it has their new values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class TakesCopies(Protocol):
    """An optimizer that may write copies in its step.

    Attributes:
        has_copied: the last step has written all copies of the parameters that it has changed.
    """

    has_copied: bool

    def take_copies(self, copies: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Take the copies of some of the parameters in the groups, each of its parameter's shape, in a dtype of its
        own.
        """
        ...
