"""Arrays as they lie on the device, for an optimizer that can step them as they lie."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True)
class Form:
    """How an array of ``n`` fp32 elements lies on the device.

    Attributes:
        kind: ``plain`` (fp32), ``split`` (a bf16 copy and an int16 remainder), ``rounded`` and ``dithered`` (bf16,
            rounded to nearest or at random), ``signed`` and ``unsigned`` (a byte an element, a scale for each 256).
        values: what has an entry for each element; bytes up to a whole number of blocks of 256.
        partner: remainders or scales.
    """

    kind: str
    values: torch.Tensor
    partner: torch.Tensor | None = None


@dataclass(frozen=True)
class Origin:
    """Where the arrays of a step come from: all that random rounding may depend on, so that neither ranks, stages nor a
    resumed run change it.

    Attributes:
        name: of the lane.
        first: where the arrays begin in the lane, in elements.
        step: number of the step, on the device if the optimizer counts there.
    """

    name: str = ""
    first: int = 0
    step: int | torch.Tensor = 0

    def stream(self, key: str) -> int:
        """Return which stream of random bits the array ``key`` draws from."""
        return zlib.crc32(f"{self.name}/{key}".encode())


@dataclass(frozen=True)
class Formed:
    """What an optimizer is asked to step.

    Attributes:
        param: what it holds in its groups; it has no memory.
        grad: shape ``[n]``.
        master: the parameter.
        states: all that the optimizer keeps for each element, by key.
        origin: of the arrays.
    """

    param: nn.Parameter
    grad: torch.Tensor
    master: Form
    states: Mapping[str, Form]
    origin: Origin


@runtime_checkable
class StepsForms(Protocol):
    """An optimizer that may step arrays as they lie; else they are brought to fp32, portion by portion."""

    def step_forms(self, parts: Sequence[Formed], factor: torch.Tensor | None = None) -> bool:
        """Step all parts, their counters included, with their gradients times ``factor`` (0-d), and return true; or do
        nothing and return false.
        """
        ...
