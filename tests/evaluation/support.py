"""A module that measures in every way there is, and one function that evaluates it: on ranks, or in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.loops import utilities
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lit_zero import ZeroStrategy
from tests.strategy.harness import LENGTH, VOCAB, LitGPT


class Measured(LitGPT):
    """Logs means, sums and maxima, values of each step, metrics with sums, and a metric with a list.

    Attributes:
        read: what the list metric holds of all ranks at the end of each evaluation: the numbers of all rows read.
        collected: numbers of the rows of this rank's steps, except where the rank says that it repeats a batch.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        each = {
            "micro": MulticlassAccuracy(VOCAB, average="micro"),
            "f1": MulticlassF1Score(VOCAB, average="macro"),
        }
        self.metrics, self.mean, self.rows = MetricCollection(each), MeanMetric(), CatMetric()
        self.read: list[list[int]] = []
        self.collected: list[int] = []

    def measure(self, batch: list[torch.Tensor]) -> None:
        if getattr(self.trainer, "forced", False):
            assert torch.is_inference_mode_enabled()
        tokens, numbers = batch
        logits = self.model(tokens[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
        self.log("loss", losses.mean(), sync_dist=True)
        self.log("both", losses.mean(), on_step=True, on_epoch=True, sync_dist=True)
        self.log("sum", losses.sum(), reduce_fx="sum", sync_dist=True)
        self.log("max", losses.max(), reduce_fx="max", sync_dist=True)
        self.metrics.update(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log_dict(self.metrics)
        self.mean.update(losses)
        self.log("mean", self.mean)
        self.rows.update(numbers.float())
        if not getattr(self.trainer.strategy, "repeats_batch", False):
            self.collected += numbers.tolist()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure(batch)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure(batch)

    def on_validation_epoch_end(self) -> None:
        self.read.append(sorted(int(number) for number in self.rows.compute().reshape(-1)))
        self.rows.reset()

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()


def dataset(rows: int) -> TensorDataset:
    """Return rows of tokens, each with its number."""
    tokens = torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    return TensorDataset(tokens, torch.arange(rows))


class Stream(IterableDataset[Any]):
    """This rank's batches, whose number only iterating tells; ``sizes`` are the rows of each batch of each rank."""

    def __init__(self, sizes: list[list[int]], rank: int | None) -> None:
        self.sizes, self.rank = sizes, rank

    def __iter__(self) -> Iterator[Any]:
        data, first = dataset(sum(map(sum, self.sizes))), 0
        for rank, sizes in enumerate(self.sizes):
            for size in sizes:
                if self.rank in (rank, None):
                    yield list(data[first : first + size])
                first += size


class Batches:
    """A loader that is no DataLoader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@dataclass
class Case:
    """One evaluation.

    Attributes:
        rows: samples of each loader; several numbers make several loaders.
        share: samples of a batch on each of ``ranks`` ranks.
        ranks: number of ranks.
        trainer: further arguments of the Trainer.
        options: of the loaders.
        sizes: rows of every batch of each rank, instead of ``rows``: the user divides the data.
        sized: such data comes as an object with a length.
        forced: insist on inference mode.
    """

    rows: list[int] = field(default_factory=list)
    share: int = 4
    ranks: int = 2
    trainer: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    sizes: list[list[int]] | None = None
    sized: bool = False
    forced: bool = False
    stages: Sequence[str] = ("none", "stage3")  # without and with an exchange in every step

    def loaders(self, alone: bool) -> Any:
        """Return the loaders of a rank, or of one process with batches of all ranks together."""
        if self.sizes is not None:
            stream = Stream(self.sizes, None if alone else dist.get_rank())
            return Batches(list(stream)) if self.sized else DataLoader(stream, batch_size=None)
        options = {"batch_size": self.share * (self.ranks if alone else 1), **self.options}
        data: list[Any] = [dataset(rows) for rows in self.rows]
        if options["batch_size"] is None:
            data = [[rows[i : i + 1] for i in range(len(rows))] for rows in data]
        found = [DataLoader(rows, **options) for rows in data]
        return found if len(found) > 1 else found[0]


@dataclass
class Found:
    """What an evaluation gave.

    Attributes:
        logged: what ``validate`` and ``test`` returned, one dictionary for each loader.
        read: see :class:`Measured`, one list for each of the two.
        collected: the same of this rank's steps.
    """

    logged: list[dict[str, float]]
    read: list[list[int]]
    collected: list[int]


def make(case: Case, strategy: Any, folder: Path, **more: Any) -> pl.Trainer:
    """Return the Trainer of a case."""
    arguments = {"accelerator": "cpu", "devices": 1 if strategy == "auto" else case.ranks, "strategy": strategy}
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(**{**arguments, **quiet, "default_root_dir": folder, **case.trainer, **more})


def run(case: Case, strategy: Any, folder: Path) -> Found:
    """Validate and test under a strategy."""
    torch.manual_seed(0)
    model, trainer = Measured(), make(case, strategy, folder)
    trainer.forced = case.forced
    with contextlib.ExitStack() as stack:
        if case.forced:  # Lightning would not use it where the process group is gloo's
            stack.enter_context(mock.patch.object(utilities, "_distributed_is_initialized", return_value=False))
        logged = [
            *trainer.validate(model, case.loaders(strategy == "auto"), verbose=False),
            *trainer.test(model, case.loaders(strategy == "auto"), verbose=False),
        ]
    return Found(logged, model.read, model.collected)


def alone(case: Case, folder: Path) -> Found:
    """Run a case in plain Lightning, in one process."""
    return run(case, "auto", folder)


def in_its_stages(case: Case, folder: Path) -> list[Found]:
    """Run a case on this rank, in each of its stages."""
    return [run(case, ZeroStrategy(stage), folder) for stage in case.stages]


def all_cases(cases: list[Case], folder: Path) -> list[list[Found]]:
    """Run several cases: fewer calls of the pool."""
    return [in_its_stages(case, folder) for case in cases]
