"""What a job leaves in its folder: ``result.json``, with what it measured, what it was told, and how it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = "result.json"

# A job's status. It is there from the start, so that a job that was cut off is told from one that never began.
STARTED, COMPLETED, FAILED = "started", "completed", "failed"


def write_result(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write what a job measured, to be called by rank 0 alone.

    Args:
        folder: the job's output folder.
        result: plain numbers and strings. The table shows ``val_loss``, ``val_bpb``, ``tokens_per_second``,
            ``state_bytes_per_rank`` and ``sent_bytes_per_step`` (bytes), the picture ``buffer_bytes_per_rank`` too, and
            ``results.csv`` everything.
    """
    path = Path(folder) / RESULT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dict(result), indent=2) + "\n")
    os.replace(temporary, path)


def read_result(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a job has left in its folder, nothing if there is no such file or it cannot be read."""
    try:
        result = json.loads((Path(folder) / RESULT).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return result if isinstance(result, dict) else {}


def read_results(folder: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """Return the results that jobs below ``folder`` have written, in the order of the jobs.

    Args:
        folder: of the sweep.
        since: results from before this time, in seconds since the epoch, are of an earlier sweep and left out.
    """
    # 1 s: coarse clocks of file systems
    files = [file for file in folder.rglob(RESULT) if file.stat().st_mtime >= since - 1]
    return sorted((read_result(file.parent) for file in files), key=lambda result: int(result.get("job", 0)))


def unfinished(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the jobs that were not completed."""
    return [int(result.get("job", 0)) for result in results if result.get("status") != COMPLETED]


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: numbers of whatever library as Python's own, tuples as lists.

    Raises:
        TypeError: if it holds something else.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: torch's, for a tensor of several elements
        raise TypeError(f"a {type(value).__name__} is neither a number nor text") from None
