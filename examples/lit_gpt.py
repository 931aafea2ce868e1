"""The LightningModule that trains a GPT on text, and the metric that tells how well.

Nothing here knows how the training is sharded: the same class runs on one process, under DDP and in every ZeRO stage.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from gpt import GPT, generate
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from lit_zero.core.errors import ConfigError
from lit_zero.optim import Muon

__all__ = ["GPT", "BitsPerByte", "LitGPT", "generate", "warmup_cosine"]


OUTER = ("token_embedding", "position_embedding", "head")  # layers of GPT that touch tokens
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


class BitsPerByte(Metric):
    """Bits that the model needs for one byte of text: comparable between tokenizers, unlike the loss per token.

    Both sums are added up over ranks before they are divided, so ranks and batches of different size weigh as they
    should.
    """

    full_state_update = False
    higher_is_better = False
    nats: Tensor
    text_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("text_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, text_bytes: Tensor) -> None:
        """Add a batch.

        Args:
            nats: negative log-likelihoods in nats, of any shape; they are summed.
            text_bytes: bytes of text that these tokens stand for, of any shape; they are summed.
        """
        self.nats += nats.sum()
        self.text_bytes += text_bytes.sum()

    def compute(self) -> Tensor:
        return self.nats / math.log(2) / self.text_bytes


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 100, final_fraction: float = 0.1
) -> LambdaLR:
    """Raise the learning rate linearly to its full value, then lower it along half a cosine.

    Args:
        optimizer: whose learning rates are scaled.
        total_steps: optimizer steps of the whole training.
        warmup_steps: optimizer steps of the rise; at most a tenth of the training is used.
        final_fraction: of the full learning rate, reached at the last step.
    """
    warmup = min(warmup_steps, total_steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


class LitGPT(pl.LightningModule):
    """Trains a ``GPT`` to predict the next token.

    A batch is ``(tokens [B, T], targets [B, T], text_bytes [B])``, where ``text_bytes`` counts the bytes of text that
    the targets of one sequence stand for.

    Args:
        vocab_size: number of different tokens.
        block_size: sequence length, in tokens.
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads per block; must divide ``dim``.
        dropout: dropout probability.
        tied: the output layer shares the token embedding's weight.
        bias: whether linear layers and norms have a bias.
        loss: ``plain``, or ``fused`` with the output layer, whose logits then never stand whole.
        optimizer: called with the parameter groups. Parameters with fewer than two dimensions get no weight decay; the
            others get the optimizer's own ``weight_decay``.
        scheduler: called with the optimizer, and with ``total_steps`` if it has such an argument; it is stepped after
            every optimizer step. None keeps the learning rate constant.
    """

    gpt: GPT

    def __init__(
        self,
        vocab_size: int = 256,
        block_size: int = 128,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = True,
        bias: bool = False,
        loss: str = "plain",
        optimizer: Callable[[Iterable[Any]], Optimizer] = ADAMW,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        # Plain numbers only: a checkpoint must open with torch.load(weights_only=True).
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.val_bpb = BitsPerByte()

    def configure_model(self) -> None:
        """Build the model here, not in the constructor, so that a strategy may build it without memory and shard it."""
        if not hasattr(self, "gpt"):
            self.gpt = GPT(**self.hparams)

    def on_fit_start(self) -> None:
        """Compare the model with the data before a step fails on a token number that is out of range.

        Raises:
            ConfigError: if the data has other tokens, or longer sequences, than the model.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        for key in ("vocab_size", "block_size"):
            ours, theirs = self.hparams[key], getattr(datamodule, key, None)
            if theirs is not None and theirs > ours:
                raise ConfigError(
                    f"model.{key}={ours} is too small for data.{key}={theirs}. "
                    f"Set model.{key} to the value of data.{key}."
                )

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, targets, _ = batch
        loss = self.gpt(tokens, targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        tokens, targets, text_bytes = batch
        loss = self.gpt(tokens, targets)
        self.val_bpb.update(loss.double() * targets.numel(), text_bytes)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(tokens))
        self.log("val_bpb", self.val_bpb, batch_size=len(tokens))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer with two parameter groups, and the scheduler.

        Raises:
            ConfigError: if the scheduler needs the number of steps and the Trainer has no limit.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        if getattr(self.optimizer, "func", self.optimizer) is Muon:  # not meant for what touches tokens
            outer = {id(p) for name in OUTER for p in self.gpt.get_submodule(name).parameters()}
            groups[0]["params"] = [p for p in decayed if id(p) not in outer]
            groups.append({"params": [p for p in decayed if id(p) in outer], "use_muon": False})
        optimizer = self.optimizer(groups)
        if self.scheduler is None:
            return optimizer
        arguments = {}
        if "total_steps" in inspect.signature(self.scheduler).parameters:
            total_steps = self.trainer.estimated_stepping_batches
            if math.isinf(total_steps):
                raise ConfigError(
                    "The scheduler needs to know how long the training is, but the Trainer has no limit. "
                    "Set trainer.max_steps or trainer.max_epochs."
                )
            arguments["total_steps"] = int(total_steps)
        scheduler = self.scheduler(optimizer, **arguments)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, vocab_size] of token numbers [B, T]."""
        return self.gpt(tokens)

    def generate(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue ``prompt`` [T]; see the function ``generate``."""
        # Through self and not self.gpt: a strategy that shards the LightningModule hears of its forwards only.
        return generate(self, prompt.to(self.device), max_new_tokens, self.hparams["block_size"], **options)
