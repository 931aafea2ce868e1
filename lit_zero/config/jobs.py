"""The Hydra job that this process runs, and the command that runs exactly that job in another process.

[Note: a rank runs its job, not the sweep]
In a multirun, Hydra runs one job after the other in one process. A rank started with that process's own command line
(``-m`` included) would run the whole sweep in step with it, and a job with another number of devices, or with values
that the sweeper draws at random, would train different things on different ranks. So a rank is started with the job's
own overrides, in the job's own folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEAM = "LIT_ZERO_TEAM"  # set by the launcher for the ranks it starts: the folder in which they check in
_PROGRAM = "LIT_ZERO_PROGRAM"  # how the Hydra app was started, as JSON; worker processes of launcher plugins inherit it

# Hydra's own settings that would make a rank a sweep again, or that the rank is given in another way.
_NOT_FOR_RANKS = (
    "hydra.mode",
    "hydra.run.dir",
    "hydra.output_subdir",
    "hydra.sweep",
    "hydra.sweeper",
    "hydra/sweeper",
    "hydra.launcher",
    "hydra/launcher",
    "hydra.job.num",
    "hydra.job.id",
)


@dataclass(frozen=True)
class Job:
    """One job of a Hydra app.

    Attributes:
        folder: the job's output folder, absolute.
        number: its place in the sweep, ``None`` outside sweeps.
        overrides: what was typed or drawn for this job.
        cwd: the folder in which the app was started.
        settings: further overrides that make another process run this job, see the note above.
        log_file: the job's log file, if it has one: each rank but rank 0 writes its own beside it.
        in_sweep: this process runs the jobs of a sweep, one after the other.
        resume: it takes up an earlier sweep, see ``lit_zero.config.sweep``.
    """

    folder: str
    number: int | None
    overrides: tuple[str, ...]
    cwd: str
    settings: tuple[str, ...]
    log_file: str | None
    in_sweep: bool = False
    resume: bool = False

    def command(self, rank: int) -> list[str]:
        """Return the command line that runs this job as ``rank``, to be started in ``cwd``."""
        own = []
        if self.log_file is not None and rank > 0:
            path = Path(self.log_file)
            log_file = path.with_name(f"{path.stem}_rank{rank}{path.suffix}")
            own.append(f"hydra.job_logging.handlers.file.filename={_quoted(str(log_file))}")
        if _PROGRAM not in os.environ:  # lit_zero was first imported when the job built its strategy
            remember_program(self.cwd)
        return [*_program(), *self.settings, *self.overrides, *own]


def current_job() -> Job | None:
    """Return the Hydra job that this process is in the middle of, ``None`` if there is none."""
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return None
    from omegaconf import OmegaConf

    hydra = module.HydraConfig.get()
    folder = OmegaConf.select(hydra, "runtime.output_dir", throw_on_missing=False)
    if folder is None:  # a config composed by hand, not a job
        return None
    settings = [line for line in hydra.overrides.hydra if not line.lstrip("+~").startswith(_NOT_FOR_RANKS)]
    settings += ["hydra.mode=RUN", f"hydra.run.dir={_quoted(folder)}", "hydra.output_subdir=null"]
    number = OmegaConf.select(hydra, "job.num", throw_on_missing=False)
    if number is not None:  # a rank's config may refer to them
        settings += [f"hydra.job.num={number}", f"hydra.job.id={_quoted(str(hydra.job.id))}"]
        settings += [f"hydra.sweep.{key}={_quoted(str(hydra.sweep[key]))}" for key in ("dir", "subdir")]
    return Job(
        folder=folder,
        number=number,
        overrides=tuple(hydra.overrides.task),
        cwd=hydra.runtime.cwd,
        settings=tuple(settings),
        log_file=OmegaConf.select(hydra, "job_logging.handlers.file.filename", throw_on_missing=False),
        in_sweep=hydra.mode is not None and hydra.mode.name == "MULTIRUN",
        resume=any(bool(node.get("resume")) for node in tables(hydra).values()),
    )


def tables(hydra: Any) -> dict[str, Any]:
    """Return the nodes of a Hydra configuration that build a ``SweepTable``, by their names among the callbacks."""
    callbacks = hydra.callbacks or {}
    return {
        str(name): node
        for name, node in callbacks.items()
        if node is not None and str(node.get("_target_")).endswith("config.sweep.SweepTable")
    }


def remember_program(folder: str = "") -> None:
    """Note how this Hydra app was started, for this process and for the processes it starts.

    Args:
        folder: in which it was started; by default the working folder.
    """
    from hydra._internal.utils import get_args_parser

    flags: list[str] = []
    arguments: Any
    arguments, _ = get_args_parser().parse_known_args(sys.argv[1:])
    for name in ("config_path", "config_name", "config_dir"):
        value = getattr(arguments, name, None)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", value]
    os.environ[_PROGRAM] = json.dumps([*this_script(folder), *flags])


def this_script(folder: str = "") -> list[str]:
    """Return the command that starts the running script anew, without its arguments.

    Args:
        folder: in which it was started; by default the working folder.
    """
    import __main__

    spec = getattr(__main__, "__spec__", None)
    if spec is None:
        return [sys.executable, os.path.abspath(os.path.join(folder, sys.argv[0]))]
    # "python -m package" runs package/__main__.py, and is started again by the package's name
    return [sys.executable, "-m", spec.name.removesuffix(".__main__")]


def _program() -> list[str]:
    return json.loads(os.environ[_PROGRAM]) if _PROGRAM in os.environ else this_script()


def _quoted(text: str) -> str:
    """Return ``text`` as a quoted value of Hydra's command-line language."""
    # Backslashes stand for themselves, except right in front of a quote: the quotes inside the text, and the closing
    # one.
    inside = re.sub(r"(\\*)'", r"\1\1\'", text)
    closing = re.sub(r"(\\+)$", r"\1\1", inside)
    return f"'{closing}'"


def typed(key: str, value: str) -> str:
    """Return what to type in a shell so that Hydra gives ``key`` this value."""
    return f"{key}={value}" if re.fullmatch(r"[\w./-]+", value) else shlex.quote(f"{key}={_quoted(value)}")


def exit_in_words(code: int) -> str:
    """Return how a process ended: its exit code, or the name of the signal that ended it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return name + (", as when memory runs out" if name == "SIGKILL" else "")
