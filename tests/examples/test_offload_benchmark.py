"""The benchmark of offload: that it runs, and that what it compares is the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark import SIZES, take_turn
from benchmark_offload import WORKER, kernels
from benchmark_worker import Turn

from tests.config.support import EXAMPLES, run

pytestmark = pytest.mark.thorough


def test_settings_train_alike() -> None:
    names = ("stage3", "stage3 cpu params", "stage3 disk params", "stage2 cpu half")
    losses = []
    for name in names:
        found = take_turn(Turn(name, 2, *SIZES["tiny"], 1, 2, "cpu", False), 120, WORKER)
        losses.append([sum(each) for each in zip(*(rank["losses"] for rank in found), strict=True)])
    assert len(losses[0]) == 3
    assert all(each == pytest.approx(losses[0], rel=1e-5) for each in losses)


def test_kernels_are_timed() -> None:
    rows = kernels(10_000, 2).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:5]] == [
        "torch fused, portions",
        "torch fused, one tensor",
        "torch foreach",
    ]
    assert len(rows) == 7, "DeepSpeed has a row, with its time or the reason why there is none"


def test_the_command_prints_both_tables(tmp_path: Path) -> None:
    words = ["--elements", "1000", "--rounds", "1", "--steps", "1", "--warmup", "1", "--sizes", "tiny", "--ranks", "1"]
    found = run(
        EXAMPLES / "benchmark_offload.py", *words, "--no-memory", "--only", "stage2", "stage2 disk", cwd=tmp_path
    )
    assert found.code == 0, found.output
    assert "AdamW on 1,000 elements" in found.output and "| stage2 disk | " in found.output
