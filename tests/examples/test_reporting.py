"""The callbacks: what counts as a step, and which lines are shown."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reporting import FinalReport, Throughput, format_summary, summarize

AWAY = {"host": 0, "file": 0}  # nothing has left the device


class Clock:
    """Stands in for ``time.perf_counter``: seconds pass when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Module:
    """Stands in for the LightningModule; keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def log(self, name: str, value: float, prog_bar: bool) -> None:
        assert (name, prog_bar) == ("tokens_per_second", True)
        self.logged.append(value)


def make_engine() -> Any:
    return SimpleNamespace(
        exchange=SimpleNamespace(counters=SimpleNamespace(sent_bytes=0)),
        parameter_count=1000,
        model_state_bytes=lambda: {
            "parameter": 4000,
            "master": 0,
            "gradient": 2000,
            "optimizer": 4000,
            "slots": 300,
            **AWAY,
        },
    )


def make_trainer(engine: Any = None, ranks: int = 1) -> Any:
    strategy = SimpleNamespace(data_parallel_size=ranks, **({} if engine is None else {"engine": engine}))
    return SimpleNamespace(
        strategy=strategy, world_size=99, global_step=0, callback_metrics={}, callbacks=[], optimizers=[]
    )


def run_batch(meter: Throughput, trainer: Any, module: Module, clock: Clock, seconds: float, steps: int = 1) -> None:
    batch = (torch.zeros(2, 8),)
    meter.on_train_batch_start(trainer, module, batch, 0)
    clock.now += seconds
    trainer.global_step += steps
    if hasattr(trainer.strategy, "engine"):
        trainer.strategy.engine.exchange.counters.sent_bytes += 500
    meter.on_train_batch_end(trainer, module, None, batch, 0)


def test_rate_of_all_ranks_and_bytes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, module, trainer = Clock(monkeypatch), Module(), make_trainer(make_engine(), ranks=4)
    meter = Throughput(warmup_steps=0)
    meter.on_train_start(trainer, module)
    assert meter.tokens_per_second is None
    for seconds in (1.0, 0.5, 0.25):
        run_batch(meter, trainer, module, clock, seconds)
    assert meter.tokens_per_second == 16 * 4 / 0.5
    assert meter.sent_bytes_per_step == 500
    assert module.logged == [64.0, 96.0, 128.0]  # medians of one, two and three steps


def test_loading_counts_and_validation_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, module, trainer = Clock(monkeypatch), Module(), make_trainer()
    meter = Throughput(warmup_steps=1)
    meter.on_train_start(trainer, module)
    run_batch(meter, trainer, module, clock, 1.0)
    clock.now += 1.0  # waiting for the next batch
    run_batch(meter, trainer, module, clock, 1.0)
    assert meter.tokens_per_second == 16 / 2.0
    clock.now += 50.0
    meter.on_validation_end(trainer, module)
    run_batch(meter, trainer, module, clock, 2.0)
    assert meter.tokens_per_second == 16 / 2.0
    assert meter.sent_bytes_per_step is None


def test_micro_batches_of_one_step_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, module, trainer = Clock(monkeypatch), Module(), make_trainer(make_engine())
    meter = Throughput(warmup_steps=0)
    meter.on_train_start(trainer, module)
    for _ in range(3):
        run_batch(meter, trainer, module, clock, 1.0, steps=0)
        run_batch(meter, trainer, module, clock, 3.0, steps=1)
    assert meter.tokens_per_second == 32 / 4.0
    assert meter.sent_bytes_per_step == 1000


def test_the_first_steps_are_left_out_of_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, module, trainer = Clock(monkeypatch), Module(), make_trainer()
    meter = Throughput(warmup_steps=3)
    meter.on_train_start(trainer, module)
    for seconds in (9.0, 9.0, 9.0, 1.0):
        run_batch(meter, trainer, module, clock, seconds)
    assert meter.tokens_per_second == 16.0


def test_summary_with_an_engine() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    trainer = make_trainer(make_engine())
    trainer.optimizers = [optimizer]
    trainer.callback_metrics = {"val_loss": torch.tensor(2.5), "val_bpb": torch.tensor(1.25)}
    summary = summarize(trainer)
    assert summary == {
        "steps": 0,
        "val_loss": 2.5,
        "val_bpb": 1.25,
        "parameters": 1000,
        "state_bytes_per_rank": 10_000,
        "buffer_bytes_per_rank": 300,
        "host_bytes_per_rank": 0,
        "file_bytes_per_rank": 0,
        "ddp_state_bytes": 16_000,  # parameter, gradient and two moments
    }
    assert "model state per rank  0.0 MB, 0.62 of the 0.0 MB of DDP" in format_summary(summary)
    trainer.optimizers = [torch.optim.SGD([parameter], lr=1.0)]
    assert summarize(trainer)["ddp_state_bytes"] == 8_000


def test_state_is_measured_while_gradients_exist() -> None:
    trainer, report = make_trainer(make_engine()), FinalReport(prompt="")
    trainer.is_global_zero = False
    for trainer.global_step in range(3):
        report.on_before_optimizer_step(trainer, None, None)  # type: ignore[arg-type]
    trainer.strategy.engine.model_state_bytes = lambda: {"parameter": 4000, "slots": 0, **AWAY}
    report.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert report.summary["state_bytes_per_rank"] == 10_000


def test_lines_about_sharding_need_an_engine() -> None:
    text = format_summary(summarize(make_trainer()))
    assert text.splitlines() == ["", "Summary", "  optimizer steps  0"]


def test_no_sample_where_the_parameters_cannot_be_used() -> None:
    report = FinalReport()
    trainer = make_trainer()  # neither a plain strategy nor one with an engine
    trainer.is_global_zero = False
    report.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert report.sample is None
