"""Broken schedules are found, and the cell is named."""

from __future__ import annotations

import itertools
import random

import pytest

from lit_zero.core.errors import ConfigError
from lit_zero.pipeline.actions import Compute, parse
from lit_zero.pipeline.checking import check, check_runs
from lit_zero.pipeline.lowering import lower
from lit_zero.pipeline.schedule import Schedule
from lit_zero.pipeline.schedules import RECIPES, build
from lit_zero.pipeline.timing import simulate

HEAD = "mine: 2 micro-batches, stages on ranks 0 1\n"
SPLIT = "mine: 1 micro-batch, stages on ranks 0\n"


def broken(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(Schedule.parse(text))
    assert str(caught.value).startswith("The pipeline schedule 'mine' cannot run: ")
    return str(caught.value).removeprefix("The pipeline schedule 'mine' cannot run: ")


def test_what_is_right_passes():
    check(Schedule.parse(HEAD + "rank 0: F0.0 F0.1 B0.0 I0.1 W0.1\nrank 1: F1.0 F1.1 I1.0 W1.0 B1.1"))
    check(Schedule.parse("mine: 1 micro-batch, stages on ranks 0 0, forward only\nrank 0: F0.0 F1.0"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            HEAD + "rank 0: F0.0 F0.1 B0.0\nrank 1: F1.0 B1.0 F1.1 B1.1",
            "rank 0 runs F for stage 0 and micro-batch 1, which needs F B or F I W.",
        ),
        (
            HEAD + "rank 0: F0.0 B0.0\nrank 1: F1.0 B1.0 F1.1 B1.1",
            "rank 0 runs nothing for stage 0 and micro-batch 1, which needs F B or F I W.",
        ),
        (SPLIT + "rank 0: F0.0 I0.0", "rank 0 runs F I for stage 0 and micro-batch 0, which needs F B or F I W."),
        (
            HEAD + "rank 0: F0.0 F0.0 F0.1 B0.0 B0.1\nrank 1: F1.0 B1.0 F1.1 B1.1",
            "rank 0, place 1, F0.0 stands there a second time.",
        ),
        (
            HEAD + "rank 0: F0.0 F0.1 B0.0 B0.1 F1.1\nrank 1: F1.0 B1.0 F1.1 B1.1",
            "rank 0, place 4, F1.1 stands on the wrong rank: stage 1 lives on rank 1.",
        ),
        (
            HEAD + "rank 0: F0.0 F0.1 B0.0 B0.1\nrank 1: B1.0 F1.0 F1.1 B1.1",
            "rank 1, place 0, B1.0 stands before F1.0, which it needs.",
        ),
        (SPLIT + "rank 0: F0.0 W0.0 I0.0", "rank 0, place 1, W0.0 stands before I0.0, which it needs."),
        (SPLIT + "rank 0: F0.0 I0.0 B0.0", "rank 0, place 2, B0.0 computes a second time what I0.0 has computed."),
        (SPLIT + "rank 0: F0.0 B0.0 I0.0", "rank 0, place 2, I0.0 computes a second time what B0.0 has computed."),
        (SPLIT + "rank 0: F1.0", "rank 0, place 0, F1.0 names stage 1, but the stages are 0 to 0."),
        (SPLIT + "rank 0: F0.3", "rank 0, place 0, F0.3 names micro-batch 3, but they are 0 to 0."),
        (
            "mine: 1 micro-batch, stages on ranks 0, forward only\nrank 0: F0.0 B0.0",
            "rank 0, place 1, B0.0 is a backward in a schedule that is forward only.",
        ),
        (
            "mine: 1 micro-batch, stages on ranks 0 2\nrank 0: F0.0 B0.0\nrank 1:\nrank 2: F1.0 B1.0",
            "stages are placed on ranks [0, 2], but there are lists for 3 ranks, and each must hold a stage.",
        ),
    ],
)
def test_what_is_incomplete_is_named(text, words):
    assert broken(text) == words


def test_a_circle_of_waiting_ranks_is_named():
    text = HEAD + "rank 0: F0.0 B0.0 F0.1 B0.1\nrank 1: F1.0 F1.1 B1.0 B1.1"
    words = (
        "deadlock: rank 0, place 1, B0.0 waits for G1.0 of rank 1, place 2, B1.0; "
        "rank 1, place 1, F1.1 waits for A0.1 of rank 0, place 2, F0.1."
    )
    assert broken(text) == words
    with pytest.raises(ConfigError, match="deadlock: rank 0, place 1"):
        simulate(Schedule.parse(text))


def test_a_rank_that_waits_for_itself_is_named():
    text = "mine: 1 micro-batch, stages on ranks 0 0\nrank 0: F1.0 F0.0 B1.0 B0.0"
    assert broken(text) == "deadlock: rank 0, place 0, F1.0 waits for A0.0 of rank 0, place 1, F0.0."


@pytest.mark.parametrize("name", RECIPES)
def test_any_action_left_out_or_doubled_or_moved_to_another_rank_is_found(name):
    schedule = build(name, 4, 3, ranks=4 // (RECIPES[name].rounds or 2))
    for rank, order in enumerate(schedule.orders):
        for place, action in enumerate(order):
            without = order[:place] + order[place + 1 :]
            elsewhere = list(schedule.orders)
            elsewhere[rank], other = without, (rank + 1) % schedule.ranks
            elsewhere[other] = (*elsewhere[other], action)
            for orders in (
                [*schedule.orders[:rank], without, *schedule.orders[rank + 1 :]],
                [*schedule.orders[:rank], (*order, action), *schedule.orders[rank + 1 :]],
                elsewhere,
            ):
                with pytest.raises(ConfigError, match=rf"{action}|stage {action.stage} and micro-batch"):
                    check(Schedule("x", schedule.placement, 3, tuple(map(tuple, orders)), schedule.backward))


def has_a_way_through(schedule: Schedule) -> bool:
    """Find out by a second method, from the sentences of what a stage needs: take away what is ready until all is."""
    done: set[Compute] = set()
    lists = [list(order) for order in schedule.orders]

    def ready(action: Compute) -> bool:
        kind, stage, m = action
        if kind == "F":
            return stage == 0 or Compute("F", stage - 1, m) in done
        if kind == "W":
            return Compute("I", stage, m) in done
        last = stage == schedule.stages - 1
        return Compute("F", stage, m) in done and (last or bool({Compute(k, stage + 1, m) for k in "BI"} & done))

    while any(lists):
        free = [order for order in lists if order and ready(order[0])]
        if not free:
            return False
        for order in free:
            done.add(order.pop(0))
    return True


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "forward"])
def test_swapped_actions_are_refused_exactly_where_nothing_gets_through(name):
    schedule = build(name, 4, 3, ranks=4 // (RECIPES[name].rounds or 2))
    refused = passed = 0
    for rank, order in enumerate(schedule.orders):
        for a, b in itertools.combinations(range(len(order)), 2):
            changed = list(order)
            changed[a], changed[b] = changed[b], changed[a]
            orders = (*schedule.orders[:rank], tuple(changed), *schedule.orders[rank + 1 :])
            swapped = Schedule(name, schedule.placement, 3, orders)
            if has_a_way_through(swapped):
                passed += 1
                check(swapped)
            else:
                refused += 1
                with pytest.raises(ConfigError, match="deadlock: rank|stands before"):
                    check(swapped)
    assert refused and passed


def test_shuffled_orders_are_refused_exactly_where_nothing_gets_through():
    dice, seen = random.Random(0), set()
    for _ in range(300):
        schedule = build(dice.choice(["gpipe", "zero_bubble", "zbv"]), 4, 2)
        orders = [list(order) for order in schedule.orders]
        for _ in range(dice.randrange(4)):
            order = dice.choice(orders)
            order.insert(dice.randrange(len(order)), order.pop(dice.randrange(len(order))))
        shuffled = Schedule("x", schedule.placement, 2, tuple(map(tuple, orders)))
        fine = has_a_way_through(shuffled)
        seen.add(fine)
        if fine:
            check(shuffled)
        else:
            with pytest.raises(ConfigError, match="cannot run: "):
                check(shuffled)
    assert seen == {True, False}


# All that two ranks do for a stage each and two micro-batches, forward only, the receives posted one action ahead.
FORWARD = Schedule.parse("x: 2 micro-batches, stages on ranks 0 1, forward only\nrank 0: F0.0 F0.1\nrank 1: F1.0 F1.1")
SENDER = "F0.0 A0.0>1 F0.1 A0.1>1"
RECEIVER = "A0.0<0 A0.1<0 A0.0?0 F1.0 A0.1?0 F1.1"


@pytest.mark.parametrize(
    ("sender", "receiver", "words"),
    [
        (
            SENDER,
            "A0.1<0 A0.0<0 A0.0?0 F1.0 A0.1?0 F1.1",
            "rank 1, step 0, A0.1<0 is number 1 on its channel, but there the other rank has A0.0.",
        ),
        (
            SENDER,
            "A0.0<0 A0.0?0 F1.0 A0.1?0 A0.1<0 F1.1",
            "rank 1, step 3, A0.1?0 waits for A0.1, for which no receive is posted before it.",
        ),
        (
            SENDER,
            "A0.0<0 A0.1<0 F1.0 A0.0?0 A0.1?0 F1.1",
            "rank 1, step 2, F1.0 starts without A0.0, which no step before it waits for.",
        ),
        (
            "A0.0>1 F0.0 F0.1 A0.1>1",
            RECEIVER,
            "rank 0, step 0, A0.0>1 sends A0.0, which this rank has not made yet.",
        ),
        (
            "F0.0 A0.0>1 F0.1",
            RECEIVER,
            "deadlock: rank 1, place 1, F1.1 waits for A0.1 of rank 0, place 1, F0.1.",
        ),
        (
            SENDER + " A0.1>1",
            RECEIVER,
            "A0.1 from rank 0 to rank 1 is sent 2 times and received 1 time.",
        ),
        (
            SENDER,
            RECEIVER + " A0.1<0",
            "A0.1 from rank 0 to rank 1 is sent 1 time and received 2 times.",
        ),
        (
            SENDER,
            RECEIVER + " A0.2<0",
            "rank 1, step 6, A0.2<0 is no message that rank 0 and this rank exchange that way.",
        ),
        (
            SENDER,
            RECEIVER + " A0.1>0",
            "rank 1, step 6, A0.1>0 is no message that rank 0 and this rank exchange that way.",
        ),
        (
            SENDER + " G1.0<1",
            RECEIVER,
            "rank 0, step 4, G1.0<1 is no message that rank 1 and this rank exchange that way.",
        ),
        ("F0.1 F0.0", RECEIVER, "rank 0 does not compute what the schedule lists for it, in that order."),
    ],
)
def test_lists_that_break_a_rule_are_named(sender, receiver, words):
    check_runs(FORWARD, [tuple(map(parse, each.split())) for each in (SENDER, RECEIVER)])
    with pytest.raises(ConfigError) as caught:
        check_runs(FORWARD, [tuple(map(parse, each.split())) for each in (sender, receiver)])
    assert str(caught.value) == f"The pipeline schedule 'x' cannot run: {words}"


@pytest.mark.parametrize("ahead", [0, 1, 2, 5, 1000])
def test_receives_may_be_posted_any_number_of_actions_ahead(ahead):
    for name in RECIPES:
        for micro_batches in (1, 2, 7):
            schedule = build(name, 6, micro_batches, ranks=6 // (RECIPES[name].rounds or 3))
            check(schedule, lower(schedule, ahead))
