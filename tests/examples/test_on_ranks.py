"""The example on two ranks: what every rank must agree on, under DDP and under a strategy that shards everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit_gpt import BitsPerByte, LitGPT
from reporting import FinalReport, Throughput
from text_data import TextDataModule

from lit_zero import Pipeline, ZeroStrategy
from tests.pool import RankPool


def bits_per_byte() -> float:
    """Ranks with different amounts of text."""
    rank = torch.distributed.get_rank()
    metric = BitsPerByte()
    metric.update(torch.tensor([10.0, 20.0][rank], dtype=torch.float64), torch.tensor([4, 1][rank]))
    return float(metric.compute())


# The first two divide the data alike: DDP repeats samples so that ranks have equally many.
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "zero3": lambda: ZeroStrategy("stage3", evaluation="lightning"),
    "zero3 once": lambda: ZeroStrategy("stage3"),
    "pipeline": lambda: ZeroStrategy(pipeline=Pipeline("1f1b", stages=2, micro_batches=4)),
}


def train(strategy: str, folder: Path) -> tuple[dict[str, float], str | None, float]:
    pl.seed_everything(3)
    rows = 8 if strategy == "pipeline" else 4  # its two ranks read the same batch
    data = TextDataModule(
        folder / "book.txt", vocab_size=300, block_size=8, batch_size=rows, val_fraction=0.1, cache_dir=folder / "cache"
    )
    model = LitGPT(
        vocab_size=300, block_size=8, dim=16, layers=2, heads=2, optimizer=partial(torch.optim.AdamW, lr=1e-2)
    )
    report = FinalReport(prompt="00", sample_tokens=10)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](),
        max_steps=8,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        callbacks=[Throughput(), report],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=data)
    return report.summary, report.sample, float(trainer.callback_metrics["val_bpb"])


def test_bits_per_byte_adds_up_before_it_divides(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(bits_per_byte) == [pytest.approx(30 / 5 / 0.6931471805599453)] * 2


def test_ranks_agree_and_sharding_changes_nothing(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"{number:07d} " for number in range(300)))
    found: dict[str, Any] = {name: ranks(2).run(train, name, tmp_path, timeout=120) for name in STRATEGIES}
    for (first, sample, bits), (second, other_sample, other_bits) in found.values():
        assert first["val_loss"] == second["val_loss"]
        assert bits == other_bits
        assert sample is not None
        assert sample == other_sample
    (piped, piped_sample, _), (ddp, sample, _) = found["pipeline"][0], found["ddp"][0]
    (once, _, _) = found["zero3 once"][0]
    assert piped["val_loss"] == pytest.approx(once["val_loss"], rel=1e-5)
    assert piped["val_bpb"] == pytest.approx(once["val_bpb"], rel=1e-5)
    assert piped_sample == sample
    # The first stage: tokens (tied, so on both), positions, and one of the two blocks; fp32 and Adam.
    block = (piped["parameters"] - 300 * 16 - 8 * 16 - 16) / 2
    assert piped["state_bytes_per_rank"] == 16 * (300 * 16 + 8 * 16 + block)
    assert piped["parameters"] == found["zero3"][0][0]["parameters"]
    # Four micro-batches of 2 x 8 x 16 activations, and the reduction of the tied weight.
    assert 4 * 2 * 8 * 16 * 4 <= piped["sent_bytes_per_step"] <= 4 * 2 * 8 * 16 * 4 + 2 * 300 * 16 * 4
    (ddp, sample, _), (zero, zero_sample, _) = found["ddp"][0], found["zero3"][0]
    assert zero["val_loss"] == pytest.approx(ddp["val_loss"], rel=1e-5)
    assert zero["val_bpb"] == pytest.approx(ddp["val_bpb"], rel=1e-5)
    assert zero_sample == sample
    assert "state_bytes_per_rank" not in ddp
    assert zero["ddp_state_bytes"] == 16 * zero["parameters"]
    assert zero["state_bytes_per_rank"] < 0.6 * zero["ddp_state_bytes"]
    # A rank sends half of the parameters, in 4 bytes each: once or (what has left its slot) twice as parameters, and
    # once as gradients.
    half = zero["parameters"] / 2 * 4
    assert 1.99 * half <= zero["sent_bytes_per_step"] <= 3.1 * half
