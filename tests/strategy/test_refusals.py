"""What the strategy refuses, in which words, and that nothing is lost by it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import Precision as LightningPrecision
from torch import nn

from lit_zero import ZeroStrategy
from lit_zero.core.errors import ConfigError, LitZeroError, UnsupportedError
from tests.pool import RankFailure, RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, loaders, make_trainer, same_bits, train
from tests.strategy.test_model_checkpoint import refused

Ranks = Callable[[int], RankPool]
FIT = Fit({"zero": "stage2"}, 2, epochs=1)

# ---- the module's own state_dict


def use_state_dict(fit: Fit, folder: Path) -> list[str]:
    """Return what state_dict and load_state_dict say after a fit; each rank on its own."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    whole = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
    said = []
    if trainer.is_global_zero:
        for use in (module.state_dict, lambda: module.load_state_dict(whole), module.model.blocks[0].state_dict):
            try:
                use()
                said.append("")
            except LitZeroError as error:
                said.append(str(error))
        if said == ["", "", ""]:
            assert same_bits(dict(module.state_dict()), whole)
        assert module.accuracy.state_dict() == {}, "without parameters there is nothing to guard"
    trainer.strategy.barrier()
    return said


@pytest.mark.parametrize(
    ("stage", "precision", "guarded"),
    [
        ("none", "32-true", False),
        ("stage2", "32-true", False),
        ("stage3", "32-true", True),
        ("none", "bf16-mixed", True),
        ("stage1", "bf16-mixed", True),
        ("stage1", "bf16-true", False),
    ],
)
def test_a_modules_own_state_dict(ranks, tmp_path, stage, precision, guarded):
    fit = replace(FIT, zero={"zero": stage}, trainer={"precision": precision})
    said = ranks(2).run(use_state_dict, fit, tmp_path)[0]
    assert said == [
        guarded
        * (
            f"{name}.state_dict() and load_state_dict() would see released or 2-byte parameters under this strategy. "
            "Save with trainer.save_checkpoint(path), get the weights with "
            "trainer.strategy.full_state_dict() on all ranks, and load weights before setup (in __init__ or "
            "configure_model) or through ckpt_path."
        )
        for name in ("LitGPT", "LitGPT", "Block")
    ]


class SavesByItself(LitGPT):
    """Rank 0 looks at its weights in the middle of training, as one may with DDP."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.is_global_zero:
            self.own = {name: value.clone() for name, value in self.state_dict().items()}
        self.whole = self.trainer.strategy.lightning_module_state_dict()


def looks_right(trainer: pl.Trainer) -> bool:
    module = trainer.lightning_module
    return not trainer.is_global_zero or same_bits(module.own, module.whole)


def test_a_rank_that_saves_alone(ranks, tmp_path):
    for stage in ("stage1", "stage2"):
        fit = replace(FIT, zero={"zero": stage}, module=SavesByItself, look=looks_right)
        assert [each.notes for each in ranks(2).run(train, fit, tmp_path / stage, timeout=30)] == [True, True]
    with pytest.raises(RankFailure, match="SavesByItself.state_dict.. and load_state_dict.. would see") as caught:
        ranks(2).run(train, replace(FIT, zero={"zero": "stage3"}, module=SavesByItself), tmp_path, timeout=30)
    assert caught.value.rank == 0


# ---- what is not supported


class Several(LitGPT):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.model.blocks, self.model.norm)]


class Without(LitGPT):
    def configure_optimizers(self) -> Any:
        return None


class Foreign(LitGPT):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(3))], 0.1)


class Matrices(LitGPT):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("module", "kind", "words"),
    [
        (Several, RuntimeError, "Training with multiple optimizers is only supported with manual optimization."),
        (
            Without,
            UnsupportedError,
            "configure_optimizers returned no optimizer; ZeroStrategy trains with exactly one. Return one, or use "
            "trainer.validate, test or predict, which need none.",
        ),
        (Foreign, LitZeroError, "SGD holds a parameter of shape (3,) that is not a parameter of the module."),
        (Matrices, UnsupportedError, "Adafactor is not element-wise: a step on a matrix differs"),
    ],
)
def test_modules(ranks, tmp_path, module, kind, words):
    for found in ranks(2).run(refused, replace(FIT, module=module), tmp_path, kind):
        assert found.startswith(words)


class OwnPrecision(LightningPrecision):
    """Replaces layers, as plugins for quantised training do."""

    precision = "own"


def test_precision_plugins(ranks, tmp_path):
    for found in ranks(2).run(refused, replace(FIT, trainer={"plugins": [OwnPrecision()]}), tmp_path, UnsupportedError):
        assert found == (
            "The precision plugin OwnPrecision does not work with ZeroStrategy. Use Trainer(precision=...) with one of "
            "'32-true', '64-true', 'bf16-mixed', '16-mixed', 'bf16-true', '16-true'."
        )


# ---- settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"zero": "stage4"}, "zero.stage='stage4' is not known. Did you mean 'stage3'?"),
        ({"zero": 3}, "zero=3 is not valid: expected a Zero, got a int."),
        ({"checkpoint": "shard"}, "checkpoint.format='shard' is not known. Did you mean 'sharded'?"),
        ({"precision": "bf16-mixed"}, "precision='bf16-mixed' is not valid: expected a Precision, got a str."),
        ({"nonfinite_loss": "skip"}, "nonfinite_loss='skip' is not known."),
        ({"timeout": -1}, "timeout=-1 is not valid: expected seconds, more than 0, or a timedelta."),
        ({"timeout": "soon"}, "timeout='soon' is not valid: expected seconds, more than 0, or a timedelta."),
        ({"process_group_backend": "mpi"}, "process_group_backend='mpi' is not known."),
    ],
)
def test_settings(arguments, words):
    with pytest.raises(ConfigError) as caught:
        ZeroStrategy(**arguments)
    assert words in str(caught.value)


def test_a_timedelta_is_a_timeout():
    assert ZeroStrategy(timeout=timedelta(minutes=1)).zero.stage == "stage2"


def test_nothing_runs_before_setup():
    strategy = ZeroStrategy()
    for use in (lambda: strategy.engine, lambda: strategy.root_device, lambda: strategy.checkpoints):
        with pytest.raises(LitZeroError):
            use()


def test_more_processes_than_the_machine_can_run(tmp_path):
    with pytest.raises(ConfigError) as caught:
        make_trainer(replace(FIT, devices=4096), tmp_path)
    assert "devices=4096 is more than this machine can run: expected at most" in str(caught.value)


# ---- another number of processes than the script has


def refuse_another_size(fit: Fit, folder: Path) -> str:
    """As in a script whose first Trainer has started the ranks that are here; torchrun would have said so itself."""
    del os.environ["TORCHELASTIC_RUN_ID"]
    return refused(fit, folder, ConfigError)


ADVICE = (
    "Give every Trainer of a script the same devices and num_nodes, or train with another number in a script of its "
    "own."
)


def test_more_devices_than_an_earlier_trainer(ranks, tmp_path):
    assert ranks(1).run(refuse_another_size, FIT, tmp_path) == [
        "The Trainer asks for 2 processes (devices times num_nodes), but this one belongs to a group of 1: an earlier "
        f"Trainer of this script has started 1. {ADVICE}"
    ]


def test_fewer_devices_than_an_earlier_trainer(ranks, tmp_path):
    assert ranks(2).run(refuse_another_size, replace(FIT, devices=1), tmp_path) == [
        "The Trainer asks for 1 processes (devices times num_nodes), but this one belongs to a group of 2: an earlier "
        f"Trainer of this script has started 2. {ADVICE}",
        "The Trainer asks for devices=1, but this process is rank 1 of its machine: an earlier Trainer of this script "
        f"has started more. {ADVICE}",
    ]


@pytest.mark.parametrize(
    ("device", "backend", "words"),
    [
        ("mps", None, "The Trainer has chosen the accelerator 'mps', between whose devices torch exchanges nothing;"),
        ("cuda", "gloo", "process_group_backend='gloo' does not serve the device 'cuda': expected one of 'nccl', "),
        ("cpu", "nccl", "process_group_backend='nccl' does not serve the device 'cpu': expected one of 'gloo', "),
    ],
)
def test_devices_that_cannot_exchange(device, backend, words):
    strategy = ZeroStrategy(process_group_backend=backend, cluster_environment=LightningEnvironment())
    strategy.parallel_devices = [torch.device(device)]
    with pytest.raises(ConfigError) as caught:
        strategy._configure_launcher()
    assert str(caught.value).startswith(words)


# ---- addresses


def use_addresses(fit: Fit, folder: Path) -> list[str]:
    """Give an address wherever a checkpoint's path is given; return what is said."""
    keep = ModelCheckpoint("memory://bucket/kept")
    said = [
        refused(replace(fit, trainer={"callbacks": [keep], "enable_checkpointing": True}), folder, UnsupportedError)
    ]
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    for use in (
        lambda: trainer.save_checkpoint("memory://bucket/saved.ckpt"),
        lambda: trainer.save_checkpoint(Path("s3://bucket/saved.ckpt")),
        lambda: trainer.fit(module, *loaders(fit), ckpt_path="memory://bucket/saved.ckpt"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            use()
        said.append(str(caught.value))
    return said


def test_addresses(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for found in ranks(2).run(use_addresses, FIT, tmp_path):
        for words, key in zip(
            found,
            (
                "ModelCheckpoint.dirpath (by default below Trainer.default_root_dir)=memory://bucket/kept",
                "filepath=memory://bucket/saved.ckpt",
                "filepath=s3:/bucket/saved.ckpt",
                "ckpt_path=memory://bucket/saved.ckpt",
            ),
            strict=True,
        ):
            assert words == (
                f"{key} is an address, but lit_zero reads and writes checkpoints on local or mounted file systems "
                "only. Give a path of one, and copy checkpoints to and from the store yourself."
            )
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]


# ---- saving what does not belong together


def save_another(fit: Fit, folder: Path) -> str:
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    trainer.validate(fit.module(**fit.arguments), loaders(fit)[1], verbose=False)
    with pytest.raises(LitZeroError) as caught:
        trainer.save_checkpoint(folder / "saved.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return str(caught.value)


def test_saving_after_another_module_was_validated(ranks, tmp_path):
    for found in ranks(2).run(save_another, FIT, tmp_path):
        assert found == (
            "The Trainer still holds the SGD of an earlier fit, but has run another module since, whose weights it "
            "would be saved with. Save right after fit, or with weights_only=True."
        )
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["weights.ckpt"]


# ---- a loss that is no number


class Diverges(LitGPT):
    """Its loss is no number from some batch on, and it keeps the weights from before.

    Args:
        value: the loss.
        batch: number of the batch.
    """

    def __init__(self, value: float, batch: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.value, self.batch = value, batch
        self.before: dict[str, torch.Tensor] = {}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if batch_idx >= self.batch else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch - self.batch % self.trainer.accumulate_grad_batches:
            self.before = self.trainer.strategy.lightning_module_state_dict()


def diverge(fit: Fit, folder: Path) -> tuple[str, bool, bool]:
    """Train until the loss is no number, look at the weights, and train on with another loss."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    with pytest.raises(LitZeroError) as caught:
        trainer.fit(module, *loaders(fit))
    after = trainer.strategy.lightning_module_state_dict()
    same = bool(after or not trainer.is_global_zero) and same_bits(after, module.before)
    trainer.save_checkpoint(folder / "saved.ckpt")
    module.value = 1.0
    again = make_trainer(replace(fit, trainer={}), folder)
    again.fit(module, *loaders(fit), ckpt_path=folder / "saved.ckpt")
    return str(caught.value), same, again.global_step > trainer.global_step


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("value", "trainer"), [(float("nan"), {}), (float("inf"), {"accumulate_grad_batches": 2})])
def test_a_loss_that_is_no_number_reaches_no_weight(ranks, tmp_path, stage, value, trainer):
    batch = 3 if trainer else 2  # the second micro-batch of a step: the first one's gradients are waiting
    fit = replace(
        FIT, zero={"zero": stage}, module=Diverges, arguments={"value": value, "batch": batch}, trainer=trainer
    )
    for rank, (words, same, trained_on) in enumerate(ranks(2).run(diverge, fit, tmp_path)):
        assert words == (
            f"The loss is {value} on rank {rank} at step {1 if trainer else 2}. No weight has been changed by it: the "
            "last checkpoint and the weights are those of the step before. Set nonfinite_loss='ignore' in ZeroStrategy "
            "to train on."
        )
        assert same
        assert trained_on


def test_training_on_without_a_number(ranks, tmp_path):
    zero = {"zero": "stage2", "nonfinite_loss": "ignore"}
    mine = ranks(2).run(train, replace(FIT, zero=zero, module=Diverges, arguments={"value": float("nan")}), tmp_path)[0]
    assert mine.steps == 5
    assert mine.weights["model.norm.weight"].isnan().all(), "as in plain Lightning"


# ---- a rank that does not come


class Late(LitGPT):
    """Rank 1 is late for the exchange of gradients, and nothing but that exchange waits for it."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.global_rank == 1 and batch_idx == 2:
            time.sleep(6.0)
        return self.model.loss(batch[0])


def wait_for_a_rank(fit: Fit, folder: Path) -> tuple[bool, float]:
    torch.manual_seed(0)
    module, trainer, began = fit.module(**fit.arguments), make_trainer(fit, folder), time.monotonic()
    try:
        trainer.fit(module, loaders(fit)[0])
    except Exception:
        return True, time.monotonic() - began
    return False, time.monotonic() - began


def test_timeout(ranks, tmp_path):
    fit = replace(FIT, zero={"zero": "stage2", "timeout": 2.0}, module=Late)
    (failed, waited), _ = ranks(2).run(wait_for_a_rank, fit, tmp_path)
    assert failed and 2.0 <= waited < 5.5
