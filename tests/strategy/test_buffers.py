"""Buffers that an evaluation writes to, in inference mode too: Lightning uses it on NCCL and not on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.loops import utilities
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop

from tests.strategy.harness import STAGES, Fit, LitGPT, loaders, make_trainer


class Counting(LitGPT):
    """Counts rows in buffers: in training in place of the old buffer, in evaluation in both ways."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("trained", torch.zeros(1))
        self.register_buffer("evaluated", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.trained = self.trained + len(batch[0]) + self.global_rank
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self.evaluated.zero_()
        self.replaced = torch.zeros(1)

    def evaluate(self, name: str, tokens: torch.Tensor) -> None:
        assert torch.is_inference_mode_enabled() == self.trainer.forced
        self.evaluated += len(tokens) + self.global_rank
        self.replaced = self.replaced + len(tokens) + self.global_rank
        super().evaluate(name, tokens)

    def on_validation_epoch_end(self) -> None:
        self.seen.append((float(self.evaluated), float(self.replaced)))


def fit(stage: str, forced: bool, folder: Path) -> tuple[list[float], list[tuple[float, float]]]:
    """Return what each buffer holds at the end of a training, and what the evaluations have counted."""
    torch.manual_seed(0)
    each = Fit({"zero": stage}, 2, arguments={"optimizer": "sgd", "lr": 0.1}, epochs=1)
    trainer = make_trainer(each, folder, val_check_interval=2, logger=False, callbacks=[])
    trainer.forced = forced
    model = Counting()
    with (
        mock.patch.object(utilities, "_distributed_is_initialized", return_value=not forced),
        mock.patch.object(_EvaluationLoop, "inference_mode", property(lambda _: forced, lambda *_: None), create=True),
    ):
        trainer.fit(model, *loaders(each))
    return [float(value) for value in (model.trained, model.evaluated, model.replaced)], model.seen


def all_fits(forced: bool, folder: Path) -> list[Any]:
    return [fit(stage, forced, folder) for stage in STAGES]


@pytest.mark.parametrize("forced", [False, True], ids=["no_grad", "inference_mode"])
def test_buffers_in_evaluation_and_training(ranks, tmp_path, forced):
    for rank, stages in enumerate(ranks(2).run(all_fits, forced, tmp_path, timeout=120)):
        for (trained, *_), seen in stages:
            # Two batches of 4 rows on each rank, in the sanity check too. Each rank sums up its own rows.
            assert seen == [(2 * (4 + rank),) * 2] * 3
            # 4 steps of 4 rows and one of 2. Rank 0's count stands for all, but for what rank 1 has added since.
            assert trained == 18 + rank
