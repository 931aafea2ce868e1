"""Checkpoints through the Trainer: any stage, rank count and format to any other, and to and from plain Lightning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_zero.cli import main
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, same_bits, train, train_all

Ranks = Callable[[int], RankPool]


class Rich(LitGPT):
    """With what else a module may hold: a parameter that no loss reaches, frozen ones, and a buffer that changes.

    Args:
        width: of the parameter that no loss reaches.
    """

    def __init__(self, width: int = 5, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.unused = nn.Parameter(torch.ones(width))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.count += 1
        return super().training_step(batch, batch_idx)


def save(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


ADAMW = {"optimizer": "adamw", "lr": 1e-2}
WHOLE = Fit(module=Rich, arguments=ADAMW, epochs=2)
FIRST = replace(WHOLE, epochs=1, look=save)  # half of it, saved after ``fit`` has returned


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Plain Lightning on one device: the uninterrupted run, and the checkpoint of its first half."""
    folder = tmp_path_factory.mktemp("plain")
    train(FIRST, folder)
    return train(WHOLE, folder / "whole"), folder / "saved.ckpt"


def check_second_half(resumed: Outcome, whole: Outcome) -> None:
    """Check that the second half, run on its own, ends and logs as the whole run."""
    assert distance(resumed.weights, whole.weights) < 1e-6
    assert resumed.weights["count"].tolist() == [10, 10]
    assert resumed.steps == whole.steps == 10
    for name in ("train_loss_step", "lr-AdamW/pg1", "val_loss", "val_accuracy"):
        values = resumed.column(name)
        assert values == pytest.approx(whole.column(name)[-len(values) :], rel=1e-6)
    assert len(resumed.column("train_loss_step")) == 5


@pytest.mark.parametrize(
    ("form", "stage", "size", "other_stage", "other_size"),
    [
        ("full", "none", 2, "stage3", 4),
        ("full", "stage1", 4, "stage2", 2),
        ("full", "stage3", 4, "stage3", 2),
        ("full", "stage2", 1, "stage3", 2),
        ("sharded", "stage3", 2, "stage1", 4),
        ("sharded", "stage3", 4, "none", 1),
        ("sharded", "stage2", 2, "stage3", 4),
        ("sharded", "none", 1, "stage2", 2),
        ("sharded", "stage1", 4, "none", 2),
    ],
)
def test_from_any_stage_and_size_to_any_other(ranks, tmp_path, plain, form, stage, size, other_stage, other_size):
    ranks(size).run(train, replace(FIRST, zero={"zero": stage, "checkpoint": form}, devices=size), tmp_path)
    path = tmp_path / "saved.ckpt"
    assert path.is_dir() == (form == "sharded")
    second = replace(WHOLE, zero={"zero": other_stage}, devices=other_size, resume=path)
    check_second_half(ranks(other_size).run(train, second, tmp_path / "second")[0], plain[0])


@pytest.mark.parametrize(
    ("form", "stage", "precision"),
    [
        ("full", "stage1", "bf16-mixed"),
        ("full", "stage3", "32-true"),
        ("sharded", "stage1", "32-true"),
        ("sharded", "stage3", "bf16-mixed"),
    ],
)
def test_resuming_in_place_is_bit_equal(ranks, tmp_path, form, stage, precision):
    whole = replace(
        WHOLE, zero={"zero": stage, "checkpoint": form}, devices=2, trainer={"precision": precision}, module=LitGPT
    )
    first = replace(whole, epochs=1, look=save)
    expected, _ = ranks(2).run(train_all, [whole, first], tmp_path)[0]
    resumed = ranks(2).run(train, replace(whole, resume=tmp_path / "1" / "saved.ckpt"), tmp_path / "second")[0]
    assert same_bits(resumed.weights, expected.weights)
    assert resumed.column("train_loss_step") == expected.column("train_loss_step")[5:]


@pytest.mark.parametrize("stage", STAGES)
def test_plain_checkpoints_resume_in_every_stage(ranks, tmp_path, plain, stage):
    second = replace(WHOLE, zero={"zero": stage}, devices=2, resume=plain[1])
    check_second_half(ranks(2).run(train, second, tmp_path)[0], plain[0])


def test_ddp_checkpoints_resume_in_every_stage(ranks, tmp_path, plain):
    # Stage none does what DDP does, with one difference that a checkpoint shows: DDP refuses unused parameters.
    whole = replace(WHOLE, module=LitGPT, devices=2, zero="ddp")
    expected, _ = ranks(2).run(train_all, [whole, replace(whole, epochs=1, look=save)], tmp_path)[0]
    resumed = [replace(whole, zero={"zero": stage}, resume=tmp_path / "1" / "saved.ckpt") for stage in STAGES]
    for each in ranks(2).run(train_all, resumed, tmp_path / "second")[0]:
        assert distance(each.weights, expected.weights) < 1e-6
        assert each.column("val_loss") == pytest.approx(expected.column("val_loss")[1:], rel=1e-6)


@pytest.mark.parametrize(("stage", "size"), [("none", 2), ("stage1", 2), ("stage2", 4), ("stage3", 2)])
def test_a_full_checkpoint_is_a_plain_one(ranks, tmp_path, plain, stage, size):
    ranks(size).run(train, replace(FIRST, zero={"zero": stage}, devices=size), tmp_path)
    path = tmp_path / "saved.ckpt"
    check_same_file(path, plain[1])
    module = Rich.load_from_checkpoint(path)
    assert module.hparams["lr"] == 1e-2
    assert same_bits(dict(module.state_dict()), torch.load(path, weights_only=True)["state_dict"])
    check_second_half(train(replace(WHOLE, resume=path), tmp_path / "second"), plain[0])


def check_same_file(mine: Path, theirs: Path) -> None:
    """Check that two checkpoints hold the same, names and types included; numbers up to rounding."""
    one, other = (torch.load(path, weights_only=True) for path in (mine, theirs))
    assert "unused" in one["state_dict"]
    _same(one, other, "")


def _same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            _same(value, other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            _same(mine, theirs, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and one.device == other.device, where
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=where)
    elif isinstance(one, float):
        assert one == pytest.approx(other), where
    else:
        assert type(one) is type(other), where
        assert one == other, where


def test_tied_weights_are_written_once(ranks, tmp_path):
    ranks(2).run(train, replace(FIRST, zero={"zero": "stage3"}, devices=2), tmp_path)
    weights = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    tied = [weights["model.embedding.weight"], weights["model.head.weight"]]
    assert tied[0].untyped_storage().data_ptr() == tied[1].untyped_storage().data_ptr()


@pytest.mark.parametrize(("stage", "size"), [("stage2", 2), ("stage3", 4)])
def test_consolidate(ranks, tmp_path, plain, stage, size, capsys):
    ranks(size).run(train, replace(FIRST, zero={"zero": stage, "checkpoint": "sharded"}, devices=size), tmp_path)
    path = tmp_path / "plain.ckpt"
    assert main(["consolidate", str(tmp_path / "saved.ckpt"), str(path)]) == 0, capsys.readouterr().err
    check_same_file(path, plain[1])
    assert Rich.load_from_checkpoint(path).hparams["width"] == 5
    check_second_half(train(replace(WHOLE, resume=path), tmp_path / "second"), plain[0])


def test_sgd_momentum(ranks, tmp_path):
    whole = replace(WHOLE, arguments={"optimizer": "sgd", "lr": 0.1})
    expected = train(whole, tmp_path / "whole")
    first = replace(whole, epochs=1, look=save, zero={"zero": "stage3", "checkpoint": "sharded"}, devices=2)
    ranks(2).run(train, first, tmp_path)
    second = replace(whole, zero={"zero": "stage1"}, devices=4, resume=tmp_path / "saved.ckpt")
    assert distance(ranks(4).run(train, second, tmp_path / "second")[0].weights, expected.weights) < 1e-6


def test_resuming_within_an_epoch_is_as_in_plain_lightning(ranks, tmp_path):
    first = replace(FIRST, epochs=2, trainer={"max_steps": 3})
    train(first, tmp_path / "plain")
    ranks(2).run(train, replace(first, zero={"zero": "stage3"}, devices=2), tmp_path / "mine")
    expected = train(replace(WHOLE, resume=tmp_path / "plain" / "saved.ckpt"), tmp_path / "plain" / "second")
    second = replace(WHOLE, zero={"zero": "stage3"}, devices=2, resume=tmp_path / "mine" / "saved.ckpt")
    resumed = ranks(2).run(train, second, tmp_path / "mine" / "second")[0]
    assert resumed.steps == expected.steps
    assert distance(resumed.weights, expected.weights) < 1e-6


def save_weights(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt", weights_only=True)


def evaluate(fit: Fit, folder: Path, path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Validate and test a module of other weights with those of a checkpoint; call it on every rank."""
    from tests.strategy.harness import loaders, make_trainer

    torch.manual_seed(7)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    return (
        trainer.validate(module, loaders(fit)[1], ckpt_path=path, verbose=False)[0],
        trainer.test(module, loaders(fit)[1], ckpt_path=path, verbose=False)[0],
    )


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_weights_alone(ranks, tmp_path, form):
    first = replace(FIRST, look=save_weights)
    trained = ranks(2).run(train, replace(first, zero={"zero": "stage3", "checkpoint": form}, devices=2), tmp_path)[0]
    path = tmp_path / "saved.ckpt"
    for size in (1, 4):
        fit = replace(WHOLE, zero={"zero": "stage3"}, devices=size)
        validated, tested = ranks(size).run(evaluate, fit, tmp_path / "again", path)[0]
        assert validated["val_loss"] == pytest.approx(trained.column("val_loss")[-1], rel=1e-6)
        assert tested["test_accuracy"] == pytest.approx(trained.column("val_accuracy")[-1])
    if form == "full":
        saved = torch.load(path, weights_only=True)
        assert saved.keys() == torch_keys_of_weights(tmp_path)
        assert same_bits(saved["state_dict"], trained.weights)


def torch_keys_of_weights(folder: Path) -> Any:
    train(replace(FIRST, look=save_weights), folder / "plain")
    return torch.load(folder / "plain" / "saved.ckpt", weights_only=True).keys()


def save_twice(fit: Fit, folder: Path) -> list[bool]:
    """Save a module that has only been validated, and save over it."""
    from tests.strategy.harness import loaders, make_trainer

    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.validate(module, loaders(fit)[1], verbose=False)
    for _ in range(2):
        save(trainer)
    again = fit.module(**fit.arguments)
    trainer.validate(again, loaders(fit)[1], ckpt_path=folder / "saved.ckpt", verbose=False)
    weights = trainer.strategy.lightning_module_state_dict()
    return [torch.equal(value, before[name]) for name, value in weights.items()]


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_module_that_was_only_validated_can_be_saved(ranks, tmp_path, form):
    found = ranks(2).run(save_twice, Fit({"zero": "stage3", "checkpoint": form}, 2, module=Rich), tmp_path)
    assert found[0] and all(found[0])
