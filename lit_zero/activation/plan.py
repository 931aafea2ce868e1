"""Which block keeps, recomputes or moves what it saves: integers in, choices out."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from lit_zero.core.errors import ConfigError

Choice = Literal["keep", "recompute", "offload"]
KEEP: Choice = "keep"
RECOMPUTE: Choice = "recompute"
OFFLOAD: Choice = "offload"
_FINEST = 256  # states that the search goes on with; of more, those that take about as much are one
_LIMITS = 16  # limits on what one block saves that are tried; of more, evenly many are left out


@dataclass(frozen=True)
class Facts:
    """What calls of a block have shown.

    Attributes:
        kept: bytes of what autograd saves in it.
        inputs: bytes of its arguments, which stay if it is recomputed.
        small: bytes of what is saved and too small to be moved.
        moved: bytes of the rest.
        forward: nanoseconds of its forward.
    """

    kept: int = 0
    inputs: int = 0
    small: int = 0
    moved: int = 0
    forward: int = 0

    def plus(self, other: Facts) -> Facts:
        """Return the sums."""
        return Facts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def shared(self, parts: int) -> Facts:
        """Return what a part has of it, rounded up."""
        return Facts(*(-(-each // parts) for each in astuple(self)))


def every(n: int, count: int) -> list[Choice]:
    """Recompute every ``n``-th of ``count`` blocks, the first included."""
    return [KEEP if number % n else RECOMPUTE for number in range(count)]


def cheapest(
    facts: Sequence[Facts], budget: int, alive: int, link: int, overlaps: bool, flight: int = 0
) -> list[Choice]:
    """Return the mix that takes least time among those that fit.

    At any time in memory are what the blocks hold from forward to backward, for every micro-batch that is alive, all
    that one block saves, while it is computed again or has come back, and what is on its way to and from host memory.
    The best mix for given limits on the latter two is found by going through the blocks and keeping, of all mixes so
    far, those that no other one beats in bytes and time at once.

    Args:
        facts: of every block, for one micro-batch.
        budget: bytes.
        alive: micro-batches between their forward and their backward, at most.
        link: bytes per second between the device and host memory, one way; 0 if nothing can be moved there.
        overlaps: copies run beside the computation.
        flight: bytes that may be on their way at a time, both ways together.

    Raises:
        ConfigError: if nothing fits; the least possible is named.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 4 (what is dropped and what it
        costs); Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, section 2.4 (dominated states).
    """
    least = None
    fitting: list[tuple[int, list[list[tuple[Choice, int, int]]]]] = []  # the room that is left, and the options
    for speed, working in itertools.product(sorted({0, link}), sorted({0, *(each.kept for each in facts)})):
        options = [_options(each, alive, speed, overlaps, each.kept <= working) for each in facts]
        beside = working + (min(flight, sum(each.moved for each in facts) * alive) if speed else 0)
        smallest = beside + sum(min(held for _, held, _ in each) for each in options)
        least = smallest if least is None else min(least, smallest)
        if smallest <= budget:
            fitting.append((budget - beside, options))
    found = [_search(options, room) for room, options in fitting[:: -(-len(fitting) // _LIMITS) or 1]]
    if not found:
        raise ConfigError(
            f"activation.budget={budget} is below the least possible, {least} bytes: so much the {len(facts)} blocks "
            f"of this rank hold with {alive} micro-batch{'es' * (alive > 1)} at a time if each does what takes least "
            "memory. Raise activation.budget, or use smaller batches."
        )
    return min(found, key=operator.itemgetter(0))[1]


def _options(facts: Facts, alive: int, link: int, overlaps: bool, movable: bool) -> list[tuple[Choice, int, int]]:
    """Return what a block may do, the bytes that it then holds, and the nanoseconds that this costs a micro-batch."""
    found: list[tuple[Choice, int, int]] = [(KEEP, facts.kept * alive, 0)]
    if not movable:
        return found
    found.append((RECOMPUTE, facts.inputs * alive, facts.forward))
    if facts.moved and link:
        copy = facts.moved * 1_000_000_000 // link
        hidden = (facts.forward, 2 * facts.forward) if overlaps else (0, 0)  # a backward takes two forwards
        waits = sum(max(0, copy - beside) for beside in hidden)
        found.append((OFFLOAD, facts.small * alive, max(1, waits)))  # of what costs the same, rather keep
    return found


def _search(options: Sequence[Sequence[tuple[Choice, int, int]]], room: int) -> tuple[int, list[Choice]]:
    """Return the least time in which one option of each block can be had in ``room`` bytes, and these options."""
    ahead = [0]  # the least that the blocks from here on take
    for each in reversed(options):
        ahead.append(ahead[-1] + min(held for _, held, _ in each))
    ahead.reverse()
    states: list[tuple[int, int, Any]] = [(0, 0, None)]  # bytes, time, and (the last choice, those before)
    for number, each in enumerate(options):
        reached = sorted(
            (
                (used + held, time + cost, (choice, before))
                for used, time, before in states
                for choice, held, cost in each
            ),
            key=operator.itemgetter(0, 1),
        )
        states = []
        for state in reached:
            if state[0] + ahead[number + 1] <= room and (not states or state[1] < states[-1][1]):
                states.append(state)
        if len(states) > _FINEST:  # of those that take about as much, go on with the fastest; the leanest stays
            cell = max(1, (states[-1][0] - states[0][0]) // _FINEST)
            cells = {(state[0] - states[0][0]) // cell: state for state in states[1:]}
            states = [states[0], *cells.values()]
    _, time, chain = min(states, key=lambda state: (state[1], state[0]))
    chosen = []
    while chain is not None:
        choice, chain = chain
        chosen.append(choice)
    return time, chosen[::-1]
