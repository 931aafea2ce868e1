"""One rank of one turn of ``benchmark_pipeline.py``."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_zero import Pipeline, ZeroStrategy


@dataclass(frozen=True)
class PipelineTurn:
    """What one turn does; travels to the worker as JSON.

    Attributes:
        contender: a key of ``CONTENDERS``.
        schedule: ``gpipe`` or ``1f1b``.
        ranks: number of processes, one stage each.
        model: arguments of ``GPT``.
        rows: sequences of a batch.
        micro_batches: pieces of a batch.
        warmup: steps before the measured ones.
        steps: measured steps.
        device: ``cpu``.
    """

    contender: str
    schedule: str
    ranks: int
    model: dict[str, Any]
    rows: int
    micro_batches: int
    warmup: int
    steps: int
    device: str = "cpu"


class Clock:
    """Notes when steps end."""

    def __init__(self, turn: PipelineTurn) -> None:
        self._warmup, self._number = turn.warmup, 0
        self._last = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step_ends(self, loss: float) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._number >= self._warmup:
            self.seconds.append(now - self._last)
        self._last, self._number = now, self._number + 1
        self.losses.append(loss)


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def boundaries(turn: PipelineTurn) -> list[int]:
    """The first block of every stage but the first."""
    layers = turn.model["layers"]
    return [layers * stage // turn.ranks for stage in range(1, turn.ranks)]


def batches(turn: PipelineTurn) -> DataLoader[Any]:
    """Return tokens and targets of every step, the same on every rank."""
    generator = torch.Generator().manual_seed(1000)
    rows = turn.rows * (turn.warmup + turn.steps)
    # Counting up from a random number, so that there is something to learn.
    first = torch.randint(0, turn.model["vocab_size"], (rows, 1), generator=generator)
    window = (first + torch.arange(turn.model["block_size"] + 1)) % turn.model["vocab_size"]
    return DataLoader(TensorDataset(window[:, :-1], window[:, 1:]), turn.rows)


class Report(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.step_ends(float(outputs["loss"]))


def trainer(clock: Clock, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Report(clock)],
        use_distributed_sampler=False,  # it would shuffle; all ranks read the same
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


# ---- by hand


class Stage(nn.Module):
    """A piece of the GPT, written by hand.

    Args:
        gpt: the whole model.
        first: number of the first block.
        end: number of the first block past it.
    """

    def __init__(self, gpt: GPT, first: int, end: int) -> None:
        super().__init__()
        self.begins, self.ends = first == 0, end == len(gpt.blocks)
        if self.begins:
            self.token_embedding, self.position_embedding = gpt.token_embedding, gpt.position_embedding
        self.blocks = nn.ModuleList(gpt.blocks[first:end])
        if self.ends:
            self.norm, self.head = gpt.norm, gpt.head

    def forward(self, x: Tensor) -> Tensor:
        if self.begins:
            x = self.token_embedding(x) + self.position_embedding(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.ends else x


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ByHand:
    """This rank's stage and the schedule.

    Args:
        gpt: the whole model.
        turn: what is run.
        rank: this rank.
    """

    def __init__(self, gpt: GPT, turn: PipelineTurn, rank: int) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        edges = [0, *boundaries(turn), turn.model["layers"]]
        self.piece = Stage(gpt, edges[rank], edges[rank + 1])
        stage = PipelineStage(self.piece, rank, turn.ranks, torch.device("cpu"))
        kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[turn.schedule]
        self._schedule = kind(stage, turn.micro_batches, loss_fn=cross_entropy)
        self._begins, self._ends = rank == 0, rank == turn.ranks - 1

    def run(self, tokens: Tensor, targets: Tensor) -> float:
        """Make the gradients of a batch; return the mean loss on the last rank, 0 on others."""
        losses: list[Tensor] = []
        if self._begins:
            self._schedule.step(tokens)
        elif self._ends:
            self._schedule.step(target=targets, losses=losses)
        else:
            self._schedule.step()
        return float(torch.stack(losses).mean()) if losses else 0.0


def by_hand(gpt: GPT, turn: PipelineTurn, rank: int, clock: Clock) -> None:
    work = ByHand(gpt, turn, rank)
    optimizer = adamw(work.piece.parameters())
    for tokens, targets in batches(turn):
        loss = work.run(tokens, targets)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_ends(loss)


class LitByHand(pl.LightningModule):
    """The same in a LightningModule."""

    automatic_optimization = False

    def __init__(self, work: ByHand) -> None:
        super().__init__()
        self.piece, self._run = work.piece, work.run

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        loss = self._run(*batch)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": torch.tensor(loss)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())


def by_hand_in_the_trainer(gpt: GPT, turn: PipelineTurn, rank: int, clock: Clock) -> None:
    module = LitByHand(ByHand(gpt, turn, rank))
    trainer(clock, strategy=SingleDeviceStrategy("cpu")).fit(module, batches(turn))


# ---- lit_zero


class LitModel(pl.LightningModule):
    """The same model as it is."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.gpt(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())


def in_the_trainer(gpt: GPT, turn: PipelineTurn, rank: int, clock: Clock) -> None:
    pipeline = Pipeline(turn.schedule, turn.ranks, turn.micro_batches, boundaries=boundaries(turn))
    strategy = ZeroStrategy("none", pipeline=pipeline)
    trainer(clock, devices=turn.ranks, strategy=strategy).fit(LitModel(gpt), batches(turn))


CONTENDERS: dict[str, Callable[[GPT, PipelineTurn, int, Clock], None]] = {
    "torch": by_hand,
    "torch in the Trainer": by_hand_in_the_trainer,
    "lit_zero": in_the_trainer,
}


def main(arguments: str, rank: int, folder: Path) -> None:
    """Run ``PipelineTurn(**arguments)`` as ``rank`` and leave the result in ``folder/<rank>.json``."""
    warnings.filterwarnings("ignore")
    turn = PipelineTurn(**json.loads(arguments))
    torch.set_num_threads(1)
    # What torchrun sets: the Trainer then starts no ranks.
    started = {"TORCHELASTIC_RUN_ID": "benchmark", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(turn.ranks)}
    os.environ.update(started | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=turn.ranks,
        timeout=timedelta(seconds=120),
    )
    torch.manual_seed(0)  # the same initial weights on every rank
    gpt, clock = GPT(**turn.model), Clock(turn)
    CONTENDERS[turn.contender](gpt, turn, rank, clock)
    dist.barrier()
    (folder / f"{rank}.json").write_text(
        json.dumps({"turn": asdict(turn), "seconds": clock.seconds, "losses": clock.losses})
    )
    sys.stdout.flush()
    os._exit(0)  # everything is written down; no backend may spend a turn's time on its own teardown


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
