"""How long a schedule takes, by simulation: each rank works through its list and waits where it must."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_zero.core.errors import ConfigError, check_choice
from lit_zero.pipeline.actions import Compute, Message, given, taken
from lit_zero.pipeline.checking import check
from lit_zero.pipeline.schedule import Schedule
from lit_zero.pipeline.timeline import Span, Timeline


@dataclass(frozen=True)
class Costs:
    """How long an action takes; in any unit of time.

    Attributes:
        F: the forward of a stage.
        I: the backward for its input.
        W: the backward for its weights.
        B: both; by default the sum.
        latency: from the end of an action to the arrival of its message on another rank.
        scale: a factor for every stage; by default all take the same time.
    """

    F: float = 1.0
    I: float = 1.0  # noqa: E741 - it is the action's name
    W: float = 1.0
    B: float = math.nan
    latency: float = 0.0
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if math.isnan(self.B):
            object.__setattr__(self, "B", self.I + self.W)
        for key in ("F", "I", "W", "B"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"costs: {key}={getattr(self, key)} must be a number above 0.")
        if not 0 <= self.latency < math.inf:
            raise ConfigError(f"costs: latency={self.latency} must be a number, 0 or more.")

    def of(self, action: Compute) -> float:
        """Return how long an action takes.

        Args:
            action: what is computed.
        """
        time: float = getattr(self, action.kind)
        return time * self.scale[action.stage] if self.scale else time

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Return the costs that a text such as ``F=1,B=2`` or ``F=1,I=1,W=0.8,latency=0.1`` gives.

        What is not named costs 1, and ``B`` as much as ``I`` and ``W``. With ``B`` alone, they are half of it each.

        Args:
            text: settings with commas between them.

        Raises:
            ConfigError: naming the setting that is unknown or is no number.
        """
        values: dict[str, float] = {}
        for setting in text.split(","):
            key, _, value = setting.strip().partition("=")
            check_choice("costs", key, ("F", "B", "I", "W", "latency"))
            try:
                values[key] = float(value)
            except ValueError:
                raise ConfigError(f"costs: {key}={value!r} is not a number. Write for example F=1,I=1,W=1.") from None
        if "B" in values and not {"I", "W"} & values.keys():
            values["I"] = values["W"] = values["B"] / 2
        named = ("F", "I", "W", "B", "latency")
        return cls(*(values.get(key, getattr(cls, key)) for key in named))


EQUAL = Costs()


def simulate(schedule: Schedule, costs: Costs = EQUAL) -> Timeline:
    """Return when every action starts and ends if each rank runs its list as early as it can.

    Args:
        schedule: what to run.
        costs: how long things take.

    Raises:
        ConfigError: if the schedule is broken; see ``checking.check``.
    """
    arrived: dict[Message, tuple[float, int]] = {}  # when it was made, and on which rank
    clocks, at = [0.0] * schedule.ranks, [0] * schedule.ranks
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while at[rank] < len(order):
                action, start = order[at[rank]], clocks[rank]
                message = taken(action, schedule.stages)
                if message is not None:
                    if message not in arrived:
                        break
                    made, maker = arrived[message]
                    start = max(start, made if maker == rank else made + costs.latency)
                end = start + costs.of(action)
                made_now = given(action, schedule.stages)
                if made_now is not None:
                    arrived[made_now] = (end, rank)
                spans.append(Span(rank, action, start, end))
                clocks[rank], at[rank], moved = end, at[rank] + 1, True
    if len(spans) < sum(map(len, schedule.orders)):
        check(schedule)  # says which rank waits for what
    return Timeline.of(spans)
