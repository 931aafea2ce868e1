"""The comparison of a sweep's jobs as a table: for the terminal, as Markdown, and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_zero.config.results import FAILED, STARTED

# key in result.json, title in the table, how a number is written
_COLUMNS = (
    ("val_loss", "val loss", "{:.4f}"),
    ("val_bpb", "bits/byte", "{:.4f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("state_bytes_per_rank", "model state/rank", "bytes"),
    ("sent_bytes_per_step", "sent/step", "bytes"),
    ("seconds", "time", "{:.0f} s"),
)


def common_overrides(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the overrides that all jobs share, none if there is only one job."""
    first = results[0].get("overrides", [])
    return [line for line in first if len(results) > 1 and all(line in r.get("overrides", []) for r in results)]


def own_overrides(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for every job what sets it apart from the others: its overrides without the common ones."""
    common = common_overrides(results)
    return [" ".join(line for line in result.get("overrides", []) if line not in common) for result in results]


def tabulate(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the overrides that all jobs share, and the table: a row of titles, then a row per job."""
    columns = [column for column in _COLUMNS if any(column[0] in result for result in results)]
    rows = [["job", "overrides", *(title for _, title, _ in columns), "status"]]
    for own, result in zip(own_overrides(results), results, strict=True):
        cells = [number(result.get(key), form) for key, _, form in columns]
        rows.append([str(result.get("job", "")), own, *cells, _status(result)])
    return common_overrides(results), rows


def number(value: Any, form: str) -> str:
    """Return a number in words: ``form`` is a format, or ``bytes``. What is no number is a dash."""
    if not isinstance(value, int | float):
        return "-"
    return _bytes(value) if form == "bytes" else form.format(value)


def text(rows: Sequence[Sequence[str]]) -> str:
    """Return the table for a terminal; names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (1, len(rows[0]) - 1)
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|" + "|".join(" --- " if i in (1, len(rows[0]) - 1) else " ---: " for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def write_csv(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write every key that some job has, unrounded."""
    first = ["job", "overrides", "status"]
    keys = first + sorted({key for result in results for key in result} - set(first))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        for result in results:
            writer.writerow({**result, "overrides": " ".join(result.get("overrides", []))})


def _status(result: Mapping[str, Any]) -> str:
    status = str(result.get("status", STARTED))
    if status == STARTED:
        return "NOT FINISHED"
    return "FAILED " + _shortened(str(result.get("error", ""))) if status == FAILED else status


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def _shortened(text: str, width: int = 80) -> str:
    first = text.splitlines()[0] if text else ""
    return first if len(first) <= width else first[: width - 3] + "..."
