"""The vocabulary of a pipeline: what a rank computes, and what ranks tell one another. Integers only, no tensor.

Every word prints in a few letters and parses back:

========  =======================================================================================================
``F2.5``  run stage 2 forward on micro-batch 5
``B2.5``  run stage 2 backward on micro-batch 5: gradients of its input and of its weights
``I2.5``  the first half of ``B2.5``: the gradient of the stage's input, which the stage before waits for
``W2.5``  the second half of ``B2.5``: the gradients of the weights, which nobody waits for
``A2.5``  a message: the activation that ``F2.5`` makes, for stage 3
``G2.5``  a message: the gradient that ``B2.5`` or ``I2.5`` makes, for stage 1
``A2.5>3``  start to send that message to rank 3, and go on
``A2.5<1``  offer a buffer for that message from rank 1, and go on
``A2.5?1``  wait until that message from rank 1 is there
========  =======================================================================================================

Source of the split backward: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 2 (there B and W).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lit_zero.core.errors import ConfigError

FORWARD, BACKWARD, INPUTS, WEIGHTS = "F", "B", "I", "W"
ACTIVATION, GRADIENT = "A", "G"
SEND, POST, WAIT = ">", "<", "?"

_WORD = re.compile(r"([FBIWAG])(\d+)\.(\d+)(?:([<>?])(\d+))?")


class Compute(NamedTuple):
    """Something to compute.

    Attributes:
        kind: ``F``, ``B``, ``I`` or ``W``.
        stage: number of the stage, 0 at the model's input.
        micro_batch: number of the micro-batch.
    """

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro_batch}"


class Message(NamedTuple):
    """What one stage hands to its neighbour, named after the stage that makes it.

    Attributes:
        kind: ``A``, the output of a stage, for the next one, or ``G``, the gradient of its input, for the one before.
        stage: the stage that makes it.
        micro_batch: number of the micro-batch.
    """

    kind: str
    stage: int
    micro_batch: int

    @property
    def target(self) -> int:
        """The stage that needs it."""
        return self.stage + 1 if self.kind == ACTIVATION else self.stage - 1

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro_batch}"


class Transfer(NamedTuple):
    """What a rank does about a message from or for another rank.

    Attributes:
        verb: ``>`` start to send, ``<`` offer a buffer to receive into, ``?`` wait until it has come.
        message: what is sent.
        peer: the other rank.
    """

    verb: str
    message: Message
    peer: int

    def __str__(self) -> str:
        return f"{self.message}{self.verb}{self.peer}"


Step = Compute | Transfer


def parse(word: str) -> Step:
    """Return what a word such as ``F2.5`` or ``A2.5>3`` says.

    Args:
        word: one word, without spaces.

    Raises:
        ConfigError: if it is not of the vocabulary.
    """
    found = _WORD.fullmatch(word)
    if found:
        kind, stage, micro_batch, verb, peer = found.groups()
        if (kind in (ACTIVATION, GRADIENT)) and verb:
            return Transfer(verb, Message(kind, int(stage), int(micro_batch)), int(peer))
        if kind not in (ACTIVATION, GRADIENT) and not verb:
            return Compute(kind, int(stage), int(micro_batch))
    raise ConfigError(
        f"{word!r} is no action of a pipeline schedule. Write F, B, I or W, the stage, a dot and the micro-batch, for "
        "example F2.5; or a message (A or G), what to do with it (> < ?) and the other rank, for example A2.5>3."
    )


def taken(action: Compute, stages: int) -> Message | None:
    """Return the message that an action cannot start without; ``None`` if it needs none of a neighbour's.

    Args:
        action: what is computed.
        stages: how many there are.
    """
    if action.kind == FORWARD and action.stage > 0:
        return Message(ACTIVATION, action.stage - 1, action.micro_batch)
    if action.kind in (BACKWARD, INPUTS) and action.stage < stages - 1:
        return Message(GRADIENT, action.stage + 1, action.micro_batch)
    return None


def given(action: Compute, stages: int) -> Message | None:
    """Return the message that an action makes for a neighbour; ``None`` at the ends of the pipeline and for ``W``.

    Args:
        action: what is computed.
        stages: how many there are.
    """
    if action.kind == FORWARD and action.stage < stages - 1:
        return Message(ACTIVATION, action.stage, action.micro_batch)
    if action.kind in (BACKWARD, INPUTS) and action.stage > 0:
        return Message(GRADIENT, action.stage, action.micro_batch)
    return None


def before(action: Compute) -> Compute | None:
    """Return the action of the same stage and micro-batch that must have run on this rank; ``None`` for a forward.

    Args:
        action: what is computed.
    """
    kinds = {BACKWARD: FORWARD, INPUTS: FORWARD, WEIGHTS: INPUTS}
    return action._replace(kind=kinds[action.kind]) if action.kind in kinds else None
