"""The programs that time a pipeline: that they run, and that what they compare is the same training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmark import SIZES, take_slices, take_turn
from benchmark_pipeline import WORKER, table
from benchmark_pipeline_worker import CONTENDERS, PipelineTurn

from tests.config.support import EXAMPLES, run

pytestmark = pytest.mark.thorough


def test_all_contenders_train_alike() -> None:
    model = {**SIZES["tiny"][0], "tied": False}
    turns = {name: take_turn(PipelineTurn(name, "1f1b", 2, model, 4, 4, 1, 3), 120, WORKER) for name in CONTENDERS}
    torch, *others = (turns[name][-1]["losses"] for name in ("torch", "torch in the Trainer", "lit_zero"))
    assert len(torch) == 4
    for losses in others:
        assert losses == pytest.approx(torch, rel=1e-5)
    assert torch[-1] < torch[0]
    assert all(len(rank["seconds"]) == 3 for turn in turns.values() for rank in turn)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot stop a process for a while")
def test_slices_stop_and_go_on() -> None:
    model = {**SIZES["tiny"][0], "tied": False}
    turns = [PipelineTurn(name, "1f1b", 2, model, 4, 4, 1, 3) for name in ("torch", "lit_zero")]
    torch, ours = (ranks[-1]["losses"] for ranks in take_slices(turns, 1.0, 120, WORKER))
    assert len(torch) == 4 and ours == pytest.approx(torch, rel=1e-5)
    with pytest.raises(RuntimeError, match="rank 0: "):
        take_slices(turns, 0.2, 0.4, WORKER)


def test_table_takes_the_slowest_rank_and_the_median() -> None:
    def turn(*seconds: float) -> list[dict]:
        ranks = [{"seconds": list(seconds), "losses": [2.0]}, {"seconds": [0.001] * len(seconds), "losses": [1.0]}]
        return ranks

    text = table({"torch": [turn(0.02, 0.04), turn(0.03)], "lit_zero": [turn(0.06)]})
    assert text.splitlines()[2:] == [
        "| torch | 30.0 (30.0, 30.0) | 1.000 | 1.0000000 |",
        "| lit_zero | 60.0 (60.0) | 2.000 | 1.0000000 |",
    ]


def test_timelines_are_measured_and_drawn(tmp_path: Path) -> None:
    words = ["--ranks", "2", "--micro-batches", "3", "--milliseconds", "2", "--steps", "1"]
    done = run(EXAMPLES / "pipeline_timeline.py", *words, "--schedules", "1f1b", "zero_bubble", cwd=tmp_path)
    assert done.code == 0, done.output
    for schedule, kept, kinds in (("1f1b", "2 1", "FB"), ("zero_bubble", "2 1", "FIW")):
        [row] = [line for line in done.output.splitlines() if line.startswith(f"| {schedule} | 3 |")]
        assert row.endswith(f"| {kept} |")
        trace = json.loads((tmp_path / "timelines" / f"{schedule}_2x3.json").read_text())["traceEvents"]
        spans = [event for event in trace if event["ph"] == "X"]
        assert sorted(span["name"] for span in spans) == sorted(
            f"{kind}{stage}.{part}" for kind in kinds for stage in range(2) for part in range(3)
        )
        assert (tmp_path / "timelines" / f"{schedule}_2x3.svg").read_text().startswith("<svg")
