"""Collections of torchmetrics with states of every kind, as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from tests.models.harness import defaults
from tests.strategy.harness import STAGES, VOCAB, Fit, LitGPT, distance, train, train_all


class Own(torchmetrics.Metric):
    """A metric of the user's own: a sum, a list of tensors, and a state that keeps its highest value."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("highest", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, scores: torch.Tensor) -> None:
        self.total += scores.sum()
        self.rows.append(scores.mean(-1))
        self.highest = torch.maximum(self.highest, scores.max())

    def compute(self) -> torch.Tensor:
        rows = torchmetrics.utilities.dim_zero_cat(self.rows)
        return self.total + 10 * rows.std() + 100 * self.highest


def collection(prefix: str) -> torchmetrics.MetricCollection:
    return torchmetrics.MetricCollection(
        {
            "accuracy": MulticlassAccuracy(VOCAB, average="micro"),
            "f1": MulticlassF1Score(VOCAB),
            "auroc": MulticlassAUROC(VOCAB, thresholds=None),  # keeps every prediction
        },
        prefix=prefix,
    )


class Measured(LitGPT):
    """Logs collections and single metrics, per step and per epoch, and computes one by hand."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.train_metrics, self.val_metrics = collection("train_"), collection("val_")
        self.confusion = MulticlassConfusionMatrix(VOCAB)
        self.mean, self.own = torchmetrics.MeanMetric(), Own()
        self.kept = torchmetrics.SumMetric()
        self.kept.persistent(True)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits, targets = self.model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten()
        self.log_dict(self.train_metrics(logits, targets), on_step=True, on_epoch=False)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        self.mean(loss, weight=len(targets))
        self.log("train_mean", self.mean, on_step=False, on_epoch=True)
        self.kept(float(len(targets)))
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train_kept", self.kept.compute(), sync_dist=False)
        self.train_metrics.reset()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        logits, targets = self.model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten()
        self.val_metrics.update(logits, targets)
        self.confusion.update(logits, targets)
        self.own(logits.softmax(-1))
        self.log("val_own", self.own, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()
        self.log("val_confused", self.confusion.compute().float().square().sum().sqrt())
        self.confusion.reset()


def test_equals_one_process(ranks, tmp_path):
    arguments = {"optimizer": "adamw", "lr": 3e-2}
    # Without limits on the batches: the validation set is 16 rows.
    trainer = {"limit_val_batches": 1.0}
    fit = defaults({"module": Measured, "arguments": arguments, "epochs": 2, "trainer": trainer, "look": None})
    alone = train(Fit(**fit), tmp_path / "alone")
    names = {"train_mean", "train_kept", "val_own", "val_confused"}
    names |= {f"val_{name}" for name in ("accuracy", "f1", "auroc")}
    assert names <= set(alone.metrics)
    fits = [Fit({"zero": stage}, 2, **fit) for stage in STAGES]
    for each in zip(*ranks(2).run(train_all, fits, tmp_path / "ranks"), strict=True):
        for mine in each:
            for name in names:
                assert mine.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-6), name
        weights = {name: value for name, value in each[0].weights.items() if name != "kept.sum_value"}
        theirs = {name: value for name, value in alone.weights.items() if name != "kept.sum_value"}
        assert distance(weights, theirs) < 1e-9
        assert each[0].weights["kept.sum_value"] * 2 == alone.weights["kept.sum_value"], "as in DDP: rank 0's own part"


def test_the_metrics_measure_something(tmp_path):
    fit = defaults(
        {"module": Measured, "arguments": {"optimizer": "adamw", "lr": 3e-2}, "rows": 36, "epochs": 8, "look": None}
    )
    found = train(Fit(**fit), tmp_path).metrics
    assert 0 < found["val_accuracy"] < 1 and found["val_confused"] > 0 and found["val_own"] > 0
