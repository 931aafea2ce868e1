"""The schedules that split the backward: gradients of inputs at once, since another rank waits for them; gradients of
weights when there is nothing better to do.

Each has a form by hand, which is best where all actions take the same time and there are enough micro-batches.
Otherwise the list scheduler may do better under the same limit of memory: what a simulation finds fastest is taken.
"""

from __future__ import annotations

from lit_zero.pipeline.actions import FORWARD, INPUTS, WEIGHTS
from lit_zero.pipeline.greedy import greedy
from lit_zero.pipeline.schedule import Order, Placement, Schedule, numbered
from lit_zero.pipeline.timing import EQUAL, Costs, simulate


def zero_bubble(placement: Placement, micro_batches: int, costs: Costs = EQUAL) -> tuple[Order, ...]:
    """Return ZB-H1: 1F1B with a third of its bubble, and no rank keeps more than 1F1B's first rank.

    Rank ``r`` runs 1F1B's order and puts off gradients of weights by ``r`` micro-batches; they fill the end.

    Args:
        placement: one stage per rank.
        micro_batches: any number; with fewer than ranks the pipeline never fills.
        costs: how long things take.

    Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 2.1.
    """
    ranks = len(placement)
    orders = []
    for rank in range(ranks):
        f, i, w = (FORWARD, rank), (INPUTS, rank), (WEIGHTS, rank)
        orders.append(numbered([f] * (ranks - rank) + [i, f] * rank + [i, w, f] * micro_batches, micro_batches))
    return _fastest(tuple(orders), placement, micro_batches, costs, held=ranks)


def zbv(placement: Placement, micro_batches: int, costs: Costs = EQUAL) -> tuple[Order, ...]:
    """Return ZB-V: two stages per rank, down the ranks and up again; full from each rank's first action to its last.

    All ranks keep the same: as much as the first rank of 1F1B, which is two halves for every rank.

    Args:
        placement: by ``vee``.
        micro_batches: any number; from twice the number of ranks on, nothing is idle between a rank's first and last
            action if all actions take the same time.
        costs: how long things take.

    Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 6.
    """
    ranks = len(placement) // 2
    full = max(micro_batches, 2 * ranks)  # the form needs as many; numbers too high are left out
    orders = []
    for rank in range(ranks):
        (f, i, w), (f2, i2, w2) = (  # on the way down and on the way up
            ((FORWARD, stage), (INPUTS, stage), (WEIGHTS, stage)) for stage in (rank, len(placement) - 1 - rank)
        )
        pattern = [f] * (2 * (ranks - rank) - 1)  # until the first micro-batch is back from the turn of the V
        pattern += [f2, f] * rank
        pattern += [f2, i2, w2] * (ranks - rank)  # until its gradient is back
        pattern += [f, i, w, f2, i2, w2] * (full - ranks)
        pattern += [i, i2] * rank  # the last gradients, for which other ranks wait
        pattern += [i, w] * (ranks - rank)
        pattern += [w2, w] * full
        orders.append(numbered(pattern, micro_batches))
    return _fastest(tuple(orders), placement, micro_batches, costs, held=2 * ranks)


def _fastest(
    by_hand: tuple[Order, ...], placement: Placement, micro_batches: int, costs: Costs, held: int
) -> tuple[Order, ...]:
    """Return what takes least time: the orders by hand, or those listed for these costs or for equal ones."""
    listed = [greedy(placement, micro_batches, each, held) for each in dict.fromkeys((costs, EQUAL))]

    def time(orders: tuple[Order, ...]) -> float:
        return simulate(Schedule("", placement, micro_batches, orders), costs).makespan

    return min(by_hand, *listed, key=time)  # the first of those that take the same
