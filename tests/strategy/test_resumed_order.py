"""After a resume, data comes in the order of the epoch that is resumed, not of epoch 0 (Lightning 21938)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from tests.strategy.harness import LENGTH, VOCAB, Fit, LitGPT, make_trainer

ROWS = 12
PERSISTENT = {"num_workers": 1, "persistent_workers": True}


class Reads(LitGPT):
    """Remembers the order in which it has read the rows of each epoch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.order: dict[int, list[int]] = {}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.order.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return super().training_step(batch, batch_idx)


def orders(folder: Path, epochs: int, resume: Path | None = None, **loader: Any) -> dict[int, list[int]]:
    """Train and return the rows in the order in which this rank has read them, by epoch."""
    data = TensorDataset(torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % VOCAB, torch.arange(ROWS))
    kept = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)  # saves while it validates
    fit = Fit({"zero": "stage2"}, torch.distributed.get_world_size(), {"callbacks": [kept]}, epochs=epochs)
    trainer = make_trainer(fit, folder, enable_checkpointing=True, logger=False)
    model = Reads()
    trainer.fit(model, DataLoader(data, 2, shuffle=True, **loader), DataLoader(data, 2), ckpt_path=resume)
    trainer.save_checkpoint(folder / "end.ckpt")
    return model.order


def all_orders(folder: Path) -> list[list[dict[int, list[int]]]]:
    """Return, for each kind of loader, the orders of an uninterrupted run and of a resumed one."""
    found = []
    for loader, name in (({"num_workers": 1}, "end"), (PERSISTENT, "epoch=0")):
        here = folder / str(len(found))
        whole = orders(here / "whole", 2, **loader)
        orders(here / "first", 1, **loader)
        found.append([whole, orders(here / "resumed", 2, here / "first" / f"{name}.ckpt", **loader)])
    return found


@pytest.mark.thorough
def test_a_resumed_epoch_is_shuffled_as_itself(ranks, tmp_path):
    for whole, resumed in ranks(1).run(all_orders, tmp_path, timeout=200)[0]:
        assert [sorted(order) for order in whole.values()] == [list(range(ROWS))] * 2
        assert whole[0] != whole[1]
        assert resumed == {1: whole[1]}
