"""The precision modes follow Lightning's own on one device, and all ranks agree on the loss scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lit_zero import Precision
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, same_bits, train, train_all

Ranks = Callable[[int], RankPool]

ADAMW = {"optimizer": "adamw", "lr": 1e-2}
SGD = {"optimizer": "sgd", "lr": 0.1}
# A bf16 number has 8 significant bits: one rounding is up to 2 ** -9 = 2e-3 of it.
ROUNDING = 2.0**-9


def close(one: Outcome, other: Outcome, weights: float, logged: float) -> None:
    assert distance(one.weights, other.weights) < weights
    assert {name: value.dtype for name, value in one.weights.items()} == {
        name: value.dtype for name, value in other.weights.items()
    }
    assert one.column("train_loss_step") == pytest.approx(other.column("train_loss_step"), rel=logged)
    assert one.column("val_loss") == pytest.approx(other.column("val_loss"), rel=logged)


@pytest.mark.parametrize(("optimizer", "accumulate"), [(ADAMW, 3), (SGD, 1)], ids=["adamw-3x", "sgd-1x"])
def test_bf16_mixed_on_one_rank_is_bit_equal(ranks, tmp_path, optimizer, accumulate):
    # Weights that autocast would cast are cast once instead of at every use, to the same bits. The rest stays fp32.
    trainer = {"precision": "bf16-mixed", "accumulate_grad_batches": accumulate}
    alone = train(Fit(trainer=trainer, arguments=optimizer), tmp_path / "alone")
    full = train(Fit(trainer={**trainer, "precision": "32-true"}, arguments=optimizer), tmp_path / "full")
    assert distance(alone.weights, full.weights) > 1e-4, "the mode must matter for the test to mean anything"
    for stage in ("none", "stage3"):
        mine = ranks(1).run(train, Fit({"zero": stage}, 1, trainer, arguments=optimizer), tmp_path / stage)[0]
        assert same_bits(mine.weights, alone.weights)
        assert mine.rows == alone.rows


@pytest.mark.parametrize(
    "trainer", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.2}], ids=["1x", "3x", "clip"]
)
def test_bf16_mixed_on_two_ranks(ranks, tmp_path, trainer):
    # Each rank rounds the gradient of its half of the batch to bf16, one device rounds that of the whole: gradients
    # differ by a rounding, ten small steps turn that into less.
    trainer = {**trainer, "precision": "bf16-mixed"}
    alone = train(Fit(trainer=trainer, arguments=ADAMW), tmp_path / "alone")
    together = ranks(2).run(
        train_all, [Fit({"zero": s}, 2, trainer, arguments=ADAMW) for s in STAGES], tmp_path, timeout=120
    )
    for each in together[0]:
        close(each, alone, weights=ROUNDING / 2, logged=ROUNDING)
    if "accumulate_grad_batches" not in trainer:
        assert all(same_bits(each.weights, together[0][0].weights) for each in together[0])


def state_bytes(trainer: pl.Trainer) -> dict[str, float]:
    """Live bytes per parameter."""
    engine = trainer.strategy.engine
    return {kind: value / engine.parameter_count for kind, value in engine.model_state_bytes().items()}


@pytest.mark.parametrize(
    ("mode", "accumulate", "parameter", "gradient", "master"),
    [
        ("32-true", 1, 4, 4, 4),
        ("bf16-mixed", 1, 2, 4, 4),
        ("bf16-mixed", 2, 2, 4, 4),
        ("bf16-true", 1, 2, 2, 2),
    ],
)
def test_the_mode_reaches_the_engine(ranks, tmp_path, mode, accumulate, parameter, gradient, master):
    trainer = {"precision": mode, "accumulate_grad_batches": accumulate, "max_steps": 2}
    zero = {"zero": "stage1", "precision": Precision(lower="all")}
    found = ranks(2).run(train, Fit(zero, 2, trainer, look=state_bytes, arguments=SGD), tmp_path)[0].notes
    assert found["parameter"] == pytest.approx(parameter, rel=0.06)
    assert found["gradient"] == pytest.approx(gradient, rel=0.06)
    # padding is 4 % of so small a model; what is a slice of the parameters themselves takes nothing more
    assert found["master"] == pytest.approx(0 if parameter == master else master / 2, rel=0.06)
    assert found["optimizer"] == pytest.approx(master / 2, rel=0.06)


@pytest.mark.parametrize("lower", ["matmul", "all"])
@pytest.mark.parametrize("reduce_dtype", ["float32", "compute"])
def test_choices_of_bf16_mixed(ranks, tmp_path, lower, reduce_dtype):
    # What else is rounded: norms, biases and the embedding; sums over ranks.
    trainer = {"precision": "bf16-mixed"}
    precision = Precision(reduce_dtype, lower=lower)
    alone = train(Fit(trainer=trainer, arguments=ADAMW), tmp_path / "alone")
    mine = ranks(2).run(
        train, Fit({"zero": "stage3", "precision": precision}, 2, trainer, arguments=ADAMW), tmp_path / "ranks"
    )[0]
    close(mine, alone, weights=4 * ROUNDING, logged=4 * ROUNDING)


@pytest.mark.parametrize(("optimizer", "size"), [(ADAMW, 2), (SGD, 1)], ids=["adamw-2", "sgd-1"])
def test_bf16_true(ranks, tmp_path, size, optimizer):
    # Even on one rank not bit-equal: torch rounds ``a + alpha * b`` in bf16 differently in the vector part of its loop
    # and in the rest, and the rest is elsewhere in a flat buffer. Every step rounds every weight.
    trainer = {"precision": "bf16-true"}
    alone = train(Fit(trainer=trainer, arguments=optimizer), tmp_path / "alone")
    fits = [Fit({"zero": stage}, size, trainer, arguments=optimizer) for stage in STAGES]
    for each in ranks(size).run(train_all, fits, tmp_path, timeout=120)[0]:
        close(each, alone, weights=3 * ROUNDING, logged=10 * ROUNDING)
        assert {value.dtype for name, value in each.weights.items() if "model." in name} == {torch.bfloat16}


def test_64_true(ranks, tmp_path):
    trainer = {"precision": "64-true", "gradient_clip_val": 0.2}
    alone = train(Fit(trainer=trainer, arguments=ADAMW), tmp_path / "alone")
    mine = ranks(2).run(train, Fit({"zero": "stage3"}, 2, trainer, arguments=ADAMW), tmp_path / "ranks")[0]
    close(mine, alone, weights=1e-14, logged=1e-14)


# ---- 16-mixed. On a CPU, Lightning turns precision="16-mixed" into bf16-mixed without a word, so the plugin is given.


class Overflowing(LitGPT):
    """Its gradients overflow in some batches, in one element of one parameter, on the last rank only.

    Args:
        overflows: numbers of the batches, counted over epochs.
        decay: whether the learning rate changes.
    """

    def __init__(self, overflows: tuple[int, ...] = (), decay: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.overflows, self.decay, self.batches = overflows, decay, 0
        self.scales: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.batches in self.overflows and self.global_rank == self.trainer.world_size - 1:
            last = self.model.norm.bias[-1]
            loss = loss + (last - last.detach()) * 1e30 * 1e30  # zero, with an infinite gradient
        self.batches += 1
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())

    def configure_optimizers(self) -> dict[str, Any]:
        found = super().configure_optimizers()
        if not self.decay:
            found.pop("lr_scheduler")
        return found


def half(scale: float = 2.0**10, growth_interval: int = 4, **more: Any) -> dict[str, Any]:
    """Return arguments of a Trainer that computes in fp16 on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], **more}


def scales(trainer: pl.Trainer) -> list[float]:
    return trainer.lightning_module.scales


@pytest.mark.parametrize(
    ("trainer", "size"), [({}, 1), ({}, 2), ({"accumulate_grad_batches": 3}, 2)], ids=["1x-1", "1x-2", "3x-2"]
)
def test_a_rank_that_overflows_skips_the_step_on_all(ranks, tmp_path, size, trainer):
    arguments = {"overflows": (0, 6), "decay": False, **SGD}
    fit: dict[str, Any] = {"module": Overflowing, "arguments": arguments, "look": scales}
    alone = train(Fit(trainer=half(**trainer), **fit), tmp_path / "alone")
    fits = [Fit({"zero": stage}, size, half(**trainer), **fit) for stage in STAGES]
    together = ranks(size).run(train_all, fits, tmp_path, timeout=120)
    assert min(alone.notes) < 2.0**10 <= max(alone.notes), "the scale must fall and rise for the test to mean anything"
    for outcomes in together:
        assert [each.notes for each in outcomes] == [alone.notes] * len(STAGES)
    for each in together[0]:
        close(each, alone, weights=1e-3, logged=2e-3)


def test_a_skipped_step_skips_the_learning_rate_schedule(ranks, tmp_path):
    arguments = {"overflows": (2, 3), **ADAMW}
    fit: dict[str, Any] = {"module": Overflowing, "epochs": 1}
    for each in ("stage1", "stage3"):
        mine = ranks(2).run(train, Fit({"zero": each}, 2, half(), arguments=arguments, **fit), tmp_path / each)[0]
        rates = mine.column("lr-AdamW/pg1")
        assert rates == pytest.approx([1e-2 / (1 + 0.1 * step) for step in (0, 1, 2, 2, 2)])


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_clipping_sees_unscaled_gradients(ranks, tmp_path, scale):
    trainer = {"gradient_clip_val": 0.2}
    full = train(Fit(trainer=trainer, arguments=SGD), tmp_path / "full")
    unclipped = train(Fit(arguments=SGD), tmp_path / "unclipped")
    assert distance(full.weights, unclipped.weights) > 0.1
    for stage in ("none", "stage2"):
        mine = ranks(2).run(train, Fit({"zero": stage}, 2, half(scale, **trainer), arguments=SGD), tmp_path / stage)[0]
        close(mine, full, weights=2e-3, logged=2e-3)


def save(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_the_loss_scale_is_saved_and_restored(ranks, tmp_path, form):
    # From a scale that only the first run has reached, and counting on to the next growth.
    arguments = {"overflows": (1,), **ADAMW}
    fit: dict[str, Any] = {"module": Overflowing, "arguments": arguments, "look": scales}
    whole = ranks(2).run(train, Fit({"zero": "stage2"}, 2, half(), **fit), tmp_path / "whole")[0]
    first = Fit({"zero": "stage2", "checkpoint": form}, 2, half(), **{**fit, "epochs": 1, "look": save})
    ranks(2).run(train, first, tmp_path)
    path, restarted = tmp_path / "half.ckpt", {**fit, "arguments": ADAMW, "resume": tmp_path / "half.ckpt"}
    resumed = ranks(2).run(train, Fit({"zero": "stage3"}, 2, half(scale=2.0), **restarted), tmp_path / "resumed")[0]
    assert resumed.notes == whole.notes[5:]
    assert same_bits(resumed.weights, whole.weights)
    if form == "full":
        assert torch.load(path, weights_only=True)["MixedPrecision"]["scale"] == whole.notes[4]
        plain = train(Fit(trainer=half(scale=2.0), **restarted), tmp_path / "plain")
        assert plain.notes == whole.notes[5:], "plain Lightning finds the scale under the same name"
        assert distance(plain.weights, whole.weights) < 1e-3


def test_the_loss_scale_of_plain_lightning_is_restored(ranks, tmp_path):
    fit: dict[str, Any] = {"module": Overflowing, "look": scales}
    early = {"overflows": (1,), "decay": False, **ADAMW}
    train(Fit(trainer=half(), module=Overflowing, arguments=early, epochs=1, look=save), tmp_path)
    restarted = {**fit, "arguments": {**early, "overflows": ()}, "resume": tmp_path / "half.ckpt"}
    plain = train(Fit(trainer=half(scale=2.0), **restarted), tmp_path / "plain")
    mine = ranks(2).run(train, Fit({"zero": "stage3"}, 2, half(scale=2.0), **restarted), tmp_path / "mine")[0]
    assert mine.notes == plain.notes
    close(mine, plain, weights=1e-3, logged=2e-3)
