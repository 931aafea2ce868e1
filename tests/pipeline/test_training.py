"""Pipelines in the Trainer: equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_zero.pipeline.policy import Pipeline
from tests.strategy.harness import STAGES, Fit, Outcome, Short, distance, train, train_all


def piped(stage: str = "stage2", devices: int = 2, layers: int = 4, **pipeline: Any) -> Fit:
    """Return a fit in a pipeline."""
    given = {"schedule": "1f1b", "stages": 2, "micro_batches": 4, **pipeline}
    return Short({"zero": stage, "pipeline": Pipeline(**given)}, devices, arguments={"layers": layers})


def equal(one: Outcome, other: Outcome, close: float = 1e-6) -> None:
    assert one.steps == other.steps
    assert distance(one.weights, other.weights) < close
    for name in ("train_loss_step", "train_loss_epoch", "val_loss", "val_accuracy"):
        assert one.column(name) == pytest.approx(other.column(name), rel=1e-5), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(Short(arguments={"layers": 4}), tmp_path_factory.mktemp("alone"))


def test_equals_one_process(ranks: Any, alone: Outcome, tmp_path: Path) -> None:
    for result in ranks(2).run(train_all, [piped(stage) for stage in STAGES], tmp_path)[0]:
        equal(result, alone)


SCHEDULES = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved", "stages": 4},
    "zero_bubble": {"schedule": "zero_bubble"},
    "zbv": {"schedule": "zbv", "stages": 4},
}


def test_every_schedule(ranks: Any, alone: Outcome, tmp_path: Path) -> None:
    """With every stage of ZeRO; interleaved and zbv have four stages on two ranks."""
    fits = [piped(stage, **given) for given in SCHEDULES.values() for stage in STAGES]
    for result in ranks(2).run(train_all, fits, tmp_path, timeout=240)[0]:
        equal(result, alone)


@pytest.mark.thorough
def test_four_ranks(ranks: Any, alone: Outcome, tmp_path: Path) -> None:
    """Two pipelines of two stages, and one of four."""
    fits = [piped(stage, 4) for stage in STAGES]
    fits += [piped(stage, 4, schedule=name, stages=4) for name in ("gpipe", "1f1b", "zero_bubble") for stage in STAGES]
    for result in ranks(4).run(train_all, fits, tmp_path, timeout=240)[0]:
        equal(result, alone)
