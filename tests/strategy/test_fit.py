"""Training through the Trainer gives what plain Lightning gives on one device with the same whole batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor

from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, same_bits, train, train_all

Ranks = Callable[[int], RankPool]

ADAMW = {"optimizer": "adamw", "lr": 1e-2}
SGD = {"optimizer": "sgd", "lr": 0.1}
# An epoch has 5 batches: with 3 to a step, its last step has 2.
THREE = {"accumulate_grad_batches": 3}
NORM = {"gradient_clip_val": 0.2}
VALUE = {"gradient_clip_val": 3e-3, "gradient_clip_algorithm": "value"}


def compare(one: Outcome, other: Outcome) -> None:
    """Check that weights, learning rates, everything logged and the number of steps agree to fp32's rounding."""
    assert distance(one.weights, other.weights) < 1e-6
    assert one.steps == other.steps
    assert len(one.rows) == len(other.rows)
    for mine, theirs in zip(one.rows, other.rows, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def in_all_stages(ranks: Ranks, size: int, folder: Path, **fit: Any) -> tuple[list[Outcome], Outcome]:
    """Return the outcome of each stage on ``size`` ranks, and that of one device."""
    alone = train(Fit(**fit), folder / "alone")
    per_rank = ranks(size).run(
        train_all, [Fit({"zero": stage}, size, **fit) for stage in STAGES], folder / "ranks", timeout=120
    )
    for first, *others in zip(*per_rank, strict=True):
        assert all(other.metrics == first.metrics for other in others), "ranks agree on what was logged"
        assert all(other.weights == {} for other in others), "the whole state dict is rank 0's alone"
    return per_rank[0], alone


# Every two settings meet once; tests/zero/test_equality.py lets all of them meet.
@pytest.mark.thorough("sgd-unclipped-1x", "adamw-value-3x", "adamw-unclipped-3x")
@pytest.mark.parametrize(
    ("optimizer", "clip", "accumulate"),
    [
        pytest.param(SGD, {}, {}, id="sgd-unclipped-1x"),
        pytest.param(SGD, NORM, THREE, id="sgd-norm-3x"),
        pytest.param(SGD, VALUE, {}, id="sgd-value-1x"),
        pytest.param(ADAMW, {}, THREE, id="adamw-unclipped-3x"),
        pytest.param(ADAMW, NORM, {}, id="adamw-norm-1x"),
        pytest.param(ADAMW, VALUE, THREE, id="adamw-value-3x"),
    ],
)
def test_equals_one_device(ranks, tmp_path, optimizer, clip, accumulate):
    stages, alone = in_all_stages(ranks, 2, tmp_path, arguments=optimizer, trainer={**clip, **accumulate})
    for each in stages:
        compare(each, alone)
    assert alone.steps == (4 if accumulate else 10)
    assert len(set(alone.column(f"lr-{'SGD' if optimizer is SGD else 'AdamW'}/pg2"))) == alone.steps
    bits = [same_bits(each.weights, stages[0].weights) for each in stages]
    assert bits == [True, True, not accumulate, not accumulate], "stages 2 and 3 reduce every micro-batch by default"


@pytest.mark.thorough
def test_equals_one_device_on_four_ranks(ranks, tmp_path):
    stages, alone = in_all_stages(ranks, 4, tmp_path, arguments=SGD, trainer={**NORM, **THREE})
    for each in stages:
        compare(each, alone)


@pytest.mark.parametrize("clip", [NORM, VALUE], ids=["norm", "value"])
def test_the_clipping_cases_clip(tmp_path, clip):
    unclipped, clipped = (
        train(Fit(arguments=SGD, trainer=each), tmp_path / str(number)) for number, each in enumerate([{}, clip])
    )
    assert distance(unclipped.weights, clipped.weights) > 1e-2


class OwnClipping(LitGPT):
    """Clips every other step."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.global_step % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


def test_a_modules_own_clipping(ranks, tmp_path):
    stages, alone = in_all_stages(ranks, 2, tmp_path, module=OwnClipping, arguments=SGD)
    plain = train(Fit(arguments=SGD), tmp_path / "plain")
    assert distance(plain.weights, alone.weights) > 1e-2
    for each in stages:
        compare(each, alone)


def test_limits(ranks, tmp_path):
    limits = {"limit_train_batches": 4, "limit_val_batches": 1, "val_check_interval": 2, "max_steps": 7}
    stages, alone = in_all_stages(ranks, 2, tmp_path, arguments=SGD, trainer={**limits, "num_sanity_val_steps": 1})
    assert alone.steps == 7
    assert len(alone.column("val_loss")) == 3
    for each in stages:
        compare(each, alone)


def test_an_epoch_that_does_not_divide_over_the_ranks_is_as_in_ddp(ranks, tmp_path):
    fits = [Fit(zero, 2, rows=37, arguments=SGD) for zero in ("ddp", *({"zero": stage} for stage in STAGES))]
    ddp, *stages = ranks(2).run(train_all, fits, tmp_path)[0]
    for each in stages:
        compare(each, ddp)


class Batches(LitGPT):
    """Remembers which rows it has seen."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append([hash(tuple(row)) for row in batch[0].tolist()])
        return super().training_step(batch, batch_idx)


def seen(trainer: pl.Trainer) -> list[list[int]]:
    return trainer.lightning_module.seen


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_reads_its_own_part_of_every_whole_batch(ranks, tmp_path, size):
    fit = {"module": Batches, "epochs": 1, "look": seen}
    whole = train(Fit(**fit), tmp_path / "alone").notes
    parts = [each.notes for each in ranks(size).run(train, Fit({"zero": "stage2"}, size, **fit), tmp_path / "ranks")]
    for together, *batches in zip(whole, *parts, strict=True):
        assert sorted(itertools.chain(*batches)) == sorted(together)


class FirstStops(EarlyStopping):
    """Stops on rank 0's word alone, which all ranks must hear."""

    def _evaluate_stopping_criteria(self, current: torch.Tensor) -> tuple[bool, str | None]:
        return (torch.distributed.get_rank() == 0, "rank 0 has seen enough")


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_early_stopping(ranks, tmp_path, stage):
    def callbacks() -> dict[str, Any]:
        stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
        return {"callbacks": [stop, LearningRateMonitor("step")]}

    fit = {"epochs": 6, "arguments": SGD}
    alone = train(Fit(trainer=callbacks(), **fit), tmp_path / "alone")
    together = ranks(2).run(train, Fit({"zero": stage}, 2, trainer=callbacks(), **fit), tmp_path / "ranks")
    assert [each.steps for each in together] == [10, 10]
    compare(together[0], alone)


def test_ranks_stop_together_if_one_of_them_wants_to(ranks, tmp_path):
    trainer = {"callbacks": [FirstStops("val_loss")]}
    together = ranks(2).run(train, Fit({"zero": "stage2"}, 2, trainer=trainer, epochs=6), tmp_path)
    assert [each.steps for each in together] == [5, 5]


class Noise(LitGPT):
    """Its parameters and its frozen buffer differ between ranks when they are built."""

    def __init__(self, **arguments: Any) -> None:
        torch.manual_seed(torch.distributed.get_rank())
        super().__init__(**arguments)
        self.register_buffer("scale", torch.rand(3))


def start(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    module.begin = {name: value.clone() for name, value in module.state_dict().items()}


def begin(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return trainer.lightning_module.begin


@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_start_from_the_weights_of_rank_0(ranks, tmp_path, stage):
    fit = Fit({"zero": stage}, 2, module=Noise, before=start, look=begin, arguments={"lr": 0.0})
    first, second = ranks(2).run(train, fit, tmp_path)
    assert distance(first.notes, second.notes) > 0.1, "they must differ for the test to mean anything"
    assert same_bits(first.weights, first.notes)
