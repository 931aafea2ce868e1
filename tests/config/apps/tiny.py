"""A model of two layers that fails on purpose, on one rank or on all, in the ways in which ranks fail."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


def before_fit(failure: str) -> None:
    """What happens before the Trainer is called."""
    if failure == "rank1_leaves" and os.environ.get("LOCAL_RANK") == "1":
        sys.exit(3)


class Tiny(pl.LightningModule):
    def __init__(self, lr: float = 0.1, failure: str = "none") -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        self.lr, self.failure = lr, failure

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 1:
            self._fail()
        return self.layers(batch[0]).square().mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("loss", self.layers(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def _fail(self) -> None:
        rank, failure = self.global_rank, self.failure
        print(f"{failure} on {self.trainer.world_size} ranks: the time is {time.time()}", flush=True)
        if failure == "all_raise":
            raise ValueError(f"every rank finds the same mistake, and this is rank {rank}")
        if rank == 1 and failure in ("rank1_raises", "rank0_sleeps", "rank0_is_stuck"):
            raise ValueError("rank 1 alone finds a mistake")
        if rank == 1 and failure == "rank1_is_killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and failure == "rank0_raises":
            raise ValueError("rank 0 alone finds a mistake")
        if rank == 0 and failure == "rank0_is_killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and failure == "rank0_sleeps":
            time.sleep(100)
        if rank == 0 and failure == "rank0_is_stuck":
            hashlib.pbkdf2_hmac("sha256", b"a call that hears no signal", b"", 2**31 - 1)


def data() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=2)
