"""Programs in processes that need not import torch and Lightning first.

``run_python`` does what ``subprocess.run([sys.executable, ...])`` does with a script or a module, but the process is
forked from the server that ranks of the pool come from, which has imported both: that saves four seconds of a core. The
processes that the program starts are ordinary ones. What a program imports, and when, cannot be tested so.
"""

from __future__ import annotations

import atexit
import os
import random
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.pool import context


@dataclass
class Finished:
    """A program that has ended: its exit code, what it wrote to both streams together, and how many seconds it took."""

    code: int
    output: str
    seconds: float


def run_python(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float) -> Finished:
    """Run a program to its end.

    Args:
        arguments: a script's file or ``-m`` and a module's name, and what the program is given.
        cwd: its working directory.
        environment: all of its variables.
        timeout: seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: if it had to be killed.
    """
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        output = Path(folder, "output")
        process = context().Process(target=_become, args=(list(arguments), str(cwd), dict(environment), str(output)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout, output.read_bytes())
        return Finished(process.exitcode, output.read_text(errors="replace"), time.monotonic() - begin)


def run_cold(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float) -> Finished:
    """Do the same in an interpreter of its own, which has imported nothing."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, done.stdout, time.monotonic() - begin)


def _become(arguments: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """Be the program, as a new interpreter would."""
    written, read = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for copy, stream in ((read, 0), (written, 1), (written, 2)):
        os.dup2(copy, stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    module = arguments[0] == "-m"
    if module:
        del arguments[0]
    sys.argv[:] = arguments
    more = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [cwd if module else str(Path(arguments[0]).parent), *more]
    random.seed()
    import numpy
    import torch

    numpy.random.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    code: object = 0
    try:
        if module:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    # What an interpreter does at its end; a forked process does not.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
