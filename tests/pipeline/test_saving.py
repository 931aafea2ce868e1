"""Checkpoints do not show the pipeline: any number of stages loads any other, and plain Lightning's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_zero.cli import main
from tests.pipeline.test_training import SCHEDULES, piped
from tests.strategy.harness import Fit, LitGPT, Outcome, Short, distance, same_bits, train, train_all


class Rich(LitGPT):
    """With what else a module may hold: a parameter that no loss reaches, and frozen ones between others."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.model.blocks[3].norm2.requires_grad_(False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


def save(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


ADAMW = {"optimizer": "adamw", "lr": 1e-2, "layers": 4}
WHOLE = Short(module=Rich, arguments=ADAMW, epochs=2)
FIRST = replace(WHOLE, epochs=1, look=save)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Plain Lightning in one process: the uninterrupted run, and the checkpoint of its first half."""
    folder = tmp_path_factory.mktemp("plain")
    train(FIRST, folder)
    return train(WHOLE, folder / "whole"), folder / "saved.ckpt"


def check_second_half(resumed: Outcome, whole: Outcome) -> None:
    assert distance(resumed.weights, whole.weights) < 1e-6  # names and their order too
    assert resumed.weights["count"].tolist() == [10, 10]
    assert resumed.steps == whole.steps == 10
    for name in ("train_loss_step", "lr-AdamW/pg1", "val_loss", "val_accuracy"):
        values = resumed.column(name)
        assert values == pytest.approx(whole.column(name)[-len(values) :], rel=1e-5)
    assert len(resumed.column("train_loss_step")) == 5


def ways(form: str) -> dict[str, Fit]:
    """Return fits by name: pipelines of several kinds, and none."""
    found = {
        "two": piped("stage1", 2),
        "two of stage3": piped("stage3", 2),
        "interleaved": piped("stage2", 2, **SCHEDULES["interleaved"]),
        "four": piped("stage2", 4, stages=4),
        "two by two": piped("stage3", 4),
        "none": Short({"zero": "stage3"}, 2),
    }
    return {
        name: replace(fit, zero={**fit.zero, "checkpoint": form}, module=Rich, arguments=ADAMW)  # type: ignore[dict-item]
        for name, fit in found.items()
    }


@pytest.mark.thorough("[four", "[interleaved", "[two by", "two-four-sharded", "none-two by two-sharded")
@pytest.mark.parametrize("form", ["full", "sharded"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("two", "four"),
        ("two of stage3", "none"),
        ("none", "two by two"),
        ("four", "interleaved"),
        ("interleaved", "two of stage3"),
        ("two by two", "two"),
    ],
)
def test_from_any_pipeline_to_any_other(
    ranks: Any, tmp_path: Path, plain: tuple[Outcome, Path], form: str, first: str, second: str
) -> None:
    one, other = ways(form)[first], ways("full")[second]
    ranks(one.devices).run(train, replace(one, epochs=1, look=save), tmp_path)
    path = tmp_path / "saved.ckpt"
    assert path.is_dir() == (form == "sharded")
    resumed = replace(other, epochs=2, resume=path)
    check_second_half(ranks(other.devices).run(train, resumed, tmp_path / "second")[0], plain[0])


def test_plain_checkpoints_resume(ranks: Any, tmp_path: Path, plain: tuple[Outcome, Path]) -> None:
    fits = [replace(fit, epochs=2, resume=plain[1]) for fit in ways("full").values() if fit.devices == 2]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        check_second_half(each, plain[0])


@pytest.mark.thorough("two of stage3", "interleaved")
@pytest.mark.parametrize("name", ["two", "two of stage3", "interleaved"])
def test_plain_lightning_resumes(ranks: Any, tmp_path: Path, plain: tuple[Outcome, Path], name: str) -> None:
    """From a full checkpoint as it is, and from a sharded one that ``lit-zero consolidate`` has made one."""
    full, parts = (replace(ways(form)[name], epochs=1, look=save) for form in ("full", "sharded"))
    ranks(2).run(train_all, [full, parts], tmp_path, timeout=120)
    assert main(["consolidate", str(tmp_path / "1" / "saved.ckpt"), str(tmp_path / "whole.ckpt")]) in (0, None)
    mine = torch.load(tmp_path / "0" / "saved.ckpt", weights_only=True)
    theirs = torch.load(plain[1], weights_only=True)
    assert list(mine["state_dict"]) == list(theirs["state_dict"])
    assert mine["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
    assert mine["optimizer_states"][0]["state"].keys() == theirs["optimizer_states"][0]["state"].keys()
    for number, path in enumerate((tmp_path / "0" / "saved.ckpt", tmp_path / "whole.ckpt")):
        resumed = train(replace(WHOLE, resume=path), tmp_path / f"resumed{number}")
        check_second_half(resumed, plain[0])


@pytest.mark.thorough
def test_resuming_in_place_is_bit_equal(ranks: Any, tmp_path: Path) -> None:
    whole = replace(ways("full")["two"], module=LitGPT)
    halves = [replace(ways(form)["two"], module=LitGPT, epochs=1, look=save) for form in ("full", "sharded")]
    expected = ranks(2).run(train_all, [replace(whole, epochs=2), *halves], tmp_path, timeout=120)[0][0]
    again = [replace(whole, epochs=2, resume=tmp_path / number / "saved.ckpt") for number in ("1", "2")]
    for each in ranks(2).run(train_all, again, tmp_path / "second", timeout=120)[0]:
        assert same_bits(each.weights, expected.weights) and each.weights
