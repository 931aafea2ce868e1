"""Fits with callbacks that are built on each rank: many cannot be pickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from tests.strategy.harness import Fit, LitGPT, Outcome, train

Build = tuple[Callable[..., Callback], dict[str, Any]]  # a callback's class and arguments


@dataclass
class With:
    """A fit with callbacks.

    Attributes:
        fit: all the rest of it.
        callbacks: their classes and arguments.
        kept: keep a checkpoint of every epoch, ``kept/epoch=N.ckpt``.
    """

    fit: Fit
    callbacks: list[Build] = field(default_factory=list)
    kept: bool = False


def run(job: With, folder: Path) -> Outcome:
    """Run one fit; call it on every rank."""
    callbacks = [kind(**arguments) for kind, arguments in job.callbacks]
    more: dict[str, Any] = {}
    if job.kept:
        callbacks.append(ModelCheckpoint(folder / "kept", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
        more = {"enable_checkpointing": True}
    if job.fit.trainer.get("logger", True):
        callbacks.append(LearningRateMonitor())
    return train(replace(job.fit, trainer={**job.fit.trainer, **more, "callbacks": callbacks}), folder)


def run_all(jobs: list[With], folder: Path) -> list[Outcome]:
    """Run several, each in a folder of its own: fewer calls of the pool."""
    return [run(job, folder / str(number)) for number, job in enumerate(jobs)]


def under(job: With, stage: str, form: str = "full", size: int = 2, **changes: Any) -> With:
    """Return the same job on ``size`` ranks under ``stage``."""
    zero = {"zero": stage, "checkpoint": form}
    return replace(job, fit=replace(job.fit, zero=zero, devices=size, **changes))


class Buffered(LitGPT):
    """With buffers that change as the number of the step does, the same on every rank."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.count += 1
        self.running.mul_(0.5).add_(self.global_step)
        self.hidden += 1
        return super().training_step(batch, batch_idx)


class Normalised(LitGPT):
    """With batch statistics, which differ from rank to rank."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.norm = ByFeature(12)


class ByFeature(torch.nn.BatchNorm1d):
    """BatchNorm over ``[B, T, C]``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)
