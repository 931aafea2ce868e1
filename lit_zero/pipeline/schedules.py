"""The schedules by name: what each is, what it needs, and what theory says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lit_zero.core.errors import ConfigError, check_choice
from lit_zero.pipeline.checking import check
from lit_zero.pipeline.greedy import greedy
from lit_zero.pipeline.one_piece import forward_in_rounds, gpipe, interleaved, one_forward_one_backward
from lit_zero.pipeline.schedule import Order, Placement, Schedule, loop, vee
from lit_zero.pipeline.timing import EQUAL, Costs
from lit_zero.pipeline.zero_bubble import zbv, zero_bubble


@dataclass(frozen=True)
class Recipe:
    """How a schedule is made.

    Attributes:
        summary: what it is, in a few words.
        order: makes the order of every rank of a placement, a number of micro-batches, and costs.
        rounds: how many stages a rank has; ``None`` for any number.
        placement: ``loop`` or ``vee``.
        bubble: the fraction of the makespan in which ranks are idle, of ranks, stages per rank, micro-batches and
            costs, where stages take equal time and messages none; ``None`` where no formula is known.
    """

    summary: str
    order: Callable[[Placement, int, Costs], tuple[Order, ...]]
    rounds: int | None
    placement: str
    bubble: Callable[[int, int, int, Costs], float | None]


def _fill(p: int, v: int, m: int, costs: Costs) -> float | None:
    """Filling and draining take ``p - 1`` stages beside ``v * m`` of work (GPipe 2019, 2.3; Megatron-LM 2021, 2.2)."""
    return (p - 1) / (v * m + p - 1) if v == 1 or m >= p else None


def _h1(p: int, v: int, m: int, costs: Costs) -> float | None:
    """The idle time of ZB-H1 is ``(p - 1) (F + I - W)`` (Zero Bubble 2023, table 2)."""
    idle = (p - 1) * (costs.F + costs.I - costs.W)
    known = m >= p and min(costs.F, costs.I) >= costs.W
    return idle / (idle + m * (costs.F + costs.I + costs.W)) if known else None


def _v(p: int, v: int, m: int, costs: Costs) -> float | None:
    """No rank is idle once it has begun, but the last one begins ``p - 1`` forwards after the first."""
    return (p - 1) / (3 * v * m + p - 1) if m >= v * p and costs.F == costs.I == costs.W else None


RECIPES = {
    "gpipe": Recipe("all forwards, then all backwards", lambda at, m, _: gpipe(at, m), 1, "loop", _fill),
    "1f1b": Recipe(
        "one forward, one backward in turn", lambda at, m, _: one_forward_one_backward(at, m), 1, "loop", _fill
    ),
    "interleaved": Recipe(
        "1F1B over several stages per rank", lambda at, m, _: interleaved(at, m), None, "loop", _fill
    ),
    "zero_bubble": Recipe("ZB-H1: 1F1B with a split backward", zero_bubble, 1, "loop", _h1),
    "zbv": Recipe("ZB-V: a split backward, two stages per rank, down and up again", zbv, 2, "vee", _v),
    "forward": Recipe(
        "no backward, for evaluation and prediction",
        lambda at, m, _: forward_in_rounds(at, m),
        None,
        "loop",
        _fill,
    ),
}
DEFAULT_ROUNDS = {"interleaved": 2}  # stages per rank where neither these nor ranks are given; 1 otherwise


def build(name: str, stages: int, micro_batches: int, *, ranks: int | None = None, costs: Costs = EQUAL) -> Schedule:
    """Return a schedule by name, checked to be complete and free of deadlock.

    Args:
        name: ``gpipe``, ``1f1b``, ``interleaved``, ``zero_bubble``, ``zbv`` or ``forward``.
        stages: how many pieces the model is in, over all ranks.
        micro_batches: how many a step has; every schedule can do with any number.
        ranks: how many ranks share the stages; by default as many as the schedule has stages for, at two per rank with
            ``interleaved`` and ``zbv``, else at one.
        costs: how long things take, by which ``zero_bubble`` and ``zbv`` choose their order; the same on all ranks.

    Raises:
        ConfigError: naming ``pipeline.schedule``, ``pipeline.stages`` or ``pipeline.micro_batches``, and what fits.
    """
    check_choice("pipeline.schedule", name, RECIPES)
    recipe = RECIPES[name]
    if micro_batches < 1:
        raise ConfigError(f"pipeline.micro_batches={micro_batches} must be 1 or more.")
    if stages < 1:
        raise ConfigError(f"pipeline.stages={stages} must be 1 or more.")
    if ranks is not None and ranks < 1:
        raise ConfigError(f"A pipeline on {ranks} ranks cannot be: it needs 1 or more.")
    rounds = recipe.rounds or (max(1, stages // ranks) if ranks else DEFAULT_ROUNDS.get(name, 1))
    ranks = ranks or max(1, stages // rounds)
    if ranks * rounds != stages:
        each = {None: "the same number of stages", 1: "1 stage"}.get(recipe.rounds, f"{rounds} stages")
        more = " pipeline.schedule=interleaved runs several per rank." if recipe.rounds == 1 else ""
        raise ConfigError(
            f"pipeline.stages={stages} does not fit {ranks} rank{'s' * (ranks > 1)}: pipeline.schedule={name} runs "
            f"{each} on every rank. pipeline.stages={ranks * rounds} fits.{more}"
        )
    placement = vee(ranks) if recipe.placement == "vee" else loop(ranks, rounds)
    orders = recipe.order(placement, micro_batches, costs)
    return _checked(Schedule(name, placement, micro_batches, orders, backward=name != "forward"))


def forward_only(placement: Placement, micro_batches: int, costs: Costs = EQUAL) -> Schedule:
    """Return the schedule without gradients for stages that are placed already, by any other schedule or by hand.

    Args:
        placement: the rank of every stage.
        micro_batches: how many; any number.
        costs: how long things take, by which the order is chosen where no closed form is known; the same on all ranks.
    """
    ranks = max(placement) + 1
    if placement == loop(ranks, len(placement) // ranks):
        orders = forward_in_rounds(placement, micro_batches)
    else:
        orders = greedy(placement, micro_batches, costs, backward=False)
    return _checked(Schedule("forward", placement, micro_batches, orders, backward=False))


def _checked(schedule: Schedule) -> Schedule:
    check(schedule)
    return schedule


def theory(schedule: Schedule, costs: Costs = EQUAL) -> float | None:
    """Return the bubble fraction that a formula gives for a schedule that ``build`` made.

    It is the fraction of the makespan in which ranks are idle, if stages take equal time and messages none.

    Args:
        schedule: of ``build``.
        costs: how long actions take.

    Returns:
        ``None`` where no formula is known: too few micro-batches, or unequal costs.
    """
    ranks, rounds = schedule.ranks, schedule.stages // schedule.ranks
    if costs.latency or len(set(costs.scale)) > 1 or schedule.name not in RECIPES:
        return None
    recipe = RECIPES[schedule.name]
    if schedule.placement == vee(ranks) and not schedule.backward:
        rounds = 1  # down and up are one way of p steps of F + F: the last rank begins late and the first one ends late
    elif schedule.placement != (vee(ranks) if recipe.placement == "vee" else loop(ranks, rounds)):
        return None
    return recipe.bubble(ranks, rounds, schedule.micro_batches, costs)
