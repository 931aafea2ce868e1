"""Callbacks that save a checkpoint when something goes wrong: on all ranks, or on one alone."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lit_zero.comm import roll_call
from tests.pool import RankPool
from tests.strategy.harness import Fit, LitGPT, loaders, make_trainer, train

Ranks = Callable[[int], RankPool]
FIT = Fit({"zero": "stage3"}, 2, epochs=1)


class Mistaken(LitGPT):
    """Makes a mistake in the third step."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            raise ValueError("a mistake")
        return super().training_step(batch, batch_idx)


def fail(fit: Fit, folder: Path, saving: str, alone: bool) -> tuple[float, list[str], list[str]]:
    """Fail in training; ``alone``: only rank 1 has a callback that saves then. Returns seconds, files and
    what was said.
    """
    roll_call.SECONDS = 1.0 if alone else 30.0
    torch.manual_seed(0)
    module = Mistaken(**fit.arguments)
    callbacks: list[Any]
    if saving == "OnExceptionCheckpoint":
        callbacks = [OnExceptionCheckpoint(folder / "kept", "failed")]
    else:
        callbacks = [ModelCheckpoint(folder / "kept", "failed", save_on_exception=True, save_last=True, save_top_k=-1)]
    if alone and os.environ["RANK"] == "0":
        callbacks[0].on_exception = lambda *_: None
    trainer = make_trainer(fit, folder, callbacks=callbacks, enable_checkpointing=True)
    begin, said = time.monotonic(), io.StringIO()
    with pytest.raises(ValueError, match="a mistake"), contextlib.redirect_stderr(said):
        trainer.fit(module, *loaders(fit))
    seconds = time.monotonic() - begin
    told = [line for line in said.getvalue().splitlines() if line.startswith("lit_zero: ")]
    return seconds, sorted(path.name for path in (folder / "kept").glob("*")), told


@pytest.mark.parametrize("saving", ["OnExceptionCheckpoint", "ModelCheckpoint"])
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_rank_that_fails_alone_saves_nothing_and_waits_for_nobody(ranks, tmp_path, saving, form):
    fit = replace(FIT, zero={"zero": "stage3", "checkpoint": form})
    _, (seconds, files, told) = ranks(2).run(fail, fit, tmp_path, saving, True, timeout=40)
    assert seconds < 20
    assert files == []
    names = ["failed.ckpt"] if saving == "OnExceptionCheckpoint" else ["failed.ckpt", "last.ckpt"]
    assert told == [
        f"lit_zero: rank 1 does not save '{tmp_path / 'kept' / name}': a rank has failed alone, and saving takes all "
        "of them. Earlier checkpoints are unharmed."
        for name in names
    ]


@pytest.mark.parametrize("saving", ["OnExceptionCheckpoint", "ModelCheckpoint"])
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_ranks_that_fail_together_save(ranks, tmp_path, saving, form):
    fit = replace(FIT, zero={"zero": "stage3", "checkpoint": form})
    (_, files, told), _ = ranks(2).run(fail, fit, tmp_path, saving, False)
    assert files == (["failed.ckpt"] if saving == "OnExceptionCheckpoint" else ["failed.ckpt", "last.ckpt"])
    assert told == []
    resumed = replace(fit, resume=tmp_path / "kept" / "failed.ckpt", trainer={"limit_train_batches": 5})
    assert ranks(2).run(train, resumed, tmp_path / "second")[0].steps > 2
