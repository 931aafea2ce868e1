"""The user's choice of how checkpoints are written."""

from __future__ import annotations

from dataclasses import dataclass

from lit_zero.core.errors import check_choice

FORMATS = ("full", "sharded")


@dataclass(frozen=True)
class Checkpoint:
    """How checkpoints are written. Both formats load at any stage and any number of ranks, whichever is chosen here.

    Args:
        format: ``"full"``: one plain Lightning ``.ckpt`` that opens without lit_zero, gathered to rank 0's host
            memory tensor by tensor. ``"sharded"``: a folder to which every rank writes its own part at once;
            ``lit-zero consolidate`` makes it a plain file.

    Raises:
        ConfigError: if ``format`` is neither.
    """

    format: str = "full"

    def __post_init__(self) -> None:
        check_choice("checkpoint.format", self.format, FORMATS)
