"""Measure the bubble of a pipeline: a real run of real ranks, in which every piece of work takes a fixed time.

    python examples/pipeline_timeline.py                               # 4 ranks, 8 and 16 micro-batches, 1f1b
    python examples/pipeline_timeline.py --schedules gpipe 1f1b zero_bubble --out timelines

The blocks of the model compute next to nothing and sleep: once in the forward, once in the backward for their input,
once in that for their weights. Ranks that sleep do not take one another's cores, so a machine with few of them shows
what a pipeline of as many accelerators would do. Everything else is as in any training: Lightning's Trainer, messages
between processes, the optimizer. For every schedule a table says how much of the time ranks were idle, and what theory
says; a Chrome trace (chrome://tracing, ui.perfetto.dev) and a picture show who did what when.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_zero import Pipeline, ZeroStrategy
from lit_zero.pipeline.report import write
from lit_zero.pipeline.schedule import in_flight
from lit_zero.pipeline.schedules import build, theory
from lit_zero.pipeline.timeline import Timeline

WIDTH = 8  # of the tensors: nothing takes time but the sleep


class Work(torch.autograd.Function):
    """Hands on what it is given, and sleeps.

    Args of ``apply``: the tensor, seconds of its forward, seconds of its backward.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, None, None


class Block(nn.Module):
    """Sleeps once in the forward and twice in the backward.

    Args:
        seconds: of each sleep.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        weight = Work.apply(self.weight, 0.0, self.seconds)  # the backward for the weights
        return Work.apply(x, self.seconds, self.seconds) * weight  # the forward, and the backward for the input


class Sleeper(pl.LightningModule):
    """Blocks in a row.

    Args:
        blocks: how many.
        seconds: of each of a block's three sleeps.
    """

    def __init__(self, blocks: int, seconds: float) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)  # so that the first stage has an input that needs a gradient
        self.blocks = nn.ModuleList(Block(seconds) for _ in range(blocks))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.entry(batch[0])
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """Keeps the timeline of every step but the first, which also starts threads and connections."""

    def __init__(self) -> None:
        self.timelines: list[Timeline] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        stages: Any = trainer.strategy.stages  # type: ignore[attr-defined]
        stages.timed = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        timeline = trainer.strategy.stages.timeline()  # type: ignore[attr-defined]
        if batch_idx > 0:
            self.timelines.append(timeline)


def run(schedule: str, ranks: int, micro_batches: int, seconds: float, steps: int) -> list[Timeline]:
    """Train for some steps and return their timelines, the same on every rank.

    Args:
        schedule: its name.
        ranks: of the pipeline.
        micro_batches: of a step.
        seconds: of each sleep of a stage.
        steps: that are measured.
    """
    stages = ranks * Pipeline(schedule, 2 * ranks).per_rank
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=ZeroStrategy("none", pipeline=Pipeline(schedule, stages, micro_batches)),
        max_steps=steps + 1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn((steps + 1) * micro_batches, WIDTH))
    trainer.fit(Sleeper(stages, seconds * ranks / stages), DataLoader(data, micro_batches))
    return watch.timelines


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write traces and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=["1f1b"])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--milliseconds", type=float, default=30.0, help="of each sleep of a rank, per micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; the table holds medians")
    parser.add_argument("--out", type=Path, default=Path("timelines"), help="folder for traces and pictures")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if first:
        print("| schedule | micro-batches | bubble | theory | of theory | step, s | activations in flight, by rank |")
        print("|---|---|---|---|---|---|---|", flush=True)
    for schedule in options.schedules:
        for many in options.micro_batches:
            timelines = run(schedule, options.ranks, many, options.milliseconds / 1e3, options.steps)
            if not first:
                continue
            bubble = statistics.median(timeline.bubble_fraction for timeline in timelines)
            made = build(schedule, options.ranks * Pipeline(schedule, 2 * options.ranks).per_rank, many)
            said = theory(made)
            kept = " ".join(str(in_flight([span.action for span in row]).graphs) for row in timelines[-1].rows)
            known, ratio = ("", "") if said is None else (f"{said:.1%}", f"{bubble / said:.3f}")
            seconds = statistics.median(timeline.makespan for timeline in timelines)
            print(f"| {schedule} | {many} | {bubble:.1%} | {known} | {ratio} | {seconds:.2f} | {kept} |", flush=True)
            options.out.mkdir(parents=True, exist_ok=True)
            name = options.out / f"{schedule}_{options.ranks}x{many}"
            title = f"{schedule}, {options.ranks} ranks, {many} micro-batches: measured bubble {bubble:.1%}"
            for ending in (".json", ".svg"):
                write(timelines[-1], title, name.with_suffix(ending))


if __name__ == "__main__":
    main()
