"""A job of a sweep in processes of its own: whatever ends it, a lack of memory too, ends no other job.

[Note: a job of a sweep has processes of its own]
Hydra runs the jobs of a sweep inside processes that outlive them: the one in which the user typed the command, or a
worker of joblib's or submitit's. A job that trained there would find what the one before has left (the state of
modules, caches, memory on a device, numbers of threads), and one that is killed would take the sweep along. So that
process only waits. Rank 0 of the job is a new process, which starts the other ranks as ever, and leaves in a file what
the task function has returned or raised. It leads a process group, so that all of a job can be ended at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lit_zero.config import jobs
from lit_zero.config.results import COMPLETED, plain, read_result
from lit_zero.core.errors import LitZeroError

T = TypeVar("T")

REPORT = "LIT_ZERO_REPORT"  # set for rank 0 of a sweep's job: the process that waits for it, and the file to leave
STOP_SECONDS = 30.0  # for a job to end by itself once the user has interrupted the sweep
POLL_SECONDS = 1.0


class JobError(LitZeroError, RuntimeError):
    """A job of a sweep has failed in its own process; the message says why, with the traceback if there is one."""


def run(task: Callable[[T], Any] | None, cfg: T) -> Any:
    """Run the Hydra job that this process is in the middle of.

    A job of a sweep runs in processes of its own, see the note above, or not at all if it is kept of a sweep that is
    taken up again. Any other runs here.

    Args:
        task: the user's function; ``None`` in a worker process of a launcher plugin, which runs jobs of sweeps only.
        cfg: its configuration.

    Returns:
        What ``task`` has returned. If that was in another process, as far as JSON can hold it, else ``None``.

    Raises:
        JobError: if the job has failed in a process of its own.
    """
    waiting = os.environ.pop(REPORT, None)  # not for the processes that the job starts
    if waiting is not None:
        parent, _, report = waiting.partition(" ")
        assert task is not None
        return _run_and_report(task, cfg, int(parent), Path(report))
    job = jobs.current_job()
    if job is None or not job.in_sweep:
        assert task is not None
        return task(cfg)
    result = read_result(job.folder)
    if job.resume and result.get("status") == COMPLETED:  # the callback has kept it: it belongs to this very job
        return result["returned"]
    return run_apart(job)


def run_apart(job: jobs.Job) -> Any:
    """Run a job in processes of its own and return what its task function has returned there.

    Raises:
        JobError: if it has failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="lit_zero-"))
    report = folder / "report.json"
    process = subprocess.Popen(
        job.command(0),
        cwd=job.cwd,
        env={**os.environ, REPORT: f"{os.getpid()} {report}"},
        stdin=subprocess.DEVNULL,  # a debugger in a group that the terminal does not listen to would wait for ever
        process_group=0,
    )
    try:
        code = _wait(process)
        told = json.loads(report.read_text()) if report.exists() else {}
    finally:
        _end_what_is_left(process)
        shutil.rmtree(folder, ignore_errors=True)
    if "error" in told:
        raise JobError(told["error"])
    if "returned" not in told:
        raise JobError(f"rank 0 ended with {jobs.exit_in_words(code)}; its own output above may say why.")
    if code:
        words = jobs.exit_in_words(code)
        print(f"lit_zero: the job was done, but its process then ended with {words}.", file=sys.stderr, flush=True)
    return told["returned"]


def _run_and_report(task: Callable[[T], Any], cfg: T, parent: int, path: Path) -> Any:
    """Call ``task`` and leave in ``path`` what it returns or raises, for the process ``parent``."""
    threading.Thread(target=_end_after, args=(parent,), name="lit_zero-sweep-watch", daemon=True).start()
    try:
        value = task(cfg)
    except Exception as error:
        text = in_words(error)
        if not isinstance(error, LitZeroError):
            text += "\n\nThe traceback of rank 0:\n" + "".join(traceback.format_exception(error))
        _write(path, {"error": text})
        raise
    try:
        _write(path, {"returned": plain(value)})
    except TypeError as error:
        print(f"lit_zero: what the job returned cannot reach the sweep ({error}), which sees None.", file=sys.stderr)
        _write(path, {"returned": None})
    return value


def in_words(error: object) -> str:
    """Return what an error says: of lit_zero's own the message, of others the type too, which is half of it."""
    return str(error) if isinstance(error, LitZeroError) else f"{type(error).__name__}: {error}"


def _write(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report))
    os.replace(temporary, path)


def _end_after(parent: int) -> None:
    """End this process and those it has started soon after ``parent`` is gone."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a job; pass on to it what is meant to end the sweep."""
    with _termination_goes_to(process):
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it is not in the terminal's group, so it has not heard
            with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            raise


@contextmanager
def _termination_goes_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let SIGTERM end the job first and then this process, if the program does nothing else with that signal."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    came = False

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        process.send_signal(signum)

    signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if came:
        sys.exit(128 + signal.SIGTERM)


def _end_what_is_left(process: subprocess.Popen[bytes]) -> None:
    """End the other processes of a job that has failed; those of one that went well have ended by themselves."""
    if process.poll() != 0:
        with suppress(ProcessLookupError, PermissionError):  # of a group that is empty
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
