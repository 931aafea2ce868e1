"""Show what each form of the optimizer's state costs in one run: bytes per parameter, loss on real text, step time.

    python examples/benchmark_state.py                             # 2.5 million parameters, 3 seeds: some 20 minutes
    python examples/benchmark_state.py --steps 100 --seeds 1 --only float32 split+int8
    python examples/benchmark_state.py --accelerator gpu --dim 768 --layers 12 --heads 12 --batch 16

A GPT is trained on the source of Python's standard library with ``bf16-mixed``, on one process, once for each form and
seed; a seed sets the first weights and the order of the text, so that forms are compared seed by seed. *Loss* is that
of the held-out text after the last step, its mean and standard deviation over the seeds; *to float32* is the mean of
the differences to fp32 state with the same seed, and their standard deviation. *Bytes* are counted from storages,
between the backward and the step; forms are for parameters in 2 bytes, here all of them
(``precision.lower=all``). With ``--lower matmul``, the default outside of this program, norms and embeddings stay in
fp32 with their masters and gradients, and the mean is higher. *Step* is the median time of a training step, and its
ratio to that with fp32 state.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lit_gpt import LitGPT, warmup_cosine
from text_data import TextDataModule

from lit_zero import Precision, ZeroStrategy

COMPUTE = {"gradient_dtype": "compute"}
FORMS: dict[str, dict[str, str]] = {
    "float32": {},
    "float32, 2-byte gradients": COMPUTE,
    "split": {"master": "split"},
    "split+bfloat16": {"master": "split", "moments": "bfloat16", **COMPUTE},
    "split+int8": {"master": "split", "moments": "int8", **COMPUTE},
    "split+int8, step in the backward": {"master": "split", "moments": "int8", "step": "backward", **COMPUTE},
}
HEADER = ("state", "bytes/parameter", "loss", "to float32", "step ms", "of float32")


@dataclass
class Found:
    """What a form has shown.

    Attributes:
        bytes: of model states, for each parameter.
        losses: on the held-out text, one for each seed.
        seconds: of each training step but the first ones.
    """

    bytes: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Clock(pl.Callback):
    """Times training steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def train(form: dict[str, str], seed: int, given: argparse.Namespace, found: Found) -> None:
    """Train once, and add to what has been found.

    Args:
        form: settings of ``Precision``.
        seed: of the weights and the order of the text.
        given: the command line.
        found: receives bytes, the loss and seconds.
    """
    pl.seed_everything(seed)
    clock = Clock()
    model = LitGPT(
        vocab_size=given.vocab,
        block_size=given.length,
        dim=given.dim,
        layers=given.layers,
        heads=given.heads,
        optimizer=partial(torch.optim.AdamW, lr=given.lr, betas=(0.9, given.beta2), weight_decay=0.1),
        scheduler=warmup_cosine,
    )
    trainer = pl.Trainer(
        accelerator=given.accelerator,
        devices=1,
        precision="bf16-mixed",
        strategy=ZeroStrategy("none", precision=Precision(lower=given.lower, **form)),
        max_steps=given.steps,
        val_check_interval=given.steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=given.val_batches,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    text = TextDataModule(given.path, given.vocab, given.length, given.batch, cache_dir=given.cache_dir)
    trainer.fit(model, text)
    engine = trainer.strategy.engine  # type: ignore[attr-defined]
    sizes = engine.model_state_bytes()
    kinds = ("parameter", "master", "gradient", "optimizer")
    found.bytes = sum(sizes[kind] for kind in kinds) / engine.parameter_count
    found.losses.append(float(trainer.callback_metrics["val_loss"]))
    found.seconds += clock.seconds[min(5, len(clock.seconds) - 1) :]


def spread(values: list[float], form: str) -> str:
    """Return mean and standard deviation of some values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:.4f}"


def table(found: dict[str, Found]) -> str:
    """Return a table in Markdown; differences and ratios are to the first row."""
    first = next(iter(found.values()))
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for name, each in found.items():
        step, of = statistics.median(each.seconds), statistics.median(first.seconds)
        apart = [one - other for one, other in zip(each.losses, first.losses, strict=True)]
        cells = (
            name,
            f"{each.bytes:.2f}",
            spread(each.losses, ".4f"),
            spread(apart, "+.4f") if each is not first else "",
            f"{1e3 * step:.1f}",
            f"{step / of:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line says and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FORMS), default=list(FORMS), help="the first is compared to")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each form")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument(
        "--lower", choices=("all", "matmul"), default="all", help="precision.lower; lit_zero's own default is matmul"
    )
    parser.add_argument("--dim", type=int, default=192, help="width of the residual stream")
    parser.add_argument("--layers", type=int, default=5, help="blocks")
    parser.add_argument("--heads", type=int, default=6, help="attention heads")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--vocab", type=int, default=512, help="different tokens")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--beta2", type=float, default=0.95, help="of AdamW: how slowly second moments move")
    parser.add_argument("--val-batches", type=int, default=40, help="of the held-out text")
    parser.add_argument("--path", default=None, help="a text file or folder instead of the standard library")
    parser.add_argument("--cache-dir", default=None, help="folder of the tokenised text")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch, on a CPU")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    found = {name: Found() for name in given.only}
    for seed in range(given.seeds):  # forms take turns, so that a slow minute of the machine concerns all
        for name in given.only:
            train(FORMS[name], seed, given, found[name])
            print(f"seed {seed}: {name} {found[name].losses[-1]:.4f}", file=sys.stderr, flush=True)
    print(table(found), flush=True)


if __name__ == "__main__":
    main()
