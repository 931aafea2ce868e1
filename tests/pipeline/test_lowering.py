"""Sends and receives among the actions."""

from __future__ import annotations

import itertools

from lit_zero.pipeline.actions import Compute, Transfer
from lit_zero.pipeline.lowering import lower
from lit_zero.pipeline.schedule import Schedule, words
from lit_zero.pipeline.schedules import RECIPES, build


def text(schedule: Schedule, ahead: int) -> list[str]:
    return [words(steps) for steps in lower(schedule, ahead)]


def test_1f1b_on_two_ranks():
    schedule = build("1f1b", 2, 2)
    assert text(schedule, 0) == [
        "F0.0 A0.0>1 F0.1 A0.1>1 G1.0<1 G1.0?1 B0.0 G1.1<1 G1.1?1 B0.1",
        "A0.0<0 A0.0?0 F1.0 B1.0 G1.0>0 A0.1<0 A0.1?0 F1.1 B1.1 G1.1>0",
    ]
    assert text(schedule, 1) == [
        "F0.0 A0.0>1 G1.0<1 F0.1 A0.1>1 G1.1<1 G1.0?1 B0.0 G1.1?1 B0.1",
        "A0.0<0 A0.0?0 F1.0 A0.1<0 B1.0 G1.0>0 A0.1?0 F1.1 B1.1 G1.1>0",
    ]


def test_the_turn_of_a_v_sends_nothing():
    assert text(build("zbv", 2, 1), 1) == ["F0.0 F1.0 I1.0 W1.0 I0.0 W0.0"]
    first, last = text(build("zbv", 4, 1), 1)
    assert last == "A0.0<0 A0.0?0 F1.0 G3.0<0 F2.0 A2.0>0 G3.0?0 I2.0 I1.0 G1.0>0 W2.0 W1.0"
    assert first == "A2.0<1 F0.0 A0.0>1 A2.0?1 F3.0 I3.0 G3.0>1 G1.0<1 W3.0 G1.0?1 I0.0 W0.0"


def test_a_receive_is_posted_early_where_the_sender_sends_early():
    """Rank 0 sends A0.1 before A0.0, rank 1 needs them the other way round: A0.1 is posted first all the same."""
    schedule = Schedule.parse(
        "x: 2 micro-batches, stages on ranks 0 1, forward only\nrank 0: F0.1 F0.0\nrank 1: F1.0 F1.1"
    )
    assert text(schedule, 0)[1] == "A0.1<0 A0.0<0 A0.0?0 F1.0 A0.1?0 F1.1"


def test_every_message_is_sent_posted_and_waited_for_once_and_in_one_order():
    for name, ahead, micro_batches in itertools.product(RECIPES, (0, 1, 2), (1, 4, 9)):
        schedule = build(name, 6, micro_batches, ranks=6 // (RECIPES[name].rounds or 2))
        lists = lower(schedule, ahead)
        placement = schedule.placement
        crossings = sum(a != b for a, b in itertools.pairwise(placement))
        for verb in "><?":
            found = [
                step.message for steps in lists for step in steps if isinstance(step, Transfer) and step.verb == verb
            ]
            assert len(found) == len(set(found)) == crossings * micro_batches * (1 + schedule.backward)
        for source, rank in itertools.permutations(range(schedule.ranks), 2):
            sent = [step.message for step in lists[source] if is_transfer(step, ">", rank)]
            posted = [step.message for step in lists[rank] if is_transfer(step, "<", source)]
            assert sent == posted


def is_transfer(step: object, verb: str, peer: int) -> bool:
    return isinstance(step, Transfer) and (step.verb, step.peer) == (verb, peer)


def test_a_wait_stands_before_its_action_and_a_send_behind_it():
    for name in RECIPES:
        for steps in lower(build(name, 6, 5, ranks=6 // (RECIPES[name].rounds or 2)), 2):
            for step, after in itertools.pairwise(steps):
                if isinstance(step, Transfer) and step.verb == "?":
                    assert isinstance(after, Compute)
                    assert after.stage == step.message.target
                if isinstance(after, Transfer) and after.verb == ">":
                    assert isinstance(step, Compute)
                    assert step.stage == after.message.stage
