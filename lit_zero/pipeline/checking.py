"""Proof that a schedule is right: everything is computed once, where and when it can be, and nobody waits for ever."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from lit_zero.core.errors import ConfigError
from lit_zero.pipeline.actions import (
    ACTIVATION,
    BACKWARD,
    FORWARD,
    INPUTS,
    POST,
    SEND,
    WEIGHTS,
    Compute,
    Message,
    Transfer,
    before,
    given,
    taken,
)
from lit_zero.pipeline.lowering import Steps, crosses, lower
from lit_zero.pipeline.schedule import Schedule

Pair = tuple[int, int]  # of ranks: from, to


def check(schedule: Schedule, lists: Sequence[Steps] | None = None) -> None:
    """Raise unless a schedule is complete and runs to its end.

    Args:
        schedule: what to check.
        lists: all that the ranks do, if not what ``lower`` makes of the schedule.

    Raises:
        ConfigError: naming the first cell that is wrong: its rank, its place in the rank's order (from 0), its action,
            and what it waits for.
    """
    check_complete(schedule)
    check_runs(schedule, lower(schedule) if lists is None else lists)


def check_complete(schedule: Schedule) -> None:
    """Raise unless each stage runs each micro-batch once, forward then backward, on its own rank, and nothing else.

    Args:
        schedule: what to check.

    Raises:
        ConfigError: naming the cell.
    """
    if sorted(set(schedule.placement)) != list(range(schedule.ranks)):
        raise _broken(
            schedule,
            f"stages are placed on ranks {sorted(set(schedule.placement))}, but there are lists for {schedule.ranks} "
            "ranks, and each must hold a stage",
        )
    seen: set[Compute] = set()
    for rank, order in enumerate(schedule.orders):
        for place, action in enumerate(order):
            wrong = _wrong_cell(schedule, rank, action, seen)
            if wrong:
                raise _broken(schedule, f"{_cell(rank, place, action)} {wrong}")
            seen.add(action)
    for stage in range(schedule.stages):
        for micro_batch in range(schedule.micro_batches):
            kinds = "".join(kind for kind in "FBIW" if Compute(kind, stage, micro_batch) in seen)
            expected = ("FB", "FIW") if schedule.backward else ("F",)
            if kinds not in expected:
                raise _broken(
                    schedule,
                    f"rank {schedule.placement[stage]} runs {' '.join(kinds) or 'nothing'} for stage {stage} and "
                    f"micro-batch {micro_batch}, which needs {' or '.join(' '.join(each) for each in expected)}",
                )


def _wrong_cell(schedule: Schedule, rank: int, action: Compute, seen: set[Compute]) -> str:
    """Return what is wrong with an action where it stands, nothing if it is right."""
    kind, stage, micro_batch = action
    if stage >= schedule.stages:
        return f"names stage {stage}, but the stages are 0 to {schedule.stages - 1}"
    if micro_batch >= schedule.micro_batches:
        return f"names micro-batch {micro_batch}, but they are 0 to {schedule.micro_batches - 1}"
    if schedule.placement[stage] != rank:
        return f"stands on the wrong rank: stage {stage} lives on rank {schedule.placement[stage]}"
    if action in seen:
        return "stands there a second time"
    if kind != FORWARD and not schedule.backward:
        return "is a backward in a schedule that is forward only"
    other = {BACKWARD: (INPUTS, WEIGHTS), INPUTS: (BACKWARD,), WEIGHTS: (BACKWARD,)}.get(kind, ())
    for twice in (action._replace(kind=each) for each in other):
        if twice in seen:
            return f"computes a second time what {twice} has computed"
    earlier = before(action)
    if earlier is not None and earlier not in seen:
        return f"stands before {earlier}, which it needs"
    return ""


def check_runs(schedule: Schedule, lists: Sequence[Steps]) -> None:
    """Raise unless the lists can be run to their end, by ranks whose sends and receives never block and waits do.

    Between two ranks the first receive posted meets the first send, and so on, as on NCCL.

    Args:
        schedule: a complete one.
        lists: of all ranks; computations must be those of the schedule, in its order.

    Raises:
        ConfigError: naming the step of the list (from 0) that breaks a rule, or all cells of the schedule that wait
            for ever, and for what.
    """
    for rank, (order, steps) in enumerate(zip(schedule.orders, lists, strict=True)):
        if tuple(step for step in steps if isinstance(step, Compute)) != order:
            raise _broken(schedule, f"rank {rank} does not compute what the schedule lists for it, in that order")
    _Run(schedule, lists).to_the_end()


class _Run:
    """Ranks that walk through their lists, each until it must wait."""

    def __init__(self, schedule: Schedule, lists: Sequence[Steps]) -> None:
        self.schedule, self.lists = schedule, lists
        self.at = [0] * schedule.ranks
        self.here: list[set[Message]] = [set() for _ in lists]  # what a rank has made or has waited for
        self.sent: dict[Pair, list[Message]] = defaultdict(list)
        self.posted: dict[Pair, list[Message]] = defaultdict(list)

    def to_the_end(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank, steps in enumerate(self.lists):
                while self.at[rank] < len(steps) and self.step(rank):
                    self.at[rank] += 1
                    moved = True
        stuck = [rank for rank, steps in enumerate(self.lists) if self.at[rank] < len(steps)]
        if stuck:
            raise _broken(self.schedule, "deadlock: " + "; ".join(self.plea(rank) for rank in stuck))
        for source, rank in self.sent.keys() | self.posted.keys():
            sent, posted = Counter(self.sent[source, rank]), Counter(self.posted[source, rank])
            for message in sent | posted:
                if sent[message] != posted[message]:
                    raise _broken(
                        self.schedule,
                        f"{message} from rank {source} to rank {rank} is sent {_times(sent[message])} and received "
                        f"{_times(posted[message])}",
                    )

    def step(self, rank: int) -> bool:
        """Do the next step of a rank; return whether it could be done now."""
        step = self.lists[rank][self.at[rank]]
        if isinstance(step, Compute):
            message, made = taken(step, self.schedule.stages), given(step, self.schedule.stages)
            if message is not None and message not in self.here[rank]:
                if crosses(message, self.schedule.placement):
                    raise self.broken(rank, f"starts without {message}, which no step before it waits for")
                return False
            if made is not None:
                self.here[rank].add(made)
            return True
        return self.transfer(rank, step)

    def transfer(self, rank: int, step: Transfer) -> bool:
        verb, message, peer = step
        if not self.exists(message, *((rank, peer) if verb == SEND else (peer, rank))):
            raise self.broken(rank, f"is no message that rank {peer} and this rank exchange that way")
        if verb == SEND:
            if message not in self.here[rank]:
                raise self.broken(rank, f"sends {message}, which this rank has not made yet")
            self.meet(rank, self.sent[rank, peer], self.posted[rank, peer], message)
            return True
        pair = (peer, rank)
        if verb == POST:
            self.meet(rank, self.posted[pair], self.sent[pair], message)
            return True
        if message not in self.posted[pair]:
            raise self.broken(rank, f"waits for {message}, for which no receive is posted before it")
        if message not in self.sent[pair]:
            return False
        self.here[rank].add(message)
        return True

    def exists(self, message: Message, source: int, target: int) -> bool:
        stages = range(self.schedule.stages)
        known = (
            message.stage in stages and message.target in stages and message.micro_batch < self.schedule.micro_batches
        )
        ranks = [self.schedule.placement[stage] for stage in (message.stage, message.target)] if known else []
        return ranks == [source, target] and (message.kind == ACTIVATION or self.schedule.backward)

    def meet(self, rank: int, own: list[Message], other: list[Message], message: Message) -> None:
        """Add a message to one end of a channel; it must be what stands at the same place of the other end."""
        own.append(message)
        if len(other) >= len(own) and other[len(own) - 1] != message:
            raise self.broken(
                rank, f"is number {len(own)} on its channel, but there the other rank has {other[len(own) - 1]}"
            )

    def broken(self, rank: int, words: str) -> ConfigError:
        at = self.at[rank]
        return _broken(self.schedule, f"rank {rank}, step {at}, {self.lists[rank][at]} {words}")

    def plea(self, rank: int) -> str:
        """Return which cell of the schedule a rank is stuck at, what it waits for, and where that stands."""
        step = self.lists[rank][self.at[rank]]
        place = sum(isinstance(each, Compute) for each in self.lists[rank][: self.at[rank]])
        action = self.schedule.orders[rank][place]
        message = taken(step, self.schedule.stages) if isinstance(step, Compute) else step.message
        assert message is not None  # only these wait
        home = self.schedule.placement[message.stage]
        kinds = (FORWARD,) if message.kind == ACTIVATION else (BACKWARD, INPUTS)
        makers = {Compute(kind, message.stage, message.micro_batch) for kind in kinds}
        maker = next(at for at, each in enumerate(self.schedule.orders[home]) if each in makers)
        made = _cell(home, maker, self.schedule.orders[home][maker])
        return f"{_cell(rank, place, action)} waits for {message} of {made}"


def _cell(rank: int, place: int, step: object) -> str:
    return f"rank {rank}, place {place}, {step}"


def _times(number: int) -> str:
    return f"{number} time{'s' * (number != 1)}"


def _broken(schedule: Schedule, words: str) -> ConfigError:
    return ConfigError(f"The pipeline schedule {schedule.name!r} cannot run: {words}.")
