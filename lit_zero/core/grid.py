"""How the ranks of a run are laid out: pipelines side by side.

A run of ``pipeline * data`` ranks has ``data`` pipelines of ``pipeline`` ranks. Neighbours in number hold the same
stages and divide the data: they exchange most, and are most likely to sit on one machine. So a pipeline is the ranks
``i, i + data, i + 2 * data, ...``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_zero.core.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """Ranks by pipeline and position.

    Attributes:
        pipeline: ranks of one pipeline.
        data: pipelines, each of which reads its own part of the data.
    """

    pipeline: int
    data: int

    @classmethod
    def of(cls, ranks: int, pipeline: int) -> Grid:
        """Lay out a number of ranks.

        Raises:
            ConfigError: if they do not divide into pipelines.
        """
        if ranks % pipeline:
            fitting = [n for n in range(1, ranks + 1) if ranks % n == 0]
            raise ConfigError(
                f"pipeline.stages makes pipelines of {pipeline} ranks, into which the {ranks} "
                f"rank{'s' * (ranks > 1)} of this run (trainer.devices times trainer.num_nodes) cannot be divided. "
                f"Start a multiple of {pipeline} ranks, or choose pipeline.stages so that a pipeline takes "
                f"{' or '.join(map(str, fitting))} rank{'s' * (ranks > 1)}."
            )
        return cls(pipeline, ranks // pipeline)

    def position(self, rank: int) -> int:
        """Return a rank's position in its pipeline."""
        return rank // self.data

    def data_rank(self, rank: int) -> int:
        """Return the number of a rank's pipeline."""
        return rank % self.data

    def rank(self, position: int, data_rank: int) -> int:
        """Return the rank at a position of a pipeline."""
        return position * self.data + data_rank

    def data_groups(self) -> list[list[int]]:
        """Return the ranks that hold the same stages, by position."""
        return [[self.rank(position, d) for d in range(self.data)] for position in range(self.pipeline)]

    def pipelines(self) -> list[list[int]]:
        """Return the ranks of every pipeline, in order of position."""
        return [[self.rank(position, d) for position in range(self.pipeline)] for d in range(self.data)]

    def tie_groups(self, positions: tuple[int, ...]) -> list[list[int]]:
        """Return, for every pipeline, the ranks at some positions."""
        return [[self.rank(position, d) for position in positions] for d in range(self.data)]
