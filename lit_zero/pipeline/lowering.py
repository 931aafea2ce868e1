"""From what the ranks compute to all that they do: sends and receives among the actions.

[Note: how messages travel]
A message crosses from rank to rank where neighbouring stages live on different ranks; the two stages in the middle of a
V share one, and nothing is sent. An executor walks a rank's list and does what each step says:

* ``A2.5>3``: start an asynchronous send. It stands right behind the action that makes the message. The tensor must live
  until the send is over; nobody waits for that before the list ends.
* ``A2.5<1``: post an asynchronous receive. It stands ``ahead`` actions before the one that needs the message, so that
  the transfer runs beside computation; with ``ahead=0``, just before it.
* ``A2.5?1``: wait for that receive, right before the action that needs it.

NCCL has no tags: between two ranks the first receive that is posted gets the first message that is sent. So the order
of receives from a rank is taken from that rank's order of sends, and where they would be needed in another order the
earlier message is posted earlier. And NCCL runs what shares a communicator one after the other: a receive that is
posted ahead would hold up every send behind it. So each direction between two ranks needs a communicator of its own;
then no step but a wait ever blocks. gloo matches by tag and needs neither.

What is proven complete and free of deadlock may be done earlier or later where that blocks nobody: ``runner`` asks for
all messages of a step at its beginning, in this order, ``transport`` posts as many as have room, and an activation is
waited for inside the action that needs it.
"""

from __future__ import annotations

from collections import defaultdict

from lit_zero.pipeline.actions import POST, SEND, WAIT, Message, Step, Transfer, given, taken
from lit_zero.pipeline.schedule import Schedule

Steps = tuple[Step, ...]  # of one rank


def lower(schedule: Schedule, ahead: int = 1) -> tuple[Steps, ...]:
    """Return all that every rank does, in order.

    Args:
        schedule: a complete one; see ``checking``.
        ahead: how many actions before the one that needs a message its receive is posted. Each posted receive holds a
            buffer.
    """
    stages, placement = schedule.stages, schedule.placement
    needed: dict[Message, int] = {}  # the place in its rank's order where a message is needed
    sent: dict[tuple[int, int], list[Message]] = defaultdict(list)  # (from, to): in the order of sends
    for rank, order in enumerate(schedule.orders):
        for place, action in enumerate(order):
            message = taken(action, stages)
            if message is not None:
                needed[message] = place
            made = given(action, stages)
            if made is not None and crosses(made, placement):
                sent[rank, placement[made.target]].append(made)

    posts: dict[tuple[int, int], list[Transfer]] = defaultdict(list)  # (rank, place): before which action
    for (source, rank), messages in sent.items():
        places = [max(0, needed[message] - ahead) for message in messages]
        for k in reversed(range(len(places) - 1)):
            places[k] = min(places[k], places[k + 1])
        for place, message in zip(places, messages, strict=True):
            posts[rank, place].append(Transfer(POST, message, source))

    lists = []
    for rank, order in enumerate(schedule.orders):
        steps: list[Step] = []
        for place, action in enumerate(order):
            steps += posts[rank, place]
            message, made = taken(action, stages), given(action, stages)
            if message is not None and crosses(message, placement):
                steps.append(Transfer(WAIT, message, placement[message.stage]))
            steps.append(action)
            if made is not None and crosses(made, placement):
                steps.append(Transfer(SEND, made, placement[made.target]))
        lists.append(tuple(steps))
    return tuple(lists)


def crosses(message: Message, placement: tuple[int, ...]) -> bool:
    """Return whether a message goes from one rank to another.

    Args:
        message: what one stage makes for its neighbour.
        placement: the rank of every stage.
    """
    return placement[message.stage] != placement[message.target]
