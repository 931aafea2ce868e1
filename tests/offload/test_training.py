"""Offload in the Trainer: results equal to those without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_zero import Offload, Pipeline
from tests.strategy.harness import Fit, Outcome, distance, same_bits, train, train_all

STAGES = ("stage1", "stage2", "stage3")
BUSY = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}


def fits(folder: Path, stage: str, devices: int, **more: Any) -> list[Fit]:
    """Return fits without and with offload."""
    choices = [Offload(), Offload("cpu"), Offload("disk", folder=folder, chunk=1 << 16)]
    if stage == "stage3":
        choices.append(Offload("disk", params=True, folder=folder))
    return [Fit({"zero": stage, "offload": each}, devices, **more) for each in choices]


def equal(one: Outcome, other: Outcome) -> None:
    assert one.steps == other.steps and one.metrics == other.metrics
    assert same_bits(one.weights, other.weights)
    assert one.rows == other.rows


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_no_offload(ranks: Any, stage: str, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    first, *others = ranks(2).run(train_all, fits(folder, stage, 2, trainer=BUSY), tmp_path)[0]
    for other in others:
        equal(other, first)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_adamw_equals_one_process(ranks: Any, stage: str, tmp_path: Path) -> None:
    arguments = {"optimizer": "adamw", "lr": 1e-2}
    alone = train(Fit(arguments=arguments), tmp_path / "alone")
    for outcome in ranks(2).run(train_all, fits(tmp_path / "states", stage, 2, arguments=arguments), tmp_path)[0]:
        assert distance(outcome.weights, alone.weights) < 1e-6
        assert outcome.column("val_loss") == pytest.approx(alone.column("val_loss"), rel=1e-5)


def test_one_rank(ranks: Any, tmp_path: Path) -> None:
    """A rank that is alone has shards of one."""
    alone = train(Fit(trainer=BUSY), tmp_path / "alone")
    for stage in STAGES:
        for outcome in ranks(1).run(train_all, fits(tmp_path / "states", stage, 1, trainer=BUSY), tmp_path)[0]:
            assert distance(outcome.weights, alone.weights) < 1e-6


def test_in_a_pipeline(ranks: Any, tmp_path: Path) -> None:
    pipeline = Pipeline("1f1b", stages=2, micro_batches=4)
    for stage in ("stage1", "stage3"):
        piped = [replace(fit, zero={**fit.zero, "pipeline": pipeline}) for fit in fits(tmp_path / "states", stage, 2)]
        first, *others = ranks(2).run(train_all, piped, tmp_path / stage)[0]
        for other in others:
            assert distance(other.weights, first.weights) < 1e-6
