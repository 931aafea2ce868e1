"""Times of a simulation, and what is told of a timeline, by hand."""

from __future__ import annotations

import json

import pytest

from lit_zero.core.errors import ConfigError
from lit_zero.pipeline.actions import Compute, parse
from lit_zero.pipeline.schedules import build
from lit_zero.pipeline.timeline import Span, Timeline
from lit_zero.pipeline.timing import Costs, simulate


def times(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {str(span.action): (span.start, span.end) for span in timeline.spans}


def test_two_stages_and_one_micro_batch():
    schedule = build("1f1b", 2, 1)
    timeline = simulate(schedule, Costs(F=2, B=3, latency=0.5))
    assert times(timeline) == {"F0.0": (0, 2), "F1.0": (2.5, 4.5), "B1.0": (4.5, 7.5), "B0.0": (8, 11)}
    assert timeline.makespan == 11
    assert (timeline.busy(0), timeline.busy(1)) == (5, 5)
    assert timeline.bubble(0) == timeline.bubble_fraction == pytest.approx(6 / 11)
    assert timeline.own_bubble_fraction == pytest.approx(1 - 10 / (11 + 5))
    assert times(simulate(schedule, Costs(F=2, B=3, scale=(1, 2))))["B1.0"] == (6, 12)


def test_a_message_to_the_same_rank_takes_no_time():
    timeline = simulate(build("zbv", 4, 1), Costs(latency=10))
    assert times(timeline)["F1.0"] == (11, 12)
    assert times(timeline)["F2.0"] == (12, 13)


def test_costs_as_text():
    assert Costs.parse("F=1,B=2") == Costs()
    assert Costs.parse("B=3") == Costs(F=1, B=3, I=1.5, W=1.5)
    assert Costs.parse("F=2, I=0.5,W=1,latency=0.25") == Costs(F=2, I=0.5, W=1, B=1.5, latency=0.25)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("f=1", "costs='f' is not known. Choose one of: F, B, I, W, latency."),
        ("F", "costs: F='' is not a number. Write for example F=1,I=1,W=1."),
        ("F=fast", "costs: F='fast' is not a number."),
        ("F=0", "costs: F=0.0 must be a number above 0."),
        ("W=inf", "costs: W=inf must be a number above 0."),
        ("F=nan", "costs: F=nan must be a number above 0."),
        ("latency=-1", "costs: latency=-1.0 must be a number, 0 or more."),
        ("latecy=1", "Did you mean 'latency'"),
    ],
)
def test_costs_that_cannot_be_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        Costs.parse(text)


def test_a_measured_timeline():
    """Spans in any order, times of any clock."""
    timeline = Timeline.of(
        [(1, parse("F1.0"), 102.0, 103.0), (0, parse("F0.1"), 101.0, 102.0), Span(0, Compute("F", 0, 0), 100.0, 101.0)]
    )
    assert times(timeline) == {"F0.0": (0, 1), "F0.1": (1, 2), "F1.0": (2, 3)}
    assert timeline.ranks == 2
    assert timeline.bubble(0) == pytest.approx(1 / 3)
    assert timeline.bubble(1) == pytest.approx(2 / 3)
    assert timeline.bubble_fraction == pytest.approx(1 / 2)
    assert timeline.own_bubble_fraction == 0


def test_nothing_measured():
    timeline = Timeline.of([])
    assert (timeline.makespan, timeline.bubble_fraction, timeline.own_bubble_fraction) == (0, 0, 0)


def test_chrome_trace():
    trace = json.loads(Timeline.of([(0, parse("F0.0"), 5.0, 5.25), (1, parse("B1.2"), 5.5, 6.0)]).chrome_trace())
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert names == ["rank 0", "rank 1"]
    assert [event for event in trace["traceEvents"] if event["ph"] == "X"] == [
        {"ph": "X", "name": "F0.0", "cat": "F", "pid": 0, "tid": 0, "ts": 0.0, "dur": 250000.0}
        | {"args": {"stage": 0, "micro_batch": 0}},
        {"ph": "X", "name": "B1.2", "cat": "B", "pid": 0, "tid": 1, "ts": 500000.0, "dur": 500000.0}
        | {"args": {"stage": 1, "micro_batch": 2}},
    ]
