"""Choose boundaries so that the heaviest stage is as light as it can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lit_zero.core.errors import check_choice
from lit_zero.pipeline.facts import Recording
from lit_zero.pipeline.plan import check_costs, check_count, refusal

BALANCES = ("parameters", "activations", "flops")


def balance(
    recording: Recording,
    stages: int,
    by: str | Sequence[float] = "parameters",
    before: float = 0.0,
    after: float = 0.0,
) -> tuple[int, ...]:
    """Return the boundaries that make the largest cost of a stage as small as possible, among those that are possible.

    Args:
        recording: what the dry run has shown.
        stages: number of pieces.
        by: ``"parameters"`` (elements; one that a stage uses several times counts once), ``"activations"`` (bytes saved
            for the backward), ``"flops"`` (of the forward), or one cost for each block, such as measured seconds.
        before: with given costs, the cost of what runs before the first block, in the same unit.
        after: with given costs, the cost of what runs after the last block.

    Raises:
        ConfigError: if there are more stages than blocks, or the costs do not fit the blocks.
        UnsupportedError: if skip connections leave fewer boundaries than are needed.
    """
    count = len(recording.blocks)
    check_count(stages, count)
    allowed = recording.allowed()
    if len(allowed) < stages - 1:
        objection = next(o for o in map(recording.objection, range(1, count)) if o)
        needed = "1 boundary" if stages == 2 else f"{stages - 1} boundaries"
        raise refusal(recording, f"pipeline.stages={stages} needs {needed}, but {objection}")
    return partition(_cost(recording, by, before, after), count, stages, allowed)


def _cost(recording: Recording, by: str | Sequence[float], before: float, after: float) -> Callable[[int, int], float]:
    count = len(recording.blocks)
    if isinstance(by, str):
        check_choice("pipeline.balance", by, BALANCES)
        if by == "parameters":
            table = [
                [
                    sum(p.numel for p in recording.parameters if any(low <= r < high for r in p.regions))
                    for high in range(count + 1)
                ]
                for low in range(count)
            ]
            return lambda low, high: table[low][high]
        costs = [float(b.flops if by == "flops" else b.activation_bytes) for b in recording.blocks]
    else:
        costs = [float(cost) for cost in by]
        check_costs(costs, count)
        costs[0] += before
        costs[-1] += after
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    return lambda low, high: sums[high] - sums[low]


def partition(cost: Callable[[int, int], float], count: int, parts: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Cut ``range(count)`` into consecutive parts whose largest cost is as small as possible.

    Exact: dynamic programming over the end of each part, ``O(parts * len(allowed) ** 2)``. Among equals the one that
    begins later wins, so that earlier parts, which hold more micro-batches in flight, are not the smaller ones.

    Args:
        cost: ``cost(low, high)`` of the part that holds ``low`` to ``high - 1``.
        count: what is cut.
        parts: number of parts; at least ``parts - 1`` cuts must be allowed.
        allowed: where a part may begin, increasing, without 0.

    Returns:
        Where each part but the first begins.
    """
    # best[end]: the smallest possible largest cost of the parts so far, if the last one ends at ``end``, and its cuts.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (float("-inf"), ())}
    for part in range(parts):
        ends = [count] if part == parts - 1 else list(allowed)
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in ends:
            for low, (worst, cuts) in best.items():
                if low >= end:
                    continue
                found = max(worst, cost(low, end))
                if end not in following or found < following[end][0]:
                    following[end] = (found, (*cuts, low))
        best = following
    return best[count][1][1:]
