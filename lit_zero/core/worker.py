"""A thread that does one job after the other, in the order in which they are given."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import torch

Job = tuple[Callable[[], None], "Future[None]"]


class Pending:
    """The ticket of a job.

    Args:
        future: that the thread will complete.
    """

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Return once the job is over; raise what it has raised."""
        self._future.result()


class Worker:
    """The thread. It ends with this object, which it does not hold, and with the process.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> Pending:
        """Do ``job`` behind those before it, with as many threads for torch's operators as the caller has."""
        if self._thread is None:
            arguments = self._jobs, torch.get_num_threads()
            self._thread = threading.Thread(target=_work, args=arguments, name=self._name, daemon=True)
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return Pending(future)

    def close(self) -> None:
        """Return when every job is over and the thread has ended."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            if thread is not threading.current_thread():  # in which the last who held the owner may have let go of it
                thread.join()


def _work(jobs: queue.SimpleQueue[Job | None], threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)  # this thread's own switch
    while (item := jobs.get()) is not None:
        job, future = item
        try:
            job()
            future.set_result(None)
        except BaseException as error:  # who waits for it raises it
            future.set_exception(error)
        del item, job, future  # they hold buffers
