"""What a Hydra app leaves behind: a ``result.json`` per job, and one table of all jobs at the end of a sweep.

The task function writes ``result.json`` into the job's folder with what it measured (:func:`write_result`); the
callback adds the job's overrides, its status and its time, for failed jobs too.
"""

from __future__ import annotations

import atexit
import csv
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lit_zero.core.errors import LitZeroError

RESULT = "result.json"

# key in result.json, title in the table, how a number is written
_COLUMNS = (
    ("val_loss", "val loss", "{:.4f}"),
    ("val_bpb", "bits/byte", "{:.4f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("state_bytes_per_rank", "model state/rank", "bytes"),
    ("sent_bytes_per_step", "sent/step", "bytes"),
    ("seconds", "time", "{:.0f} s"),
)


def write_result(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write what a job measured, to be called by rank 0 alone.

    Args:
        folder: the job's output folder.
        result: plain numbers and strings; the table shows ``val_loss``, ``val_bpb``, ``tokens_per_second``,
            ``state_bytes_per_rank`` and ``sent_bytes_per_step`` (bytes), and the files beside it everything.
    """
    path = Path(folder) / RESULT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dict(result), indent=2) + "\n")
    os.replace(temporary, path)


class SweepTable(Callback):
    """Print one table of all jobs of a sweep; ``results.md`` and ``results.csv`` in its folder hold it too."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._since = 0.0  # when the sweep started, in seconds of the file system's clock
        self._job_since = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the sweep's jobs will be."""
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self._since = time.time()
        # Hydra 1.3 calls on_multirun_end only if every job succeeded.
        atexit.register(self._show)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forget what an earlier job left in the same folder."""
        if _is_rank_zero():
            self._job_since = time.time()
            (Path(config.hydra.runtime.output_dir) / RESULT).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Complete the job's ``result.json``, or write it for a job that failed."""
        if not _is_rank_zero():
            return
        folder = Path(config.hydra.runtime.output_dir)
        try:
            result = json.loads((folder / RESULT).read_text())
        except FileNotFoundError:
            result = {}
        result["overrides"] = list(config.hydra.overrides.task)
        result["job"] = config.hydra.job.get("num", 0) if self._folder is not None else 0
        result["seconds"] = round(time.time() - self._job_since, 3)
        result["status"] = "completed"
        if job_return.status is not JobStatus.COMPLETED:
            result["status"] = "failed"
            error = job_return._return_value
            # lit_zero's own errors say what happened; of others, the type is half of the message
            result["error"] = str(error) if isinstance(error, LitZeroError) else f"{type(error).__name__}: {error}"
        write_result(folder, result)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show the table."""
        atexit.unregister(self._show)
        self._show()

    def _show(self) -> None:
        if self._folder is None:
            return
        results = read_results(self._folder, self._since)
        if not results:
            return
        common, rows = tabulate(results)
        text = _plain(rows)
        print(f"\n{len(results)} jobs in {self._folder}" + (f", all with {' '.join(common)}" if common else ""))
        print(text, flush=True)
        (self._folder / "results.md").write_text(_markdown(rows))
        _write_csv(self._folder / "results.csv", results)


def read_results(folder: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """Return the results that jobs below ``folder`` have written, in the order of the jobs.

    Args:
        folder: of the sweep.
        since: results from before this time, in seconds since the epoch, are of an earlier sweep and left out.
    """
    files = [
        file for file in folder.rglob(RESULT) if file.stat().st_mtime >= since - 1
    ]  # 1 s: coarse clocks of file systems
    return sorted((json.loads(file.read_text()) for file in files), key=lambda result: int(result.get("job", 0)))


def tabulate(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the overrides that all jobs share, and the table: a row of titles, then a row per job."""
    common = [
        line
        for line in results[0].get("overrides", [])
        if len(results) > 1 and all(line in r.get("overrides", []) for r in results)
    ]
    columns = [column for column in _COLUMNS if any(column[0] in result for result in results)]
    rows = [["job", "overrides", *(title for _, title, _ in columns), "status"]]
    for result in results:
        own = " ".join(line for line in result.get("overrides", []) if line not in common)
        cells = [_cell(result.get(key), form) for key, _, form in columns]
        status = result.get("status", "")
        if status == "failed":
            status = "FAILED " + _shortened(str(result.get("error", "")))
        rows.append([str(result.get("job", "")), own, *cells, status])
    return common, rows


def _is_rank_zero() -> bool:
    return (
        int(os.environ.get("LOCAL_RANK", 0)) == 0
        and int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0))) == 0
    )


def _cell(value: Any, form: str) -> str:
    if not isinstance(value, int | float):
        return "-"
    return _bytes(value) if form == "bytes" else form.format(value)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def _shortened(text: str, width: int = 80) -> str:
    first = text.splitlines()[0] if text else ""
    return first if len(first) <= width else first[: width - 3] + "..."


def _plain(rows: Sequence[Sequence[str]]) -> str:
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


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|" + "|".join(" --- " if i in (1, len(rows[0]) - 1) else " ---: " for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _write_csv(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write every key that some job has, unrounded."""
    first = ["job", "overrides", "status"]
    keys = first + sorted({key for result in results for key in result} - set(first))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        for result in results:
            writer.writerow({**result, "overrides": " ".join(result.get("overrides", []))})
