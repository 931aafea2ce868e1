"""Start the other ranks of a job as processes of their own, each with the same program.

The process in which the user typed the command is rank 0. What this adds to Lightning's own launcher:

* In a Hydra sweep a rank runs its job, not the sweep, and the next job starts as if it were the first
  (see the note in ``lit_zero.config.jobs``).
* When a rank fails, the others end too, and rank 0 raises :class:`RankError` with that rank's traceback. Lightning
  kills rank 0 instead, and with it the rest of a sweep (see the note in ``lit_zero.strategy.ranks``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lit_zero.config import jobs
from lit_zero.strategy.ranks import ClusterEnvironment, Follower, Leader, RankError

__all__ = ["JobLauncher", "RankError", "end_lone_job", "new_job"]

T = TypeVar("T")


class JobLauncher:
    """Launcher of a strategy, with the interface of Lightning's launchers.

    Args:
        cluster_environment: says who starts the processes, and where they meet.
        num_processes: ranks on this machine.
        num_nodes: machines.
        timeout: seconds that this process waits for the ranks it starts.
    """

    def __init__(
        self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int, timeout: float = 1800.0
    ) -> None:
        self.cluster_environment = cluster_environment
        self.num_processes = num_processes
        self.num_nodes = num_nodes
        self.timeout = timeout

    @property
    def is_interactive_compatible(self) -> bool:
        """In a notebook there is no script that other processes could run."""
        return self.num_processes == self.num_nodes == 1

    def launch(self, function: Callable[..., T], *args: Any, trainer: Any = None, **kwargs: Any) -> T:
        """Start the other ranks if that has not happened yet, then call ``function`` in this one.

        Args:
            function: called with ``args`` and ``kwargs``; every rank's own launcher calls the same.
            trainer: given by Lightning; not used.

        Raises:
            RankError: in rank 0, if another rank has failed.
        """
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            _Process.here = Leader.start(environment, self.num_processes, self.num_nodes, self.timeout)
        elif _Process.here is None and jobs.TEAM in os.environ:
            _Process.here = Follower(Path(os.environ[jobs.TEAM]), environment.local_rank())
        _share_cores(self.num_processes)
        here = _Process.here
        if here is None:  # started by torchrun or a cluster, which watches the ranks
            return function(*args, **kwargs)
        return here.run(lambda: function(*args, **kwargs))

    def kill(self, signum: int) -> None:
        """Send ``signum`` to the ranks that this process has started; Lightning passes SIGTERM on in this way."""
        if isinstance(_Process.here, Leader):
            _Process.here.send(signum)


def new_job() -> None:
    """Forget the previous Hydra job of this process: its ranks, process group and environment variables.

    To be called when a strategy is built. Does nothing outside Hydra, within one job, and in ranks that were started
    by a launcher.
    """
    here = _Process.here
    if isinstance(here, Leader) and here.job != jobs.current_job():
        here.close()
        _Process.here = None


def end_lone_job() -> None:
    """Forget an earlier job of this process that had no other rank: from here on, ranks are started in another way."""
    here = _Process.here
    if isinstance(here, Leader) and here.alone:
        here.close()
        _Process.here = None


def _share_cores(processes: int) -> None:
    """Give each rank its part of the threads that torch would use alone, unless the user has set OMP_NUM_THREADS.

    The variable itself is left alone: it would outlive the job, and the next one may have another number of ranks.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        if _Process.threads is None:
            _Process.threads = torch.get_num_threads()
        torch.set_num_threads(max(1, _Process.threads // processes))


class _Process:
    """The role of this process in the job that it belongs to: one at a time, as a process has one environment.

    Attributes:
        here: ``None`` if the ranks were started by others.
        threads: torch's number of threads before the first job changed it.
    """

    here: Leader | Follower | None = None
    threads: int | None = None
