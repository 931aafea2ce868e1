"""Start all ranks as processes that take over this program's objects: ``spawn``, ``fork`` and ``forkserver``.

Other than with scripts (see ``launcher``), the process in which the user calls the Trainer is no rank: it hands the
Trainer, the module and the data to new processes, waits, and takes back what rank 0 found. What this adds to
Lightning's own launcher:

* The weights that come back are whole in every stage: all ranks take part in gathering them, when the run is over.
* When a rank fails, the others end within seconds, and :class:`RankError` holds the traceback of the rank that failed
  first. Lightning waits for a rank that hangs, and reports whichever process ended first.
* Results of any size come back: through a file, where Lightning's pipe blocks once it is full.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing
from torch import nn

from lit_zero.comm import meeting, process_group
from lit_zero.config.validate import check_cpu_processes
from lit_zero.core.errors import UnsupportedError
from lit_zero.strategy.flavour import (
    _IS_INTERACTIVE,
    TrainerFn,
    _check_bad_cuda_fork,
    _check_missing_main_guard,
    _GlobalStateSnapshot,
    _MultiProcessingLauncher,
    rank_zero_warn,
)
from lit_zero.strategy.launcher import JobLauncher, end_lone_job
from lit_zero.strategy.ranks import NOTICE_SECONDS, POLL_SECONDS, Follower, RankError, first_failure
from lit_zero.strategy.refusals import refuse_other_devices
from lit_zero.zero.engine import Engine

# What a ModelCheckpoint knows at the end, as far as Lightning's own launchers or users ask for it.
_KEPT = ("best_model_path", "best_model_score", "last_model_path", "best_k_models", "kth_best_model_path")


def choose_launcher(strategy: Any, start_method: str) -> Any:
    """Return what starts the ranks of ``strategy``.

    Raises:
        ConfigError: if they are too many for this machine.
        UnsupportedError: if they cannot be started so from here.
    """
    environment, ranks = strategy.cluster_environment, strategy.num_processes
    refuse_other_devices(strategy.parallel_devices[0].type, strategy.backend)
    if strategy.parallel_devices[0].type == "cpu" and not environment.creates_processes_externally:
        check_cpu_processes("devices", ranks)
    launcher: Any
    if start_method == "popen":
        launcher = JobLauncher(environment, ranks, strategy.num_nodes, strategy.timeout.total_seconds())
    else:
        end_lone_job()
        launcher = ProcessLauncher(strategy, start_method)
    if _IS_INTERACTIVE and not launcher.is_interactive_compatible:
        raise UnsupportedError(
            f"start_method={start_method!r} cannot start {ranks} ranks from a notebook or an interactive Python, where "
            "there is no script to run. Use start_method='fork' (strategy='zero3_notebook'), or run the code as a "
            "script."
        )
    return launcher


class _Output(NamedTuple):
    """What rank 0 sends back.

    Attributes:
        results: of the function, such as the metrics of ``trainer.test``.
        state: ``trainer.state``.
        checkpoints: attributes of each checkpoint callback, by its state key.
        extra: callback metrics, as Lightning packs them.
        fitted: there are trained weights.
    """

    results: Any
    state: Any
    checkpoints: dict[str, dict[str, Any]]
    extra: dict[str, Any]
    fitted: bool


class ProcessLauncher(_MultiProcessingLauncher):
    """Launcher of a strategy, with the interface of Lightning's launchers.

    Args:
        strategy: the strategy that uses it.
        start_method: ``"spawn"``, ``"fork"`` or ``"forkserver"``, see :mod:`multiprocessing`.

    Raises:
        UnsupportedError: where the ranks exist already, or are to run on several machines.
        ValueError: if this system has no such start method.
    """

    def __init__(self, strategy: Any, start_method: Any) -> None:
        environment = strategy.cluster_environment
        if environment.creates_processes_externally:
            raise UnsupportedError(
                f"start_method={start_method!r} starts the ranks itself, but this process is one already "
                f"({type(environment).__name__}, LOCAL_RANK={os.environ.get('LOCAL_RANK', 'not set')}): torchrun, "
                "SLURM or an earlier Trainer of this program has started it. Use start_method='popen', that is "
                "strategy='zero3' in place of 'zero3_spawn'."
            )
        if strategy.num_nodes > 1:
            raise UnsupportedError(
                f"start_method={start_method!r} starts the ranks of one machine, got num_nodes={strategy.num_nodes}. "
                "Use start_method='popen', that is strategy='zero3' in place of 'zero3_spawn', with torchrun or SLURM."
            )
        super().__init__(strategy, start_method)
        self._strategy: Any = strategy
        self._folder = Path()  # where the ranks leave word

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call ``function`` in new processes, one for each rank, and return what it returned in rank 0.

        Args:
            function: called with ``args`` and ``kwargs``.
            trainer: takes over the weights, metrics and paths that its copy in rank 0 has at the end.

        Raises:
            RankError: if a rank has failed.
            UnsupportedError: if what the ranks need cannot be handed to them.
        """
        self._refuse_what_cannot_be_handed_over(trainer)
        self._folder = Path(tempfile.mkdtemp(prefix="lit_zero-"))
        # One port for all ranks, chosen here, and no longer: the next job may find it taken.
        port = self._strategy.cluster_environment.main_port
        listener = meeting.hold_port(port)  # see [Note: listening early]
        try:
            with _environment(MASTER_PORT=str(port), **{meeting.JOB: uuid.uuid4().hex}):
                self.procs = self._start(listener, trainer, function, args, kwargs)
                meeting.let_go_of_port(port)  # rank 0 has it
                self._wait()
            output: Any = torch.load(self._folder / "output", weights_only=False)
            if trainer is None:
                return output
            self._already_fit |= output.fitted
            self._recover_results_in_main_process(output, trainer)
            return output.results
        finally:
            meeting.let_go_of_port(port)
            _kill(self.procs)
            self.procs = []
            shutil.rmtree(self._folder, ignore_errors=True)

    def _refuse_what_cannot_be_handed_over(self, trainer: Any) -> None:
        if self._start_method == "fork":
            _check_bad_cuda_fork()
            if process_group.is_initialized():
                raise UnsupportedError(
                    "start_method='fork' would copy this process's process group, whose connections cannot be shared. "
                    "Call torch.distributed.destroy_process_group() first, or use start_method='spawn'."
                )
        else:
            _check_missing_main_guard()
        if trainer is None:
            return
        if self._already_fit and trainer.state.fn == TrainerFn.FITTING:
            raise UnsupportedError(
                f"trainer.fit() a second time on one Trainer does not work with start_method={self._start_method!r}: "
                "the Trainer's progress stays in the processes that have ended. Make a new Trainer, and pass "
                "fit(ckpt_path=...) to go on from a checkpoint."
            )
        module = trainer.lightning_module
        if module is not None and Engine.of(module) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} is sharded in this process by an earlier Trainer and cannot be handed to "
                "others. Make a new one, and load its weights from a checkpoint if they are needed."
            )

    def _start(self, listener: socket.socket | None, trainer: Any, function: Any, args: Any, kwargs: Any) -> list[Any]:
        context: Any = torch.multiprocessing.get_context(self._start_method)
        # Random states and the like: a forked process has them already.
        states = _GlobalStateSnapshot.capture() if self._start_method != "fork" else None
        started: list[Any] = []
        try:
            for rank in range(self._strategy.num_processes):
                arguments = (rank, listener if rank == 0 else None, trainer, function, args, kwargs, states)
                process = context.Process(target=self._be_rank, args=arguments, name=f"rank {rank}")
                process.start()
                started.append(process)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            _kill(started)
            raise UnsupportedError(
                f"start_method={self._start_method!r} sends the Trainer, the module and the data to new processes, but "
                f"something among them cannot be sent: {error}. Define classes and functions at the top level of a "
                "module, without lambdas, or use start_method='popen' (strategy='zero3') or 'fork', which send nothing."
            ) from error
        except BaseException:
            _kill(started)
            raise
        return started

    def _wait(self) -> None:
        """Return when every rank has finished.

        Raises:
            RankError: if one has failed.
        """
        while True:
            codes = {rank: process.exitcode for rank, process in enumerate(self.procs)}
            if first_failure(self._folder, codes) is not None:
                break
            if all(code == 0 for code in codes.values()):
                if (self._folder / "output").exists():
                    return
                raise RankError(
                    "Every rank has ended with exit code 0 before it had finished: the script has called exit()."
                )
            multiprocessing.connection.wait(
                [process.sentinel for process in self.procs if process.exitcode is None], 5 * POLL_SECONDS
            )
        # The others notice by their lost connections. What they report may be the earlier failure, so read once more;
        # but before they are killed, which is no failure of theirs.
        deadline = time.monotonic() + NOTICE_SECONDS
        while any(process.exitcode is None for process in self.procs) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        cause = first_failure(self._folder, {rank: process.exitcode for rank, process in enumerate(self.procs)})
        assert cause is not None
        raise RankError(cause.message(len(self.procs)))

    # ---- in a rank

    def _be_rank(
        self,
        rank: int,
        listener: socket.socket | None,
        trainer: Any,
        function: Any,
        args: Any,
        kwargs: Any,
        states: Any,
    ) -> None:
        if listener is not None:
            meeting.take_port(listener)
        elif self._start_method == "fork":
            meeting.let_go_of_port(int(os.environ["MASTER_PORT"]))  # a copy, with which rank 0's end would go unnoticed
        if self._start_method != "fork":
            _unshare(trainer.lightning_module if trainer is not None else None)
        elif self._strategy.root_device.type == "cpu":
            # [Note: forked ranks compute with one thread] OpenMP's threads do not live on in a forked process, and the
            # first operation that wants them would wait for ever.
            torch.set_num_threads(1)
            os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["LOCAL_RANK"] = str(rank)
        follower = Follower(self._folder, rank)
        output: Any = _File(self._folder / "output")
        try:
            follower.run(lambda: self._wrapping_function(rank, trainer, function, args, kwargs, output, states))
        except (Exception, KeyboardInterrupt):
            sys.exit(1)  # the follower has reported it; nobody wants the traceback twice
        process_group.destroy()

    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        fitted = trainer.state.fn == TrainerFn.FITTING
        # Whole also where checkpoints are sharded. Every rank has to ask.
        weights = self._strategy.full_state_dict() if fitted else {}
        if self._strategy.local_rank != 0:
            return None
        if fitted:
            torch.save(weights, self._folder / "weights")
        kept = {
            callback.state_key: {name: getattr(callback, name) for name in _KEPT if hasattr(callback, name)}
            for callback in trainer.checkpoint_callbacks
        }
        return _Output(results, trainer.state, kept, self.get_extra_results(trainer), fitted)

    # ---- back in the process that has launched the ranks

    def _recover_results_in_main_process(self, worker_output: Any, trainer: Any) -> None:
        for callback in trainer.checkpoint_callbacks:  # the module may have brought more of them to the ranks
            for name, value in worker_output.checkpoints.get(callback.state_key, {}).items():
                setattr(callback, name, value)
        if worker_output.fitted:
            self._take_weights(trainer.lightning_module)
        trainer.state = worker_output.state
        self.update_main_process_results(trainer, worker_output.extra)

    def _take_weights(self, module: Any) -> None:
        weights = torch.load(self._folder / "weights", map_location="cpu", weights_only=False, mmap=True)
        if weights.keys() - module.state_dict().keys():  # built in the ranks only, so far
            with self._strategy.precision_plugin.tensor_init_context():
                module.configure_model()
        module.load_state_dict(weights, strict=False)  # a module may lose layers while it is trained
        lost = sorted(weights.keys() - module.state_dict().keys())
        if lost:
            rank_zero_warn(
                f"{len(lost)} trained tensors have no place in the {type(module).__name__} of this process and are "
                f"lost to it, {lost[0]!r} first: it was given more layers in the processes that have trained it. "
                "Build them in __init__ or configure_model, or load the checkpoint."
            )


def _unshare(module: nn.Module | None) -> None:
    """Give what a module owns memory of its own: tensors that are sent to other processes lie in memory that all of
    them share, and one rank would write the buffers and metric states of another.
    """
    if module is None:
        return
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.device.type == "cpu" and tensor.is_shared():
            tensor.data = tensor.data.clone()
    for owner in module.modules():
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_shared():
                vars(owner)[name] = value.clone()


class _File:
    """What Lightning's launcher takes for the queue to the main process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, value: Any) -> None:
        """Write ``value``; once per file."""
        torch.save(value, self._path)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Inside, environment variables are set; new processes inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _kill(processes: list[Any]) -> None:
    # Not SIGTERM: Lightning answers it with a collective, and a rank that waits in one does not answer at all.
    for process in processes:
        if process.exitcode is None:
            process.kill()
    for process in processes:
        process.join()
