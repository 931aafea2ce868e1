"""The schedules whose backward runs in one piece: GPipe, 1F1B, interleaved 1F1B. Each is a closed form."""

from __future__ import annotations

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

    Micro-batches go through a rank's stages in groups (see ``groups``). Megatron-LM makes groups of exactly as many as
    there are ranks, and wants a multiple of it; here any number has the bubble of the formula, at the price of somewhat
    more activations.

    Args:
        placement: by ``loop``.
        micro_batches: any number; with fewer than ranks the pipeline never fills.

    Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021,
    section 2.2.2; the number of forwards before the first backward is Megatron-LM's.
    """
    ranks = max(placement) + 1
    rounds = len(placement) // ranks
    if rounds == 1:
        return one_forward_one_backward(placement, micro_batches)
    sizes = groups(micro_batches, ranks)
    orders = []
    for rank in range(ranks):
        own = range(rank, len(placement), ranks)
        forwards = [(FORWARD, stage) for size in sizes for stage in own for _ in range(size)]
        backwards = [(BACKWARD, stage) for size in sizes for stage in reversed(own) for _ in range(size)]
        warmup = min(2 * (ranks - 1 - rank) + (rounds - 1) * sizes[0], len(forwards))
        pairs = zip(forwards[warmup:], backwards, strict=False)
        pattern = [*forwards[:warmup], *chain.from_iterable(pairs), *backwards[len(forwards) - warmup :]]
        orders.append(numbered(pattern, micro_batches))
    return tuple(orders)


def forward_in_rounds(placement: Placement, micro_batches: int) -> tuple[Order, ...]:
    """Return the forwards of ``interleaved`` alone.

    Args:
        placement: by ``loop``.
        micro_batches: any number.
    """
    ranks = max(placement) + 1
    sizes = groups(micro_batches, ranks)
    orders = []
    for rank in range(ranks):
        own = range(rank, len(placement), ranks)
        pattern = [(FORWARD, stage) for size in sizes for stage in own for _ in range(size)]
        orders.append(numbered(pattern, micro_batches))
    return tuple(orders)


def groups(micro_batches: int, ranks: int) -> list[int]:
    """Return how many micro-batches go through a rank's first stage before the first of them goes through its second.

    Each group is at least as many as there are ranks, so that the first is back when the last has left, and they differ
    by one at most. With fewer micro-batches than ranks it is one group with places left empty.

    Args:
        micro_batches: how many.
        ranks: how many.
    """
    number = max(1, micro_batches // ranks)
    size, longer = divmod(max(micro_batches, ranks), number)
    return [size + 1] * longer + [size] * (number - longer)
