"""Offload in the Trainer: results equal to those without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero import Offload, Pipeline
from tests.strategy.harness import (
    Fit,
    LitGPT,
    Outcome,
    Short,
    distance,
    loaders,
    make_trainer,
    same_bits,
    train,
    train_all,
)
from tests.strategy.test_precision import Overflowing, half, scales

STAGES = ("stage1", "stage2", "stage3")
BUSY = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}


def fits(folder: Path, stage: str, devices: int, **more: Any) -> list[Fit]:
    """Return fits without and with offload."""
    choices = [Offload(), Offload("cpu"), Offload("disk", folder=folder, chunk=1 << 16)]
    if stage == "stage3":
        choices.append(Offload("disk", params=True, folder=folder))
    return [Short({"zero": stage, "offload": each}, devices, **more) for each in choices]


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


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_adamw_equals_one_process(ranks: Any, stage: str, tmp_path: Path) -> None:
    arguments = {"optimizer": "adamw", "lr": 1e-2}
    alone = train(Short(arguments=arguments), tmp_path / "alone")
    for outcome in ranks(2).run(train_all, fits(tmp_path / "states", stage, 2, arguments=arguments), tmp_path)[0]:
        assert distance(outcome.weights, alone.weights) < 1e-6
        assert outcome.column("val_loss") == pytest.approx(alone.column("val_loss"), rel=1e-5)


def test_one_rank(ranks: Any, tmp_path: Path) -> None:
    """A rank that is alone has shards of one."""
    alone = train(Short(trainer=BUSY), tmp_path / "alone")
    for stage in ("stage2", "stage3"):
        for outcome in ranks(1).run(train_all, fits(tmp_path / "states", stage, 1, trainer=BUSY), tmp_path)[0]:
            assert distance(outcome.weights, alone.weights) < 1e-6


def test_in_a_pipeline(ranks: Any, tmp_path: Path) -> None:
    pipeline = Pipeline("1f1b", stages=2, micro_batches=4)
    chosen = fits(tmp_path / "states", "stage3", 2)
    piped = [replace(fit, zero={**fit.zero, "pipeline": pipeline}) for fit in chosen]
    first, *others = ranks(2).run(train_all, piped, tmp_path)[0]
    for other in others:
        assert distance(other.weights, first.weights) < 1e-6


class Shaken(Overflowing):
    """With dropout: random numbers are drawn while the step runs beside the forward.

    Args:
        fused: the optimizer divides by the loss scale itself, and skips the step itself.
    """

    def __init__(self, fused: bool = False, **arguments: Any) -> None:
        super().__init__(overflows=(0, 4), **arguments)
        self.fused = fused
        self.model.norm = nn.Sequential(self.model.norm, nn.Dropout(0.2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = LitGPT.training_step(self, batch, batch_idx)
        if self.batches in self.overflows and self.global_rank == self.trainer.world_size - 1:
            last = self.model.norm[0].bias[-1]
            loss = loss + (last - last.detach()) * 1e30 * 1e30
        self.batches += 1
        return loss

    def configure_optimizers(self) -> Any:
        if not self.fused:
            return super().configure_optimizers()
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3, fused=True)


@pytest.mark.thorough
@pytest.mark.parametrize(("stage", "fused"), [("stage1", True), ("stage2", False), ("stage3", True)])
def test_a_loss_scaler_that_skips_steps(ranks: Any, stage: str, fused: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = {"trainer": half(), "module": Shaken, "arguments": {"fused": fused}, "look": scales}
    first, *others = ranks(2).run(train_all, fits(tmp_path / "states", stage, 2, **more), tmp_path)[0]
    assert min(first.notes) < 2.0**10
    for other in others:
        equal(other, first)
        assert other.notes == first.notes


class Fails(LitGPT):
    """In the fourth step."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise ValueError("a mistake")
        return super().training_step(batch, batch_idx)


def again(fit: Fit, folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Fit, fit again with the same module, and once more after a failure; return weights, and what lies about."""
    torch.manual_seed(0)
    module = LitGPT()
    for number in range(2):
        trainer = make_trainer(fit, folder / str(number))
        trainer.fit(module, *loaders(fit))
    with pytest.raises(ValueError, match="a mistake"):
        failing = make_trainer(fit, folder / "failing")
        failing.fit(Fails(), *loaders(fit))
    weights = {name: value.clone() for name, value in trainer.strategy.full_state_dict().items()}  # type: ignore
    return weights, [path.name for path in (folder.parent / "states").glob("*")]


def all_again(fits: list[Fit], folder: Path) -> list[tuple[dict[str, torch.Tensor], list[str]]]:
    return [again(fit, folder / str(number)) for number, fit in enumerate(fits)]


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_two_fits_and_a_failure(ranks: Any, stage: str, tmp_path: Path) -> None:
    chosen = fits(tmp_path / "states", stage, 2, epochs=1)
    (expected, _), *others = ranks(2).run(all_again, chosen, tmp_path)[0]
    for weights, left in others:
        assert same_bits(weights, expected) and left == []
