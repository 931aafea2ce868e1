"""The choice for a budget, with integers: against all mixes there are."""

from __future__ import annotations

import itertools
import random

import pytest

from lit_zero.activation.plan import KEEP, OFFLOAD, RECOMPUTE, Facts, cheapest, every
from lit_zero.core.errors import ConfigError

BLOCK = Facts(kept=100, inputs=10, small=2, moved=98, forward=1000)


def cost(facts: list[Facts], choices: tuple[str, ...], alive: int, link: int, overlaps: bool) -> tuple[int, int]:
    """Return bytes and nanoseconds of a mix, in another way than the code does."""
    held = time = working = 0
    for each, choice in zip(facts, choices, strict=True):
        if choice == KEEP:
            held += each.kept * alive
            continue
        working = max(working, each.kept)
        if choice == RECOMPUTE:
            held, time = held + each.inputs * alive, time + each.forward
        else:
            copy = each.moved * 10**9 // link
            out, back = (max(0, copy - each.forward), max(0, copy - 2 * each.forward)) if overlaps else (copy, copy)
            held, time = held + each.small * alive, time + max(1, out + back)
    return held + working, time


@pytest.mark.parametrize("overlaps", [False, True])
def test_nothing_is_better(overlaps: bool) -> None:
    dice = random.Random(0)
    for _ in range(60):
        facts = [
            Facts(
                dice.randint(20, 200),
                dice.randint(1, 20),
                dice.randint(0, 9),
                dice.randint(1, 200),
                dice.randint(1, 99),
            )
            for _ in range(dice.randint(1, 5))
        ]
        alive, link, budget = dice.randint(1, 3), dice.randint(1, 9) * 10**9, dice.randint(50, 900)
        mixes = [
            cost(facts, mix, alive, link, overlaps)
            for mix in itertools.product((KEEP, RECOMPUTE, OFFLOAD), repeat=len(facts))
        ]
        fitting = [time for held, time in mixes if held <= budget]
        if not fitting:
            least = min(held for held, _ in mixes)
            with pytest.raises(ConfigError, match=f"is below the least possible, {least} bytes"):
                cheapest(facts, budget, alive, link, overlaps)
            continue
        held, time = cost(facts, tuple(cheapest(facts, budget, alive, link, overlaps)), alive, link, overlaps)
        assert held <= budget and time == min(fitting)


def test_room_for_all_keeps_all() -> None:
    assert cheapest([BLOCK] * 4, 400, 1, 10**9, False) == [KEEP] * 4


def test_no_host_memory_no_offload() -> None:
    assert set(cheapest([BLOCK] * 4, 330, 1, 0, True)) == {KEEP, RECOMPUTE}
    assert set(cheapest([BLOCK] * 4, 310, 1, 10**12, True)) == {KEEP, OFFLOAD}


def test_what_is_on_its_way_counts() -> None:
    """Room for 2 bytes of each block, and for all that one saves, and for what is on its way."""
    assert set(cheapest([BLOCK] * 4, 4 * 2 + 100 + 30, 1, 10**12, True, flight=30)) == {OFFLOAD}
    assert set(cheapest([BLOCK] * 4, 4 * 10 + 100, 1, 10**12, True, flight=33)) == {RECOMPUTE}
    assert set(cheapest([BLOCK] * 4, 4 * 2 + 100 + 4 * 98, 1, 10**12, True, flight=1 << 28)) == {KEEP}
    with pytest.raises(ConfigError, match="is below the least possible, 138 bytes"):
        cheapest([BLOCK] * 4, 137, 1, 10**12, True, flight=30)


def test_the_least_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        cheapest([BLOCK] * 4, 139, 1, 0, False)
    assert str(caught.value) == (
        "activation.budget=139 is below the least possible, 140 bytes: so much the 4 blocks of this rank hold with 1 "
        "micro-batch at a time if each does what takes least memory. Raise activation.budget, or use smaller batches."
    )
    assert cheapest([BLOCK] * 4, 140, 1, 0, False) == [RECOMPUTE] * 4


def test_many_different_blocks_are_quick_and_fit() -> None:
    dice = random.Random(1)
    facts = [
        Facts(kept, kept // 17, kept // 50, kept, kept // 3) for kept in (dice.randint(10**7, 10**9) for _ in range(96))
    ]
    budget = sum(each.kept for each in facts) // 2
    found = {}
    for link in (0, 10**10):
        choices = cheapest(facts, budget, 1, link, True)
        held, found[link] = cost(facts, tuple(choices), 1, link or 1, True)
        assert held <= budget and len(set(choices)) == 2
    # Of what is dropped a block gives 16 bytes in 17, for a third of a nanosecond each.
    most = sum(each.kept for each in facts) - budget + max(each.kept for each in facts)
    assert most / 3 < found[0] < 1.02 * most / 3 * 17 / 16
    assert found[10**10] < 96, "copies are hidden behind the computation, and cost next to nothing"


def test_every() -> None:
    assert every(2, 5) == [RECOMPUTE, KEEP, RECOMPUTE, KEEP, RECOMPUTE]
