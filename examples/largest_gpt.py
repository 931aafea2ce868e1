"""The largest GPT that takes full AdamW steps on one device, and its tokens per second, for each setting of offload.

    python examples/largest_gpt.py                                        # one GPU, bf16-mixed, blocks recomputed
    python examples/largest_gpt.py --device cpu --limit 300 --dim 512     # no GPU: 300 MB more than an idle process

A model grows by layers; everything else stays. The number of layers is doubled until a job fails, then bisected. Each
attempt is a process of its own with a Trainer of its own, and must end all its steps with finite losses: what counts is
the whole job, host memory and disk space included. The table says what stopped each setting.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"where": "none"},
    "cpu": {"where": "cpu"},
    "cpu, params": {"where": "cpu", "params": True},
    "disk": {"where": "disk"},
    "disk, params": {"where": "disk", "params": True},
}
SHORT = (
    "out of memory",
    "not enough memory",
    "Cannot allocate",
    "MemoryError",
    "bad_alloc",
    "too little space",
    "(killed)",
)


@dataclass(frozen=True)
class Attempt:
    """One job; travels to its process as JSON.

    Attributes:
        setting: a key of ``SETTINGS``.
        layers: blocks of the GPT.
        dim: width of the residual stream.
        batch: sequences in a step.
        length: tokens of a sequence.
        steps: full steps; the first is not timed.
        device: ``cuda`` or ``cpu``.
        limit: bytes for data beyond what an idle process has; 0 for no limit of our own.
        folder: where files of states are made.
    """

    setting: str
    layers: int
    dim: int
    batch: int
    length: int
    steps: int
    device: str
    limit: int
    folder: str


@dataclass(frozen=True)
class Result:
    """What an attempt gave: numbers, or why there are none.

    Attributes:
        parameters: of the model.
        tokens: per second, after the first step.
        peak: bytes of device memory (GPU), 0 where nobody counts them.
        stopped: what a job that failed was short of, in the words of its last line.
    """

    parameters: int = 0
    tokens: float = 0.0
    peak: int = 0
    stopped: str = ""


def largest(attempt: Callable[[int], Result], most: int) -> tuple[int, Result, str]:
    """Return the largest number of layers that works (0 for none), its result, and what stopped the next larger one.

    Args:
        attempt: tries a number of layers.
        most: layers to try at most.
    """
    good, best, bad, stopped, layers = 0, Result(), most + 1, "", 1
    while layers <= most:
        found = attempt(layers)
        if found.stopped:
            bad, stopped = layers, found.stopped
            break
        good, best, layers = layers, found, 2 * layers
    while bad - good > max(good // 16, 1):
        middle = (good + bad) // 2
        found = attempt(middle)
        if found.stopped:
            bad, stopped = middle, found.stopped
        else:
            good, best = middle, found
    return good, best, stopped or f"nothing, up to {most} layers"


def in_a_process(attempt: Attempt, timeout: float) -> Result:
    """Run an attempt.

    Raises:
        RuntimeError: if it fails for another reason than a lack of memory, space or time.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    command = [sys.executable, str(Path(__file__).resolve()), "--attempt", json.dumps(asdict(attempt))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Result(stopped=f"{timeout:.0f} s of time")
    if done.returncode == 0:
        return Result(**json.loads(done.stdout.strip().splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [""])[-1] + (" (killed)" if done.returncode == -9 else "")
    short = next((word for word in SHORT if word in last), "")
    if not short:
        raise RuntimeError(f"{attempt}: {done.stderr[-3000:]}")
    return Result(stopped=short)


# ---- one attempt, in its process


def run(attempt: Attempt) -> Result:
    """Train; raise what the Trainer raises."""
    if attempt.limit:
        torch.set_num_threads(1)
        _fit(replace(attempt, layers=1, dim=64))  # what is loaded late does not count
        _limit(attempt.limit)
    return _fit(attempt)


def _limit(more: int) -> None:
    import resource

    held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + more, held + more))


def _fit(attempt: Attempt) -> Result:
    import lightning.pytorch as pl
    from gpt import GPT

    from lit_zero import Offload, Zero, ZeroStrategy

    class Model(pl.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "model"):
                heads = max(attempt.dim // 64, 1)
                self.model = GPT(4096, attempt.length, attempt.dim, attempt.layers, heads)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(batch[:, :-1], batch[:, 1:])
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            if attempt.device == "cuda":
                torch.cuda.synchronize()
            ended.append(time.perf_counter())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    ended: list[float] = []
    chosen = SETTINGS[attempt.setting]
    files = {"folder": attempt.folder, "chunk": 4 << 20 if attempt.limit else None}
    offload = Offload(**chosen, **(files if chosen["where"] == "disk" else {}))
    trainer = pl.Trainer(
        accelerator="gpu" if attempt.device == "cuda" else "cpu",
        devices=1,
        strategy=ZeroStrategy(Zero("stage3", units=["Block"]), offload=offload, activation="full"),
        precision="bf16-mixed",
        max_steps=attempt.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=attempt.folder,
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 4096, (attempt.steps * attempt.batch, attempt.length + 1), generator=generator)
    trainer.fit(Model(), torch.utils.data.DataLoader(rows, attempt.batch))  # type: ignore[arg-type]
    seconds = (ended[-1] - ended[0]) / (attempt.steps - 1)
    peak = torch.cuda.max_memory_allocated() if attempt.device == "cuda" else 0
    count = trainer.strategy.engine.parameter_count  # type: ignore[attr-defined]
    return Result(count, attempt.batch * attempt.length / seconds, peak)


def main(arguments: list[str] | None = None) -> None:
    """Search, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit", type=int, default=0, help="CPU: MB for data, beyond what an idle process has")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--most", type=int, default=1024, help="layers to try at most")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for an attempt")
    parser.add_argument("--folder", default=None, help="where files of states are made; a temporary folder by default")
    parser.add_argument("--attempt", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.attempt:
        print(json.dumps(asdict(run(Attempt(**json.loads(options.attempt))))))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible. --device cpu --limit MB searches under a limit of memory instead")
    if (options.device == "cpu") != (options.limit > 0):
        parser.error("--limit goes with --device cpu, and --device cpu with --limit")
    if options.steps < 2:
        parser.error("--steps: the first is not timed, so at least 2 are needed")
    print("| offload | layers | parameters | tokens/s | peak device memory | stopped by |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for setting in options.settings:
            shape = (options.dim, options.batch, options.length, options.steps, options.device)
            folder = options.folder or temporary

            def attempt(layers: int, setting: str = setting) -> Result:
                tried = Attempt(setting, layers, *shape, options.limit * 10**6, folder)  # noqa: B023
                found = in_a_process(tried, options.timeout)
                print(f"{setting}, {layers} layers: {found.stopped or 'works'}", file=sys.stderr, flush=True)
                return found

            layers, found, stopped = largest(attempt, options.most)
            peak = f"{found.peak / 2**30:.1f} GiB" if found.peak else ""
            cells = [setting, layers, f"{found.parameters:,}", f"{found.tokens:,.0f}", peak, stopped]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
