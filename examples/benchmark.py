"""Compare lit_zero with the other ways to train data-parallel: step time, memory and losses on the same GPT.

    python examples/benchmark.py                                  # 2 and 4 ranks, both sizes: about an hour on 2 cores
    python examples/benchmark.py --ranks 2 --sizes 2M --rounds 2  # minutes
    python examples/benchmark.py --device cuda --ranks 1 --sizes 30M

The contenders take turns (A B C A B C ...), each turn in fresh processes with one thread per rank, so that a machine
that slows down slows all of them. The yardstick is the *time above the floor*: the median step of a contender minus
the median step of the same processes training unconnected. Peak memory comes from turns of its own (see
``TensorMemory`` in ``benchmark_worker.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_worker import CONTENDERS, Turn

SIZES: dict[str, tuple[dict[str, int], int]] = {  # arguments of GPT, and sequences per rank and step
    "tiny": ({"vocab_size": 64, "block_size": 16, "dim": 32, "layers": 2, "heads": 2}, 2),
    "2M": ({"vocab_size": 1024, "block_size": 128, "dim": 192, "layers": 4, "heads": 6}, 4),
    "30M": ({"vocab_size": 4096, "block_size": 128, "dim": 512, "layers": 9, "heads": 8}, 4),
}
WORKER = Path(__file__).with_name("benchmark_worker.py")


@dataclass
class Measured:
    """What all turns of one contender have measured.

    Attributes:
        rounds: median step of each turn, in seconds.
        seconds: all measured steps, in seconds, each the mean over ranks.
        peak_bytes: of the rank with the most; None if not measured.
        losses: mean over ranks, one per step from the first; equal seeds make them comparable.
        failure: why a turn gave no result; empty if all did.
    """

    rounds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def step(self) -> float:
        """Median step in seconds."""
        return statistics.median(self.seconds)

    def add(self, results: list[dict]) -> None:
        """Take in what each rank wrote down in one turn."""
        seconds = [statistics.fmean(steps) for steps in zip(*(r["seconds"] for r in results), strict=True)]
        if not results[0]["turn"]["memory"] or results[0]["turn"]["device"] == "cuda":
            self.seconds += seconds
            self.rounds.append(statistics.median(seconds))
            self.losses = [statistics.fmean(losses) for losses in zip(*(r["losses"] for r in results), strict=True)]
        if results[0]["peak_bytes"] is not None:
            self.peak_bytes = max(self.peak_bytes or 0, *(r["peak_bytes"] for r in results))


def take_turn(turn: Any, timeout: float, worker: Path = WORKER) -> list[dict]:
    """Run one turn in fresh processes and return what each rank wrote down.

    Args:
        turn: what to run: a dataclass with the number of ``ranks`` and the ``device``.
        timeout: seconds after which the turn is given up.
        worker: the program that each rank runs.

    Raises:
        RuntimeError: with the last line of the first rank that failed; no process of the turn is left.
    """
    with _Running(turn, worker) as running:
        running.go_on(timeout, timeout)
        return running.results()


def take_slices(turns: Sequence[Any], seconds: float, timeout: float, worker: Path = WORKER) -> list[list[dict]]:
    """Run several turns side by side and return what the ranks of each wrote down: the processes of one run for a slice
    of time while those of the others are stopped, so that a machine whose speed drifts is as fast for all of them. A
    step in which they are stopped seems long: take medians. Not on Windows.

    Args:
        turns: what to run, see :func:`take_turn`.
        seconds: of a slice; at least some steps.
        timeout: seconds of all slices of a turn, after which it is given up.
        worker: the program that each rank runs.

    Raises:
        RuntimeError: as of :func:`take_turn`.
    """
    with contextlib.ExitStack() as stack:
        everyone = [stack.enter_context(_Running(turn, worker)) for turn in turns]
        for each in everyone:
            each.signal(signal.SIGSTOP)
        waiting = list(everyone)
        while waiting:
            for each in list(waiting):
                each.signal(signal.SIGCONT)
                if each.go_on(seconds, timeout):
                    waiting.remove(each)
                else:
                    each.signal(signal.SIGSTOP)
        return [each.results() for each in everyone]


class _Running:
    """The processes of a turn; none of them is left when the ``with`` block ends."""

    def __init__(self, turn: Any, worker: Path) -> None:
        self._turn, self._worker, self._spent = turn, worker, 0.0

    def __enter__(self) -> _Running:
        turn = self._turn
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": turn.device}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the ranks find what this process finds
        self._temporary = tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        self._logs = [self._folder / f"{rank}.log" for rank in range(turn.ranks)]
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(self._logs):
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(turn.ranks)}
                command = [sys.executable, str(self._worker), json.dumps(asdict(turn)), str(rank), str(self._folder)]
                with log.open("wb") as output:
                    self._processes.append(
                        subprocess.Popen(command, env=ranked, stdout=output, stderr=subprocess.STDOUT)
                    )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._temporary.cleanup()

    def signal(self, number: int) -> None:
        """Send a signal to the processes that still run."""
        for process in self._processes:
            process.send_signal(number)

    def go_on(self, seconds: float, timeout: float) -> bool:
        """Wait for a time; return whether all processes have ended.

        Raises:
            RuntimeError: if one has failed, or all waits together have taken ``timeout`` seconds.
        """
        end = time.monotonic() + seconds
        while True:
            codes = [process.poll() for process in self._processes]
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is None and all(code == 0 for code in codes):
                return True
            if failed is None and time.monotonic() >= end:
                self._spent += seconds
                if self._spent < timeout:
                    return False
                failed = codes.index(None)
            if failed is not None:
                lines = self._logs[failed].read_text(errors="replace").strip().splitlines() or ["no output"]
                raise RuntimeError(f"rank {failed}: {lines[-1]}")
            time.sleep(0.05)

    def results(self) -> list[dict]:
        """Return what each rank wrote down."""
        return [json.loads((self._folder / f"{rank}.json").read_text()) for rank in range(self._turn.ranks)]


def measure(names: list[str], size: str, ranks: int, options: argparse.Namespace) -> dict[str, Measured]:
    """Let the contenders take turns, ``options.rounds`` times, and then once each for memory."""
    model, batch_size = SIZES[size]
    measured = {name: Measured() for name in names}
    # The memory meter sums up all live memory after every operation, so few steps must do; the first has made all
    # lasting buffers.
    memory_turns = [] if options.no_memory or options.device == "cuda" else [True]
    for memory in [False] * options.rounds + memory_turns:
        warmup, steps = (2, 2) if memory else (options.warmup, options.steps)
        for name in names:
            if measured[name].failure:
                continue
            turn = Turn(name, ranks, model, batch_size, warmup, steps, options.device, memory)
            try:
                measured[name].add(take_turn(turn, options.timeout))
            except RuntimeError as error:
                measured[name].failure = str(error)
            _report_turn(name, size, ranks, memory, measured[name])
    return measured


def _report_turn(name: str, size: str, ranks: int, memory: bool, measured: Measured) -> None:
    if measured.failure:
        outcome = f"failed: {measured.failure}"
    elif memory:
        outcome = f"{(measured.peak_bytes or 0) / 1e6:.1f} MB"
    else:
        outcome = f"{measured.rounds[-1] * 1e3:.1f} ms"
    print(f"{size} on {ranks} ranks, {name}: {outcome}", file=sys.stderr, flush=True)


def table(measured: dict[str, Measured]) -> str:
    """Return the comparison as a Markdown table; ratios need ``floor``, ``ddp`` and ``fsdp2-reshard``."""
    rows = [
        "| contender | step, ms (each round) | of DDP | above floor, ms | of DDP's | of FSDP2's "
        "| peak memory, MB | of DDP | last loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    steps = {name: found.step for name, found in measured.items() if found.seconds and not found.failure}
    above = {name: step - steps["floor"] for name, step in steps.items()} if "floor" in steps else {}
    peaks = {name: found.peak_bytes for name, found in measured.items() if found.peak_bytes}
    for name, found in measured.items():
        if name not in steps:
            rows.append(f"| {name} | failed: {found.failure} | | | | | | | |")
            continue
        each = ", ".join(f"{seconds * 1e3:.1f}" for seconds in found.rounds)
        cells = [
            name,
            f"{steps[name] * 1e3:.1f} ({each})",
            _ratio(steps, name, "ddp"),
            f"{above[name] * 1e3:.1f}" if above else "",
            _ratio(above, name, "ddp") if name != "floor" else "",
            _ratio(above, name, "fsdp2-reshard") if name != "floor" else "",
            f"{peaks[name] / 1e6:.1f}" if name in peaks else "",
            _ratio(peaks, name, "ddp"),
            f"{found.losses[-1]:.7f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _ratio(values: dict[str, float] | dict[str, int], name: str, reference: str) -> str:
    """The value of ``name`` as a multiple of that of ``reference``; empty without a reference that is above zero."""
    if name not in values or values.get(reference, 0) <= 0:
        return ""
    return f"{values[name] / values[reference]:.2f}"


def describe_machine(device: str) -> str:
    """Return one line that says where the figures come from."""
    what = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores ({_cpu_name()})"
    return f"{what}, torch {torch.__version__}, Python {platform.python_version()}, one thread per rank"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def choose(only: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Return the contenders to run and remarks about those that cannot run here."""
    names = [name for name in CONTENDERS if only is None or name in only or name == "floor"]
    if importlib.util.find_spec("deepspeed") is not None:
        return names, []
    missing = [name for name in names if name.startswith("deepspeed")]
    remarks = [f"DeepSpeed is not installed, so {', '.join(missing)} did not run."] if missing else []
    return [name for name in names if name not in missing], remarks


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2M", "30M"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=10, help="measured steps per turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="contenders; the floor always runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="skip the turns that measure peak memory (CPU)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a turn is given up")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and max(options.ranks) > torch.cuda.device_count():
        parser.error(f"--ranks {max(options.ranks)} needs as many GPUs, but {torch.cuda.device_count()} are visible")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a contender failed."""
    options = parse(arguments)
    names, remarks = choose(options.only)
    parts = [describe_machine(options.device), *remarks]
    failed = False
    for size in options.sizes:
        for ranks in options.ranks:
            measured = measure(names, size, ranks, options)
            failed |= any(found.failure for found in measured.values())
            parts.append(f"### {size} parameters, {ranks} ranks\n\n{table(measured)}")
            print("\n" + parts[-1], flush=True)
            if options.markdown:
                options.markdown.write_text("\n\n".join(parts) + "\n")
    print("\n" + "\n".join(parts[: 1 + len(remarks)]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
