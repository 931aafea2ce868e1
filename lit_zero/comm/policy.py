"""The user's choice of how bytes travel."""

from __future__ import annotations

from dataclasses import dataclass

from lit_zero.core.errors import ConfigError


@dataclass(frozen=True)
class Comm:
    """How parameters are gathered and gradients reduced.

    Args:
        overlap: run the exchange beside the computation (a thread of its own on CPU, streams of their own on GPU). Off,
            every exchange finishes before the computation goes on, which makes a profile easy to read; results are the
            same bit for bit.

    Raises:
        ConfigError: if ``overlap`` is not a bool.
    """

    overlap: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.overlap, bool):
            raise ConfigError(f"comm.overlap={self.overlap!r} is not valid: expected true or false.")
