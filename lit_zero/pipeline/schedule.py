"""A schedule: which rank holds which stage, and what each rank computes, in order.

It is data. It prints, and what it prints parses back::

    1f1b: 2 micro-batches, stages on ranks 0 1
    rank 0: F0.0 F0.1 B0.0 B0.1
    rank 1: F1.0 B1.0 F1.1 B1.1

Nothing is said of communication: that follows (see ``lowering``). Nor is a schedule right because it exists:
``checking`` proves it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lit_zero.core.errors import ConfigError
from lit_zero.pipeline.actions import BACKWARD, FORWARD, INPUTS, WEIGHTS, Compute, parse

Order = tuple[Compute, ...]  # of one rank
Placement = tuple[int, ...]  # the rank of every stage

_HEAD = re.compile(r"(\S+): (\d+) micro-batch(?:es)?, stages on ranks ((?:\d+ ?)+)(, forward only)?")


def loop(ranks: int, stages_per_rank: int = 1) -> Placement:
    """Return the placement that deals stages to ranks in rounds: 0 1 2 0 1 2.

    Args:
        ranks: how many.
        stages_per_rank: how many rounds.
    """
    return tuple(range(ranks)) * stages_per_rank


def vee(ranks: int) -> Placement:
    """Return the placement that goes down the ranks and up again: 0 1 2 2 1 0.

    The first and the last stage share a rank, and so do the two in the middle, which need no message.

    Args:
        ranks: how many.
    """
    return (*range(ranks), *reversed(range(ranks)))


PLACEMENTS = ("loop", "vee")


@dataclass(frozen=True)
class Schedule:
    """What every rank computes, in order.

    Attributes:
        name: of the rule that it was built by.
        placement: the rank of every stage.
        micro_batches: how many.
        orders: of every rank, what it computes.
        backward: whether gradients are computed; without, it is for evaluation and prediction.
    """

    name: str
    placement: Placement
    micro_batches: int
    orders: tuple[Order, ...]
    backward: bool = True

    @property
    def stages(self) -> int:
        """How many pieces the model is in."""
        return len(self.placement)

    @property
    def ranks(self) -> int:
        """How many ranks the pipeline has."""
        return len(self.orders)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that live on a rank, first to last.

        Args:
            rank: of the pipeline.
        """
        return tuple(stage for stage, home in enumerate(self.placement) if home == rank)

    def __str__(self) -> str:
        many = "micro-batch" if self.micro_batches == 1 else "micro-batches"
        places = " ".join(map(str, self.placement))
        only = "" if self.backward else ", forward only"
        head = f"{self.name}: {self.micro_batches} {many}, stages on ranks {places}{only}"
        return "\n".join([head, *(f"rank {rank}: {words(order)}" for rank, order in enumerate(self.orders))])

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Return the schedule that a text describes, in the form that ``str`` gives.

        Args:
            text: a line that says what it is, then a line of actions per rank.

        Raises:
            ConfigError: naming the line or the word that cannot be read.
        """
        head, *lines = [line.strip() for line in text.strip().splitlines() or [""]]
        found = _HEAD.fullmatch(head)
        if not found:
            raise ConfigError(
                "A pipeline schedule starts with a line such as '1f1b: 8 micro-batches, stages on ranks 0 1', not "
                f"{head!r}."
            )
        orders = []
        for rank, line in enumerate(lines):
            label, _, row = line.partition(":")
            if label != f"rank {rank}":
                raise ConfigError(f"Line {rank + 2} of a pipeline schedule starts with 'rank {rank}:', not {label!r}.")
            steps = [parse(word) for word in row.split()]
            for step in steps:
                if not isinstance(step, Compute):
                    raise ConfigError(f"rank {rank}: {step} is communication; a schedule lists what is computed only.")
            orders.append(tuple(step for step in steps if isinstance(step, Compute)))
        placement = tuple(map(int, found[3].split()))
        return cls(found[1], placement, int(found[2]), tuple(orders), backward=not found[4])


def numbered(pattern: Iterable[tuple[str, int]], micro_batches: int) -> Order:
    """Return the actions of a pattern: of each (kind, stage) the first is for micro-batch 0, the next for 1, and so on.

    What would be numbered ``micro_batches`` or more is left out, so a pattern may be made for more micro-batches than
    there are. What waits for what never crosses from one micro-batch to another: without whole micro-batches a complete
    schedule stays complete, and one free of deadlock free of it.

    Args:
        pattern: kinds and stages, in order.
        micro_batches: how many there are.
    """
    counts: Counter[tuple[str, int]] = Counter()
    order = []
    for kind, stage in pattern:
        if counts[kind, stage] < micro_batches:
            order.append(Compute(kind, stage, counts[kind, stage]))
        counts[kind, stage] += 1
    return tuple(order)


def words(steps: Iterable[object]) -> str:
    """Return actions as one line.

    Args:
        steps: of one rank.
    """
    return " ".join(map(str, steps))


@dataclass(frozen=True)
class InFlight:
    """How many activations a rank keeps at most at one time, one for each (stage, micro-batch).

    Each is that of one stage: with two stages per rank it is half as large as with one.

    Attributes:
        graphs: from the start of ``F`` to the end of ``B`` or ``I``: all that the forward saved.
        held: from the start of ``F`` to the end of ``B`` or ``W``: all of it, or the part that ``W`` still needs (the
            inputs of the layers and the gradients of their outputs).
    """

    graphs: int
    held: int


def in_flight(order: Iterable[Compute]) -> InFlight:
    """Return the most activations that are alive at one time on the rank that runs this order.

    A rank does one thing at a time, so this does not depend on how long things take. Without a backward an activation
    is free once its forward is over.

    Args:
        order: what the rank computes.
    """
    order = tuple(order)
    backward = any(each.kind != FORWARD for each in order)
    graphs = held = most_graphs = most_held = 0
    for each in order:
        if each.kind == FORWARD:
            graphs, held = graphs + 1, held + 1
            most_graphs, most_held = max(most_graphs, graphs), max(most_held, held)
        graphs -= each.kind in (BACKWARD, INPUTS) or not backward
        held -= each.kind in (BACKWARD, WEIGHTS) or not backward
    return InFlight(most_graphs, most_held)
