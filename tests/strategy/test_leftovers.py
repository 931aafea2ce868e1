"""What a run leaves in a process when nobody holds its Trainer and module any more."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

from lit_zero import Pipeline
from lit_zero.zero.engine import Engine
from tests.strategy.harness import STAGES, Fit, train


def fit_and_forget(folder: Path) -> None:
    for stage in STAGES:
        train(Fit({"zero": stage}, 2, epochs=1), folder / stage)
    for schedule in ("1f1b", "zero_bubble"):
        pipeline = Pipeline(schedule, stages=2, micro_batches=4)
        train(Fit({"zero": "stage3", "pipeline": pipeline}, 2, epochs=1), folder / schedule)


def ours() -> list[str]:
    """Return the names of our threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lit_zero")]


def left(threads: int = 1 << 30) -> tuple[list[str], int, int, int]:
    """Return our threads, the operating system's threads with gloo's, the mapped arenas and the engines of this
    process.

    Args:
        threads: as many as there should be; those above have a while to end.
    """
    gc.unfreeze()  # what earlier calls have left is looked at too
    dist.barrier()  # gloo starts the threads of this call's own group when it is used
    patience = time.monotonic() + 10.0
    while len(ours()) > threads and time.monotonic() < patience:
        time.sleep(0.05)  # one that has been told to end needs a moment for it
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    arenas = sum("memfd:lit_zero" in line for line in Path("/proc/self/maps").read_text().splitlines())
    engines = sum(isinstance(each, Engine) for each in gc.get_objects())
    return ours(), sum("gloo" in name for name in names), arenas, engines


def test_threads_groups_and_memory_go_with_the_module(ranks, tmp_path):
    ranks(2).run(left)
    before = ranks(2).run(left)
    ranks(2).run(fit_and_forget, tmp_path)
    assert ranks(2).run(left, max(len(rank[0]) for rank in before)) == before
