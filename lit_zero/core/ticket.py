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


DONE = Done()
