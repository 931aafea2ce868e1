"""Jobs of their own: one that has too little memory for its states, and one that is killed in the middle of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero import Offload
from tests.offload.job import KILLED_AT, Wide, data, trainer
from tests.strategy.harness import distance, same_bits

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


def job(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.offload.job", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is mapped on Linux only")
def test_states_that_do_not_fit_into_memory(tmp_path: Path) -> None:
    whole = job("limited", "none", str(tmp_path))
    assert whole.returncode != 0
    assert "not enough memory" in whole.stderr or "alloc" in whole.stderr, whole.stderr[-2000:]
    on_disk = job("limited", "disk", str(tmp_path))
    assert on_disk.returncode == 0, on_disk.stderr[-3000:]
    assert "steps: 3" in on_disk.stdout
    assert list((tmp_path / "states").iterdir()) == []
    assert sum(file.stat().st_size for file in (tmp_path / "saved").iterdir()) > 12 * 1_001_000 * 12


def test_a_disk_that_fails_on_one_rank(tmp_path: Path) -> None:
    """The other rank does not wait, and nothing that is half stepped is saved."""
    begin = time.monotonic()
    found = job("failing", "disk", str(tmp_path))
    assert found.returncode != 0
    assert time.monotonic() - begin < 60
    assert "writing" in found.stderr and "failed (No space left on device)" in found.stderr, found.stderr[-3000:]
    assert list((tmp_path / "states").iterdir()) == []
    kept = sorted(folder.name for folder in (tmp_path / "kept").iterdir())
    assert kept == [f"step={number}.ckpt" for number in range(1, KILLED_AT)]


def resumed(folder: Path, checkpoint: Path | None, offload: Offload) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    run = trainer(offload, folder, 6)
    run.fit(Wide(40, 4), data(40, 2), ckpt_path=checkpoint)
    return {name: value.clone() for name, value in run.strategy.full_state_dict().items()}  # type: ignore[attr-defined]


def test_a_kill_in_the_middle_of_a_step(ranks: Any, tmp_path: Path) -> None:
    found = job("killed", "disk", str(tmp_path))
    assert found.returncode == -signal.SIGKILL, found.stderr[-3000:]
    assert list((tmp_path / "states").iterdir()) == [], "the system has given the space back"
    kept = sorted(folder.name for folder in (tmp_path / "kept").iterdir())
    assert kept == [f"step={number}.ckpt" for number in range(1, KILLED_AT)]
    disk = Offload("disk", params=True, folder=tmp_path / "states")
    [straight] = ranks(1).run(resumed, tmp_path, None, disk)
    for offload in (disk, Offload("cpu"), Offload()):
        [gone_on] = ranks(1).run(resumed, tmp_path, tmp_path / "kept" / kept[-1], offload)
        if offload.away:
            assert same_bits(gone_on, straight)
        assert distance(gone_on, straight) < 1e-6  # on one rank the step is then whole parameters'
