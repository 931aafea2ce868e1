"""What a run leaves in a process when nobody holds its Trainer and module any more."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tests.strategy.harness import STAGES, Fit, train


def fit_and_forget(folder: Path) -> None:
    for stage in STAGES:
        train(Fit({"zero": stage}, 2, epochs=1), folder / stage)


def left() -> tuple[list[str], int, int]:
    """Return our threads, the operating system's threads with gloo's, and the mapped arenas of this process."""
    ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("lit_zero")]
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    arenas = sum("memfd:lit_zero" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return ours, sum("gloo" in name for name in names), arenas


def test_threads_groups_and_memory_go_with_the_module(ranks, tmp_path):
    ranks(2).run(left)
    before = ranks(2).run(left)
    ranks(2).run(fit_and_forget, tmp_path)
    for (threads, gloo, arenas), (threads_before, gloo_before, arenas_before) in zip(
        ranks(2).run(left), before, strict=True
    ):
        assert len(threads) <= len(threads_before) and arenas <= arenas_before
        assert gloo <= gloo_before + 2, "a group has three; those of this very call come and go"
