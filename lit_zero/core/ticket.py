"""What stands for work under way."""

from __future__ import annotations

from typing import Protocol


class Ticket(Protocol):
    """A call under way."""

    def wait(self) -> None:
        """Return once the results may be used by the caller (on a GPU: by what the caller launches next)."""


class Done:
    """The ticket of a call that finished at once."""

    def wait(self) -> None:
        """Return at once."""


class Failed:
    """The ticket of a call that failed: whoever waits for it is told.

    Args:
        error: what it has raised.
    """

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self) -> None:
        """Raise it."""
        raise self._error


DONE = Done()
