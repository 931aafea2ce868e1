"""A timeline as a picture, one row per rank: as text, as SVG, and as boxes for ``raster``, which makes a PNG of them.

It does not matter whether the timeline was simulated or measured. The SVG is written by hand, as the picture of a sweep
is: no library is needed for a few rectangles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from lit_zero.pipeline.actions import BACKWARD, FORWARD, INPUTS, WEIGHTS
from lit_zero.pipeline.timeline import Span, Timeline

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    FORWARD: (122, 166, 240),
    BACKWARD: (108, 197, 138),
    INPUTS: (95, 208, 197),
    WEIGHTS: (242, 193, 78),
}
MEANINGS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUTS: "backward for inputs",
    WEIGHTS: "backward for weights",
}
WIDEST, SLOT, ROW, BAR, LEFT, TOP, MARGIN = 2400, 30, 30, 26, 64, 44, 12  # pixels
_LETTER = 6.7  # pixels; the width of one


def text(timeline: Timeline, slot: float | None = None, width: int | None = None) -> str:
    """Return the grid as text: a line per rank, a column per slot of time.

    An action is named where it starts, by its micro-batch if each rank has one stage, else by stage and micro-batch;
    ``-`` says that it goes on, ``.`` that the rank is idle.

    Args:
        timeline: what to draw.
        slot: how long a column is; by default as long as the shortest action.
        width: most characters of a line; a longer grid goes on in another block below.
    """
    if slot is None:
        slot = min((span.end - span.start for span in timeline.spans), default=1.0)
    columns = math.ceil(timeline.makespan / slot - 1e-6)
    names = _Names(timeline)
    grid = []
    for row in timeline.rows:
        cells = ["."] * columns
        for span in row:
            first, end = round(span.start / slot), round(span.end / slot)
            cells[first:end] = [names.of(span), *"-" * (end - first - 1)][: end - first]
        grid.append([cell.ljust(names.longest) for cell in cells])
    fold = max(1, (width - 8) // (names.longest + 1)) if width else columns
    blocks = []
    for first in range(0, columns, max(1, fold)):
        rows = (" ".join(cells[first : first + fold]) for cells in grid)
        blocks.append("\n".join(f"rank {rank:<3}{row}".rstrip() for rank, row in enumerate(rows)))
    return "\n\n".join(blocks)


@dataclass(frozen=True)
class Box:
    """One action in a picture.

    Attributes:
        span: the action.
        x: of its left side; pixels from the picture's left.
        y: of its upper side; pixels from the picture's top.
        width: pixels.
        height: pixels.
        color: by its kind; paler for the later stages of a rank.
        label: its name.
    """

    span: Span
    x: float
    y: float
    width: float
    height: float
    color: Color
    label: str


@dataclass(frozen=True)
class Picture:
    """Boxes and the size of the picture that they fill, in pixels."""

    width: int
    height: int
    boxes: tuple[Box, ...]


def picture(timeline: Timeline) -> Picture:
    """Return where in a picture each action stands.

    Args:
        timeline: what to draw.
    """
    shortest = min((span.end - span.start for span in timeline.spans), default=1.0) or 1.0
    scale = min(SLOT / shortest, WIDEST / (timeline.makespan or 1.0))  # pixels per unit of time
    names = _Names(timeline)
    boxes = []
    for span in timeline.spans:
        stages = names.stages[span.rank]
        paler = stages.index(span.action.stage) / len(stages)
        boxes.append(
            Box(
                span,
                LEFT + span.start * scale,
                TOP + span.rank * ROW,
                (span.end - span.start) * scale,
                BAR,
                _mix(COLORS[span.action.kind], paler),
                names.of(span),
            )
        )
    width = LEFT + timeline.makespan * scale + 11 * _LETTER + MARGIN
    return Picture(math.ceil(width), TOP + timeline.ranks * ROW + MARGIN, tuple(boxes))


def svg(timeline: Timeline, title: str = "") -> str:
    """Return the timeline as SVG; a browser shows an action's name and times under the mouse.

    Args:
        timeline: what to draw.
        title: a line above it.
    """
    drawn = picture(timeline)
    width = max(drawn.width, math.ceil(2 * MARGIN + len(title) * _LETTER))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{drawn.height}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{drawn.height}" fill="white"/>',
        _words(MARGIN, 16, title, 'font-weight="bold"'),
    ]
    at: float = LEFT
    for kind in [kind for kind in COLORS if any(span.action.kind == kind for span in timeline.spans)]:
        out.append(f'<rect x="{at:.1f}" y="24" width="10" height="10" fill="{_hex(COLORS[kind])}"/>')
        out.append(_words(at + 14, 33, MEANINGS[kind]))
        at += 14 + len(MEANINGS[kind]) * _LETTER + 16
    end = max((box.x + box.width for box in drawn.boxes), default=LEFT)
    for rank in range(timeline.ranks):
        y = TOP + rank * ROW
        out.append(f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}" fill="#f1f1f1"/>')
        out.append(_words(MARGIN, y + 17, f"rank {rank}"))
        out.append(_words(end + 8, y + 17, f"{timeline.bubble(rank):.1%} idle"))
    for box in drawn.boxes:
        span = box.span
        out.append(
            f'<rect x="{box.x:.2f}" y="{box.y}" width="{box.width:.2f}" height="{box.height}" '
            f'fill="{_hex(box.color)}" stroke="white" stroke-width="0.8"><title>{span.action} on rank {span.rank}, '
            f"{span.start:.6g} to {span.end:.6g}</title></rect>"
        )
        if box.width >= len(box.label) * _LETTER:
            middle = box.x + box.width / 2
            out.append(_words(middle, box.y + 17, box.label, 'text-anchor="middle" pointer-events="none"'))
    return "\n".join([*out, "</svg>\n"])


class _Names:
    """How actions are called in a picture: without the stage where a rank has only one."""

    def __init__(self, timeline: Timeline) -> None:
        self.stages = [sorted({span.action.stage for span in row}) for row in timeline.rows]
        self.alone = all(len(stages) < 2 for stages in self.stages)
        self.longest = max((len(self.of(span)) for span in timeline.spans), default=1)

    def of(self, span: Span) -> str:
        return f"{span.action.kind}{span.action.micro_batch}" if self.alone else str(span.action)


def _mix(color: Color, white: float) -> Color:
    red, green, blue = (round(part + (255 - part) * white) for part in color)
    return red, green, blue


def _hex(color: Color) -> str:
    return "#" + bytes(color).hex()


def _words(x: float, y: float, said: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" xml:space="preserve" {more}>{escape(said)}</text>'
