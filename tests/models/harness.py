"""Put a model of somebody else into a LightningModule and train it: in every stage on ranks, and in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, Outcome, distance, same_bits, train, train_all

Ranks = Callable[[int], RankPool]
CLASSES = 5  # of images


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


class Foreign(pl.LightningModule):
    """Trains a model as it is.

    Args:
        build: makes the model.
        loss: ``loss(model, tokens)``, a mean over rows; tokens have the shape ``[rows, 9]``.
        optimizer: ``optimizer(self)``.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss: Callable[[Any, torch.Tensor], torch.Tensor],
        optimizer: Callable[[nn.Module], Any] = adamw,
    ) -> None:
        super().__init__()
        self.model = build()
        self.loss, self.optimizer = loss, optimizer

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(self.model, batch[0])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.model, batch[0]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


def images(tokens: torch.Tensor, size: int = 9) -> torch.Tensor:
    """Return an image for every row, shape ``[rows, 3, size, size]``."""
    a = torch.sin(tokens * 1.0)
    pixels = torch.stack([torch.sin(k * (a[:, :, None] + a[:, None, :])) for k in (1, 2, 3)], 1)
    return pixels if size == 9 else F.interpolate(pixels, size, mode="bilinear")


def labels(tokens: torch.Tensor) -> torch.Tensor:
    """Return the class of every row's image, shape ``[rows]``."""
    return tokens[:, 0] % CLASSES


def units(trainer: pl.Trainer) -> list[str]:
    """Return the names of the units, to see that a model is cut at all."""
    engine = getattr(trainer.strategy, "engine", None)
    return [] if engine is None else [unit.name for unit in engine.units]


def defaults(fit: dict[str, Any]) -> dict[str, Any]:
    """Return what these tests train with: three steps in fp64."""
    trainer = {"precision": "64-true", "limit_val_batches": 1, "num_sanity_val_steps": 0, **fit.pop("trainer", {})}
    return {"module": Foreign, "rows": 24, "epochs": 1, "look": units, "trainer": trainer, **fit}


def in_all_stages(
    ranks: Ranks, folder: Path, size: int = 2, stages: Sequence[str] = STAGES, **fit: Any
) -> tuple[list[Outcome], Outcome]:
    """Return the outcome of every stage on ``size`` ranks, and that of one process in plain Lightning."""
    fit = defaults(fit)
    alone = train(Fit(**fit), folder / "alone")
    fits = [Fit({"zero": stage}, size, **fit) for stage in stages]
    return ranks(size).run(train_all, fits, folder / "ranks", timeout=180)[0], alone


def check_equal(stages: Sequence[Outcome], alone: Outcome, tolerance: float = 1e-9) -> None:
    """Check that all stages gave what one process gave, and the same bits as one another."""
    for each in stages:
        assert each.steps == alone.steps > 1
        assert distance(each.weights, alone.weights) < tolerance
        for mine, theirs in zip(each.rows, alone.rows, strict=True):
            assert mine == pytest.approx(theirs, rel=max(100 * tolerance, 1e-8))
        assert same_bits(each.weights, stages[0].weights)
    losses = alone.column("train_loss")
    assert losses[-1] != pytest.approx(losses[0], rel=1e-5), "something must have been learned"
