"""A small LightningModule and one function that trains it: on the ranks of a pool, or in plain Lightning on one device.

Both see the same whole batches. Lightning's sampler gives rank ``r`` of ``n`` every ``n``-th index of one permutation,
so ``n`` ranks with ``BATCH / n`` rows each read what one process with ``BATCH`` rows reads from the same permutation.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lit_zero import ZeroStrategy
from tests.zero.harness import GPT

STAGES = ("none", "stage1", "stage2", "stage3")
BATCH = 8  # rows of a whole batch
ROWS = 36  # of the training set: an epoch is 8 + 8 + 8 + 8 + 4 rows, and four ranks have equal parts of each
VOCAB, LENGTH = 31, 9


class LitGPT(pl.LightningModule):
    """A GPT with two parameter groups, a learning rate that changes every step, and metrics of both kinds.

    Args:
        optimizer: ``adamw`` or ``sgd``.
        lr: highest learning rate.
        tied: embedding and head share one weight.
        layers: number of blocks.
    """

    def __init__(self, optimizer: str = "sgd", lr: float = 0.1, tied: bool = True, layers: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT(VOCAB, tied=tied, layers=layers)
        self.accuracy = MulticlassAccuracy(VOCAB, average="micro")  # its states are sums

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.model.loss(batch[0])
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.evaluate("val", batch[0])

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.evaluate("test", batch[0])

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits: torch.Tensor = self.model(batch[0])
        return logits.argmax(-1)

    def evaluate(self, name: str, tokens: torch.Tensor) -> None:
        logits, targets = self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        self.log(f"{name}_loss", F.cross_entropy(logits, targets), sync_dist=True)
        self.accuracy(logits, targets)
        self.log(f"{name}_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict[str, Any]:
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        lr = self.hparams["lr"]
        optimizer: torch.optim.Optimizer
        if self.hparams["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        else:
            # AdamW divides a gradient by its own size, so an element whose true gradient is zero (a key's bias) moves
            # by rounding alone. A larger eps takes those out of the comparison.
            optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(rows: int, seed: int, share: int, as_ranks: bool = False) -> DataLoader[Any]:
    """Return batches of ``share`` rows; ``as_ranks``: shuffled as Lightning does for ranks in training."""
    tokens = torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    dataset = TensorDataset(tokens)
    sampler = DistributedSampler(dataset, 1, 0, shuffle=True) if as_ranks else None
    return DataLoader(dataset, share, sampler=sampler)


@dataclass
class Fit:
    """One call of ``trainer.fit``.

    Attributes:
        zero: arguments of ``ZeroStrategy``, or the name of any strategy.
        devices: ranks.
        trainer: further arguments of the Trainer.
        module: builds the LightningModule.
        arguments: what ``module`` is given.
        rows: of the training set.
        epochs: to train.
        resume: checkpoint to go on from.
        look: called with the Trainer after the fit; its result becomes ``Outcome.notes``.
        before: called with the Trainer and the module before the fit.
    """

    zero: dict[str, Any] | str = "auto"
    devices: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)
    module: Callable[..., pl.LightningModule] = LitGPT
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = ROWS
    epochs: int = 2
    resume: Any = None
    look: Callable[[pl.Trainer], Any] | None = None
    before: Callable[[pl.Trainer, pl.LightningModule], Any] | None = None


@dataclass
class Short(Fit):
    """A fit of one epoch, where nothing asks for two."""

    epochs: int = 1


@dataclass
class Outcome:
    """What a fit gave.

    Attributes:
        weights: the whole state dict; empty on ranks other than 0.
        rows: what was logged, one dictionary per row of the CSV file; empty on ranks other than 0.
        metrics: ``trainer.callback_metrics``.
        steps: optimizer steps.
        notes: what ``look`` returned.
    """

    weights: dict[str, torch.Tensor]
    rows: list[dict[str, float]]
    metrics: dict[str, float]
    steps: int
    notes: Any = None

    def column(self, name: str) -> list[float]:
        """All logged values of one name, in order."""
        return [row[name] for row in self.rows if name in row]


def make_trainer(fit: Fit, folder: Path, **more: Any) -> pl.Trainer:
    """Return the Trainer of a fit."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": fit.devices,
        "strategy": ZeroStrategy(**fit.zero) if isinstance(fit.zero, dict) else fit.zero,
        "max_epochs": fit.epochs,
        "logger": CSVLogger(folder, name="csv", version=0),
        "log_every_n_steps": 1,
        "callbacks": [LearningRateMonitor("step")],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**arguments, **fit.trainer, **more})


def loaders(fit: Fit) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the training and the validation data of a rank."""
    pipeline = fit.zero.get("pipeline") if isinstance(fit.zero, dict) else None
    share = BATCH // (fit.devices // (pipeline.ranks if pipeline else 1))
    return loader(fit.rows, 1, share, as_ranks=fit.zero == "auto"), loader(16, 2, share)


def train(fit: Fit, folder: Path) -> Outcome:
    """Run a fit; call it on every rank."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    if fit.before is not None:
        fit.before(trainer, module)
    trainer.fit(module, *loaders(fit), ckpt_path=fit.resume)
    return outcome(trainer, fit, folder)


def train_all(fits: list[Fit], folder: Path) -> list[Outcome]:
    """Run several fits one after the other, each in a folder of its own: fewer calls of the pool."""
    return [train(fit, folder / str(number)) for number, fit in enumerate(fits)]


def outcome(trainer: pl.Trainer, fit: Fit, folder: Path) -> Outcome:
    """Collect what a fit gave."""
    weights = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
    rows = []
    if trainer.is_global_zero and trainer.logger is not None:
        trainer.logger.save()
        with open(folder / "csv" / "version_0" / "metrics.csv") as file:
            rows = [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Outcome(weights, rows, metrics, trainer.global_step, fit.look(trainer) if fit.look else None)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the relative distance of two state dicts, which must have the same names in the same order."""
    assert list(one) == list(other)
    a, b = (torch.cat([value.flatten().double() for value in each.values()]) for each in (one, other))
    return ((a - b).norm() / b.norm()).item()


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts are equal bit for bit."""
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())
