"""The schedules whose backward runs in one piece: GPipe, 1F1B, interleaved 1F1B. Each is a closed form."""

from __future__ import annotations

import math
from itertools import chain

from lit_zero.pipeline.actions import BACKWARD, FORWARD
from lit_zero.pipeline.schedule import Order, Placement, numbered


def gpipe(placement: Placement, micro_batches: int) -> tuple[Order, ...]:
    """Return the order that runs all forwards, then all backwards; every rank keeps all activations.

    Args:
        placement: one stage per rank.
        micro_batches: any number.

    Source: Huang et al., "GPipe", 2019, section 2.3.
    """
    ranks = range(len(placement))
    return tuple(
        numbered([(FORWARD, rank)] * micro_batches + [(BACKWARD, rank)] * micro_batches, micro_batches)
        for rank in ranks
    )


def one_forward_one_backward(placement: Placement, micro_batches: int) -> tuple[Order, ...]:
    """Return the order that, once the pipeline is full, runs one backward for each forward.

    Rank ``r`` of ``p`` keeps at most ``p - r`` activations, however many micro-batches there are.

    Args:
        placement: one stage per rank.
        micro_batches: any number.

    Source: Narayanan et al., "PipeDream", 2019, section 3.2; with a flush after each step, "Efficient Large-Scale
    Language Model Training on GPU Clusters Using Megatron-LM", 2021, section 2.2.1.
    """
    orders = []
    for rank in range(len(placement)):
        f, b = (FORWARD, rank), (BACKWARD, rank)
        orders.append(numbered([f] * (len(placement) - 1 - rank) + [f, b] * micro_batches, micro_batches))
    return tuple(orders)


def interleaved(placement: Placement, micro_batches: int) -> tuple[Order, ...]:
    """Return 1F1B over several stages per rank: the pipeline fills in smaller steps, so the bubble is smaller.

    Micro-batches travel in groups of as many as there are ranks. A last group that is not full is cut out of a full
    one, which keeps it correct, though it waits longer than the formula says.

    Args:
        placement: by ``loop``.
        micro_batches: any number; a multiple of the number of ranks has the smallest bubble.

    Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021,
    section 2.2.2; the number of forwards before the first backward is Megatron-LM's.
    """
    ranks = max(placement) + 1
    rounds = len(placement) // ranks
    if rounds == 1:
        return one_forward_one_backward(placement, micro_batches)
    groups = math.ceil(micro_batches / ranks)
    orders = []
    for rank in range(ranks):
        own = range(rank, len(placement), ranks)
        forwards = [(FORWARD, stage) for stage in own for _ in range(ranks)] * groups
        backwards = [(BACKWARD, stage) for stage in reversed(own) for _ in range(ranks)] * groups
        warmup = min(2 * (ranks - 1 - rank) + (rounds - 1) * ranks, len(forwards))
        pairs = zip(forwards[warmup:], backwards, strict=False)
        pattern = [*forwards[:warmup], *chain.from_iterable(pairs), *backwards[len(forwards) - warmup :]]
        orders.append(numbered(pattern, micro_batches))
    return tuple(orders)
