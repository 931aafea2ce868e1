"""Every precision mode does what its name says in Lightning on one device, in every stage.

On a CPU Lightning computes ``16-mixed`` in bf16 (with a warning), so here its plugin for fp16 is given by hand; matrix
products of fp16 on a GPU are not covered here. Field complaint 5: ``16-mixed`` is really full fp16 (Lightning 18016).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_zero import Zero
from lit_zero.cli import main
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, distance, same_bits, train, train_all
from tests.strategy.test_precision import ADAMW, SGD, Overflowing, close, half, save, scales

Ranks = Callable[[int], RankPool]

# A number of fp16 has 11 significant bits.
FP16 = 2.0**-12


@pytest.mark.thorough("64-true", "16-true")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("mode", "optimizer", "weights", "logged"),
    [
        ("64-true", ADAMW, 1e-14, 1e-14),
        ("32-true", ADAMW, 1e-6, 1e-6),
        # Not AdamW: squares of gradients are lost in fp16, and a small difference becomes a large one.
        ("16-true", SGD, 3 * FP16, 10 * FP16),
    ],
    ids=["64-true", "32-true", "16-true"],
)
def test_true_modes_follow_one_device(ranks, tmp_path, size, mode, optimizer, weights, logged):
    trainer = {"precision": mode, "gradient_clip_val": 0.2, "accumulate_grad_batches": 2}
    alone = train(Fit(trainer=trainer, arguments=optimizer), tmp_path / "alone")
    other = train(Fit(trainer={**trainer, "precision": "bf16-true"}, arguments=optimizer), tmp_path / "other")
    assert distance(alone.weights, other.weights) > 2 * weights, "the mode must matter for the test to mean anything"
    fits = [Fit({"zero": stage}, size, trainer, arguments=optimizer) for stage in STAGES]
    together = ranks(size).run(train_all, fits, tmp_path, timeout=120)[0]
    for each in together:
        close(each, alone, weights=weights, logged=logged)
        dtype = {"64-true": torch.float64, "32-true": torch.float32, "16-true": torch.float16}[mode]
        assert {value.dtype for name, value in each.weights.items() if "model." in name} == {dtype}


def test_16_true_with_adamw_on_one_rank_is_bit_equal(ranks, tmp_path):
    trainer = {"precision": "16-true", "accumulate_grad_batches": 2}
    alone = train(Fit(trainer=trainer, arguments=ADAMW), tmp_path / "alone")
    mine = ranks(1).run(train, Fit({"zero": "stage3"}, 1, trainer, arguments=ADAMW), tmp_path / "mine")[0]
    assert same_bits(mine.weights, alone.weights)
    assert mine.rows == alone.rows


class Watched(LitGPT):
    """Notes the dtypes that its modules compute in."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.computed: dict[str, set[torch.dtype]] = {"linear": set(), "norm": set()}
        for module in self.model.modules():
            kind = {nn.Linear: "linear", nn.LayerNorm: "norm"}.get(type(module))
            if kind is not None:
                module.register_forward_hook(lambda _module, _inputs, out, kind=kind: self.note(kind, out))

    def note(self, kind: str, output: torch.Tensor) -> None:
        self.computed[kind].add(output.dtype)


def dtypes(trainer: pl.Trainer) -> dict[str, set[torch.dtype]]:
    """Return the dtypes in which what is kept, and what is computed, exists."""
    engine = trainer.strategy.engine
    states = [tensor for binding in engine.bindings for tensor in binding.state_tensors()]
    return {
        "master": {lane.master.dtype for lane in engine.lanes},
        "state": {tensor.dtype for tensor in states if tensor.numel() > 1},
        **trainer.lightning_module.computed,
    }


def test_16_mixed_keeps_masters_and_optimizer_states_in_fp32(ranks, tmp_path):
    """Field complaint 5."""
    fits = [Fit({"zero": s}, 2, half(), module=Watched, arguments=ADAMW, epochs=1, look=dtypes) for s in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        fp32, fp16 = {torch.float32}, {torch.float16}
        assert each.notes == {"master": fp32, "state": fp32, "linear": fp16, "norm": fp32}
        assert {value.dtype for value in each.weights.values()} == fp32


class Exact(pl.LightningModule):
    """Its gradients are small multiples of powers of two, and do not depend on its weights.

    So no number is rounded in fp16, and what ranks compute apart adds up to the bits of one process. In some batches
    the loss of the last rank is so large that its gradients overflow.

    Args:
        overflows: numbers of these batches, counted over epochs.
    """

    def __init__(self, overflows: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        for block in self.blocks:
            nn.init.constant_(block.weight, 0.25)
        self.overflows, self.batches = overflows, 0
        self.scales: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens = batch[0]
        inputs, targets = (tokens[:, :8] % 3 - 1).float(), (tokens[:, 1:] % 2 * 2 - 1).float()
        loss = torch.stack([(block(inputs) * targets).mean() for block in self.blocks]).sum()
        if self.batches in self.overflows and self.global_rank == self.trainer.world_size - 1:
            loss = loss * 2.0**20
        self.batches += 1
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125, momentum=0.5)


@pytest.mark.parametrize(
    ("trainer", "size"), [({"accumulate_grad_batches": 2}, 2), ({}, 4)], ids=["2x-on-2", "1x-on-4"]
)
def test_forced_overflows_on_one_rank_equal_one_process_bit_for_bit(ranks, tmp_path, size, trainer):
    fit: dict[str, Any] = {"module": Exact, "arguments": {"overflows": (0, 3, 6)}, "look": scales}
    alone = train(Fit(trainer=half(**trainer), **fit), tmp_path / "alone")
    never = train(Fit(trainer=half(**trainer), module=Exact, look=scales), tmp_path / "never")
    assert min(alone.notes) < 2.0**10 <= max(never.notes)
    assert distance(alone.weights, never.weights) > 0.01, "overflows must matter for the test to mean anything"
    fits = [Fit({"zero": Zero(stage, units=["Linear"])}, size, half(**trainer), **fit) for stage in STAGES]
    together = ranks(size).run(train_all, fits, tmp_path, timeout=120)
    for outcomes in together:
        assert [each.notes for each in outcomes] == [alone.notes] * len(STAGES), "all ranks agree on every loss scale"
    for each in together[0]:
        assert same_bits(each.weights, alone.weights)


class Fused(Overflowing):
    """With an optimizer that divides by the loss scale itself, and skips the step itself."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3, fused=True)


def test_an_optimizer_that_skips_the_step_itself(ranks, tmp_path):
    fit: dict[str, Any] = {"module": Fused, "arguments": {"overflows": (0, 3)}, "look": scales, "epochs": 1}
    alone = train(Fit(trainer=half(), **fit), tmp_path / "alone")
    for outcomes in ranks(2).run(train_all, [Fit({"zero": s}, 2, half(), **fit) for s in STAGES], tmp_path):
        for each in outcomes:
            assert each.notes == alone.notes
            if each.weights:
                close(each, alone, weights=1e-3, logged=2e-3)


class Scheduled(Overflowing):
    """With several schedulers of one optimizer."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        every_step = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        other_step = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        every_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        steps = [{"scheduler": each, "interval": "step"} for each in (every_step, other_step)]
        return [optimizer], [*steps, {"scheduler": every_epoch, "interval": "epoch"}]


def advances(trainer: pl.Trainer) -> list[int]:
    return [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]


def test_several_schedulers_stand_still_with_a_skipped_step(ranks, tmp_path):
    arguments = {"overflows": (1, 4, 7), **SGD}
    fit: dict[str, Any] = {"module": Scheduled, "arguments": arguments, "look": advances}
    for outcomes in ranks(2).run(train_all, [Fit({"zero": s}, 2, half(), **fit) for s in STAGES], tmp_path):
        # 10 batches in 2 epochs, one of which ends with a skipped step
        assert [each.notes for each in outcomes] == [[7, 7, 2]] * len(STAGES)


def test_the_loss_scale_of_a_consolidated_checkpoint_is_found_by_plain_lightning(ranks, tmp_path):
    arguments = {"overflows": (1,), **ADAMW}
    fit: dict[str, Any] = {"module": Overflowing, "arguments": arguments, "look": scales}
    whole = ranks(2).run(train, Fit({"zero": "stage2"}, 2, half(), **fit), tmp_path / "whole")[0]
    first = Fit({"zero": "stage3", "checkpoint": "sharded"}, 2, half(), **{**fit, "epochs": 1, "look": save})
    ranks(2).run(train, first, tmp_path)
    assert main(["consolidate", str(tmp_path / "half.ckpt"), str(tmp_path / "plain.ckpt")]) in (0, None)
    restarted = {**fit, "arguments": ADAMW, "resume": tmp_path / "plain.ckpt"}
    plain = train(Fit(trainer=half(scale=2.0), **restarted), Path(tmp_path / "plain"))
    assert plain.notes == whole.notes[5:]
    assert distance(plain.weights, whole.weights) < 1e-3
