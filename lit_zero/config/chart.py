"""The comparison of a sweep as a picture: bars for memory and speed, one row per job.

It is SVG, written by hand: every browser shows it, it prints at any size, and no library is needed for a few
rectangles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lit_zero.config.results import COMPLETED
from lit_zero.config.table import number, own_overrides

_ROW, _BAR, _PANEL, _GAP, _MARGIN, _LETTER = 24, 14, 300, 110, 16, 6.7  # pixels; _LETTER: the width of one
_COLORS = ("#4269d0", "#a9bdf0", "#4269d0")


@dataclass(frozen=True)
class _Panel:
    """One measure.

    Attributes:
        title: above the bars.
        parts: keys in result.json that are stacked in one bar, and what each is.
        form: how the sum is written.
    """

    title: str
    parts: tuple[tuple[str, str], ...]
    form: str


_PANELS = (
    _Panel(
        "memory per rank",
        (("state_bytes_per_rank", "model state"), ("buffer_bytes_per_rank", "working buffers")),
        "bytes",
    ),
    _Panel("speed", (("tokens_per_second", "tokens/s, all ranks together"),), "{:,.0f}"),
)


def draw(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the picture as SVG, ``None`` if no job has measured memory or speed.

    Args:
        results: of the jobs, from top to bottom.
    """
    panels = [panel for panel in _PANELS if any(_values(result, panel) for result in results)]
    if not panels:
        return None
    numbers = [str(result.get("job", "")) for result in results]
    labels = [f"{job}  {own}".strip() for job, own in zip(numbers, own_overrides(results), strict=True)]
    left = _MARGIN + max(len(label) for label in labels) * _LETTER + 12
    top = _MARGIN + 44
    width = left + len(panels) * (_PANEL + _GAP)
    height = top + len(results) * _ROW + _MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11" fill="#222">',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
    ]
    for row, label in enumerate(labels):
        out.append(_text(left - 12, top + row * _ROW, label, 'text-anchor="end"'))
    for column, panel in enumerate(panels):
        out += _bars(results, panel, left + column * (_PANEL + _GAP), top)
    return "\n".join([*out, "</svg>\n"])


def _bars(results: Sequence[Mapping[str, Any]], panel: _Panel, x: float, top: float) -> list[str]:
    """Return one panel, whose upper left corner is at ``(x, top)`` pixels, with its title above."""
    known = [part for part in panel.parts if any(part[0] in result for result in results)]
    out = [_text(x, top - 40, panel.title, 'font-weight="bold"')]
    at = x
    for (_, name), color in zip(known, _COLORS, strict=False):
        out.append(f'<rect x="{at:.1f}" y="{top - 19}" width="9" height="9" fill="{color}"/>')
        out.append(_text(at + 13, top - 22, name))
        at += 13 + len(name) * _LETTER + 14
    most = max(sum(_values(result, panel).values()) for result in results) or 1.0
    for row, result in enumerate(results):
        values, y, at = _values(result, panel), top + row * _ROW, x
        for (key, _), color in zip(known, _COLORS, strict=False):
            long = values.get(key, 0.0) / most * _PANEL
            if long:
                out.append(f'<rect x="{at:.1f}" y="{y}" width="{long:.1f}" height="{_BAR}" fill="{color}"/>')
            at += long
        done = result.get("status", COMPLETED) == COMPLETED
        said = number(sum(values.values()), panel.form) if values else ("-" if done else "not completed")
        out.append(_text(at + 5, y, said))
    return out


def _values(result: Mapping[str, Any], panel: _Panel) -> dict[str, float]:
    """Return the parts of a bar that a job has measured."""
    values = {key: result.get(key) for key, _ in panel.parts}
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float) and value >= 0}


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y + _BAR - 3:.1f}" xml:space="preserve" {more}>{escape(words)}</text>'
