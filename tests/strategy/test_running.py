"""Everything else that a Trainer runs: by name, validate, test and predict, one after the other, and summaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelSummary
from lightning.pytorch.loops import utilities
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from torch import nn

from lit_zero import ZeroStrategy
from tests.pool import RankPool
from tests.strategy.harness import (
    STAGES,
    VOCAB,
    Fit,
    LitGPT,
    distance,
    loaders,
    make_trainer,
    outcome,
    same_bits,
    train,
    train_all,
)

Ranks = Callable[[int], RankPool]
FIT = Fit(arguments={"optimizer": "sgd", "lr": 0.1}, epochs=1)


def strategy_of(trainer: pl.Trainer) -> tuple[str, int, dict[str, int]]:
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy)
    return strategy.zero.stage, strategy.data_parallel_size, strategy.distributed_sampler_kwargs


@pytest.mark.parametrize("size", [1, 2])
def test_by_name(ranks, tmp_path, size):
    alone = train(FIT, tmp_path / "alone")
    fits = [replace(FIT, zero=f"zero{number}", devices=size, look=strategy_of) for number in range(4)]
    for rank, outcomes in enumerate(ranks(size).run(train_all, fits, tmp_path)):
        for stage, each in zip(STAGES, outcomes, strict=True):
            assert each.notes == (stage, size, {"num_replicas": size, "rank": rank})
            if rank == 0:
                assert distance(each.weights, alone.weights) < 1e-6


class Summary(ModelSummary):
    """Keeps what it would print, on rank 0."""

    text = ""

    @classmethod
    def summarize(cls, summary_data: Any, total_parameters: int, *more: Any, **others: Any) -> None:
        Summary.text = f"{total_parameters} {dict(summary_data)['Params']} {dict(summary_data).get('Out sizes')}"


def summary(trainer: pl.Trainer) -> str:
    text, Summary.text = Summary.text, ""
    return text


class WithExample(LitGPT):
    """The summary runs it once to learn the sizes of what goes in and out."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.example_input_array = torch.zeros(2, 5, dtype=torch.int64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


@pytest.mark.thorough("LitGPT")
@pytest.mark.parametrize("module", [LitGPT, WithExample])
def test_the_summary_counts_true_parameters(ranks, tmp_path, module):
    fit = replace(FIT, module=module, look=summary)

    def with_summary(**changes: Any) -> Fit:
        return replace(fit, trainer={"callbacks": [Summary(max_depth=3)]}, **changes)

    expected = train(with_summary(), tmp_path / "alone").notes
    count = sum(p.numel() for p in LitGPT().parameters())
    assert expected.startswith(f"{count} [")
    fits = [with_summary(zero={"zero": stage}, devices=2) for stage in STAGES]
    first, second = ranks(2).run(train_all, fits, tmp_path)
    assert [each.notes for each in first] == [expected] * 4
    assert [each.notes for each in second] == [""] * 4


class InInferenceMode(LitGPT):
    """Insists on it, and keeps a tensor that was made in it, as a cache would."""

    def evaluate(self, name: str, tokens: torch.Tensor) -> None:
        assert torch.is_inference_mode_enabled()
        self.cache = tokens + 1
        super().evaluate(name, tokens)


def run_in_inference_mode(fit: Fit, folder: Path) -> dict[str, Any]:
    """Lightning uses no_grad where the process group is gloo's, and within ``fit``: make it use inference_mode.

    The first evaluation comes before the first step, so buffers that are made late would be made in inference mode.
    """
    with (
        mock.patch.object(utilities, "_distributed_is_initialized", return_value=False),
        mock.patch.object(_EvaluationLoop, "inference_mode", property(lambda _: True, lambda *_: None), create=True),
    ):
        return run_all(replace(fit, module=InInferenceMode), folder)


def run_all(fit: Fit, folder: Path) -> dict[str, Any]:
    """Validate, train, test, predict, train on with the same Trainer and with a new one, and go back to the first."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder / "first")
    training, validation = loaders(fit)
    found: dict[str, Any] = {}
    found["before"] = trainer.validate(module, validation, verbose=False)[0]
    trainer.fit(module, training, validation)
    found["first"] = outcome(trainer, fit, folder / "first").weights
    found["tested"] = trainer.test(module, validation, verbose=False)[0]
    predicted = trainer.predict(module, validation)
    assert predicted is not None
    trainer.fit_loop.max_epochs = 2 * fit.epochs
    trainer.fit(module, training, validation)
    found["second"] = outcome(trainer, fit, folder / "first").weights
    other = make_trainer(fit, folder / "second")
    other.fit(module, training, validation)
    found["third"] = outcome(other, fit, folder / "second").weights
    found["validated"] = trainer.validate(module, validation, verbose=False)[0]
    trainer.fit_loop.max_epochs = 3 * fit.epochs
    trainer.fit(module, training, validation)
    found["fourth"] = outcome(trainer, fit, folder / "first").weights
    return {**found, "predicted": torch.cat(predicted)}


@pytest.mark.thorough("none-bf16", "stage3-bf16", "stage2-32")
@pytest.mark.parametrize(
    ("stage", "precision", "close"),
    [
        ("none", "bf16-mixed", 2e-3),
        ("stage2", "32-true", 1e-6),  # replicated weights, as in stages none and 1
        ("stage3", "32-true", 1e-6),
        ("stage3", "bf16-mixed", 2e-3),
    ],
)
def test_one_after_the_other(ranks, tmp_path, stage, precision, close):
    fit = replace(FIT, trainer={"precision": precision, "val_check_interval": 2})
    alone = run_all(fit, tmp_path / "alone")
    fit = replace(fit, zero={"zero": stage}, devices=2)
    first, second = ranks(2).run(run_all, fit, tmp_path / "ranks")
    for name in ("first", "second", "third", "fourth"):
        assert distance(first[name], alone[name]) < close
        assert {value.dtype for value in first[name].values()} == {torch.float32}
    for name in ("before", "tested", "validated"):
        assert first[name] == second[name] == pytest.approx(alone[name], rel=close, abs=0.02)
    together = torch.stack([first["predicted"], second["predicted"]], 1).flatten(0, 1)  # rows take turns
    agree = (together == alone["predicted"]).float().mean()
    assert agree == 1 if precision == "32-true" else agree > 0.9

    forced = ranks(2).run(run_in_inference_mode, fit, tmp_path / "forced")[0]
    for name in ("first", "second", "third", "fourth"):
        assert same_bits(forced[name], first[name])
    assert [forced[name] for name in ("before", "tested")] == [first[name] for name in ("before", "tested")]
    assert torch.equal(forced["predicted"], first["predicted"])


def count_calls(trainer: pl.Trainer) -> Any:
    return trainer.global_step, trainer.lightning_module.calls


class Warmup(LitGPT):
    """Overrides hooks that touch the optimizer, and looks at the step as it happens."""

    calls = 0

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (batch_idx + 1)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_hooks_around_the_optimizer(ranks, tmp_path, accumulate):
    fit = replace(FIT, module=Warmup, trainer={"accumulate_grad_batches": accumulate}, look=count_calls)
    alone = train(fit, tmp_path / "alone")
    for each in ranks(2).run(train_all, [replace(fit, zero={"zero": stage}, devices=2) for stage in STAGES], tmp_path)[
        0
    ]:
        assert distance(each.weights, alone.weights) < 1e-6
        assert each.notes == alone.notes


@pytest.mark.parametrize(("precision", "bits"), [("32-true", True), ("bf16-mixed", True)])
def test_accumulation_that_changes_over_epochs(ranks, tmp_path, precision, bits):
    def scheduled(**changes: Any) -> Fit:
        callbacks = [GradientAccumulationScheduler({0: 1, 1: 3})]
        return replace(FIT, epochs=2, trainer={"precision": precision, "callbacks": callbacks}, **changes)

    alone = train(scheduled(), tmp_path / "alone")
    assert alone.steps == 7
    one = ranks(1).run(train, scheduled(zero={"zero": "stage2"}), tmp_path / "one")[0]
    assert same_bits(one.weights, alone.weights)
    two = ranks(2).run(train, scheduled(zero={"zero": "stage3"}, devices=2), tmp_path / "two")[0]
    assert distance(two.weights, alone.weights) < (1e-6 if precision == "32-true" else 1e-3)


class Averages(LitGPT):
    """With batch norm, whose running averages are buffers: every rank sees other rows."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.norm = nn.BatchNorm1d(VOCAB, affine=False)  # DDP refuses parameters that no loss reaches

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.norm(self.model(batch[0]).flatten(0, 1).detach())
        return super().training_step(batch, batch_idx)


def averages(trainer: pl.Trainer) -> list[float]:
    return trainer.lightning_module.norm.running_mean.tolist()


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_buffers_are_rank_0s_as_in_ddp(ranks, tmp_path, stage):
    fit = replace(FIT, module=Averages, devices=2, look=averages, trainer={"max_steps": 3})
    ddp = ranks(2).run(train, replace(fit, zero="ddp"), tmp_path / "ddp")
    mine = ranks(2).run(train, replace(fit, zero={"zero": stage}), tmp_path / "mine")
    assert mine[0].notes == pytest.approx(ddp[0].notes, rel=1e-5)
    assert mine[0].weights["norm.running_mean"].tolist() == mine[0].notes


def alone_after_fit(fit: Fit, folder: Path) -> list[bool] | None:
    """After ``fit``, rank 0 uses the module while the others go their way."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder, limit_val_batches=0)
    trainer.fit(module, loaders(fit)[0])
    assert all(unit.ticket is None for unit in trainer.strategy.engine.units), "nothing is on its way any more"
    whole = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
    if not trainer.is_global_zero:
        return None
    with torch.no_grad():
        assert module.model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, VOCAB)
    return [torch.equal(value, whole[name]) for name, value in module.state_dict().items()]


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_rank_may_use_replicated_parameters_alone_after_fit(ranks, tmp_path, stage):
    found = ranks(2).run(alone_after_fit, replace(FIT, zero={"zero": stage}, devices=2), tmp_path, timeout=30)[0]
    assert found and all(found)


def fast(fit: Fit, folder: Path) -> int:
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder, fast_dev_run=2)
    trainer.fit(module, *loaders(fit))
    return trainer.global_step


def test_fast_dev_run(ranks, tmp_path):
    assert ranks(2).run(fast, replace(FIT, zero={"zero": "stage3"}, devices=2), tmp_path) == [2, 2]
