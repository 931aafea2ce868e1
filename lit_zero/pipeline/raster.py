"""A timeline as PNG, for where no browser is: coloured boxes with the micro-batch's number in each."""

from __future__ import annotations

import struct
import zlib

from lit_zero.pipeline.drawing import BAR, LEFT, ROW, TOP, Color, picture
from lit_zero.pipeline.timeline import Timeline

# Each digit in three columns and five rows, a row as a number of three bits.
_DIGITS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717")
_DOT = 2  # pixels; the size of one point of a digit
_INK: Color = (34, 34, 34)


def png(timeline: Timeline) -> bytes:
    """Return the timeline as the bytes of a PNG file; ranks are numbered on the left, from 0 at the top.

    Args:
        timeline: what to draw.
    """
    drawn = picture(timeline)
    canvas = _Canvas(drawn.width, drawn.height)
    end = max((box.x + box.width for box in drawn.boxes), default=float(LEFT))
    for rank in range(timeline.ranks):
        canvas.fill(LEFT, TOP + rank * ROW, round(end) - LEFT, BAR, (241, 241, 241))
        canvas.number(rank, LEFT // 2, TOP + rank * ROW + BAR // 2)
    for box in drawn.boxes:
        left, right = round(box.x), round(box.x + box.width)
        canvas.fill(left, round(box.y), max(1, right - left - 1), round(box.height), box.color)
        number = box.span.action.micro_batch
        if len(str(number)) * 4 * _DOT <= right - left:
            canvas.number(number, (left + right) // 2, round(box.y + box.height / 2))
    return canvas.file()


class _Canvas:
    """White pixels to draw on."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.rows = [bytearray(b"\xff" * 3 * width) for _ in range(height)]

    def fill(self, x: int, y: int, width: int, height: int, color: Color) -> None:
        width = min(width, self.width - x)
        for row in self.rows[y : y + height]:
            row[3 * x : 3 * (x + width)] = bytes(color) * width

    def number(self, number: int, x: int, y: int) -> None:
        """Draw a number around a point."""
        digits = str(number)
        left, top = x - (4 * len(digits) - 1) * _DOT // 2, y - 5 * _DOT // 2
        for place, digit in enumerate(digits):
            for line, bits in enumerate(_DIGITS[int(digit)]):
                for column in range(3):
                    if int(bits) & 4 >> column:
                        self.fill(left + (4 * place + column) * _DOT, top + line * _DOT, _DOT, _DOT, _INK)

    def file(self) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = struct.pack(">IIBBBBB", self.width, len(self.rows), 8, 2, 0, 0, 0)  # 8 bits each of red, green, blue
        pixels = zlib.compress(b"".join(b"\0" + row for row in self.rows), 9)  # 0: a row as it is
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
