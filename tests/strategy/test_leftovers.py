"""What a run leaves in a process when nobody holds its Trainer and module any more."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

from tests.strategy.harness import STAGES, Fit, train


def fit_and_forget(folder: Path) -> None:
    for stage in STAGES:
        train(Fit({"zero": stage}, 2, epochs=1), folder / stage)


def left() -> tuple[list[str], int, int]:
    """Return our threads, the operating system's threads with gloo's, and the mapped arenas of this process."""
    dist.barrier()  # gloo starts the threads of this call's own group when it is used
    patience = time.monotonic() + 10.0
    while any(thread.name.startswith("lit_zero") for thread in threading.enumerate()) and time.monotonic() < patience:
        time.sleep(0.05)  # one that has been told to end needs a moment for it
    ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("lit_zero")]
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    arenas = sum("memfd:lit_zero" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return ours, sum("gloo" in name for name in names), arenas


def test_threads_groups_and_memory_go_with_the_module(ranks, tmp_path):
    ranks(2).run(left)
    before = ranks(2).run(left)
    ranks(2).run(fit_and_forget, tmp_path)
    assert ranks(2).run(left) == before
