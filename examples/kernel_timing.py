"""What benchmarks of kernels share: contenders that take turns, a copy's bandwidth beside them, a table, a plot.

[Note: memory anew for each turn] On a CPU the same kernel over the same data in other memory takes 5 percent more or
less, and what is made first in a process is slowest: it gets the scattered pages. So contenders are built anew in each
turn, each as often first as any other, and ratios are formed within turns.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import torch

Run = Callable[[], object]
COPIED = 1 << 28  # bytes that the copy beside the contenders reads, and writes
_COPY = ""  # its name among theirs


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Attributes:
        name: as the table shows it.
        build: makes all that it needs on the device and returns what does the work once. It is called in each turn.
            What it raises (a package that is not installed, no kernel for this device) becomes the contender's row.
        moved: bytes that it cannot but read and write, where they are not the case's.
    """

    name: str
    build: Callable[[], Run]
    moved: int | None = None


@dataclass(frozen=True)
class Case:
    """The same work, done by several contenders; the first one is ours.

    Attributes:
        name: what is done, to how much.
        moved: bytes that the work cannot but read and write, once.
        contenders: take turns.
    """

    name: str
    moved: int
    contenders: Sequence[Contender]


@dataclass
class Timed:
    """What one case has measured.

    Attributes:
        case: the case.
        seconds: of each contender, one median for each round; in the same order for all.
        failed: why a contender did not run.
        bandwidth: bytes per second that a copy reads and writes on the same device, in the same rounds.
    """

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    bandwidth: float = 0.0

    def rate(self, contender: Contender) -> float:
        """Bytes per second of a contender, of those that it cannot but move."""
        return (contender.moved or self.case.moved) / statistics.median(self.seconds[contender.name])

    def ratio(self, contender: Contender) -> float:
        """How long a contender takes, in times of the first one."""
        first = self.seconds[self.case.contenders[0].name]
        return statistics.median(one / other for one, other in zip(self.seconds[contender.name], first, strict=True))


def measure(case: Case, device: torch.device, rounds: int, repeats: int) -> Timed:
    """Let the contenders of a case and a copy take turns. See [Note: memory anew for each turn].

    Args:
        case: what is measured.
        device: where.
        rounds: turns of each.
        repeats: runs in a turn; its median counts.
    """
    timed = Timed(case)
    contenders = [*case.contenders, Contender(_COPY, lambda: _copy(device))]
    for turn in range(rounds):
        first = turn % len(contenders)
        ready = dict[str, Run]()
        for contender in contenders[first:] + contenders[:first]:
            if contender.name in timed.failed:
                continue
            try:
                run = contender.build()
                run()  # makes states, compiles
                ready[contender.name] = run
            except Exception as error:
                text = str(error).strip().splitlines()
                timed.failed[contender.name] = f"{type(error).__name__}: {text[0] if text else ''}"
        for name, run in ready.items():
            timed.seconds.setdefault(name, []).append(_seconds(run, device, repeats))
        del run
        ready.clear()
        gc.collect()  # the next turn needs the memory
    timed.bandwidth = 2 * COPIED / statistics.median(timed.seconds.pop(_COPY))
    return timed


def _copy(device: torch.device) -> Run:
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _seconds(run: Run, device: torch.device, repeats: int) -> float:
    """Return the median time of a few runs."""
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def table(timed: Timed) -> str:
    """Return a case as a table in Markdown."""
    case = timed.case
    ours = case.contenders[0].name in timed.seconds
    rows = [
        f"| {case.name} | median, ms | best, ms | of ours | GB/s | of a copy's {timed.bandwidth / 1e9:.1f} GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for contender in case.contenders:
        if contender.name in timed.failed:
            rows.append(f"| {contender.name} | did not run: {timed.failed[contender.name]} | | | | |")
            continue
        seconds, rate = timed.seconds[contender.name], timed.rate(contender)
        middle = statistics.median(seconds)
        ratio = f"{timed.ratio(contender):.2f}" if ours else ""
        cells = [f"{middle * 1e3:.2f}", f"{min(seconds) * 1e3:.2f}", ratio, f"{rate / 1e9:.1f}"]
        rows.append("| " + " | ".join([contender.name, *cells, f"{rate / timed.bandwidth:.0%}"]) + " |")
    return "\n".join(rows)


_WIDTH, _LEFT, _BAR, _ROW = 760, 250, 14, 20  # pixels


def plot(timed: Sequence[Timed], title: str) -> str:
    """Return the bytes per second of all contenders as bars in an SVG, a line standing for the copy."""
    most = max([each.bandwidth for each in timed] + [each.rate(c) for each in timed for c in _ran(each)])
    scale, parts, y = (_WIDTH - _LEFT - 90) / most, [_text(8, 20, title, "bold")], 44
    for each in timed:
        parts.append(_text(8, y, each.case.name, "bold"))
        top, y = y + 6, y + _ROW
        for contender in _ran(each):
            rate = each.rate(contender)
            color = "#2b6cb0" if contender is each.case.contenders[0] else "#a0aec0"
            parts.append(_text(16, y, contender.name))
            parts.append(f'<rect x="{_LEFT}" y="{y - 11}" width="{rate * scale:.1f}" height="{_BAR}" fill="{color}"/>')
            parts.append(_text(_LEFT + rate * scale + 6, y, f"{rate / 1e9:.1f} GB/s"))
            y += _ROW
        x = _LEFT + each.bandwidth * scale
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{y - 12}" stroke="#c53030"/>')
        y += 16
    parts.append(
        _text(8, y, "Bytes that the work must move per second; red line: a copy of 256 MiB on the same device.")
    )
    size = f'width="{_WIDTH}" height="{y + 12}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect {size} fill="white"/>\n{body}\n</svg>\n'
    )


def _ran(timed: Timed) -> list[Contender]:
    return [contender for contender in timed.case.contenders if contender.name in timed.seconds]


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}">{escape(text)}</text>'
