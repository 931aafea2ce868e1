"""Which block keeps, recomputes or moves what it saves: integers in, choices out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_zero.core.errors import ConfigError

Choice = Literal["keep", "recompute", "offload"]
KEEP: Choice = "keep"
RECOMPUTE: Choice = "recompute"
OFFLOAD: Choice = "offload"
_FINEST = 4096  # states that the search goes on with; with more, bytes are rounded up


@dataclass(frozen=True)
class Facts:
    """What one step has shown of a block, for one micro-batch.

    Attributes:
        kept: bytes of what autograd saves in it.
        inputs: bytes of its arguments, which stay if it is recomputed.
        small: bytes of what is saved and too small to be moved.
        moved: bytes of the rest.
        forward: nanoseconds of its forward.
    """

    kept: int
    inputs: int
    small: int
    moved: int
    forward: int


def every(n: int, count: int) -> list[Choice]:
    """Recompute every ``n``-th of ``count`` blocks, the first included."""
    return [KEEP if number % n else RECOMPUTE for number in range(count)]


def cheapest(facts: Sequence[Facts], budget: int, alive: int, link: int, overlaps: bool) -> list[Choice]:
    """Return the mix that takes least time among those that fit.

    At any time in memory are what the blocks hold from forward to backward, for every micro-batch that is alive, and
    all that one block saves, while it is computed again or has come back. The best mix for a given limit on the
    latter is found by going through the blocks and keeping, of all mixes so far, those that no other one beats in
    bytes and time at once.

    Args:
        facts: of every block.
        budget: bytes.
        alive: micro-batches between their forward and their backward, at most.
        link: bytes per second between the device and host memory, one way; 0 if nothing can be moved there.
        overlaps: copies run beside the computation.

    Raises:
        ConfigError: if nothing fits; the least possible is named.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 4 (what is dropped and what it
        costs); Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, section 2.4 (dominated states).
    """
    best: tuple[int, list[Choice]] | None = None
    least = 0
    for working in sorted({0, *(each.kept for each in facts)}):
        options = [_options(each, alive, link, overlaps, each.kept <= working) for each in facts]
        smallest = working + sum(min(held for _, held, _ in each) for each in options)
        least = min(least or smallest, smallest)
        if smallest > budget:
            continue
        time, choices = _search(options, budget - working)
        if best is None or time < best[0]:
            best = time, choices
    if best is None:
        raise ConfigError(
            f"activation.budget={budget} is below the least possible, {least} bytes: so much the {len(facts)} blocks "
            f"of this rank hold with {alive} micro-batch{'es' * (alive > 1)} at a time if each does what takes least "
            "memory. Raise activation.budget, or use smaller batches."
        )
    return best[1]


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
    states: list[tuple[int, int, tuple[Choice, ...]]] = [(0, 0, ())]
    for number, each in enumerate(options):
        reached = sorted(
            (
                (used + held, time + cost, (*chosen, choice))
                for used, time, chosen in states
                for choice, held, cost in each
            ),
            key=lambda state: state[:2],
        )
        states = []
        for state in reached:
            if state[0] + ahead[number + 1] <= room and (not states or state[1] < states[-1][1]):
                states.append(state)
        if len(states) > _FINEST:  # of those that take about as much, go on with the fastest; the leanest stays
            cell = max(1, (states[-1][0] - states[0][0]) // _FINEST)
            cells = {(state[0] - states[0][0]) // cell: state for state in states[1:]}
            states = [states[0], *cells.values()]
    _, time, chosen = min(states, key=lambda state: (state[1], state[0]))
    return time, list(chosen)
