"""Pictures: what stands where."""

from __future__ import annotations

import struct
import zlib
from xml.etree import ElementTree

import pytest

from lit_zero.pipeline.actions import parse
from lit_zero.pipeline.drawing import COLORS, LEFT, SLOT, TOP, WIDEST, picture, svg, text
from lit_zero.pipeline.raster import png
from lit_zero.pipeline.schedules import RECIPES, build
from lit_zero.pipeline.timeline import Timeline
from lit_zero.pipeline.timing import Costs, simulate

SVG = "{http://www.w3.org/2000/svg}"


def lines(*rows: str) -> str:
    return "\n".join(rows)


def test_the_grid_as_text():
    assert text(simulate(build("1f1b", 2, 3))) == lines(
        "rank 0  F0 F1 .  .  B0 -  F2 B1 -  .  B2 -",
        "rank 1  .  F0 B0 -  F1 B1 -  F2 B2 -  .  .",
    )
    assert text(simulate(build("zbv", 4, 1))) == lines(
        "rank 0  F0.0 .    .    F3.0 I3.0 W3.0 .    I0.0 W0.0",
        "rank 1  .    F1.0 F2.0 .    .    I2.0 I1.0 W2.0 W1.0",
    )


def test_a_grid_that_is_too_wide_goes_on_below():
    assert text(simulate(build("forward", 2, 3)), width=16) == lines(
        "rank 0  F0 F1",
        "rank 1  .  F0",
        "",
        "rank 0  F2 .",
        "rank 1  F1 F2",
    )
    assert "F2" in text(simulate(build("forward", 2, 3)), width=1)


def test_a_measured_grid():
    timeline = Timeline.of([(0, parse("F0.0"), 7.0, 7.31), (1, parse("F1.0"), 7.4, 7.42), (1, parse("F1.1"), 7.5, 7.6)])
    assert text(timeline, slot=0.1) == "rank 0  F0 -  -  .  .  .\nrank 1  .  .  .  .  .  F1"  # one too short to be seen
    assert text(Timeline.of([])) == ""


def test_boxes_do_not_overlap_and_are_as_long_as_their_actions():
    timeline = simulate(build("zbv", 8, 3), Costs(F=1, I=1.5, W=0.5))
    drawn = picture(timeline)
    assert len(drawn.boxes) == 8 * 3 * 3
    for one, other in zip(drawn.boxes, drawn.boxes[1:], strict=False):
        assert one.span.rank < other.span.rank or one.x + one.width <= other.x + 1e-6
    for box in drawn.boxes:
        assert box.width == pytest.approx((box.span.end - box.span.start) * 2 * SLOT)
        assert LEFT <= box.x <= box.x + box.width <= drawn.width
        assert TOP <= box.y <= box.y + box.height <= drawn.height


def test_a_long_run_still_fits():
    assert picture(simulate(build("gpipe", 2, 400))).width < WIDEST + 200


@pytest.mark.parametrize("name", RECIPES)
def test_svg_holds_every_action(name):
    schedule = build(name, 6, 7, ranks=6 // (RECIPES[name].rounds or 2))
    timeline = simulate(schedule)
    root = ElementTree.fromstring(svg(timeline, "a < b"))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles == [
        f"{span.action} on rank {span.rank}, {span.start:.6g} to {span.end:.6g}" for span in timeline.spans
    ]
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "a < b" in words
    assert f"{timeline.bubble(0):.1%} idle" in words
    kinds = {span.action.kind for span in timeline.spans}
    assert ("backward for weights" in words) == ("W" in kinds)


def pixels(data: bytes) -> list[bytes]:
    """Return the rows of a PNG as it is written here, checking every chunk's sum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunks[kind] = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (1 + 3 * width)
    return [raw[row * (1 + 3 * width) + 1 : (row + 1) * (1 + 3 * width)] for row in range(height)]


def test_png():
    timeline = simulate(build("zero_bubble", 2, 12))
    rows = pixels(png(timeline))
    drawn = picture(timeline)
    assert (len(rows[0]) // 3, len(rows)) == (drawn.width, drawn.height)
    for box in drawn.boxes:
        x, y = round(box.x) + 2, round(box.y) + 2
        assert tuple(rows[y][3 * x : 3 * x + 3]) == COLORS[box.span.action.kind] == box.color
        ink = b"".join(row[3 * x : 3 * (x + 24)] for row in rows[y : y + 22]).count(bytes((34, 34, 34)))
        assert ink >= 7 * 4  # a 1 and a 7 are the digits with the fewest points, each of 4 pixels


def test_later_stages_of_a_rank_are_paler():
    boxes = picture(simulate(build("interleaved", 6, 2, ranks=2))).boxes
    shades = {box.span.action.stage: box.color for box in boxes if box.span.rank == 0 and box.span.action.kind == "F"}
    assert shades[0] == COLORS["F"]
    assert sum(shades[0]) < sum(shades[2]) < sum(shades[4]) < 3 * 255


def test_nothing_to_draw():
    assert pixels(png(Timeline.of([])))
    assert ElementTree.fromstring(svg(Timeline.of([]))).tag == f"{SVG}svg"
