"""Parameters that are unfrozen, or given to the optimizer, after training has begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, LearningRateMonitor
from torch import nn

from tests.pool import RankFailure, RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, same_bits, train, train_all

Ranks = Callable[[int], RankPool]


class Plain(LitGPT):
    """All in one group, no schedule: callbacks add groups of their own."""

    def configure_optimizers(self) -> Any:
        wanted = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.AdamW(wanted, lr=1e-2, eps=1e-3)


class BlockByBlock(BaseFinetuning):
    """Freezes all blocks, and thaws one at the beginning of each epoch, the last one first."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.model.blocks)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch > 0:
            block = pl_module.model.blocks[-epoch]
            self.unfreeze_and_add_param_group(block, optimizer, lr=1e-2 / (1 + epoch))


def fits(size: int, stages: tuple[str, ...] = STAGES, **more: Any) -> list[Fit]:
    return [Fit({"zero": stage}, size, module=Plain, epochs=4, **more) for stage in stages]


def callbacks() -> dict[str, Any]:
    return {"callbacks": [BlockByBlock(), LearningRateMonitor("step")]}


def by_callback(size: int, folder: Path, precision: str) -> list[Outcome]:
    found = []
    for number, fit in enumerate(fits(size)):
        fit.trainer = {**callbacks(), "precision": precision}
        found.append(train(fit, folder / str(number)))
    return found


def alone(folder: Path, precision: str = "32-true", **more: Any) -> Outcome:
    trainer = {**callbacks(), "precision": precision}
    return train(Fit(module=Plain, epochs=4, trainer=trainer, **more), folder / "alone")


@pytest.mark.parametrize("size", [1, 2])
def test_thawing_block_by_block_equals_one_device(ranks, tmp_path, size):
    expected = alone(tmp_path)
    stages = ranks(size).run(by_callback, size, tmp_path / "ranks", "32-true", timeout=120)[0]
    for each in stages:
        assert distance(each.weights, expected.weights) < 1e-6
        assert same_bits(each.weights, stages[0].weights)
        for group in (1, 2, 3, 4):
            assert each.column(f"lr-AdamW/pg{group}") == expected.column(f"lr-AdamW/pg{group}")
    assert len(expected.column("lr-AdamW/pg4")) == 5


@pytest.mark.thorough
def test_thawing_in_bf16_mixed_follows_one_device(ranks, tmp_path):
    expected = alone(tmp_path, "bf16-mixed")
    stages = ranks(2).run(by_callback, 2, tmp_path / "ranks", "bf16-mixed", timeout=120)[0]
    for each in stages:
        assert distance(each.weights, expected.weights) < 1e-2
        assert same_bits(each.weights, stages[0].weights)


def stop_and_go_on(size: int, folder: Path) -> list[Outcome]:
    """Train until the second block has been thawed, and go on from a checkpoint."""
    found = []
    for number, (first, second) in enumerate(zip(fits(size), fits(size), strict=True)):
        path = folder / f"{number}.ckpt"
        first.trainer, second.trainer = callbacks(), callbacks()
        first.epochs, first.look = 3, _Save(path)
        train(first, folder / f"first{number}")
        second.resume = path
        found.append(train(second, folder / f"second{number}"))
    return found


class _Save:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.thorough
def test_a_resumed_run_has_the_groups_of_the_checkpoint(ranks, tmp_path):
    """What Lightning's callback does not restore (it freezes again what had been thawed), we do not either."""
    stages = ranks(2).run(stop_and_go_on, 2, tmp_path, timeout=120)[0]
    resumed = alone(tmp_path, resume=tmp_path / "3.ckpt")
    for each in stages:
        assert distance(each.weights, resumed.weights) < 1e-6
        assert same_bits(each.weights, stages[0].weights)


class Thawing(pl.Callback):
    """Thaws by hand what the optimizer has had from the start."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.model.blocks[0].requires_grad_(trainer.current_epoch > 0)


class All(Plain):
    def configure_optimizers(self) -> Any:
        self.model.blocks[0].requires_grad_(False)
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


def by_hand(size: int, folder: Path) -> list[Outcome]:
    return train_all(
        [Fit({"zero": stage}, size, module=All, trainer={"callbacks": [Thawing()]}) for stage in STAGES], folder
    )


def test_what_the_optimizer_had_frozen_may_be_thawed_by_hand(ranks, tmp_path):
    expected = train(Fit(module=All, trainer={"callbacks": [Thawing()]}), tmp_path / "alone")
    for each in ranks(2).run(by_hand, 2, tmp_path / "ranks")[0]:
        assert distance(each.weights, expected.weights) < 1e-6


class Moving(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            (optimizer,) = trainer.optimizers
            optimizer.param_groups.append({**optimizer.param_groups[0], "params": [pl_module.model.norm.weight]})


class Stranger(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Moving, "'model.norm.weight' is in two optimizers or groups"),
        (Stranger, r"holds a tensor of shape \(3,\) that is not a parameter of the module"),
    ],
)
def test_groups_that_make_no_sense_are_refused(ranks, tmp_path, callback, words):
    fit = Fit({"zero": "stage2"}, 2, module=Plain, trainer={"callbacks": [callback()]})
    with pytest.raises(RankFailure, match=words):
        ranks(2).run(train, fit, tmp_path)


def faster(epoch: int) -> float:
    return 1.5


def backbone_finetuning() -> dict[str, Any]:
    return {"callbacks": [BackboneFinetuning(2, faster, backbone_initial_lr=1e-3, verbose=False)]}


class WithBackbone(Plain):
    def __init__(self) -> None:
        super().__init__(tied=False)
        self.backbone = self.model.blocks


def test_lightnings_backbone_finetuning_equals_one_device(ranks, tmp_path):
    expected = train(Fit(module=WithBackbone, epochs=4, trainer=backbone_finetuning()), tmp_path / "alone")
    fits = [Fit({"zero": stage}, 2, module=WithBackbone, epochs=4, trainer=backbone_finetuning()) for stage in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path / "ranks", timeout=120)[0]:
        assert distance(each.weights, expected.weights) < 1e-6
