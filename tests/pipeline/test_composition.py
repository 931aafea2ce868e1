"""Pipelines beside all else that shapes a step: accumulation, clipping, precision, stages of ZeRO, several runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lit_zero import Zero, ZeroStrategy
from tests.pipeline.reference import Random
from tests.pipeline.test_training import SCHEDULES, equal, piped
from tests.pool import RankFailure
from tests.strategy.harness import (
    STAGES,
    Fit,
    LitGPT,
    Outcome,
    Short,
    distance,
    loaders,
    make_trainer,
    train,
    train_all,
)
from tests.strategy.test_precision import half

ADAMW = {"optimizer": "adamw", "lr": 1e-2, "layers": 4}


class Odd(LitGPT):
    """With a frozen layer, a parameter that no loss reaches, and its gradient norms noted before clipping."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unused = nn.Parameter(torch.ones(5))
        self.model.blocks[2].up.requires_grad_(False)
        self.model.blocks[0].norm1.requires_grad_(False)
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy):
            norm = strategy.gradient_norm()
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.norms.append(float(norm))


def norms(trainer: pl.Trainer) -> list[float]:
    return trainer.lightning_module.norms


WAYS: dict[str, dict[str, Any]] = {
    "accumulate": {"accumulate_grad_batches": 2},  # 5 batches an epoch: the last window has one
    "norm": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.2},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("odd")
    return {
        name: train(Short(module=Odd, arguments=ADAMW, trainer=way, look=norms), folder / name)
        for name, way in WAYS.items()
    }


def odd_fits(stage: str, devices: int = 2, **pipeline: Any) -> list[Fit]:
    fit = replace(piped(stage, devices, **pipeline), module=Odd, arguments=ADAMW, look=norms)
    return [replace(fit, trainer=way) for way in WAYS.values()]


def check_odd(found: list[list[Outcome]], odd: dict[str, Outcome]) -> None:
    expected = list(odd.values())
    for outcomes in found:
        for number, each in enumerate(outcomes):
            alone = expected[number % len(expected)]
            assert each.notes == pytest.approx(alone.notes, rel=1e-5)
            assert each.metrics == pytest.approx(alone.metrics, rel=1e-5)
            if each.weights:
                equal(each, alone)


def test_accumulation_clipping_and_two_groups(ranks: Any, odd: dict[str, Outcome], tmp_path: Path) -> None:
    assert min(odd["norm"].notes) > 0.2, "clipping must matter"
    fits = [fit for stage in STAGES for fit in odd_fits(stage)]
    check_odd(ranks(2).run(train_all, fits, tmp_path, timeout=180), odd)


@pytest.mark.thorough
def test_the_same_with_other_schedules(ranks: Any, odd: dict[str, Outcome], tmp_path: Path) -> None:
    fits = [fit for name in ("interleaved", "zero_bubble", "zbv") for fit in odd_fits("stage2", **SCHEDULES[name])]
    check_odd(ranks(2).run(train_all, fits, tmp_path, timeout=180), odd)


@pytest.mark.thorough
def test_the_same_on_two_by_two_ranks(ranks: Any, odd: dict[str, Outcome], tmp_path: Path) -> None:
    fits = [*odd_fits("stage1", 4), *odd_fits("stage3", 4), *odd_fits("stage3", 4, **SCHEDULES["zbv"])]
    check_odd(ranks(4).run(train_all, fits, tmp_path, timeout=180), odd)


class Partly(LitGPT):
    """The weight that both ends share is used at one of them only in every other batch."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx % 2 == 0:
            return super().training_step(batch, batch_idx)
        hidden = self.model.embedding(batch[0])
        for block in self.model.blocks:
            hidden = block(hidden)
        loss: torch.Tensor = self.model.norm(hidden).square()[..., :3].mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


@pytest.mark.thorough
def test_a_tied_weight_that_one_stage_does_not_use(ranks: Any, tmp_path: Path) -> None:
    alone = train(Short(module=Partly, arguments=ADAMW), tmp_path / "alone")
    for size in (2, 4):
        fits = [replace(piped(stage, size), module=Partly, arguments=ADAMW) for stage in STAGES]
        for each in ranks(size).run(train_all, fits, tmp_path / str(size), timeout=120)[0]:
            equal(each, alone)


# ---- precision


def test_bf16_mixed(ranks: Any, tmp_path: Path) -> None:
    trainer = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
    alone = train(Short(arguments=ADAMW, trainer=trainer), tmp_path / "alone")
    fits = [replace(piped(stage), arguments=ADAMW, trainer=trainer) for stage in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        assert distance(each.weights, alone.weights) < 2.0**-10
        assert each.column("train_loss_step") == pytest.approx(alone.column("train_loss_step"), rel=2.0**-8)


class Overflowing(LitGPT):
    """The gradients of one parameter, which one stage holds, overflow in some batches.

    Args:
        where: the parameter.
        overflows: numbers of the batches, counted over epochs.
    """

    def __init__(self, where: str, overflows: tuple[int, ...], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.overflows, self.scales, self.now = overflows, [], False
        self.get_parameter(where).register_hook(lambda grad: grad * float("inf") if self.now else grad)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.now = self.current_epoch * 5 + batch_idx in self.overflows
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.scales.append((self.trainer.precision_plugin.scaler.get_scale(), rate))


def scales(trainer: pl.Trainer) -> list[tuple[float, float]]:
    return trainer.lightning_module.scales


@pytest.mark.thorough
@pytest.mark.parametrize("where", ["model.blocks.0.up.weight", "model.blocks.3.up.weight"])
def test_all_stages_skip_together(ranks: Any, tmp_path: Path, where: str) -> None:
    given = {"where": where, "overflows": (0, 3, 4), **ADAMW}
    # Lightning alone lets the rate go on.
    plain = Short({"zero": "none"}, 1, half(), Overflowing, given, epochs=2, look=scales)
    [alone] = ranks(1).run(train, plain, tmp_path / "alone")
    fits = [
        replace(piped(stage), module=Overflowing, arguments=given, trainer=half(), epochs=2, look=scales)
        for stage in ("none", "stage2", "stage3")
    ]
    fits += [replace(fits[1], trainer=half(accumulate_grad_batches=2))]
    found = ranks(2).run(train_all, fits, tmp_path, timeout=120)
    assert len(set(alone.notes)) > 5 and alone.notes[0][0] < alone.notes[-1][0] * 100
    for outcomes in found:
        assert [each.notes for each in outcomes[:3]] == [alone.notes] * 3
    for each in found[0][:3]:
        assert distance(each.weights, alone.weights) < 2e-3
        assert each.column("train_loss_step") == pytest.approx(alone.column("train_loss_step"), rel=4e-3)
    assert found[0][3].notes == found[1][3].notes and len(found[0][3].weights) == len(alone.weights)
    assert all(value.isfinite().all() for value in found[0][3].weights.values())


def test_all_stages_skip_together_under_every_schedule(ranks: Any, tmp_path: Path) -> None:
    """What overflows is on the first stage, on the last one, or between."""
    places = ["model.blocks.0.up.weight", "model.blocks.1.up.weight", "model.blocks.3.up.weight", "model.norm.weight"]
    given = {"where": places[0], "overflows": (0, 3, 4), **ADAMW}
    plain = Fit({"zero": "none"}, 1, half(), Overflowing, given, look=scales)
    [alone] = ranks(1).run(train, replace(plain, epochs=1), tmp_path / "alone")
    names = ("gpipe", "interleaved", "zero_bubble", "zbv")
    fits = [
        replace(piped("stage2", **SCHEDULES[name]), module=Overflowing, trainer=half(), look=scales) for name in names
    ]
    fits = [replace(fit, arguments={**given, "where": place}) for fit, place in zip(fits, places, strict=True)]
    found = ranks(2).run(train_all, fits, tmp_path, timeout=120)
    assert len({scale for scale, _ in alone.notes}) > 2, "steps must be skipped"
    for outcomes in found:
        assert [each.notes for each in outcomes] == [alone.notes] * len(names)
    for each in found[0]:
        assert distance(each.weights, alone.weights) < 2e-3
        assert each.column("train_loss_step") == pytest.approx(alone.column("train_loss_step"), rel=4e-3)


# ---- randomness and batch statistics


def test_dropout_equals_one_process_that_runs_the_same_micro_batches(ranks: Any, tmp_path: Path) -> None:
    arguments = {"layers": 4}
    alone = train(Short(module=Random, arguments={"pieces": True, **arguments}), tmp_path / "alone")
    without = train(Short(module=Random, arguments={"dropout": False, **arguments}), tmp_path / "without")
    assert distance(alone.weights, without.weights) > 1e-2
    fits = [replace(piped("stage3", **way), module=Random, arguments=arguments) for way in SCHEDULES.values()]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        equal(each, alone)


@pytest.mark.thorough
def test_batch_statistics_are_saved_by_the_stages_that_have_them(ranks: Any, tmp_path: Path) -> None:
    arguments = {"layers": 4, "dropout": False, "norms": True}
    alone = train(Short(module=Random, arguments={"pieces": True, **arguments}), tmp_path / "alone")
    means = [name for name in alone.weights if name.endswith("running_mean")]
    assert len(means) == 2 and all(alone.weights[name].abs().sum() > 0 for name in means)
    ways = [{}, SCHEDULES["zbv"]]
    fits = [replace(piped("stage2", **way), module=Random, arguments=arguments) for way in ways]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        equal(each, alone)


# ---- what is gathered how often


class Counting(Callback):
    """Notes how many gathers a step takes, from its forward to its end."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        trainer.strategy.engine.exchange.counters.reset()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.gathers = trainer.strategy.engine.exchange.counters.gathers


def count(trainer: pl.Trainer, module: Any) -> None:
    trainer.callbacks.append(Counting())


def gathers(trainer: pl.Trainer) -> Any:
    engine = trainer.strategy.engine
    return trainer.gathers, len(engine.units), engine.model_state_bytes()["slots"]


def test_units_are_gathered_once_a_step_unless_slots_are_few(ranks: Any, tmp_path: Path) -> None:
    fit = replace(piped("stage3", 4), arguments={"layers": 8}, epochs=1, before=count, look=gathers, rows=32)
    few = replace(fit, zero={**fit.zero, "zero": Zero("stage3", slots=2)})  # type: ignore[dict-item]
    alone = train(Short(arguments={"layers": 8}, epochs=1, rows=32), tmp_path / "alone")
    found = ranks(4).run(train_all, [fit, few], tmp_path, timeout=120)
    for once, often in found:
        number, units, room = once.notes
        assert number == units  # the root unit too, which is not in a slot that it shares
        assert often.notes[0] >= 4 * (units - 1)  # at least once for each micro-batch
        assert often.notes[2] < room
    for each in found[0]:
        equal(each, alone)


def reductions(trainer: pl.Trainer) -> int:
    return trainer.strategy.engine.exchange.counters.reductions


@pytest.mark.thorough
def test_gradients_are_reduced_once_a_step_unless_asked(ranks: Any, tmp_path: Path) -> None:
    """The last batch has 2 rows in each pipeline, and so 2 micro-batches."""
    fit = replace(piped("stage2", 4), before=count, look=reductions, epochs=1)
    often = replace(fit, zero={**fit.zero, "zero": Zero("stage2", accumulate="reduce")})  # type: ignore[dict-item]
    alone = train(Short(arguments={"layers": 4}, epochs=1), tmp_path / "alone")
    found = ranks(4).run(train_all, [fit, often], tmp_path, timeout=120)
    for held, reduced in found:
        assert reduced.notes == 2 * held.notes > 0
    for each in found[0]:
        equal(each, alone)


# ---- several runs


class Trained(LitGPT):
    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        return {"tokens": super().predict_step(batch, batch_idx), "sum": batch[0].sum(1)}


def several(ways: list[Any], devices: int, folder: Path) -> list[list[Any]]:
    """Fit twice with the same Trainer, and evaluate in every way in between."""
    found = []
    for number, given in enumerate(ways):
        torch.manual_seed(0)
        module, fit = Trained(layers=4), Short(given, devices, epochs=1)
        train_data, val_data = loaders(fit)
        trainer = make_trainer(fit, folder / str(number))
        trainer.fit(module, train_data, val_data)
        notes: list[Any] = [trainer.validate(module, val_data, verbose=False)[0]]
        notes.append(trainer.test(module, val_data, verbose=False)[0])
        predicted = trainer.predict(module, val_data)
        notes.append([{key: value.tolist() for key, value in each.items()} for each in predicted])
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, train_data, val_data)
        notes.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        found.append(notes)
    return found


@pytest.mark.thorough
def test_several_runs(ranks: Any, tmp_path: Path) -> None:
    [alone] = several(["auto"], 1, tmp_path / "alone")
    names = ("1f1b", "interleaved", "zbv")
    ways = [{"zero": "stage3", "pipeline": piped(**SCHEDULES[name]).zero["pipeline"]} for name in names]
    for outcomes in ranks(2).run(several, ways, 2, tmp_path, timeout=120):
        for notes in outcomes:
            for mine, theirs in zip(notes, alone, strict=True):
                assert mine == (pytest.approx(theirs, rel=1e-5) if isinstance(theirs, dict) else theirs)


def evaluated_first(way: dict[str, Any], folder: Path, where: str) -> Any:
    """Validate, then fit, with one Trainer."""
    torch.manual_seed(0)
    fit = Short(way or "auto", 2 if way else 1, epochs=1)
    module: Any = Random(layers=4, dropout=False, norms=True, pieces=not way)
    if where:
        module = Auxiliary(where)
    train_data, val_data = loaders(fit)
    trainer = make_trainer(fit, folder)
    trainer.validate(module, val_data, verbose=False)
    trainer.fit(module, train_data, val_data)
    return trainer.strategy.lightning_module_state_dict()


class Auxiliary(LitGPT):
    """Its training step uses a layer that the others do not, or elsewhere.

    Args:
        where: ``first`` of all, ``last``, or ``moved``: first, and last in validation.
    """

    def __init__(self, where: str) -> None:
        super().__init__(layers=4)
        self.where, self.further = where, nn.Linear(31, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.where != "last":
            self.further(torch.ones(31))
        logits = self.model(batch[0])
        return logits.square().mean() + (self.further(logits).mean() if self.where == "last" else 0)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        logits = self.model(batch[0])
        self.log("val_loss", (self.further(logits) if self.where == "moved" else logits).square().mean())


def test_a_fit_after_a_validation(ranks: Any, tmp_path: Path) -> None:
    alone = evaluated_first({}, tmp_path / "alone", "")
    way = piped("stage2").zero
    assert distance(ranks(2).run(evaluated_first, way, tmp_path, "")[0], alone) < 1e-6


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_training_step_that_needs_more_than_the_validation(ranks: Any, tmp_path: Path, where: str) -> None:
    alone = evaluated_first({}, tmp_path / "alone", where)
    mine = ranks(2).run(evaluated_first, piped("stage2").zero, tmp_path, where)[0]
    assert distance(mine, alone) < 1e-6


def test_a_training_step_that_needs_other_stages_than_the_validation(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="needs the parameter 'further.bias' on stage 0.*Call trainer.fit first"):
        ranks(2).run(evaluated_first, piped("stage2").zero, tmp_path, "moved")
