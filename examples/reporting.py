"""What a training run tells its user: speed while it runs, and at the end a summary and a piece of generated text.

Both callbacks work with every strategy; the lines about sharding appear when the strategy has an engine that can be
asked.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor


@dataclass
class _Mark:
    """Where the optimizer step that is being measured began."""

    seconds: float
    sent_bytes: int
    global_step: int
    tokens: int = 0  # seen by this rank since then


class Throughput(pl.Callback):
    """Shows tokens per second on the progress bar and keeps what every optimizer step took.

    A step is measured from the end of the previous one, so loading data and logging count; validation does not. The
    first element of a batch must hold the tokens [B, T].

    Args:
        warmup_steps: first optimizer steps that are left out of the medians.
        window: optimizer steps whose median the progress bar shows.
    """

    def __init__(self, warmup_steps: int = 5, window: int = 20) -> None:
        self.warmup_steps = warmup_steps
        self.window = window
        self._rates: list[float] = []  # tokens per second, all ranks together, one per optimizer step
        self._sent: list[int] = []  # bytes sent by this rank, one per optimizer step
        self._mark: _Mark | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over all steps, for all ranks together; None before the first step has ended."""
        return statistics.median(self._measured(self._rates)) if self._rates else None

    @property
    def sent_bytes_per_step(self) -> float | None:
        """Median over all steps of the bytes that this rank sends; None if the strategy does not count them."""
        return statistics.median(self._measured(self._sent)) if self._sent else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rates.clear()
        self._sent.clear()
        self._mark = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._mark is None:
            self._mark = self._now(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mark, now = self._mark, self._now(trainer)
        if mark is None:
            return
        mark.tokens += batch[0].numel()
        if now.global_step == mark.global_step:
            return  # a micro-batch of a step that has not ended
        ranks = getattr(trainer.strategy, "data_parallel_size", trainer.world_size)
        self._rates.append(mark.tokens * ranks / (now.seconds - mark.seconds))
        if _engine(trainer) is not None:
            self._sent.append(now.sent_bytes - mark.sent_bytes)
        self._mark = now
        pl_module.log("tokens_per_second", statistics.median(self._rates[-self.window :]), prog_bar=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = None  # begin again at the next batch, so that the validation is in no step

    def _measured(self, steps: list[Any]) -> list[Any]:
        return steps[self.warmup_steps :] or steps

    @staticmethod
    def _now(trainer: pl.Trainer) -> _Mark:
        engine = _engine(trainer)
        sent = 0 if engine is None else engine.exchange.counters.sent_bytes
        sent += getattr(getattr(trainer.strategy, "stages", None), "sent_bytes", 0)  # activations, in a pipeline
        return _Mark(time.perf_counter(), sent, trainer.global_step)


class FinalReport(pl.Callback):
    """Prints a summary and a generated continuation when the training ends, and keeps the numbers in ``summary``.

    The keys of ``summary`` are those of the following that are known: ``train_loss`` and ``val_loss`` (nats per
    token), ``val_bpb`` (bits per byte), ``steps``, ``parameters`` (elements), ``tokens_per_second`` (all ranks
    together), ``state_bytes_per_rank`` and ``ddp_state_bytes`` (parameters, gradients and optimizer state: on this
    rank, in a pipeline on the rank with the largest stage, and on each rank under plain data parallelism in 32 bits),
    ``buffer_bytes_per_rank`` (in which gathered parameters and new gradients take turns), ``sent_bytes_per_step`` (by
    this rank). ``sample`` is the generated text.

    Args:
        prompt: text to continue; empty for no sample.
        sample_tokens: tokens to generate.
        temperature: of the samples.
        top_k: sample among the k most likely tokens only.
        seed: of the samples.
    """

    def __init__(
        self,
        prompt: str = "\ndef",
        sample_tokens: int = 150,
        temperature: float = 0.7,
        top_k: int | None = 40,
        seed: int = 0,
    ) -> None:
        self.prompt = prompt
        self.sample_tokens = sample_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self.summary: dict[str, float] = {}
        self.sample: str | None = None
        self._state_bytes: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        engine = _engine(trainer)
        # In the second step: gradients exist, and the first step has made the optimizer's state.
        if engine is not None and trainer.global_step == 1:
            self._state_bytes = _state_bytes(trainer)

    # At the end of training and not of fit: by then the strategy has been torn down.
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.summary = summarize(trainer)
        if self._state_bytes:
            self.summary |= self._state_bytes
        self.sample = self._sample(trainer, pl_module)

    # At the end of fit and not of training: by then the progress bar is closed.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            print(format_summary(self.summary), flush=True)
            if self.sample is not None:
                print(f"\nA sample of {self.sample_tokens} tokens:\n{self.sample}\n", flush=True)

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        """Generate text on every rank: with sharded parameters, and in a pipeline, all take part in each forward."""
        data: Any = getattr(trainer, "datamodule", None)
        module: Any = pl_module
        plain = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        # Other strategies may only allow the parameters to be used inside the wrapped module's own forward.
        callable_here = plain or _engine(trainer) is not None
        if not self.prompt or not callable_here or not hasattr(data, "encode") or not hasattr(module, "generate"):
            return None
        with trainer.precision_plugin.forward_context():
            tokens: Tensor = module.generate(
                data.encode(self.prompt),
                self.sample_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                seed=self.seed,
            )
        text: str = data.decode(tokens)
        return text


def summarize(trainer: pl.Trainer) -> dict[str, float]:
    """Collect the numbers of a training that is about to end; see ``FinalReport`` for the keys."""
    summary: dict[str, float] = {"steps": trainer.global_step}
    for key in ("train_loss", "val_loss", "val_bpb"):
        if key in trainer.callback_metrics:
            summary[key] = float(trainer.callback_metrics[key])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput):
            if callback.tokens_per_second is not None:
                summary["tokens_per_second"] = callback.tokens_per_second
            if callback.sent_bytes_per_step is not None:
                summary["sent_bytes_per_step"] = callback.sent_bytes_per_step
    engine = _engine(trainer)
    if engine is not None:
        summary["parameters"] = engine.parameter_count
        summary |= _state_bytes(trainer)
        moments = _moments(trainer.optimizers[0]) if trainer.optimizers else 0
        summary["ddp_state_bytes"] = engine.parameter_count * 4 * (2 + moments)
    return summary


def format_summary(summary: dict[str, float]) -> str:
    """Return the numbers that are known, one per line."""
    rows: list[tuple[str, str]] = []

    def row(label: str, key: str, form: str) -> None:
        if key in summary:
            rows.append((label, form.format(summary[key])))

    row("optimizer steps", "steps", "{:,}")
    row("training loss, last step", "train_loss", "{:.3f} nats per token")
    row("validation loss", "val_loss", "{:.3f} nats per token")
    row("validation", "val_bpb", "{:.3f} bits per byte")
    row("speed", "tokens_per_second", "{:,.0f} tokens/s, all ranks together")
    row("parameters", "parameters", "{:,}")
    if "state_bytes_per_rank" in summary:
        ours, ddp = summary["state_bytes_per_rank"], summary["ddp_state_bytes"]
        rows.append(("model state per rank", f"{ours / 1e6:.1f} MB, {ours / ddp:.2f} of the {ddp / 1e6:.1f} MB of DDP"))
        rows.append(("working buffers", f"{summary['buffer_bytes_per_rank'] / 1e6:.1f} MB"))
    if "sent_bytes_per_step" in summary:
        rows.append(("sent per rank and step", f"{summary['sent_bytes_per_step'] / 1e6:.1f} MB"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(["", "Summary", *(f"  {label:<{width}}  {value}" for label, value in rows)])


def _engine(trainer: pl.Trainer) -> Any:
    """The sharding engine of the strategy; None if the strategy has none."""
    return getattr(trainer.strategy, "engine", None)


def _state_bytes(trainer: pl.Trainer) -> dict[str, float]:
    """What the engine keeps on this rank's device now: model states, and the buffers in which parts of them take turns;
    and what has left it. In a pipeline, what it keeps on the rank with the most; all ranks must call this.
    """
    strategy: Any = trainer.strategy
    found = dict(strategy.engine.model_state_bytes())
    elsewhere = [found.pop(key) for key in ("slots", "host", "file")]
    kept: list[int] = [sum(found.values()), *elsewhere]
    if getattr(getattr(strategy, "pipeline", None), "ranks", 1) > 1:
        kept = strategy.reduce(torch.tensor(kept, device=strategy.root_device), reduce_op="max").tolist()
    names = ("state_bytes_per_rank", "buffer_bytes_per_rank", "host_bytes_per_rank", "file_bytes_per_rank")
    return dict(zip(names, kept, strict=True))


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """How many values the optimizer keeps for one element of a parameter: 2 for Adam, 0 before its first step."""
    for parameter, state in optimizer.state.items():
        return sum(1 for value in state.values() if torch.is_tensor(value) and value.shape == parameter.shape)
    return 0
