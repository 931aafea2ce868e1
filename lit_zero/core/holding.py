"""Which ranks of a pipeline hold which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Holding:
    """What each rank of a pipeline holds of a module that is divided over them.

    The default is a module that is divided over nobody: its only rank holds everything.

    Attributes:
        rank: this rank's position in the pipeline.
        holders: parameter name to the positions that hold it, ascending; several for weights that are tied over ranks.
            What is not named is held by position 0.
    """

    rank: int = 0
    holders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, name: str) -> tuple[int, ...]:
        """Return the positions that hold a parameter, ascending."""
        return self.holders.get(name, (0,))

    def here(self, holders: tuple[int, ...]) -> bool:
        """Return whether this rank is one of ``holders``."""
        return self.rank in holders

    def counts(self, holders: tuple[int, ...]) -> bool:
        """Return whether this rank is the one that answers for what ``holders`` hold, so that it counts once."""
        return self.rank == holders[0]

    def ties(self) -> list[tuple[int, ...]]:
        """Return the groups of several positions that hold a parameter together; the same order on every rank."""
        return sorted({holders for holders in self.holders.values() if len(holders) > 1})
