"""The LightningModule: optimizer groups, schedule, the metric, checkpoints, and a run on one process."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit_gpt import GPT, BitsPerByte, LitGPT, warmup_cosine
from reporting import FinalReport, Throughput
from text_data import TextDataModule

from lit_zero.core.errors import ConfigError
from lit_zero.optim import Muon

SMALL = {"vocab_size": 256, "block_size": 8, "dim": 16, "layers": 2, "heads": 2}


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{number:07d} " for number in range(200)))
    return TextDataModule(path=book, block_size=8, batch_size=4, val_fraction=0.1, cache_dir=tmp_path / "cache")


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    fixed = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path}
    return pl.Trainer(**{**fixed, **quiet, **options})


def test_bits_per_byte_is_the_hand_computed_one() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5, 6]))
    metric.update(torch.tensor(7.0), torch.tensor(1))
    assert float(metric.compute()) == pytest.approx((1 + 2 + 3 + 4 + 7) / ((5 + 6 + 1) * math.log(2)), rel=1e-12)
    metric.reset()
    metric.update(torch.tensor(math.log(2), dtype=torch.float64), torch.tensor(1))
    assert float(metric.compute()) == 1.0


def test_bits_per_byte_of_a_uniform_guess() -> None:
    """Guessing among 256 bytes costs 8 bits each; among 1,024 tokens of 2 bytes, 10 bits for two."""
    metric = BitsPerByte()
    metric.update(torch.full((3, 5), math.log(256)), torch.tensor([5, 5, 5]))
    assert float(metric.compute()) == pytest.approx(8.0)
    metric.reset()
    metric.update(torch.full((3, 5), math.log(1024)), torch.tensor([10, 10, 10]))
    assert float(metric.compute()) == pytest.approx(5.0)


@pytest.mark.parametrize("vocab_size", [256, 270])
def test_validation_logs_the_mean_loss_and_its_bits_per_byte(
    tmp_path: Path, data: TextDataModule, vocab_size: int
) -> None:
    data.vocab_size = vocab_size
    torch.manual_seed(0)
    model = LitGPT(**{**SMALL, "vocab_size": vocab_size})
    (logged,) = trainer(tmp_path).validate(model, data, verbose=False)
    with torch.no_grad():
        rows = [data.val_set[i] for i in range(len(data.val_set))]
        nats = [float(model.gpt(tokens[None], targets[None])) * 8 for tokens, targets, _ in rows]
    text_bytes = sum(len(data.decode(targets)) for _, targets, _ in rows)
    assert (vocab_size == 256) == (text_bytes == 8 * len(rows))
    assert logged["val_loss"] == pytest.approx(sum(nats) / (8 * len(rows)), rel=1e-5)
    assert logged["val_bpb"] == pytest.approx(sum(nats) / math.log(2) / text_bytes, rel=1e-5)


def test_only_matrices_decay() -> None:
    model = LitGPT(**SMALL, bias=True, optimizer=partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25))
    model.configure_model()
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_is_for_hidden_matrices(tied: bool) -> None:
    model = LitGPT(**SMALL, tied=tied, optimizer=partial(Muon, lr=0.5))
    model.configure_model()
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, Muon)
    hidden, vectors, outer = optimizer.param_groups
    names = {param: name for name, param in model.named_parameters()}
    assert all(".blocks." in names[p] and p.ndim == 2 for p in hidden["params"])
    assert (hidden["use_muon"], vectors["weight_decay"], outer["use_muon"]) == (None, 0.0, False)
    assert {names[p] for p in outer["params"]} == {
        *("gpt.token_embedding.weight", "gpt.position_embedding.weight"),
        *([] if tied else ["gpt.head.weight"]),
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_warmup_and_cosine() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, total_steps=110, warmup_steps=10, final_fraction=0.1)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([2.0 * step / 11 for step in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * 0.55)
    assert rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_scheduler_gets_the_number_of_steps_if_it_asks(tmp_path: Path, data: TextDataModule) -> None:
    asked: list[int] = []

    def asks(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        asked.append(total_steps)
        return warmup_cosine(optimizer, total_steps)

    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(LitGPT(**SMALL, scheduler=asks), data)
    assert asked == [3]
    constant = partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(LitGPT(**SMALL, scheduler=constant), data)


def test_a_schedule_without_an_end_is_refused(tmp_path: Path, data: TextDataModule) -> None:
    endless = trainer(tmp_path, max_epochs=-1, limit_val_batches=0)
    with pytest.raises(ConfigError) as caught:
        endless.fit(LitGPT(**SMALL, scheduler=warmup_cosine), data)
    assert str(caught.value) == (
        "The scheduler needs to know how long the training is, but the Trainer has no limit. "
        "Set trainer.max_steps or trainer.max_epochs."
    )


@pytest.mark.parametrize("key", ["vocab_size", "block_size"])
def test_data_that_do_not_fit_the_model_are_refused(tmp_path: Path, data: TextDataModule, key: str) -> None:
    model = LitGPT(**{**SMALL, key: 4})
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, fast_dev_run=True).fit(model, data)
    value = {"vocab_size": 256, "block_size": 8}[key]
    assert str(caught.value) == (
        f"model.{key}=4 is too small for data.{key}={value}. Set model.{key} to the value of data.{key}."
    )


def test_the_model_is_built_once(tmp_path: Path) -> None:
    model = LitGPT(**SMALL)
    assert not hasattr(model, "gpt")
    model.configure_model()
    first = model.gpt
    model.configure_model()
    assert model.gpt is first
    assert isinstance(first, GPT)


def test_fast_dev_run_with_all_callbacks(tmp_path: Path, data: TextDataModule, capsys: pytest.CaptureFixture) -> None:
    report = FinalReport(prompt="0000", sample_tokens=5)
    model = LitGPT(**SMALL, scheduler=warmup_cosine)
    trainer(tmp_path, fast_dev_run=True, callbacks=[Throughput(), report]).fit(model, data)
    assert {"steps", "train_loss", "val_loss", "val_bpb", "tokens_per_second"} <= report.summary.keys()
    assert report.sample is not None
    assert report.sample.startswith("0000")
    assert "bits per byte" in capsys.readouterr().out


def test_training_learns_and_the_checkpoint_opens_without_trust(tmp_path: Path, data: TextDataModule) -> None:
    torch.manual_seed(0)
    model = LitGPT(**SMALL, optimizer=partial(torch.optim.AdamW, lr=1e-2), scheduler=warmup_cosine)
    run = trainer(tmp_path, max_steps=60, limit_val_batches=4)
    run.fit(model, data)
    assert float(run.callback_metrics["val_loss"]) < 3.0  # nats; it starts at log(256) = 5.5
    file = tmp_path / "model.ckpt"
    run.save_checkpoint(file)
    opened = torch.load(file, weights_only=True)
    assert opened["hyper_parameters"] == {**SMALL, "dropout": 0.0, "tied": True, "bias": False, "loss": "plain"}
    loaded = LitGPT.load_from_checkpoint(file)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
