"""Pipelines in the Trainer: equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_zero.pipeline.policy import Pipeline
from tests.strategy.harness import STAGES, Fit, Outcome, distance, train, train_all


def piped(stage: str = "stage2", devices: int = 2, layers: int = 4, **pipeline: Any) -> Fit:
    """Return a fit in a pipeline."""
    given = {"schedule": "1f1b", "stages": 2, "micro_batches": 4, **pipeline}
    return Fit({"zero": stage, "pipeline": Pipeline(**given)}, devices, arguments={"layers": layers})


def equal(one: Outcome, other: Outcome, close: float = 1e-6) -> None:
    assert one.steps == other.steps
    assert distance(one.weights, other.weights) < close
    for name in ("train_loss_step", "train_loss_epoch", "val_loss", "val_accuracy"):
        assert one.column(name) == pytest.approx(other.column(name), rel=1e-5), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(Fit(arguments={"layers": 4}), tmp_path_factory.mktemp("alone"))


def test_equals_one_process(ranks: Any, alone: Outcome, tmp_path: Path) -> None:
    for result in ranks(2).run(train_all, [piped(stage) for stage in STAGES], tmp_path)[0]:
        equal(result, alone)
