"""What is printed parses back, and the modules that plan need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lit_zero
from lit_zero.core.errors import ConfigError
from lit_zero.pipeline.actions import Compute, Message, Transfer, before, given, parse, taken
from lit_zero.pipeline.lowering import lower
from lit_zero.pipeline.schedule import Schedule, in_flight, numbered, words
from lit_zero.pipeline.schedules import RECIPES, build


def test_words():
    assert str(Compute("F", 3, 0)) == "F3.0"
    assert str(Transfer(">", Message("A", 2, 15), 3)) == "A2.15>3"
    assert parse("W12.7") == Compute("W", 12, 7)
    assert parse("G1.4?0") == Transfer("?", Message("G", 1, 4), 0)


@pytest.mark.parametrize("word", ["", "F", "F3", "F3.", "X1.2", "F1.2>3", "A1.2", "F1.2 ", "f1.2", "F-1.2", "A1.2!3"])
def test_what_is_no_word_is_refused(word):
    with pytest.raises(ConfigError, match="is no action of a pipeline schedule. Write F, B, I or W, the stage"):
        parse(word)


def test_who_needs_what():
    assert taken(Compute("F", 0, 5), 4) is None
    assert taken(Compute("F", 2, 5), 4) == given(Compute("F", 1, 5), 4) == Message("A", 1, 5)
    for kind in "BI":
        assert taken(Compute(kind, 2, 5), 4) == given(Compute(kind, 3, 5), 4) == Message("G", 3, 5)
        assert taken(Compute(kind, 3, 5), 4) is None
        assert given(Compute(kind, 0, 5), 4) is None
        assert before(Compute(kind, 1, 5)) == Compute("F", 1, 5)
    assert given(Compute("F", 3, 5), 4) is None
    assert given(Compute("W", 2, 5), 4) is taken(Compute("W", 2, 5), 4) is None
    assert before(Compute("W", 1, 5)) == Compute("I", 1, 5)
    assert before(Compute("F", 1, 5)) is None
    assert (Message("A", 1, 0).target, Message("G", 1, 0).target) == (2, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_schedule_and_its_steps_parse_back(name):
    for micro_batches in (1, 3, 11):
        schedule = build(name, 6, micro_batches, ranks=6 // (RECIPES[name].rounds or 2))
        assert Schedule.parse(str(schedule)) == schedule
        for steps in lower(schedule):
            assert tuple(parse(word) for word in words(steps).split()) == steps


def test_a_schedule_as_text():
    assert str(build("1f1b", 2, 2)) == (
        "1f1b: 2 micro-batches, stages on ranks 0 1\nrank 0: F0.0 F0.1 B0.0 B0.1\nrank 1: F1.0 B1.0 F1.1 B1.1"
    )
    assert str(build("forward", 2, 1)).startswith("forward: 1 micro-batch, stages on ranks 0 1, forward only\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "A pipeline schedule starts with a line such as '1f1b: 8 micro-batches, stages on ranks 0 1', not ''"),
        ("x: 1 micro-batch, stages on ranks 0\nF0.0 B0.0", "Line 2 of a pipeline schedule starts with 'rank 0:', not"),
        ("x: 1 micro-batch, stages on ranks 0\nrank 0: F0.0 Q0.0", "'Q0.0' is no action of a pipeline schedule"),
        ("x: 1 micro-batch, stages on ranks 0\nrank 0: F0.0 A0.0>1", "A0.0>1 is communication; a schedule lists what"),
    ],
)
def test_a_text_that_is_no_schedule_is_refused(text, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Schedule.parse(text)


def test_numbers_of_a_pattern():
    pattern = [("F", 0), ("F", 1), ("F", 0), ("F", 0)]
    assert words(numbered(pattern, 2)) == "F0.0 F1.0 F0.1"


def test_activations_in_flight_by_hand():
    def count(text: str) -> tuple[int, int]:
        found = in_flight(tuple(map(parse, text.split())))
        return found.graphs, found.held

    assert count("F0.0 F0.1 B0.0 F0.2 B0.1 B0.2") == (2, 2)
    assert count("F0.0 I0.0 F0.1 I0.1 W0.0 W0.1") == (1, 2)
    assert count("F0.0 F1.0 F0.1") == (1, 1)
    assert count("") == (0, 0)


def test_planning_needs_no_torch():
    """The package's own __init__ imports torch, so it is replaced by an empty one."""
    code = f"""
import sys, types
package = types.ModuleType("lit_zero")
package.__path__ = [{str(Path(lit_zero.__file__).parent)!r}]
sys.modules.update({{"lit_zero": package, "torch": None, "numpy": None}})
from lit_zero.pipeline.report import report
from lit_zero.pipeline.schedules import build
from lit_zero.pipeline.timing import Costs
print(report(build("1f1b", 2, 2), Costs()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "theory 33.3%" in done.stdout
