"""What a Hydra app leaves behind: a ``result.json`` per job, and at the end of a sweep one comparison of all jobs.

The task function writes ``result.json`` into the job's folder with what it measured (:func:`write_result`); the
callback adds the job's overrides, its status, its time and what it returned, for failed jobs too.

[Note: a sweep is taken up again]
``hydra.sweep.dir=FOLDER hydra.callbacks.sweep_table.resume=true``, with the command line of the sweep that left FOLDER
half done, runs what is missing. A job is kept, and what it returned given to the sweeper once more, if its own
``result.json`` says that it was completed with exactly this configuration: the same overrides, and the same values in
the configuration files. A job whose files have changed since, or that failed or was cut off, runs again. A folder that
holds a job with other overrides ends the sweep before anything in it is overwritten: it is of another sweep, or of
one that draws its values at random. One that draws them with a seed draws the same again.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lit_zero.config import chart, job_process, jobs, table
from lit_zero.config.results import (
    COMPLETED,
    FAILED,
    STARTED,
    plain,
    read_result,
    read_results,
    unfinished,
    write_result,
)

__all__ = ["SweepTable", "write_result"]


class SweepTable(Callback):
    """Compare all jobs of a sweep: a table on the terminal, and ``results.md``, ``.csv`` and ``.svg`` in its folder.

    A job that fails does not end the sweep; the program ends with exit code 1 when all others have run.

    Args:
        resume: take up the sweep in ``hydra.sweep.dir``, see the note above. Needs ``lit_zero.config.main``.
    """

    def __init__(self, resume: bool = False) -> None:
        self._resume = resume
        self._folder: Path | None = None  # of the sweep; None outside sweeps
        self._name = "sweep_table"  # of this callback
        self._repeatable = True  # the same command line gives the same jobs
        self._since = 0.0  # when the sweep started, in seconds of the file system's clock
        self._job_since = 0.0
        self._kept = False  # the job is kept of an earlier sweep
        self._begun: dict[str, Any] = {}  # what the job's result holds from the start
        # The process that waits for a sweep's job writes its result, not the one that runs it: see the note in
        # job_process.
        self._is_waited_for = job_process.REPORT in os.environ

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what has no effect."""
        if self._resume and self._writes():
            sys.exit("resume=true of lit_zero's SweepTable has an effect in a sweep only: add -m.")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the sweep's jobs will be."""
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self._since = time.time()
        self._name = next(iter(jobs.tables(config.hydra)), self._name)
        seed = OmegaConf.select(config.hydra, "sweeper.sampler.seed")
        self._repeatable = _is_basic(config) or seed is not None
        if self._resume and not self._folder.is_dir():
            sys.exit(
                f"hydra.callbacks.{self._name}.resume=true takes up an earlier sweep, but there is no folder "
                f"{self._folder}. Name the folder of that sweep with hydra.sweep.dir=FOLDER."
            )
        # Hydra 1.3 calls on_multirun_end only if the sweep came to its end.
        atexit.register(self._show)

    def on_job_start(self, config: DictConfig, *, task_function: Any = None, **kwargs: Any) -> None:
        """Keep what an earlier sweep has left in the same folder if it is this job's, else replace it."""
        if not self._writes():
            return
        folder = Path(config.hydra.runtime.output_dir)
        self._begun = {
            "job": config.hydra.job.get("num", 0) if self._folder is not None else 0,
            "overrides": list(config.hydra.overrides.task),
            "status": STARTED,
        }
        self._begun["config"] = _fingerprint(config)
        self._kept = False
        if self._resume and self._folder is not None:
            self._refuse_another(folder, self._begun["overrides"], task_function)
            before = read_result(folder)
            same = all(before.get(key) == self._begun[key] for key in ("overrides", "config"))
            self._kept = same and before.get("status") == COMPLETED and "returned" in before
        self._job_since = time.time()
        if not self._kept:
            write_result(folder, self._begun)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Complete the job's ``result.json``."""
        if not self._writes() or self._kept:
            return
        folder = Path(config.hydra.runtime.output_dir)
        result = {**read_result(folder), **self._begun}
        result["seconds"] = round(time.time() - self._job_since, 3)
        result["status"] = COMPLETED
        if job_return.status is JobStatus.COMPLETED:
            with suppress(TypeError):  # then a sweep that is taken up again runs the job again
                result["returned"] = plain(job_return._return_value)
        else:
            error = job_return._return_value
            result["status"] = FAILED
            result["error"] = job_process.in_words(error)
            if self._folder is not None and _is_basic(config):
                self._report(result, error)
                # Hydra's sweeper would raise the error after the batch of jobs that this one is in, and leave out the
                # batches that follow. It asks for nothing that a job returns.
                job_return.status, job_return._return_value = JobStatus.COMPLETED, None
        write_result(folder, result)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show the comparison; end the program with exit code 1 if a job has not been completed."""
        atexit.unregister(self._show)
        if self._show():
            sys.exit(1)

    def _writes(self) -> bool:
        return not self._is_waited_for and _is_rank_zero()

    def _refuse_another(self, folder: Path, overrides: list[str], task_function: Any) -> None:
        """End the sweep if the folder is of another one, or if nothing would keep a job from running again."""
        key = f"hydra.callbacks.{self._name}.resume=true"
        if not getattr(task_function, "takes_up", False):
            atexit.unregister(self._show)
            sys.exit(f"{key} needs lit_zero.config.main in place of hydra.main: it would have no effect here.")
        there = read_result(folder).get("overrides", overrides)
        if there != overrides:
            atexit.unregister(self._show)
            sys.exit(
                f"{key} takes up the same sweep only: {folder} holds the job {' '.join(there)!r}, but this one is "
                f"{' '.join(overrides)!r}. Type the same command line; a sweep that draws its values needs the same "
                "seed (hydra.sweeper.sampler.seed). Or choose another hydra.sweep.dir."
            )

    def _report(self, result: dict[str, Any], error: BaseException) -> None:
        print(
            f"lit_zero: job {result['job']} ({' '.join(result['overrides'])}) has failed, the sweep goes on. "
            f"{result['error'].splitlines()[0]}",
            file=sys.stderr,
            flush=True,
        )
        if not isinstance(error, job_process.JobError):  # that one was shown by the job's own process
            traceback.print_exception(error)

    def _show(self) -> list[int]:
        """Print the table, write the files, and return the numbers of the jobs that were not completed."""
        if self._folder is None:
            return []
        results = read_results(self._folder, 0.0 if self._resume else self._since)
        if not results:
            return []
        common, rows = table.tabulate(results)
        print(f"\n{len(results)} jobs in {self._folder}" + (f", all with {' '.join(common)}" if common else ""))
        print(table.text(rows))
        (self._folder / "results.md").write_text(table.markdown(rows))
        table.write_csv(self._folder / "results.csv", results)
        picture = chart.draw(results)
        if picture is not None:
            (self._folder / "results.svg").write_text(picture)
        missing = unfinished(results)
        if missing:
            print(f"{len(missing)} of {len(results)} jobs were not completed: {', '.join(map(str, missing))}.")
        if missing and self._repeatable:
            folder = jobs.typed("hydra.sweep.dir", str(self._folder))
            print(f"To run what is missing, repeat the command with {folder} hydra.callbacks.{self._name}.resume=true")
        sys.stdout.flush()
        return missing


def _fingerprint(config: DictConfig) -> str:
    """Return what tells this configuration from any other, as far as it is known before the job runs."""
    names = [str(name) for name in config if name != "hydra"]
    text = OmegaConf.to_yaml(OmegaConf.masked_copy(config, names), resolve=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_basic(config: DictConfig) -> bool:
    return str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _is_rank_zero() -> bool:
    ranks = ("LOCAL_RANK", "SLURM_LOCALID"), ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID")
    return all(next((os.environ[name] for name in names if name in os.environ), "0") == "0" for names in ranks)
