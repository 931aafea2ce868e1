"""Ranks for tests: processes that form a gloo group over loopback, started once per world size and session.

``RankPool(2).run(fn, *args)`` calls ``fn(*args)`` on two ranks and returns their results in rank order. One call, in
phases:

1. Every rank takes over the caller's environment variables and working directory, adds what ``torchrun`` would set,
   resets what an earlier call may have changed (threads, default dtype, random seeds) and joins a process group that is
   new for this call.
2. It calls ``fn`` and answers with the result, or with its traceback.
3. When all have answered, every rank leaves the process group and collects garbage: nothing of a call outlives it.

Anything but a result from every rank raises ``RankFailure`` and ends the processes; the next call starts new ones. That
costs a few tenths of a second, because ranks are forked from a server process that has imported what they need.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import random
import reprlib
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

START_TIMEOUT = 120.0  # seconds for a rank to import torch and report, on a machine that is busy with other things
GRACE = 5.0  # seconds that the other ranks get to answer once one has failed
HOST = "127.0.0.1"
# What the server imports before it forks ranks.
PRELOAD = ["torch.distributed", "lightning.pytorch", "lit_zero", "pytest"]


class RankFailure(Exception):
    """A call did not give a result on every rank; the text holds the failing rank's traceback.

    Attributes:
        rank: the rank that failed first.
        exception: what that rank raised, or ``None`` when it hung, died, or raised something that cannot be pickled.
    """

    def __init__(self, text: str, rank: int, exception: BaseException | None = None) -> None:
        super().__init__(text)
        self.rank = rank
        self.exception = exception


class RankHang(RankFailure):
    """At least one rank did not answer in time and none raised; the text holds the silent ranks' Python stacks."""


@dataclass(frozen=True)
class _Call:
    number: int  # since the ranks were started; keeps the keys of one process group apart from the next one's
    environment: dict[str, str]
    directory: str
    payload: bytes  # pickled (fn, args), apart, so that an import error while unpickling is the rank's own failure


@dataclass(frozen=True)
class _Result:
    value: Any


@dataclass(frozen=True)
class _Failure:
    rank: int
    when: float  # seconds of the machine's monotonic clock, which all processes share
    summary: str  # one line
    traceback: str
    exception: bytes | None  # pickled


@dataclass
class _Rank:
    """The caller's side of one rank."""

    rank: int
    process: mp.process.BaseProcess
    connection: Connection
    stacks: Path  # faulthandler writes here


class RankPool:
    """``world_size`` processes that run one function together, again and again. See the module's docstring.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        if world_size < 1:
            raise ValueError(f"RankPool needs at least 1 rank, got world_size={world_size}.")
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._calls = 0
        # A torch.distributed.TCPStore. Its server lives in this process, so that no rank's death takes it along.
        self._store: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order; empty while no rank runs."""
        return [rank.process.pid or 0 for rank in self._ranks]

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Call ``fn(*args)`` on every rank inside a fresh gloo group.

        Args:
            fn: a function of a module's top level (it is pickled by reference).
            args: anything that can be pickled; every rank gets a copy of its own.
            timeout: seconds for the whole call, without the start of the processes.

        Returns:
            What ``fn`` returned, in rank order.

        Raises:
            TypeError: ``fn`` or ``args`` cannot be pickled.
            RankFailure: a rank raised or died. The processes are gone; the next call starts new ones.
            RankHang: a rank did not answer in time. The same.
        """
        name = f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', fn)}"
        try:
            payload = pickle.dumps((fn, args))
        except Exception as error:
            raise TypeError(
                f"{name} and its arguments cannot be sent to the ranks: {error}. Expected a function of a module's top "
                "level and arguments that can be pickled; got a lambda, an inner function or something that is tied to "
                "this process."
            ) from error
        try:
            self._start()
            self._calls += 1
            deadline = time.monotonic() + timeout
            self._send(_Call(self._calls, each, os.getcwd(), payload) for each in self._environments())
            results = self._collect(name, deadline, timeout)
            deadline = max(deadline, time.monotonic() + GRACE)
            self._send([None] * self.world_size)
            self._collect(f"leaving the process group after {name}", deadline, timeout)
        except BaseException:  # KeyboardInterrupt and pytest-timeout too: a rank may be anywhere
            self.close()
            raise
        return results

    def close(self) -> None:
        """End the processes. The next ``run`` starts new ones."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.connection.close()
        self._ranks = []
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        atexit.unregister(self.close)

    def _start(self) -> None:
        if self._ranks and all(rank.process.is_alive() for rank in self._ranks):
            return
        self.close()
        import torch.distributed as dist

        atexit.register(self.close)
        self._calls = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        processes = context()
        for rank in range(self.world_size):
            ours, theirs = processes.Pipe()
            stacks = Path(self._folder.name, f"rank{rank}.txt")
            process = processes.Process(
                target=_serve, args=(rank, self.world_size, self._store.port, theirs, str(stacks)), name=f"rank{rank}"
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(rank, process, ours, stacks))
        self._collect("starting", time.monotonic() + START_TIMEOUT, START_TIMEOUT)

    def _environments(self) -> Iterator[dict[str, str]]:
        with socket.socket() as probe:  # for a test that makes a process group of its own from the environment
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        common = {
            **os.environ,
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": f"pool-{os.getpid()}-{self._calls}",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": _loopback(),
        }
        for rank in range(self.world_size):
            yield {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}

    def _send(self, messages: Iterable[_Call | None]) -> None:
        for rank, message in zip(self._ranks, messages, strict=True):
            with contextlib.suppress(OSError):  # it died; _collect meets the end of the connection and says so
                rank.connection.send_bytes(pickle.dumps(message))

    def _collect(self, what: str, deadline: float, timeout: float) -> list[Any]:
        """Return one answer per rank, or raise for the rank that failed first and those that are silent."""
        pending = {rank.connection: rank for rank in self._ranks}
        results: dict[int, Any] = {}
        failures: list[_Failure] = []
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[call-overload]
                answer = _receive(rank)
                if isinstance(answer, _Failure):
                    failures.append(answer)
                    deadline = min(deadline, time.monotonic() + GRACE)
                else:
                    results[rank.rank] = answer.value
        if failures or pending:
            self._raise(what, timeout, failures, sorted(pending.values(), key=lambda rank: rank.rank))
        return [results[rank] for rank in range(self.world_size)]

    def _raise(self, what: str, timeout: float, failures: list[_Failure], silent: list[_Rank]) -> NoReturn:
        stacks = "".join(f"\nStacks of rank {rank.rank}:\n{_dump_stacks(rank)}" for rank in silent)
        names = ", ".join(str(rank.rank) for rank in silent)
        if not failures:
            text = f"{what}: no answer from rank {names} of {self.world_size} within {timeout:g} s.\n{stacks}"
            raise RankHang(text, silent[0].rank)
        first, *others = sorted(failures, key=lambda failure: failure.when)
        text = f"{what}: rank {first.rank} of {self.world_size} failed.\n\n{first.traceback}"
        for other in others:
            text += f"\nAfter that rank {other.rank} failed: {other.summary}"
        if silent:
            text += f"\nAfter that no answer from rank {names} for {GRACE:g} s.\n{stacks}"
        raise RankFailure(text, first.rank, _unpickled(first.exception))


def context() -> Any:
    """Return how processes are made: forked from a server that has imported torch, where the system can."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    made = mp.get_context("forkserver")
    made.set_forkserver_preload(PRELOAD)
    return made


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def _receive(rank: _Rank) -> _Result | _Failure:
    try:
        return pickle.loads(rank.connection.recv_bytes())
    except (EOFError, OSError):
        rank.process.join(GRACE)
        code = rank.process.exitcode
        cause = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        # A rank that dies without a word is never the consequence of another one's error: it comes first.
        return _Failure(rank.rank, float("-inf"), f"died ({cause})", f"It died ({cause}).\n{_read(rank.stacks)}", None)
    except Exception as error:
        summary = f"its result cannot be unpickled: {error!r}"
        return _Failure(rank.rank, time.monotonic(), summary, f"It returned, but {summary}\n", None)


def _unpickled(exception: bytes | None) -> BaseException | None:
    try:
        return pickle.loads(exception) if exception else None
    except Exception:  # its class lives in a module that only the rank could import; the text still tells everything
        return None


def _dump_stacks(rank: _Rank) -> str:
    """Ask a silent rank for the stacks of all its Python threads."""
    if not hasattr(signal, "SIGUSR1") or rank.process.pid is None:
        return "  (this system has no SIGUSR1 to ask for them)\n"
    before = _read(rank.stacks)
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.process.pid, signal.SIGUSR1)
    for _ in range(60):
        time.sleep(0.05)
        stacks = _read(rank.stacks)
        if stacks != before:
            time.sleep(0.05)  # it may still be writing
            return _read(rank.stacks)[len(before) :]
    return "  (it does not react to signals: stopped, or stuck inside the kernel)\n"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# ---- inside a rank ----


def _serve(rank: int, world_size: int, port: int, connection: Connection, stacks: str) -> None:
    """Answer calls until the caller is gone."""
    threading.Thread(target=_end_with_caller, name="end with caller", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller decides
    with open(stacks, "w") as file:
        faulthandler.enable(file)  # a segmentation fault leaves its stack there
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        import torch.distributed as dist

        store = dist.TCPStore(HOST, port, is_master=False)
        gc.collect()
        gc.freeze()  # what is imported stays; collecting after a call looks at the call's objects only
        _answer(connection, _Result(None))
        while True:
            try:
                call: _Call | None = pickle.loads(connection.recv_bytes())
                if call is None:  # every rank has answered
                    _clean()
                    _answer(connection, _Result(None))
                else:
                    _prepare(rank, call)
                    prefix = dist.PrefixStore(f"call{call.number}", store)
                    dist.init_process_group("gloo", store=prefix, rank=rank, world_size=world_size)
                    dist.barrier()  # a rank that left at once would close connections that others are still making
                    fn, args = pickle.loads(call.payload)
                    _answer(connection, _Result(fn(*args)))
            except BaseException as error:  # pytest.fail, SystemExit: whatever ends the function is its failure
                if not isinstance(error, EOFError):
                    with contextlib.suppress(OSError):
                        _answer(connection, _failure(rank, error))
                # Its sockets close now, so ranks that wait for this one in a collective fail too instead of hanging.
                os._exit(1)


def _answer(connection: Connection, answer: _Result | _Failure) -> None:
    sys.stdout.flush()  # what this call printed belongs to the test that made it
    sys.stderr.flush()
    connection.send_bytes(pickle.dumps(answer))


def _prepare(rank: int, call: _Call) -> None:
    """Reset what an earlier call may have changed and take over the caller's surroundings."""
    import torch

    os.environ.clear()
    os.environ.update(call.environment)
    os.chdir(call.directory)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    # Lightning reads RANK for this when it is imported, and that happened in the server, before there was a rank.
    if "lightning_utilities.core.rank_zero" in sys.modules:
        sys.modules["lightning_utilities.core.rank_zero"].rank_zero_only.rank = rank


def _clean() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    gc.freeze()  # what a call has left stays: what it has imported, and what libraries remember


def _failure(rank: int, error: BaseException) -> _Failure:
    when = time.monotonic()
    frames = error.__traceback__.tb_next if error.__traceback__ else None  # without the frame of this file
    text = "".join(traceback.format_exception(type(error), error, frames))
    if isinstance(error, AssertionError) and not error.args and frames is not None:
        text += _locals(frames)
    try:
        pickled: bytes | None = pickle.dumps(error)
        pickle.loads(pickled)  # type: ignore[arg-type]  # some can be pickled but not unpickled
    except Exception:
        pickled = None
    summary = traceback.format_exception_only(type(error), error)[-1].strip()
    return _Failure(rank, when, summary, text, pickled)


def _locals(frames: Any) -> str:
    """Return the local variables where a bare assertion failed: pytest rewrites asserts in its own process only."""
    while frames.tb_next is not None:
        frames = frames.tb_next
    short = reprlib.Repr()
    short.maxother = short.maxstring = short.maxlong = 300
    return "".join(f"  {name} = {short.repr(value)}\n" for name, value in frames.tb_frame.f_locals.items())


def _end_with_caller() -> None:
    caller = mp.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)
