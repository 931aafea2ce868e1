"""One process that runs the same micro-batches as a pipeline, from the same seeds: what a pipeline must equal."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from lit_zero.core.randomness import seed_everything
from lit_zero.pipeline.micro_batches import cut
from lit_zero.pipeline.policy import Pipeline
from lit_zero.strategy.work import seed_of
from tests.callbacks.harness import ByFeature
from tests.strategy.harness import LitGPT
from tests.zero.harness import Block

MICRO_BATCHES = 4
POLICY = Pipeline("gpipe", stages=2, micro_batches=MICRO_BATCHES)


def in_pieces(module: pl.LightningModule, step: Any, batch: Any, batch_idx: int) -> Any:
    """Run a step as a pipeline does: seeded anew for each micro-batch, the loss weighted by rows."""
    seed = int(torch.randint(0, 1 << 62, ()))
    micro = cut(batch, POLICY)
    logged: dict[str, list[Any]] = {}
    losses = []
    log = module.log
    with torch.random.fork_rng(devices=[]):
        module.log = lambda name, value, **kwargs: logged.setdefault(name, []).append((value, kwargs))
        for number, part in enumerate(micro.parts):
            seed_everything(seed_of(seed, number))
            losses.append(step(part, batch_idx))
        del module.log
    for name, values in logged.items():
        value = values[-1][0]
        if isinstance(value, torch.Tensor):
            value = sum(w * v.detach() for w, (v, _) in zip(micro.weights, values, strict=True))
        log(name, value, **values[-1][1])
    return None if losses[0] is None else sum(w * loss for w, loss in zip(micro.weights, losses, strict=True))


class DropBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.2, self.training)


class Random(LitGPT):
    """Random numbers before, in and after the blocks, and batch statistics at both ends.

    Args:
        dropout: there are some.
        norms: the same of batch statistics.
        pieces: run in micro-batches by itself.
    """

    def __init__(self, dropout: bool = True, norms: bool = False, pieces: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dropout, self.pieces = dropout, pieces
        if dropout:
            for index in range(len(self.model.blocks)):
                self.model.blocks[index] = DropBlock(12)
            self.model.embedding.register_forward_hook(lambda module, _, x: F.dropout(x, 0.1, module.training))
        if norms:
            self.model.blocks[0].norm1 = ByFeature(12)
            self.model.norm = ByFeature(12)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        return in_pieces(self, self.one, batch, batch_idx) if self.pieces else self.one(batch, batch_idx)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        if self.pieces:
            torch.randint(0, 1 << 62, ())  # a pipeline draws a seed for every step
        super().validation_step(batch, batch_idx)

    def one(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens = batch[0]
        keep = (torch.rand(tokens.shape) > 0.1) if self.dropout else torch.ones(tokens.shape, dtype=torch.bool)
        logits = F.dropout(self.model(tokens[:, :-1] * keep[:, :-1]), 0.1, self.dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss
