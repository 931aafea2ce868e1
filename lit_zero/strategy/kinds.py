"""Whether two ranks have failed of the same cause, as far as their errors tell."""

from __future__ import annotations

import re

from lit_zero.core.errors import LitZeroError, LostRankError


def kind_of(error: BaseException) -> str:
    """Return type and message of an error in one line."""
    return f"{type(error).__qualname__}: {error}"


def same_kind(kind: str, error: Exception) -> bool:
    """Return whether an error of another rank is one that this rank has come to by itself.

    Messages may differ in numbers, such as that of the rank. That a rank is lost follows from what another one has
    come to. Other errors that lit_zero raises on purpose do not; there the type is enough.

    Args:
        kind: ``kind_of`` the other rank's error.
        error: this rank's.
    """
    own = kind_of(error)
    if isinstance(error, LostRankError):
        return False
    if isinstance(error, LitZeroError) and kind.partition(":")[0] == own.partition(":")[0]:
        return True
    return re.sub(r"\d+", "#", kind) == re.sub(r"\d+", "#", own)
