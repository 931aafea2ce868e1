"""What ``lit-zero schedule`` says and writes: the grid of a schedule, its bubble, and what it keeps in memory."""

from __future__ import annotations

from pathlib import Path

from lit_zero.core.errors import ConfigError, did_you_mean
from lit_zero.pipeline.drawing import svg, text
from lit_zero.pipeline.raster import png
from lit_zero.pipeline.schedule import Schedule, in_flight
from lit_zero.pipeline.schedules import RECIPES, theory
from lit_zero.pipeline.timeline import Timeline
from lit_zero.pipeline.timing import Costs, simulate


def report(schedule: Schedule, costs: Costs, width: int | None = None) -> str:
    """Return a schedule as a grid, with its bubble and its activations in flight.

    Args:
        schedule: one that ``build`` made.
        costs: how long things take.
        width: most characters of a line of the grid.

    Raises:
        ConfigError: if the schedule is broken.
    """
    timeline = simulate(schedule, costs)
    formula = theory(schedule, costs)
    said = "no formula for these numbers" if formula is None else f"theory {formula:.1%}"
    kept = [in_flight(order) for order in schedule.orders]
    rounds = schedule.stages // schedule.ranks
    lines = [
        headline(schedule),
        text(timeline, width=width),
        f"bubble: {timeline.bubble_fraction:.1%} of the makespan ({said}); by rank "
        + " ".join(f"{timeline.bubble(rank):.1%}" for rank in range(schedule.ranks)),
        f"        {timeline.own_bubble_fraction:.1%} between each rank's own first and last action",
        "peak activations in flight, by rank: " + " ".join(str(each.graphs) for each in kept),
    ]
    if any(each.held != each.graphs for each in kept):
        lines.append("  with those that only W still needs: " + " ".join(str(each.held) for each in kept))
    if rounds > 1:
        lines.append(f"  each of one stage, that is of 1/{rounds} of what a rank holds")
    return "\n".join(lines)


def headline(schedule: Schedule) -> str:
    """Return what a schedule is, in a line.

    Args:
        schedule: one that ``build`` made.
    """
    stages, ranks, many = schedule.stages, schedule.ranks, schedule.micro_batches
    return (
        f"{schedule.name} ({RECIPES[schedule.name].summary}): {stages} stage{'s' * (stages > 1)} on {ranks} "
        f"rank{'s' * (ranks > 1)}, {many} micro-batch{'es' * (many > 1)}"
    )


def write(timeline: Timeline, title: str, path: str | Path, microseconds: float = 1e6) -> None:
    """Write a timeline as a picture or as a trace.

    Args:
        timeline: simulated or measured.
        title: a line for the picture.
        path: file to write: ``.svg``, ``.png``, or ``.json`` for chrome://tracing and ui.perfetto.dev.
        microseconds: how many one unit of time is, for the trace.

    Raises:
        ConfigError: if the ending is none of these.
    """
    path = Path(path)
    check_ending(path)
    if path.suffix == ".svg":
        path.write_text(svg(timeline, title))
    elif path.suffix == ".png":
        path.write_bytes(png(timeline))
    else:
        path.write_text(timeline.chrome_trace(microseconds))


def check_ending(path: str | Path) -> None:
    """Raise unless a file's name ends as one that ``write`` can write.

    Args:
        path: of the file.

    Raises:
        ConfigError: naming the endings.
    """
    ending = Path(path).suffix
    if ending not in (".svg", ".png", ".json"):
        raise ConfigError(f"The file '{path}' ends with {ending!r}. {did_you_mean(ending, ('.svg', '.png', '.json'))}")
