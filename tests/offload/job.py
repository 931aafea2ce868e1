"""A job of its own: ``python -m tests.offload.job limited|killed|failing OFFLOAD FOLDER``.

``limited`` trains a model of 12 million parameters when this process may take only 110 MB more than it has; ``killed``
is killed in the middle of the fourth step, while it writes to the file of the states; ``failing`` has two ranks, of
which one cannot write any more in the fourth step.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_zero import Checkpoint, Offload, ZeroStrategy
from lit_zero.comm import roll_call

MORE = 110 << 20  # bytes
WIDTH, LAYERS = 1000, 12  # a million parameters to a layer
KILLED_AT = 4


class Wide(pl.LightningModule):
    """A deep chain of square layers: with Adam 16 bytes for each of 12 million parameters, 192 MB."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.width, self.depth, self.steps = width, layers, 0  # steps that have begun

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(self.depth))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for layer in self.layers:
            batch = layer(batch).tanh()
        return batch.square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)


def trainer(offload: Offload, folder: Path, steps: int, devices: int = 1, **more: object) -> pl.Trainer:
    strategy = ZeroStrategy("stage3", offload=offload, checkpoint=Checkpoint("sharded"))
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=steps,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **silent, **more},  # type: ignore[arg-type]
    )


def data(width: int, rows: int) -> DataLoader[torch.Tensor]:
    torch.manual_seed(3)
    return DataLoader(torch.randn(rows, width), 2)  # type: ignore[arg-type]


def offload(where: str, folder: Path) -> Offload:
    if where == "none":
        return Offload()
    return Offload("disk", params=True, folder=folder / "states", chunk=1 << 20)


def limited(where: str, folder: Path) -> None:
    """Train under a limit of the memory that a process may have for data (Linux counts what it may write to)."""
    torch.set_num_threads(1)
    threading.stack_size(1 << 19)
    trainer(offload(where, folder), folder, 2).fit(Wide(8, 3), data(8, 4))  # loads what is loaded late
    run, batches = trainer(offload(where, folder), folder, 3), data(WIDTH, 8)
    module = Wide()
    status = Path("/proc/self/status").read_text().split("VmData:")[1]
    held = int(status.split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + MORE, held + MORE))
    run.fit(module, batches)
    run.save_checkpoint(folder / "saved")
    print("steps:", run.global_step)


def killed(where: str, folder: Path) -> None:
    """Save after every step; the fourth never ends."""
    keep = pl.callbacks.ModelCheckpoint(folder / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(offload(where, folder), folder, 6, callbacks=[keep], enable_checkpointing=True)
    write, module, left = os.pwritev, Wide(40, 4), [5]  # writes of the step that still happen

    def kill(*arguments: object) -> int:
        if module.steps == KILLED_AT:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)  # type: ignore[arg-type]

    torch.manual_seed(0)
    os.pwritev = kill  # type: ignore[assignment]
    run.fit(module, data(40, 2))


def failing(where: str, folder: Path) -> None:
    """Save after every step, and when something goes wrong."""
    keep = pl.callbacks.ModelCheckpoint(
        folder / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}", save_on_exception=True
    )
    run = trainer(offload(where, folder), folder, 6, 2, callbacks=[keep], enable_checkpointing=True)
    roll_call.SECONDS = 1.0
    write, module = os.pwritev, Wide(40, 4)

    def fail(*arguments: object) -> int:
        if module.steps == KILLED_AT and run.global_rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)  # type: ignore[arg-type]

    os.pwritev = fail  # type: ignore[assignment]
    run.fit(module, data(40, 4))


if __name__ == "__main__":
    torch.manual_seed(0)
    {"limited": limited, "killed": killed, "failing": failing}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
