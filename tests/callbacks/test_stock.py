"""What else the Trainer brings works in every stage as in one process, or is refused by Lightning in these words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.callbacks.harness import With, run, run_all, under
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, loaders, make_trainer, same_bits

Ranks = Callable[[int], RankPool]


# ---- training as in one process


FIT = Fit(epochs=2)
TRAINED = {
    "accumulation_scheduler": With(
        replace(FIT, epochs=3), [(GradientAccumulationScheduler, {"scheduling": {0: 1, 1: 2, 2: 4}})]
    ),
    "early_stopping": With(
        replace(FIT, arguments={"lr": 0.3}, epochs=5),
        [(EarlyStopping, {"monitor": "val_loss", "patience": 1, "min_delta": 0.05})],
    ),
    "overfit_batches": With(replace(FIT, trainer={"overfit_batches": 2})),
    "fast_dev_run": With(replace(FIT, trainer={"fast_dev_run": 2, "logger": False})),
    "detect_anomaly": With(replace(FIT, epochs=1, trainer={"detect_anomaly": True})),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return run_all(list(TRAINED.values()), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def staged(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    jobs = TRAINED.values()
    return {
        stage: ranks(2).run(run_all, [under(job, stage) for job in jobs], tmp_path_factory.mktemp(stage))[0]
        for stage in STAGES
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", range(len(TRAINED)), ids=list(TRAINED))
def test_equals_one_process(alone, staged, stage, number):
    mine, theirs = staged[stage][number], alone[number]
    assert mine.steps == theirs.steps
    assert distance(mine.weights, theirs.weights) < 1e-6
    assert sorted({name for row in mine.rows for name in row}) == sorted({name for row in theirs.rows for name in row})
    for name in {name for row in theirs.rows for name in row}:
        assert mine.column(name) == pytest.approx(theirs.column(name), rel=1e-5), name


def test_they_do_something(alone):
    steps = dict(zip(TRAINED, (found.steps for found in alone), strict=True))
    assert steps == {
        "accumulation_scheduler": 5 + 3 + 2,
        "early_stopping": steps["early_stopping"],
        "overfit_batches": 4,
        "fast_dev_run": 2,
        "detect_anomaly": 5,
    }
    assert 10 <= steps["early_stopping"] < 25


class Rooted(LitGPT):
    """The gradient of its loss is no number; the loss is one."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.0 * torch.sqrt(0.0 * self.model.norm.weight.sum())


def words_of(job: With, kind: type[Exception], folder: Path) -> str:
    with pytest.raises(kind) as caught:
        run(job, folder)
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_detect_anomaly_finds_one(ranks, tmp_path, stage):
    job = under(With(replace(FIT, module=Rooted, trainer={"detect_anomaly": True})), stage)
    for found in ranks(2).run(words_of, job, RuntimeError, tmp_path):
        assert "returned nan values in its 0th output" in found


# ---- the learning rate finder


class Steady(LitGPT):
    """Without a schedule, and with a loss that ranks agree on."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


FINDS = With(
    replace(FIT, module=Steady, epochs=3),
    [(LearningRateFinder, {"min_lr": 1e-3, "max_lr": 1.0, "num_training_steps": 15})],
)


def found_rates(trainer: pl.Trainer) -> tuple[float, list[float], float]:
    finder = next(c for c in trainer.callbacks if isinstance(c, LearningRateFinder))
    return (
        finder.optimal_lr.suggestion(),
        finder.optimal_lr.results["loss"],
        trainer.optimizers[0].param_groups[0]["lr"],
    )


@pytest.mark.thorough
def test_learning_rate_finder(ranks, tmp_path):
    """Afterwards the model is as before, and trains on with what was found; losses are rank 0's, as under DDP."""
    job = replace(FINDS, fit=replace(FINDS.fit, zero="ddp", devices=2, look=found_rates))
    stages = ("none", "stage2", "stage3")
    jobs = [job, *(under(job, stage) for stage in stages), under(job, "stage3", "sharded")]
    ddp, *mine = ranks(2).run(run_all, jobs, tmp_path)[0]
    assert ddp.notes[0] == ddp.notes[2] != 0.1 and len(ddp.notes[1]) >= 10
    for each in mine:
        assert each.notes[0] == pytest.approx(ddp.notes[0]) == each.notes[2]
        assert each.notes[1] == pytest.approx(ddp.notes[1], rel=1e-5)
        assert each.column("val_loss") == pytest.approx(ddp.column("val_loss"), rel=1e-6)
        assert each.steps == ddp.steps == 15
    for each in mine[:-1]:
        assert distance(each.weights, ddp.weights) < 1e-6
        assert same_bits(each.weights, mine[0].weights)
    assert not list(tmp_path.rglob(".lr_find*")), "what it saved to go back to is gone"


AVERAGES = [(EMAWeightAveraging, {"decay": 0.8}), (StochasticWeightAveraging, {"swa_lrs": 0.05, "swa_epoch_start": 2})]


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["finder", "average"])
def test_learning_rate_finder_beside_averages(ranks, tmp_path, first):
    """What it loads to go back is loaded in the middle of a run, before or after there is an average."""
    jobs = []
    for average in AVERAGES:
        callbacks = [*FINDS.callbacks, average] if first == "finder" else [average, *FINDS.callbacks]
        job = With(replace(FINDS.fit, zero="ddp", devices=2), callbacks)
        jobs += [job, under(job, "stage3")]
    found = ranks(2).run(run_all, jobs, tmp_path)[0]
    for ddp, mine in (found[:2], found[2:]):
        assert distance(mine.weights, ddp.weights) < 1e-6
        assert mine.column("val_loss") == pytest.approx(ddp.column("val_loss"), rel=1e-6)
    assert distance(found[0].weights, found[2].weights) > 1e-3


def tune(fit: Fit, folder: Path) -> tuple[float | None, str]:
    torch.manual_seed(0)
    module, trainer = fit.module(), make_trainer(fit, folder, callbacks=[])
    rates = Tuner(trainer).lr_find(module, *loaders(fit), min_lr=1e-3, max_lr=1.0, num_training=15)
    with pytest.raises(ValueError) as caught:
        Tuner(make_trainer(fit, folder, callbacks=[])).scale_batch_size(module, *loaders(fit))
    return rates.suggestion(), str(caught.value)


@pytest.mark.thorough
def test_tuner(ranks, tmp_path):
    suggested = set()
    for stage in ("stage1", "stage3"):
        for rate, words in ranks(2).run(tune, Fit({"zero": stage}, 2, module=Steady, epochs=3), tmp_path / stage):
            suggested.add(rate)
            assert words == "Tuning the batch size is currently not supported with distributed strategies."
    assert len(suggested) == 1 and None not in suggested


@pytest.mark.parametrize("size", [1, 2])
def test_batch_size_finder(ranks, tmp_path, size):
    """Lightning refuses it under every strategy with ranks; on one device ``strategy="auto"`` has none."""
    job = under(With(FIT, [(BatchSizeFinder, {})]), "stage2", size=size)
    for found in ranks(size).run(words_of, job, MisconfigurationException, tmp_path):
        assert found == "The Batch size finder is not supported with distributed strategies."


# ---- what looks on: training is the same, and it sees something


class Spikes(LitGPT):
    """On rank 1 the loss of batch 3 is far too high."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 100.0 if batch_idx == 3 and self.global_rank == 1 else loss


@pytest.mark.parametrize("stage", STAGES)
def test_spike_detection(ranks, tmp_path, stage):
    """A spike on one rank ends the run on all."""
    job = under(With(replace(FIT, module=Spikes), [(SpikeDetection, {})]), stage)
    for found in ranks(2).run(words_of, job, TrainingSpikeException, tmp_path):
        assert found == "Training spike detected in batch 3"
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [2, 3]


def rows_of(batch: Any) -> int:
    return len(batch[0])


LOOKERS = {
    "none": [],
    "spike": [(SpikeDetection, {})],
    "throughput": [(ThroughputMonitor, {"batch_size_fn": rows_of, "window_size": 3})],
    "device": [(DeviceStatsMonitor, {"cpu_stats": True})],
}


@pytest.mark.thorough
def test_monitors(ranks, tmp_path):
    jobs = [With(replace(FIT, epochs=1), callbacks) for callbacks in LOOKERS.values()]
    for stage in ("none", "stage3"):
        found = ranks(2).run(run_all, [under(job, stage) for job in jobs], tmp_path / stage)[0]
        plain, _, throughput, device = found
        assert all(same_bits(each.weights, plain.weights) for each in found)
        assert len(throughput.column("train/batches_per_sec")) >= 2
        # All ranks together see twice the samples of one.
        one, both = throughput.column("train/device/samples_per_sec"), throughput.column("train/samples_per_sec")
        assert both == pytest.approx([2 * rate for rate in one])
        seen = [name for row in device.rows for name in row if name.startswith("DeviceStatsMonitor.on_train_batch_end")]
        assert any("cpu_vm_percent" in name for name in seen)


# ---- profilers


PROFILED = Fit(epochs=1, trainer={"limit_train_batches": 3, "limit_val_batches": 1})


def profile(fit: Fit, folder: Path) -> list[tuple[dict[str, torch.Tensor], str]]:
    """Train under each profiler; return the weights and the report of this rank."""
    found = []
    for kind, more in (
        (SimpleProfiler, {}),
        (AdvancedProfiler, {}),
        (PyTorchProfiler, {"export_to_chrome": False, "row_limit": 1000}),
    ):
        where = folder / kind.__name__
        profiler = kind(dirpath=where, filename="report", **more)
        torch.manual_seed(0)
        trainer = make_trainer(fit, where, callbacks=[], profiler=profiler)
        trainer.fit(LitGPT(), *loaders(fit))
        weights = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
        reports = sorted(where.glob(f"*report*{trainer.global_rank}*"))
        found.append((weights, "\n".join(path.read_text() for path in reports)))
    return found


@pytest.mark.thorough
def test_profilers(ranks, tmp_path):
    expected = run(With(PROFILED), tmp_path / "alone").weights
    for stage in ("stage1", "stage3"):
        for rank, found in enumerate(
            ranks(2).run(profile, replace(PROFILED, zero={"zero": stage}, devices=2), tmp_path / stage)
        ):
            simple, advanced, deep = (report for _, report in found)
            if rank == 0:
                assert all(distance(weights, expected) < 1e-6 for weights, _ in found)
            assert "[Strategy]ZeroStrategy.training_step" in simple
            assert "engine.py" in advanced
            assert "[Strategy]ZeroStrategy.backward" in deep and "aten::addmm" in deep
