"""Checkpoints of modules whose ``state_dict`` does not call parameters as ``named_parameters`` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lit_zero.cli import main
from lit_zero.core.errors import CheckpointError
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, distance, same_bits, train, train_all
from tests.strategy.test_model_checkpoint import refused

Ranks = Callable[[int], RankPool]
ADAMW = {"optimizer": "adamw", "lr": 1e-2}


class Renamed(LitGPT):
    """Its blocks are wrapped, which state_dict does not tell, and its norm goes by another name there."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.model.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in self.model.blocks)
        self.model.norm.register_state_dict_post_hook(self._saved)
        self.model.norm.register_load_state_dict_pre_hook(self._loaded)

    @staticmethod
    def _saved(module: nn.Module, entries: dict[str, Any], prefix: str, metadata: Any) -> None:
        entries[f"{prefix}scale"] = entries.pop(f"{prefix}weight")

    @staticmethod
    def _loaded(module: nn.Module, entries: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}scale" in entries:
            entries[f"{prefix}weight"] = entries.pop(f"{prefix}scale")


def save(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    """Save a checkpoint, and return the whole weights on rank 0."""
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")
    return {name: value.clone() for name, value in trainer.strategy.full_state_dict().items()}


def save_plainly(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


WHOLE = Fit(module=Renamed, arguments=ADAMW)
FIRST = replace(WHOLE, epochs=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Plain Lightning on one device: the whole run, its first half, and the checkpoint of that."""
    folder = tmp_path_factory.mktemp("plain")
    first = train(replace(FIRST, look=save_plainly), folder)
    return train(WHOLE, folder / "whole"), first, folder / "saved.ckpt"


@pytest.mark.parametrize("form", ["full", "sharded"])
@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_a_checkpoint_has_the_names_of_the_state_dict(ranks, tmp_path, plain, form, stage, capsys):
    whole, first, _ = plain
    fit = replace(FIRST, zero={"zero": stage, "checkpoint": form}, devices=2, look=save)
    mine, other = ranks(2).run(train, fit, tmp_path)
    assert any("model.norm.scale" in name for name in mine.notes) and not any("wrapped" in name for name in mine.notes)
    assert distance(mine.notes, first.weights) < 1e-6
    assert other.notes == {}
    path = tmp_path / "saved.ckpt"
    if form == "sharded":
        assert main(["consolidate", str(path), str(tmp_path / "one.ckpt")]) == 0, capsys.readouterr().err
        path = tmp_path / "one.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert same_bits({name: saved[name] for name in mine.notes}, mine.notes) and len(saved) == len(mine.notes)

    second = replace(WHOLE, zero={"zero": "stage3"}, devices=2, resume=tmp_path / "saved.ckpt")
    resumed = ranks(2).run(train, second, tmp_path / "second")[0]
    assert resumed.steps == 10
    assert distance(resumed.weights, whole.weights) < 1e-6


def test_plain_checkpoints_with_such_names_resume(ranks, tmp_path, plain):
    fits = [replace(WHOLE, zero={"zero": stage}, devices=2, resume=plain[2]) for stage in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path)[0]:
        assert distance(each.weights, plain[0].weights) < 1e-6


def test_without_hooks_in_the_way_the_same_checkpoint_fits_the_bare_blocks(ranks, tmp_path):
    class_of_first = replace(FIRST, module=Wrapped, zero={"zero": "stage3", "checkpoint": "sharded"}, devices=2)
    first = ranks(2).run(train, replace(class_of_first, look=save), tmp_path)[0]
    second = replace(WHOLE, module=LitGPT, zero={"zero": "stage1"}, devices=2, resume=tmp_path / "saved.ckpt")
    resumed = ranks(2).run(train, second, tmp_path / "second")[0]
    assert list(resumed.weights) == list(first.notes)
    assert distance(resumed.weights, train(replace(WHOLE, module=LitGPT), tmp_path / "plain").weights) < 1e-6


class Wrapped(LitGPT):
    """Its blocks are wrapped, which state_dict does not tell."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.model.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in self.model.blocks)


class Own(LitGPT):
    """Leaves something out, in the way that takes no arguments."""

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if "norm" not in name}


def test_an_override_that_takes_no_arguments(ranks, tmp_path):
    alone = train(replace(FIRST, module=Own), tmp_path / "alone")
    mine = ranks(2).run(train, replace(FIRST, module=Own, zero={"zero": "stage3"}, devices=2), tmp_path)[0]
    assert not any("norm" in name for name in mine.weights)
    assert distance(mine.weights, alone.weights) < 1e-6


class Cut(LitGPT):
    """Saves a matrix as two."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._register_state_dict_hook(self._saved)

    @staticmethod
    def _saved(module: nn.Module, entries: dict[str, Any], prefix: str, metadata: Any) -> None:
        entries["upper"], entries["lower"] = entries.pop("model.embedding.weight").split([1, 30])


def test_a_parameter_in_pieces_is_refused(ranks, tmp_path):
    for form in ("full", "sharded"):
        fit = replace(FIRST, module=Cut, zero={"zero": "stage3", "checkpoint": form}, devices=2)
        for found in ranks(2).run(refused, fit, tmp_path / form, CheckpointError):
            assert found == (
                "Cut.state_dict() holds 'upper', which is made of parameters but is none of them, so its value cannot "
                "be collected from the ranks. A hook of state_dict may rename or leave out parameters, not cut, join "
                "or add them: do that to the finished checkpoint."
            )
