"""The processes of one job on one machine: rank 0 starts the others, and all end together.

[Note: how a job ends when a rank fails]
Rank 0 starts to train only when every rank has checked in, so a rank that dies while it starts is noticed while rank 0
still runs Python. Later, a rank that fails writes its traceback to a file and exits. Its broken connections make rank
0 raise some error of communication, in most cases; rank 0 then finds the rank's file or exit code and raises RankError
in its place. If rank 0 waits in a call that does not notice, a thread interrupts it by a signal after
``NOTICE_SECONDS``, and if that does not wake it either, ends the process after ``STUCK_SECONDS``. If rank 0 fails, its
process ends and the other ranks notice, by their connections or by their watch on it.
"""

from __future__ import annotations

import atexit
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
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol, TypeVar

from lit_zero.comm import meeting, process_group
from lit_zero.config import jobs
from lit_zero.core.errors import LitZeroError
from lit_zero.strategy.kinds import kind_of, same_kind

T = TypeVar("T")

NOTICE_SECONDS = 4.0  # for rank 0 to notice by itself that a rank has failed
STUCK_SECONDS = 15.0  # after which a process that has not noticed is ended
SETTLE_SECONDS = 2.0  # in which the exit code of a rank follows the loss of its connection
LEAVE_SECONDS = 30.0  # for the ranks to end once rank 0 has finished
ASK_SECONDS = 30.0  # after which rank 0 says for which ranks it waits
POLL_SECONDS = 0.1
_SAME_WAY = "Every rank must run the same script up to the same call of the Trainer."


class RankError(LitZeroError, RuntimeError):
    """A process of the job has failed, not necessarily this one; the message holds its traceback."""


class ClusterEnvironment(Protocol):
    """What the launcher asks of Lightning's cluster environment, of whichever distribution."""

    @property
    def creates_processes_externally(self) -> bool: ...

    @property
    def main_address(self) -> str: ...

    @property
    def main_port(self) -> int: ...

    def local_rank(self) -> int: ...

    def node_rank(self) -> int: ...

    def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...


@dataclass(frozen=True, order=True)
class Failure:
    """What ended a rank other than rank 0; the earliest of several is the cause of the others.

    Attributes:
        time: seconds since the epoch; 0 if it is unknown.
        rank: local rank.
        kind: type and message of the exception, empty if there was none to report.
        text: the traceback, or how the process ended.
    """

    time: float
    rank: int
    kind: str
    text: str

    def message(self, ranks: int) -> str:
        """Return what to tell the user of a job of so many ``ranks``."""
        if not self.kind:
            return f"rank {self.rank} of {ranks} ended with {self.text}; its own output above may say why."
        return f"rank {self.rank} of {ranks} failed with {self.kind}\n\nThe traceback of rank {self.rank}:\n{self.text}"


def first_failure(folder: Path, codes: Mapping[int, int | None], since: float = 0.0) -> Failure | None:
    """Return the failure that came first, ``None`` if no rank has failed.

    Args:
        folder: where the ranks leave the tracebacks of their failures.
        codes: exit codes by rank, ``None`` for a rank that lives; to be read before this is called, since a rank
            writes first and ends then.
        since: seconds since the epoch; a rank that has reported an error before and lives on has dealt with it.
    """
    failures = []
    for rank, code in codes.items():
        try:
            report = json.loads((folder / f"rank{rank}.error").read_text())
        except FileNotFoundError:
            # Killed, or failed on its own outside the Trainer: earlier than what the others then report of lost
            # connections.
            report = {"time": 0.0, "kind": "", "text": jobs.exit_in_words(code)} if code else None
        if report is not None and (code or report["time"] >= since):
            failures.append(Failure(rank=rank, **report))
    return min(failures, default=None)


class Follower:
    """A rank that was started by a leader.

    Args:
        folder: where it checks in and leaves the traceback of its failure.
        rank: local rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        (folder / f"rank{rank}.ready").touch()
        threading.Thread(target=self._watch, args=(os.getppid(),), name="lit_zero-watch", daemon=True).start()

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function``; if it fails, leave the traceback where the leader finds it."""
        path = self._folder / f"rank{self._rank}.error"
        path.unlink(missing_ok=True)  # of an earlier call, whose error the script has dealt with
        try:
            return function()
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            report = json.dumps({"time": time.time(), "kind": kind_of(error), "text": text})
            temporary = path.with_suffix(".tmp")
            temporary.write_text(report)
            os.replace(temporary, path)
            raise

    def _watch(self, leader: int) -> None:
        """End this process soon after the leader is gone, in case it waits in a call that does not notice."""
        while os.getppid() == leader:
            time.sleep(1.0)
        time.sleep(STUCK_SECONDS)
        os._exit(1)


class Leader:
    """Rank 0 of a machine: starts the other ranks and watches them. Built by :meth:`start`.

    Attributes:
        job: the Hydra job, ``None`` outside Hydra.
        alone: the job has one rank, this one.
    """

    def __init__(self) -> None:
        self.job = jobs.current_job()
        self.alone = False
        self._folder = Path()  # where the other ranks leave word
        self._port = 0  # where the ranks meet
        self._before: dict[str, str | None] = {}  # environment variables that we changed, as they were
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._since = 0.0  # when the last run() began, in seconds since the epoch
        self._inside = False  # rank 0 is inside run()
        self._failed = False  # the last run() has raised
        self._listens = False  # a signal wakes rank 0
        self._closed = threading.Event()

    @classmethod
    def start(
        cls, environment: ClusterEnvironment, num_processes: int, num_nodes: int, timeout: float = 1800.0
    ) -> Leader:
        """Start the other ranks of this machine and wait until each has got as far as this one.

        Args:
            environment: says where the ranks meet.
            num_processes: ranks on this machine.
            num_nodes: machines.
            timeout: seconds to wait for the ranks.

        Raises:
            RankError: if one of them ends before, or does not come.
        """
        self = cls()
        self.alone = num_processes * num_nodes == 1
        self._set("MASTER_ADDR", environment.main_address)
        self._set("MASTER_PORT", str(environment.main_port))
        self._set("NODE_RANK", str(environment.node_rank()))
        self._set("WORLD_SIZE", str(num_processes * num_nodes))
        self._set("LOCAL_RANK", str(environment.local_rank()))
        self._port = environment.main_port
        if environment.node_rank() == 0:
            meeting.hold_port(self._port)  # see [Note: listening early]
        if num_nodes == 1:  # else other leaders start ranks too, and have not heard of each other
            self._set(meeting.JOB, uuid.uuid4().hex)
        if num_processes == 1:
            return self
        self._folder = Path(tempfile.mkdtemp(prefix="lit_zero-"))
        atexit.register(self.close)
        for rank in range(1, num_processes):
            command = [*jobs.this_script(), *sys.argv[1:]] if self.job is None else self.job.command(rank)
            variables = {**os.environ, "LOCAL_RANK": str(rank), jobs.TEAM: str(self._folder)}
            cwd = None if self.job is None else self.job.cwd
            self._ranks[rank] = subprocess.Popen(command, env=variables, cwd=cwd)
        began, asked = time.monotonic(), False
        while waiting := [rank for rank in self._ranks if not (self._folder / f"rank{rank}.ready").exists()]:
            for rank in waiting:
                code = self._ranks[rank].poll()
                if code is not None and not (self._folder / f"rank{rank}.ready").exists():
                    self._failed = True
                    self.close()
                    raise RankError(
                        f"rank {rank} of {num_processes} ended ({jobs.exit_in_words(code)}) before it began to train. "
                        f"Its own output above says why. {_SAME_WAY}"
                    )
            waited, absent = time.monotonic() - began, f"rank {', '.join(map(str, waiting))} of {num_processes}"
            if waited > timeout:
                self._failed = True
                self._kill()
                self.close()
                raise RankError(
                    f"{absent} did not begin to train within timeout={timeout:g} s and was ended. {_SAME_WAY} If the "
                    "script only needs longer before that, raise timeout in ZeroStrategy."
                )
            if waited > ASK_SECONDS and not asked:
                asked = True
                print(
                    f"lit_zero: still waiting, after {waited:.0f} s, for {absent} to begin to train. {_SAME_WAY}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(POLL_SECONDS)
        threading.Thread(target=self._watch, name="lit_zero-watch", daemon=True).start()
        return self

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function``.

        Raises:
            RankError: if another rank has failed.
        """
        self._since = time.time()
        cause = self._first_failure()
        if cause is not None:
            self._give_up(cause)
        with self._interruptible():
            self._inside, self._failed = True, False
            try:
                return function()
            except BaseException as error:
                self._inside, self._failed = False, True
                cause = self._cause_of(error) if isinstance(error, Exception) else None
                if cause is None:
                    raise
                self._give_up(cause, "" if isinstance(error, RankError) else kind_of(error))
            finally:
                self._inside = False

    def send(self, signum: int) -> None:
        """Send a signal to the other ranks that are alive."""
        for process in self._ranks.values():
            if process.poll() is None:
                process.send_signal(signum)

    def close(self) -> None:
        """Leave the process group, let the other ranks end, end those that do not, and restore the environment."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self.close)
        meeting.let_go_of_port(self._port)
        if not self._failed:
            self._wait(NOTICE_SECONDS)
        # Ranks that still wait for this one notice that it leaves. In a thread, because leaving may itself wait for a
        # rank that is gone.
        leave = threading.Thread(target=process_group.destroy, name="lit_zero-leave", daemon=True)
        leave.start()
        leave.join(NOTICE_SECONDS)
        self._wait(NOTICE_SECONDS if self._failed else LEAVE_SECONDS)
        stuck = self._alive()
        self._kill()
        failed = {
            rank: process.returncode
            for rank, process in self._ranks.items()
            if process.returncode and rank not in stuck
        }
        if not self._failed and (stuck or failed):
            told = [f"rank {rank} did not end and was killed" for rank in stuck]
            told += [f"rank {rank} failed afterwards ({jobs.exit_in_words(code)})" for rank, code in failed.items()]
            print(f"lit_zero: rank 0 has finished, but {', '.join(told)}.", file=sys.stderr, flush=True)
        if self._ranks:
            shutil.rmtree(self._folder, ignore_errors=True)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _set(self, name: str, value: str) -> None:
        self._before[name] = os.environ.get(name)
        os.environ[name] = value

    def _alive(self) -> list[int]:
        return [rank for rank, process in self._ranks.items() if process.poll() is None]

    def _wait(self, seconds: float) -> None:
        """Return when the other ranks have ended, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while self._alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _kill(self) -> None:
        # Not SIGTERM: Lightning answers it with a collective, and a rank that waits in one does not answer at all.
        self.send(signal.SIGKILL)
        for process in self._ranks.values():
            process.wait()

    def _first_failure(self) -> Failure | None:
        """Return the failure that came first, ``None`` if no other rank has failed."""
        codes = {rank: process.poll() for rank, process in self._ranks.items()}
        return first_failure(self._folder, codes, self._since)

    def _cause_of(self, error: Exception) -> Failure | None:
        """Return the failure of another rank that made rank 0 raise ``error``, ``None`` if that is rank 0's own."""
        now = time.time()
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._first_failure() is None and self._ranks and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        time.sleep(5 * POLL_SECONDS)  # a connection is lost a little before the exit code is known
        cause = self._first_failure()
        # The same error on every rank: rank 0's own tells as much, and has its type.
        if cause is None or same_kind(cause.kind, error) or cause.time > now:
            return None
        return cause

    def _give_up(self, cause: Failure, noticed: str = "") -> NoReturn:
        """End the other ranks and raise what ended one of them."""
        self._failed = True
        self._wait(NOTICE_SECONDS)
        self._kill()
        if noticed:
            noticed = f"\nRank 0 noticed by {noticed}"
        # "from None": what rank 0 raised only follows from this, and its long traceback would stand in front of the
        # one that matters.
        raise RankError(cause.message(len(self._ranks) + 1) + noticed) from None

    def _watch(self) -> None:
        """Wake rank 0 if a rank fails and rank 0 does not notice, and end it if it does not wake."""
        noticed = None
        while not self._closed.wait(POLL_SECONDS):
            if not self._inside or self._first_failure() is None:
                noticed = None
                continue
            noticed = noticed or time.monotonic()
            waited = time.monotonic() - noticed
            if waited > STUCK_SECONDS:
                cause = self._first_failure()
                reason = cause.message(len(self._ranks) + 1) if cause is not None else ""
                print(f"lit_zero: rank 0 is stuck and ends. {reason}", file=sys.stderr, flush=True)
                self._kill()
                shutil.rmtree(self._folder, ignore_errors=True)
                os._exit(1)
            if waited > NOTICE_SECONDS and self._listens:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                time.sleep(1.0)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the watching thread raise RankError in this one, if this is the main thread: no other takes signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def wake(signum: int, frame: FrameType | None) -> None:
            if self._inside:
                raise RankError("another rank has failed")

        before = signal.signal(signal.SIGUSR2, wake)
        self._listens = True
        try:
            yield
        finally:
            self._listens = False
            # A wake-up may still be on its way: better unheard than in the hands of a default that ends the process.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN if before in (signal.SIG_DFL, None) else before)
