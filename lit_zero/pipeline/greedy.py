"""A list scheduler: time runs, and each rank that is free starts the most urgent thing it can."""

from __future__ import annotations

import heapq
import math

from lit_zero.pipeline.actions import FORWARD, INPUTS, WEIGHTS, Compute, Message, given, taken
from lit_zero.pipeline.schedule import Order, Placement
from lit_zero.pipeline.timing import EQUAL, Costs


def greedy(
    placement: Placement, micro_batches: int, costs: Costs = EQUAL, held: float = math.inf, backward: bool = True
) -> tuple[Order, ...]:
    """Return the order that arises if every free rank takes the first of these that is ready: a backward for inputs,
    a forward of its deepest stage, a backward for weights.

    Inputs' gradients come first because other ranks wait for them; those of weights fill what would be idle time. A
    forward of a rank's ``k``-th last stage starts only while ``k`` activations more would fit: so there is always room
    for micro-batches under way to get to the end of the model and back, and the scheduler cannot lock itself up.

    Args:
        placement: the rank of every stage.
        micro_batches: how many.
        costs: how long things take, by which the order is made; any other costs run it too.
        held: most activations that a rank may keep, from ``F`` to ``W``, counted in stages; at least as many as a rank
            has stages.
        backward: whether gradients are computed.

    Source: the idea of filling idle time with weights' gradients under a limit of memory: Qi et al., "Zero Bubble
    Pipeline Parallelism", 2023, section 3.1. The rules are our own.
    """
    stages, ranks = len(placement), max(placement) + 1
    own = [[stage for stage in reversed(range(stages)) if placement[stage] == rank] for rank in range(ranks)]
    kinds = (INPUTS, FORWARD, WEIGHTS) if backward else (FORWARD,)
    done = {(kind, stage): 0 for kind in (FORWARD, INPUTS, WEIGHTS) for stage in range(stages)}  # micro-batches begun
    arrival: dict[Message, float] = {}
    orders: list[list[Compute]] = [[] for _ in range(ranks)]
    free, kept = [0.0] * ranks, [0] * ranks  # when a rank is free, and how many activations it keeps
    moments = [0.0]  # a heap of the times at which something changes

    def ready(action: Compute, rank: int, now: float) -> bool:
        kind, stage, micro_batch = action
        if micro_batch == micro_batches:
            return False
        if kind == FORWARD:
            if backward and kept[rank] + own[rank].index(stage) + 1 > held:
                return False
        elif micro_batch == done[FORWARD if kind == INPUTS else INPUTS, stage]:
            return False
        message = taken(action, stages)
        return message is None or arrival.get(message, math.inf) <= now

    while moments:
        now = heapq.heappop(moments)
        while moments and moments[0] == now:
            heapq.heappop(moments)
        for rank in range(ranks):
            if free[rank] > now:
                continue
            actions = (Compute(kind, stage, done[kind, stage]) for kind in kinds for stage in own[rank])
            action = next((each for each in actions if ready(each, rank, now)), None)
            if action is None:
                continue
            done[action.kind, action.stage] += 1
            kept[rank] += (action.kind == FORWARD) - (action.kind == WEIGHTS)
            orders[rank].append(action)
            free[rank] = now + costs.of(action)
            heapq.heappush(moments, free[rank])
            message = given(action, stages)
            if message is not None:
                there = placement[message.target] == rank
                arrival[message] = free[rank] + (0.0 if there else costs.latency)
                heapq.heappush(moments, arrival[message])
    return tuple(map(tuple, orders))
