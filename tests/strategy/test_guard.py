"""The guard before a module's own state_dict: what it keeps alive, and copies."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_zero.core.errors import LitZeroError
from tests.pool import RankPool
from tests.strategy.harness import Fit, loaders, make_trainer

Ranks = Callable[[int], RankPool]
FIT = Fit({"zero": "stage3"}, 2, epochs=1)


def fit_again(fit: Fit, folder: Path) -> tuple[bool, int]:
    """Fit a module with one Trainer after the other; tell whether the first one's engine is gone, and count guards."""
    torch.manual_seed(0)
    module, engines = fit.module(**fit.arguments), []
    for number in range(3):
        trainer = make_trainer(fit, folder / str(number))
        trainer.fit(module, *loaders(fit))
        engines.append(weakref.ref(trainer.strategy.engine))
        del trainer
    gc.collect()
    assert engines[-1]() is not None
    return engines[0]() is None and engines[1]() is None, len(module._state_dict_pre_hooks)


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_another_trainer_leaves_nothing_of_the_one_before(ranks, tmp_path, stage):
    for found in ranks(2).run(fit_again, replace(FIT, zero={"zero": stage}), tmp_path):
        assert found == (True, 1)


def copy_block(fit: Fit, folder: Path) -> str:
    """Copy a block after a fit; return what is said, or nothing if the copy is the same."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    block = module.model.blocks[0]
    try:
        other = copy.deepcopy(block)
    except LitZeroError as error:
        return str(error)
    for mine, theirs in zip(other.parameters(), block.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert list(other.state_dict()) == list(block.state_dict())
    return ""


@pytest.mark.parametrize(("stage", "refused"), [("stage2", False), ("stage3", True)])
def test_copies(ranks, tmp_path, stage, refused):
    for found in ranks(2).run(copy_block, replace(FIT, zero={"zero": stage}), tmp_path):
        assert found == refused * (
            "copy.deepcopy() of a module would see released or 2-byte parameters under this strategy. Save with "
            "trainer.save_checkpoint(path), get the weights with trainer.strategy.full_state_dict() on all ranks, and "
            "load weights before setup (in __init__ or configure_model) or through ckpt_path."
        )
