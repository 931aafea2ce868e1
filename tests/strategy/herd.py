"""A program that hands its training to other processes, in many ways one after the other: see ``test_processes.py``.

``python -m tests.strategy.herd FOLDER``. It is a program of its own because a forked process must find no traces of an
earlier backward, which a pytest process is full of.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_zero import ZeroStrategy
from tests.strategy.harness import VOCAB, Fit, LitGPT, loaders, make_trainer
from tests.zero.harness import GPT

FIT = Fit({"zero": "stage3"}, 2, arguments={"optimizer": "sgd", "lr": 0.1})


class Late(LitGPT):
    """Is built where it is trained."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        del self.model

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = GPT(VOCAB)


class Failing(LitGPT):
    """Fails at the third step of one rank.

    Args:
        rank: which.
        how: ``raises``, ``dies``, or ``hangs`` while another raises.
        folder: where it notes when.
    """

    def __init__(self, rank: int, how: str, folder: str) -> None:
        super().__init__()
        self.rank, self.how, self.folder = rank, how, folder

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            Path(self.folder, "failed").write_text(str(time.time()))
            if self.global_rank == self.rank and self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.global_rank == self.rank:
                raise ValueError(f"rank {self.rank} alone finds a mistake")
            if self.how == "hangs":
                time.sleep(1000)
        return super().training_step(batch, batch_idx)


@dataclass
class Case:
    """One fit.

    Attributes:
        strategy: name, or arguments of ZeroStrategy.
        module: builds the LightningModule.
        arguments: what ``module`` is given.
        more: trainer functions to call after the fit.
    """

    strategy: str | dict[str, Any]
    module: Any = LitGPT
    arguments: dict[str, Any] = field(default_factory=lambda: dict(FIT.arguments))
    more: tuple[str, ...] = ()


SHARDED = {"zero": "stage3", "checkpoint": "sharded", "start_method": "forkserver"}
CASES = {
    "zero0_fork": Case("zero0_fork"),
    "zero2_notebook": Case("zero2_notebook"),
    "zero3_fork": Case("zero3_fork", more=("validate", "test")),
    "forkserver, sharded checkpoints": Case(SHARDED),
    "built late": Case("zero3_fork", Late, more=("validate",)),
    "zero3_spawn": Case("zero3_spawn"),
    "fork, rank 1 raises": Case("zero3_fork", Failing, {"rank": 1, "how": "raises"}),
    "fork, rank 1 dies": Case("zero2_fork", Failing, {"rank": 1, "how": "dies"}),
    "fork, rank 1 raises and rank 0 hangs": Case("zero1_fork", Failing, {"rank": 1, "how": "hangs"}),
    "forkserver, rank 0 raises": Case(SHARDED, Failing, {"rank": 0, "how": "raises"}),
}


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train, and return what this process knows afterwards."""
    torch.manual_seed(0)
    folder.mkdir()
    failing = case.module is Failing
    module = case.module(**case.arguments, **({"folder": str(folder)} if failing else {}))
    keep = ModelCheckpoint(folder / "kept", monitor="val_loss", save_last=True)
    strategy = ZeroStrategy(**case.strategy) if isinstance(case.strategy, dict) else case.strategy
    trainer = make_trainer(FIT, folder, strategy=strategy, enable_checkpointing=True, callbacks=[keep])
    found: dict[str, Any] = {"error": ""}
    try:
        trainer.fit(module, *loaders(FIT))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        found["seconds"] = time.time() - float((folder / "failed").read_text())
    else:
        found["weights"] = {name: value.clone() for name, value in module.state_dict().items()}
        found["from the strategy"] = trainer.strategy.lightning_module_state_dict()
        found["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found["best"] = (Path(keep.best_model_path).exists(), float(keep.best_model_score))
        found["last"] = Path(keep.last_model_path).exists()
        found["finished"] = trainer.state.finished
        found["called"] = use(trainer, module, case.more)
    found["children"] = [process.name for process in multiprocessing.active_children()]
    found["variables"] = sorted(name for name in os.environ if name.startswith(("MASTER_", "LIT_ZERO_JOB")))
    found["left behind"] = sorted(path.name for path in Path(tempfile.gettempdir()).glob("lit_zero-*"))
    return found


def use(trainer: pl.Trainer, module: pl.LightningModule, names: tuple[str, ...]) -> dict[str, Any]:
    """Call functions of the Trainer; with the weights that have come back, unless it says otherwise."""
    validation, found = loaders(FIT)[1], {}
    for name in names:
        found[name] = getattr(trainer, name)(module, validation, verbose=False)
    if names:
        found["best"] = trainer.test(module, validation, ckpt_path="best", verbose=False)
        try:
            trainer.fit(module, *loaders(FIT))
        except Exception as error:
            found["a second fit"] = f"{type(error).__name__}: {error}"
    return found


def main(folder: Path) -> None:
    """Run every case."""
    tempfile.tempdir = str(folder / "temporary")
    Path(tempfile.tempdir).mkdir()
    multiprocessing.set_forkserver_preload(["tests.strategy.harness"])
    # Keep OpenMP's threads busy before anything is forked: they are what a forked process lacks.
    torch.set_num_threads(2)
    torch.ones(1 << 22).sin().sum()
    torch.save({name: run(case, folder / name.replace(" ", "_")) for name, case in CASES.items()}, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
