"""Every schedule, for all small numbers: complete, free of deadlock, in the time and memory that theory gives."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from lit_zero.core.errors import ConfigError
from lit_zero.pipeline.actions import Compute
from lit_zero.pipeline.checking import check
from lit_zero.pipeline.one_piece import gpipe
from lit_zero.pipeline.schedule import Order, Placement, Schedule, in_flight, loop, vee
from lit_zero.pipeline.schedules import RECIPES, build, forward_only, theory
from lit_zero.pipeline.timing import Costs, simulate

RANKS, MICRO_BATCHES = range(1, 9), range(1, 21)


def rounds(name: str) -> tuple[int, ...]:
    only = RECIPES[name].rounds
    return (1, 2, 3) if only is None else (only,)


@pytest.mark.parametrize("name", RECIPES)
def test_each_is_complete_and_runs_and_takes_the_time_of_theory(name):
    known = 0
    for ranks, v, m in itertools.product(RANKS, rounds(name), MICRO_BATCHES):
        schedule = build(name, ranks * v, m, ranks=ranks)  # is checked; see test_what_is_built_is_checked
        formula = theory(schedule)
        if formula is not None:
            known += 1
            assert simulate(schedule).bubble_fraction == pytest.approx(formula, abs=1e-9), str(schedule)
    assert known >= 52  # of each there is a formula for some: 8 to 20 micro-batches on 4 ranks and on fewer at least


def test_what_is_built_is_checked(monkeypatch):
    def wrong(placement: Placement, micro_batches: int, costs: Costs) -> tuple[Order, ...]:
        return gpipe(placement, micro_batches)[::-1]

    monkeypatch.setitem(RECIPES, "gpipe", replace(RECIPES["gpipe"], order=wrong))
    with pytest.raises(
        ConfigError, match="'gpipe' cannot run: rank 0, place 0, F1.0 stands on the wrong rank: stage 1"
    ):
        build("gpipe", 2, 3)
    monkeypatch.setattr("lit_zero.pipeline.schedules.greedy", lambda *_, **__: ((Compute("F", 0, 0),), ()))
    with pytest.raises(ConfigError, match="'forward' cannot run: rank 1 runs nothing for stage 1 and micro-batch 0"):
        forward_only((0, 1, 1, 0), 1)


def test_forward_only_runs_on_every_placement():
    placements = [vee(ranks) for ranks in RANKS] + [loop(3, 2), (0, 1, 1, 0, 0, 1), (1, 0), (0, 0, 1, 1)]
    for placement, m in itertools.product(placements, MICRO_BATCHES):
        schedule = forward_only(placement, m)
        check(schedule)
        assert {each.kind for order in schedule.orders for each in order} == {"F"}
        if placement == vee(max(placement) + 1):
            bubble = theory(schedule)
            assert simulate(schedule).bubble_fraction == pytest.approx(bubble, abs=1e-9)


@pytest.mark.parametrize("latency", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("name", ["zero_bubble", "zbv"])
def test_orders_made_for_unequal_costs_run_too(name, latency):
    for ranks, m in itertools.product((1, 2, 3, 5), (1, 2, 5, 8, 13)):
        stages = ranks * rounds(name)[0]
        for costs in (
            Costs(F=1, I=1.3, W=0.4, latency=latency),
            Costs(F=0.7, I=1, W=1.9, latency=latency),
            Costs(latency=latency, scale=tuple(1 + 0.5 * (stage % 3) for stage in range(stages))),
        ):
            schedule = build(name, stages, m, ranks=ranks, costs=costs)
            check(schedule)
            blind = build(name, stages, m, ranks=ranks)
            assert simulate(schedule, costs).makespan <= simulate(blind, costs).makespan * (1 + 1e-9)


def kept(schedule: Schedule) -> list[int]:
    return [in_flight(order).held for order in schedule.orders]


def test_activations_in_flight():
    for p, m in itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 5, 7, 11, 12)):
        assert kept(build("gpipe", p, m)) == [m] * p
        assert kept(build("1f1b", p, m)) == [min(m, p - rank) for rank in range(p)]  # PipeDream-flush
        assert max(kept(build("zero_bubble", p, m))) <= p  # as 1F1B's first rank
        graphs = [in_flight(order).graphs for order in build("zero_bubble", p, m).orders]
        assert all(most <= max(p - rank, min(m, p)) for rank, most in enumerate(graphs))
        assert max(kept(build("zbv", 2 * p, m))) <= 2 * p  # in halves: as 1F1B's first rank
        assert kept(build("forward", p, m)) == [1] * p
        for v in (2, 3):
            group = -(-m // max(1, m // p))  # Megatron-LM's where m is a multiple of p
            first = min(v * m, 2 * (p - 1) + (v - 1) * group + 1)  # forwards before the first backward, and one
            assert kept(build("interleaved", v * p, m, ranks=p))[0] == first


def test_bubbles_of_4_stages_and_8_micro_batches():
    """The numbers as the papers give them, not through ``theory``."""

    def bubble(name: str, stages: int = 4, m: int = 8, **costs: float) -> float:
        return simulate(build(name, stages, m), Costs(**costs)).bubble_fraction

    assert bubble("gpipe") == pytest.approx(3 / 11)  # GPipe, section 2.3: (p - 1) / (m + p - 1)
    assert bubble("1f1b") == bubble("1f1b", F=2, B=5) == pytest.approx(3 / 11)
    assert bubble("interleaved", 8) == pytest.approx(3 / 19)  # Megatron-LM 2021, section 2.2.2: a v-th of it
    assert bubble("zero_bubble") == pytest.approx(3 / (3 + 8 * 3))  # Zero Bubble 2023, table 2: (p - 1)(F + I - W) idle
    assert bubble("zero_bubble", F=2, I=2, W=1) == pytest.approx(9 / (9 + 8 * 5))
    timeline = simulate(build("zbv", 8, 8))
    assert timeline.own_bubble_fraction == pytest.approx(0, abs=1e-12)
    assert timeline.makespan == 6 * 8 + 3  # the last rank begins 3 forwards later


@pytest.mark.parametrize("name", ["zero_bubble", "zbv"])
def test_a_formula_for_unequal_costs_is_right_where_it_is_given(name):
    known = 0
    for p, m, forward, inputs, weights in itertools.product((2, 3, 5), (5, 10, 13), *[(0.5, 1, 1.5)] * 3):
        costs = Costs(F=forward, I=inputs, W=weights)
        schedule = build(name, p * rounds(name)[0], m, costs=costs)
        formula = theory(schedule, costs)
        if formula is not None:
            known += 1
            assert simulate(schedule, costs).bubble_fraction == pytest.approx(formula, abs=1e-9), (p, m, costs)
    assert known


def test_few_micro_batches_take_the_list_scheduler_s_order():
    """By hand ZB-V on 4 ranks takes 6 slots longer than its work with 4 micro-batches; the scheduler takes 3."""
    assert simulate(build("zbv", 8, 4)).makespan == 6 * 4 + 3


def test_the_order_follows_measured_costs():
    costs = Costs(F=1, I=1, W=2)
    follows, does_not = (simulate(build("zbv", 8, 16, costs=each), costs).bubble_fraction for each in (costs, Costs()))
    assert (follows, does_not) == (pytest.approx(0.0229, abs=1e-4), pytest.approx(0.0376, abs=1e-4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zvb", 4, 8), r"pipeline.schedule='zvb' is not known. Did you mean 'zbv'\?"),
        (("1f1b", 4, 0), "pipeline.micro_batches=0 must be 1 or more"),
        (("1f1b", 0, 8), "pipeline.stages=0 must be 1 or more"),
        (("1f1b", 4, 8, 0), "A pipeline on 0 ranks cannot be: it needs 1 or more"),
        (
            ("1f1b", 8, 8, 4),
            "pipeline.stages=8 does not fit 4 ranks: pipeline.schedule=1f1b runs 1 stage on every rank. "
            "pipeline.stages=4 fits. pipeline.schedule=interleaved runs several per rank.",
        ),
        (
            ("zbv", 7, 8),
            "pipeline.stages=7 does not fit 3 ranks: pipeline.schedule=zbv runs 2 stages on every rank. "
            "pipeline.stages=6 fits.$",
        ),
        (
            ("interleaved", 6, 8, 4),
            "pipeline.stages=6 does not fit 4 ranks: pipeline.schedule=interleaved runs the same number of stages on "
            "every rank. pipeline.stages=4 fits.$",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, words):
    name, stages, micro_batches, *ranks = arguments
    with pytest.raises(ConfigError, match=words):
        build(name, stages, micro_batches, ranks=ranks[0] if ranks else None)


def test_a_formula_is_not_given_where_none_is_known():
    assert theory(build("interleaved", 8, 3, ranks=4)) is None
    assert theory(build("1f1b", 4, 8), Costs(latency=0.1)) is None
    assert theory(build("1f1b", 2, 8), Costs(scale=(1.0, 2.0))) is None
    assert theory(build("zbv", 8, 7)) is None
    swapped = build("1f1b", 2, 4)
    assert theory(Schedule("mine", swapped.placement, 4, swapped.orders)) is None
