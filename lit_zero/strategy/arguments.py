"""Checks of the strategy's arguments."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lit_zero.core.errors import ConfigError


def instance(key: str, value: Any, kind: type[Any]) -> Any:
    """Return ``value``.

    Raises:
        ConfigError: if it is no ``kind``.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{key}={value!r} is not valid: expected a {kind.__name__}, got a {type(value).__name__}.")
    return value


def duration(key: str, value: Any) -> timedelta:
    """Return ``value``, seconds or a timedelta, as a timedelta.

    Raises:
        ConfigError: if it is neither, or not more than 0.
    """
    if not isinstance(value, timedelta):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{key}={value!r} is not valid: expected seconds, more than 0, or a timedelta.")
        value = timedelta(seconds=value)
    return value
