"""When each rank did what: of a simulation, or of a real run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from lit_zero.pipeline.actions import Compute


@dataclass(frozen=True)
class Span:
    """One action on one rank.

    Attributes:
        rank: of the pipeline.
        action: what was computed.
        start: when it began; seconds, or the unit of the simulation's costs.
        end: when it was over.
    """

    rank: int
    action: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Spans, sorted by rank and start.

    Attributes:
        spans: of all ranks.
        ranks: how many.
    """

    spans: tuple[Span, ...]
    ranks: int

    @classmethod
    def of(cls, spans: Iterable[tuple[int, Compute, float, float] | Span]) -> Timeline:
        """Return the timeline of spans in any order, shifted so that the first starts at 0.

        Args:
            spans: spans, or (rank, action, start, end), times of one clock.
        """
        made = [span if isinstance(span, Span) else Span(*span) for span in spans]
        first = min((span.start for span in made), default=0.0)
        made = [Span(span.rank, span.action, span.start - first, span.end - first) for span in made]
        ranks = max((span.rank for span in made), default=-1) + 1
        return cls(tuple(sorted(made, key=lambda span: (span.rank, span.start))), ranks)

    @cached_property
    def rows(self) -> tuple[tuple[Span, ...], ...]:
        """The spans of every rank, in order."""
        rows: list[list[Span]] = [[] for _ in range(self.ranks)]
        for span in self.spans:
            rows[span.rank].append(span)
        return tuple(map(tuple, rows))

    @property
    def makespan(self) -> float:
        """The time from the first action of any rank to the end of the last of any rank."""
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, rank: int) -> float:
        """Return the time that a rank computes.

        Args:
            rank: of the pipeline.
        """
        return sum(span.end - span.start for span in self.rows[rank])

    def bubble(self, rank: int) -> float:
        """Return the part of the makespan in which a rank does not compute, between 0 and 1.

        Args:
            rank: of the pipeline.
        """
        return 1 - self.busy(rank) / self.makespan if self.makespan else 0.0

    @property
    def bubble_fraction(self) -> float:
        """The part of all ranks' makespan in which they do not compute, between 0 and 1.

        The makespan counts for every rank, because a step ends for all together where the gradient norm is clipped or
        a loss is logged. (Megatron-LM's papers divide the same idle time by the time of computing instead.)
        """
        return sum(map(self.bubble, range(self.ranks))) / self.ranks if self.ranks else 0.0

    @property
    def own_bubble_fraction(self) -> float:
        """The same between each rank's own first and last action, not counting that later ranks start and end later.

        Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 5.3 ("bubble rate"), which lets a rank that
        is done begin the next step.
        """
        own = sum(row[-1].end - row[0].start for row in self.rows if row)
        return 1 - sum(map(self.busy, range(self.ranks))) / own if own else 0.0

    def chrome_trace(self, microseconds: float = 1e6) -> str:
        """Return the timeline as JSON that chrome://tracing and ui.perfetto.dev open, one row per rank.

        Args:
            microseconds: how many one unit of time is; a million where times are seconds.
        """
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
            for rank in range(self.ranks)
        ]
        events += [
            {
                "ph": "X",
                "name": str(span.action),
                "cat": span.action.kind,
                "pid": 0,
                "tid": span.rank,
                "ts": span.start * microseconds,
                "dur": (span.end - span.start) * microseconds,
                "args": {"stage": span.action.stage, "micro_batch": span.action.micro_batch},
            }
            for span in self.spans
        ]
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
