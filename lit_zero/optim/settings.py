"""Hyper-parameters that cannot be are refused when an optimizer is made, in the words of torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_settings(group: Mapping[str, Any]) -> None:
    """Look at the settings of a parameter group.

    Raises:
        ValueError: naming what came.
    """
    if not float(group["lr"]) >= 0.0:
        raise ValueError(f"Invalid learning rate: {group['lr']}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    check_length("betas", group["betas"], 2)
    for index, beta in enumerate(group["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if "momentum" in group and not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"Invalid momentum value: {group['momentum']}")


def check_length(key: str, values: Any, length: int) -> None:
    """Check that a setting has so many numbers.

    Raises:
        ValueError: naming it.
    """
    if len(values) != length:
        raise ValueError(f"optimizer.{key}={values!r} is not valid: expected {length} numbers, got {len(values)}.")
