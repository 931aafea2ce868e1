"""What a user of Lightning expects holds on every rank of a pipeline: logs, metrics, callbacks, hooks, predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from lit_zero.callbacks import PredictionWriter
from tests.callbacks.harness import With, run_all
from tests.evaluation.support import dataset
from tests.pipeline.test_training import SCHEDULES, equal, piped
from tests.pool import RankFailure
from tests.strategy.harness import STAGES, VOCAB, Fit, LitGPT, Short, make_trainer, train, train_all

LAYERS = {"layers": 4}


class Logging(LitGPT):
    """Logs in every way there is."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        each = {"micro": MulticlassAccuracy(VOCAB, average="micro"), "f1": MulticlassF1Score(VOCAB)}
        self.val_metrics = torchmetrics.MetricCollection(each, prefix="val_")
        self.auroc = MulticlassAUROC(VOCAB, thresholds=None)  # keeps every prediction
        self.mean, self.kept, self.rows = torchmetrics.MeanMetric(), torchmetrics.SumMetric(), torchmetrics.CatMetric()
        self.kept.persistent(True)
        self.notes: list[Any] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        tokens = batch[0]
        logits = self.model(tokens[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
        self.log("train_loss", losses.mean(), on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"sum": losses.sum(), "again": losses.sum()}, on_epoch=True, reduce_fx="sum")
        self.log("max", losses.max(), on_step=True, on_epoch=True, reduce_fx=torch.max)
        self.log("min", losses.min(), on_epoch=True, reduce_fx="min", logger=False)
        self.log("number", 3, on_step=True, prog_bar=True)
        self.mean.update(losses)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.kept.update(float(len(tokens)))
        return {"loss": losses.mean(), "rows": losses.detach(), "name": "step", "number": 0.5}

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        assert outputs["rows"].shape == (len(outputs["rows"]),) and outputs["name"] == "step"
        self.notes.append([float(outputs["loss"]), *outputs["rows"].tolist(), outputs["number"]])

    def on_train_epoch_end(self) -> None:
        self.log("kept", self.kept.compute())  # never reset

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        tokens = batch[0]
        logits, targets = self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        self.log("val_loss", F.cross_entropy(logits, targets), on_step=True, on_epoch=True)
        self.val_metrics(logits, targets)
        self.log_dict(self.val_metrics)
        self.auroc.update(logits.softmax(-1), targets)
        self.rows.update(tokens[:, 0].float())
        self.accuracy(logits, targets)
        self.log("val_accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val_auroc", self.auroc.compute())
        self.notes.append(sorted(self.rows.compute().tolist()))
        self.auroc.reset()
        self.rows.reset()


def told(trainer: pl.Trainer) -> Any:
    bar = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    return trainer.lightning_module.notes, bar, float(trainer.lightning_module.kept.sum_value)


def check_told(found: list[Any], alone: Any) -> None:
    for outcomes in found:
        for each in outcomes:
            assert each.metrics == pytest.approx(alone.metrics, rel=1e-5)
            assert each.notes[1] == pytest.approx(alone.notes[1], rel=1e-5)
            assert len(each.notes[0]) == len(alone.notes[0])
            for mine, theirs in zip(each.notes[0], alone.notes[0], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)
    for each in found[0]:
        equal(each, alone)
        assert set(each.rows[0]) == set(alone.rows[0])
        for name in ("sum", "max_step", "max_epoch", "number", "mean", "kept", "val_loss_epoch", "val_f1", "val_auroc"):
            assert each.column(name) == pytest.approx(alone.column(name), rel=1e-5), name


def test_what_is_logged_is_the_same_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    alone = train(Short(module=Logging, arguments=LAYERS, epochs=2, look=told), tmp_path / "alone")
    fits = [replace(piped("stage2", **way), module=Logging, epochs=2, look=told) for way in SCHEDULES.values()]
    check_told(ranks(2).run(train_all, fits, tmp_path, timeout=180), alone)


@pytest.mark.thorough
def test_logs_of_two_pipelines(ranks: Any, tmp_path: Path) -> None:
    """What each pipeline returns and what is logged without sync_dist is of its own rows."""
    names = ("val_micro", "val_f1", "val_auroc", "val_accuracy", "mean", "kept")
    alone = train(Short(module=Logging, arguments=LAYERS, epochs=2), tmp_path / "alone")
    fits = [
        replace(piped("stage3", 4), module=Logging, epochs=2),
        replace(piped("stage1", 4, **SCHEDULES["zbv"]), module=Logging, epochs=2),
    ]
    for outcomes in ranks(4).run(train_all, fits, tmp_path, timeout=180):
        for each in outcomes:
            for name in names:
                # In the area under a curve, rounding may swap neighbours.
                close = 1e-3 if "auroc" in name else 1e-5
                assert each.metrics[name] == pytest.approx(alone.metrics[name], rel=close), name


# ---- no loss


class Sometimes(LitGPT):
    """Returns nothing in some batches, with momentum and weight decay that would go on moving the weights."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (1, 2) else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2, eps=1e-3)


@pytest.mark.thorough
def test_no_loss(ranks: Any, tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 2}]
    alone = [
        train(Short(module=Sometimes, arguments=LAYERS, trainer=way), tmp_path / f"alone{number}")
        for number, way in enumerate(ways)
    ]
    fits = [replace(piped(stage), module=Sometimes, trainer=way) for stage in STAGES for way in ways]
    for number, each in enumerate(ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]):
        equal(each, alone[number % 2])
    fits = [replace(piped(stage, 4), module=Sometimes, trainer=way) for stage in ("none", "stage3") for way in ways]
    for number, each in enumerate(ranks(4).run(train_all, fits, tmp_path, timeout=120)[0]):
        equal(each, alone[number % 2])


# ---- callbacks


@pytest.mark.thorough
def test_callbacks(ranks: Any, tmp_path: Path) -> None:
    def job(fit: Fit, folder: str) -> With:
        callbacks: Any = [
            (
                ModelCheckpoint,
                {"dirpath": tmp_path / folder, "monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}"},
            ),
            (EarlyStopping, {"monitor": "val_loss", "mode": "max", "patience": 2}),  # a loss that falls is no better
        ]
        trainer = {"enable_checkpointing": True}
        return With(replace(fit, trainer=trainer, epochs=6, look=stopped, arguments={**LAYERS, "lr": 0.05}), callbacks)

    [alone] = run_all([job(Short(), "alone")], tmp_path / "0")
    jobs = [job(piped("stage2"), "two"), job(piped("stage3", **SCHEDULES["zbv"]), "zbv")]
    for outcomes in ranks(2).run(run_all, jobs, tmp_path / "1", timeout=120):
        for each in outcomes:
            assert each.notes == alone.notes and each.steps == alone.steps < 30
            assert each.metrics == pytest.approx(alone.metrics, rel=1e-5)


def stopped(trainer: pl.Trainer) -> Any:
    checkpoint = trainer.checkpoint_callback
    kept = sorted(Path(path).name for path in checkpoint.best_k_models)  # type: ignore[union-attr]
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return trainer.current_epoch, kept, Path(checkpoint.best_model_path).name, rate  # type: ignore[union-attr]


# ---- evaluation


class Predicting(LitGPT):
    """Predicts tensors, lists and texts."""

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        tokens, numbers = batch
        return {"row": numbers, "both": (self.model(tokens)[:, -1], [f"row {number}" for number in numbers.tolist()])}


def predict(ways: list[Fit], folder: Path) -> list[Any]:
    found = []
    for number, fit in enumerate(ways):
        torch.manual_seed(0)
        writer = PredictionWriter(folder / f"{number}.pt")
        trainer = make_trainer(fit, folder, callbacks=[writer])
        returned = trainer.predict(Predicting(layers=4), DataLoader(dataset(11), 2 if fit.devices == 4 else 4))
        found.append(([each["row"].tolist() for each in returned], writer.predictions))
    return found


def test_predictions(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    [(batches, written)] = predict([Short()], tmp_path / "alone")
    ways = [piped("stage3", **way) for way in SCHEDULES.values()]
    for rank, outcomes in enumerate(ranks(2).run(predict, ways, tmp_path)):
        for returned, mine in outcomes:
            assert returned == batches
            check_written(mine, written) if rank == 0 else None
    found = ranks(4).run(predict, [piped("stage2", 4), piped("stage3", 4)], tmp_path)
    for number in range(2):
        check_written(found[0][number][1], written)
        assert found[0][number][0] == found[2][number][0]  # the ranks of a pipeline return the same
        assert sorted(row for batch in found[0][number][0] + found[1][number][0] for row in batch) == list(range(11))


def check_written(mine: Any, other: Any) -> None:
    assert mine["row"].tolist() == other["row"].tolist() == list(range(11))
    torch.testing.assert_close(mine["both"][0], other["both"][0])
    assert mine["both"][1] == other["both"][1]


class Bare(LitGPT):
    """Logs nothing and returns nothing."""

    def test_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().test_step(batch, batch_idx)


def evaluate(ways: list[Fit], folder: Path) -> list[Any]:
    found = []
    for fit in ways:
        torch.manual_seed(0)
        trainer, module = make_trainer(fit, folder), Bare(layers=4)
        data = [DataLoader(dataset(rows), 4) for rows in (11, 6)]
        found.append((trainer.test(module, data, verbose=False), trainer.validate(module, data[0], verbose=False)))
    return found


def test_evaluation_under_every_schedule(ranks: Any, tmp_path: Path) -> None:
    [alone] = evaluate([Short()], tmp_path)
    ways = [piped("stage3", **way) for way in SCHEDULES.values()]
    for outcomes in ranks(2).run(evaluate, ways, tmp_path, timeout=120):
        for each in outcomes:
            for mine, theirs in zip(each[0] + each[1], alone[0] + alone[1], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)


# ---- parameters of other stages


class Looking(LitGPT):
    """Reads and writes parameters of every stage in a hook."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.blocks[1].norm1.requires_grad_(False)
        self.notes: list[torch.Tensor] = []

    @property
    def names(self) -> list[str]:
        return ["model.embedding.weight", "model.head.weight", "model.blocks.0.up.bias", "model.blocks.3.down.weight"]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        strategy = self.trainer.strategy
        for name in self.names:
            gradient = self.get_parameter(name).grad
            self.notes.append(strategy.full.gradient(name) if gradient is None else gradient.clone())

    def on_train_batch_end(self, *_: Any) -> None:
        strategy = self.trainer.strategy
        for name in [*self.names, "model.blocks.1.norm1.weight"]:
            if hasattr(strategy, "full"):
                value = strategy.full.parameter(name)
                strategy.full.set_parameter(name, value * 0.99)
            else:
                with torch.no_grad():
                    value = self.get_parameter(name).clone()
                    self.get_parameter(name).mul_(0.99)
            self.notes.append(value)
        for name in self.names:
            if hasattr(strategy, "full"):
                state = strategy.full.state(name, "exp_avg")
                strategy.full.set_state(name, "exp_avg", state * 0.9)
            else:
                found = self.trainer.optimizers[0].state[self.get_parameter(name)]["exp_avg"]
                state = found.clone()
                found.mul_(0.9)
            self.notes.append(state)


def looked(trainer: pl.Trainer) -> Any:
    return trainer.lightning_module.notes


@pytest.mark.thorough
def test_parameters_of_other_stages(ranks: Any, tmp_path: Path) -> None:
    arguments = {"optimizer": "adamw", "lr": 1e-2, **LAYERS}
    alone = train(Short(module=Looking, arguments=arguments, look=looked, epochs=1), tmp_path / "alone")
    assert len(alone.notes) == 5 * 13
    for size in (2, 4):
        fits = [
            replace(piped(stage, size), module=Looking, arguments=arguments, look=looked, epochs=1) for stage in STAGES
        ]
        for outcomes in ranks(size).run(train_all, fits, tmp_path / str(size), timeout=120):
            for each in outcomes:
                for mine, theirs in zip(each.notes, alone.notes, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
                if each.weights:
                    equal(each, alone)


# ---- what a step must not do


class Wrong(LitGPT):
    """Does in its step what a pipeline cannot.

    Args:
        what: that.
    """

    def __init__(self, what: str) -> None:
        super().__init__(layers=4)
        self.what = what
        self.automatic_optimization = what != "manual"
        if what == "on step":
            self.accuracy.dist_sync_on_step = True

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        logits = self.model(batch[0])
        if self.what == "twice":
            logits = logits + self.model(batch[0])
        if self.what == "error":
            raise KeyError("user")
        if self.what == "gather":
            self.all_gather(logits)
        if self.what == "reduce":
            self.trainer.strategy.reduce(logits)
        if self.what in ("compute", "on step"):
            self.accuracy(logits.flatten(0, 1), batch[0].flatten())
        if self.what == "compute":
            self.accuracy.compute()
        if self.what == "positional":
            self.log("x", 1.0, True)
        return logits.square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.what == "state_dict":
            self.state_dict()
        if self.what == "unknown":
            self.trainer.strategy.full.parameter("model.heat.weight")  # type: ignore[attr-defined]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if self.what != "kept":
            optimizer.zero_grad()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if self.what == "kept":
            closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)


REFUSED = {
    "manual": "Wrong uses manual optimization.*Use automatic optimization, or pipeline=none",
    "twice": "is called twice in one step.*Call the model once in the step",
    "gather": "all_gather was called in a step.*Call it in a hook",
    "reduce": "reduce was called in a step.*sync_dist=True",
    "compute": "metric 'accuracy' exchanges its states in the step.*Call compute.. at the end of the epoch",
    "on step": "dist_sync_on_step=True.*at the end of the epoch",
    "positional": "got further arguments by position; name them",
    "state_dict": "would see the parameters of one stage of the pipeline only.*full_state_dict",
    "unknown": "no parameter 'model.heat.weight'. Did you mean.*model.blocks.0.up.weight.*model.blocks.3.up.weight",
    "error": "KeyError: 'user'",
    "kept": "optimizer_zero_grad has left the gradients.*accumulate_grad_batches",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(ranks: Any, tmp_path: Path, what: str) -> None:
    with pytest.raises(RankFailure, match=f"(?s){REFUSED[what]}"):
        fit = replace(piped("none"), module=Wrong, arguments={"what": what}, epochs=1)
        ranks(2).run(train, fit, tmp_path)
