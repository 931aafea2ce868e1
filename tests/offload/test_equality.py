"""Training with shards that live elsewhere equals training without: bit for bit where the same kernel steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero.offload import Offload
from lit_zero.precision import Lowering, Precision
from tests.offload.harness import RUN, STAGES, disk, plain, trained, with_steps
from tests.zero.harness import GPT, Outcome, Run, distance, momentum, one_process


def variants(folder: Path, stage: str) -> list[Offload]:
    """Return every way to offload in a stage."""
    found = [Offload("cpu"), disk(folder), Offload("cpu", ratio=0.5), disk(folder, ratio=0.4)]
    if stage == "stage3":
        found += [Offload("cpu", params=True), disk(folder, params=True), disk(folder, params=True, ratio=0.5)]
    return found


def all_of(stage: str, folder: Path, run: Run, lowering: Lowering | None = None) -> list[Outcome]:
    return [trained(stage, offload, run, lowering) for offload in (Offload(), *variants(folder, stage))]


def same(outcomes: list[Outcome]) -> None:
    first, *others = outcomes
    for other in others:
        assert other.losses == first.losses
        assert list(other.weights) == list(first.weights)
        for name, value in first.weights.items():
            assert torch.equal(other.weights[name], value), name


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_equals_one_process(stage: str, tmp_path: Path) -> None:
    expected = one_process(RUN)
    for outcome in all_of(stage, tmp_path, RUN):
        assert distance(outcome, expected) < 1e-6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_no_offload_bit_for_bit(ranks: Any, stage: str, tmp_path: Path) -> None:
    for outcomes in ranks(2).run(all_of, stage, tmp_path, RUN):
        same(outcomes)


@pytest.mark.thorough("stage1", "stage2")
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_clipping_and_momentum(ranks: Any, stage: str, tmp_path: Path) -> None:
    run = with_steps(RUN, optimizer=momentum, micro_batches=2, clip=0.5, clip_value=0.01)
    for outcomes in ranks(2).run(all_of, stage, tmp_path, run):
        same(outcomes)
        assert outcomes[0].notes["norms"] == outcomes[1].notes["norms"]


@pytest.mark.parametrize("stage", STAGES)
def test_mixed_precision(ranks: Any, stage: str, tmp_path: Path) -> None:
    lowering = Lowering(Precision(lower="all"), torch.bfloat16)
    for outcomes in ranks(2).run(all_of, stage, tmp_path, with_steps(RUN, loss=autocast_loss), lowering):
        same(outcomes)


def autocast_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss: torch.Tensor = model.loss(tokens)
    return loss


def holding(stage: str, folder: Path, run: Run) -> list[Outcome]:
    """Accumulate in the way that is not the stage's own; and as from a GPU in both."""
    other = "reduce" if stage == "stage1" else "hold"
    found = [trained(stage, None, run, accumulate=other)]
    found += [trained(stage, way, run, accumulate=other) for way in (Offload("cpu"), disk(folder))]
    found += [trained(stage, way, run, accumulate=other, streams=True) for way in (Offload("cpu"), disk(folder))]
    own = [trained(stage, None, run)]
    own += [trained(stage, way, run, streams=True) for way in (Offload("cpu"), disk(folder))]
    same(own)
    return found


@pytest.mark.thorough("stage1", "stage2")
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_that_are_copied_and_held(ranks: Any, stage: str, tmp_path: Path) -> None:
    run = with_steps(RUN, steps=3, micro_batches=3, clip=0.5)
    for outcomes in ranks(2).run(holding, stage, tmp_path, run):
        same(outcomes)


class Partly(GPT):
    """With a frozen block, a part that no loss reaches, and one that only some steps reach."""

    def __init__(self) -> None:
        super().__init__(layers=4)
        self.blocks[1].requires_grad_(False)
        self.idle = torch.nn.Linear(12, 12)
        self.sometimes = torch.nn.Linear(12, 12)
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = super().forward(tokens)
        return x + self.sometimes(self.embedding(tokens)).mean() if self.calls % 2 else x


def trainable(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)


@pytest.mark.thorough("stage1", "stage2")
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_and_unreached_parameters(ranks: Any, stage: str, tmp_path: Path) -> None:
    run = with_steps(RUN, model=Partly, optimizer=trainable, steps=5)
    for outcomes in ranks(2).run(all_of, stage, tmp_path, run):
        same(outcomes)


class Counting(torch.optim.Optimizer):
    """Counts steps in the group, as some optimizers do, and makes its state anew in each."""

    def __init__(self, params: Any, lr: float | torch.Tensor) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["k"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["sum"] = state.get("sum", torch.zeros_like(param)) * 0.9 + param.grad
                    param.sub_(state["sum"] * group["lr"] / group["k"])
        return loss


def counting(model: torch.nn.Module) -> torch.optim.Optimizer:
    return Counting(model.parameters(), torch.tensor(0.1))


def test_an_optimizer_that_counts_in_its_groups(ranks: Any, tmp_path: Path) -> None:
    for outcomes in ranks(2).run(all_of, "stage2", tmp_path, with_steps(RUN, optimizer=counting, model=big)):
        same(outcomes)


def test_a_plain_adamw_steps_with_the_fused_kernel(tmp_path: Path) -> None:
    run = with_steps(RUN, optimizer=plain)
    expected = one_process(run)
    for offload in (Offload("cpu"), disk(tmp_path)):
        assert distance(trained("stage2", offload, run), expected) < 1e-6


def test_portions_do_not_matter(tmp_path: Path) -> None:
    """The smallest portion is a thousand elements, so every lane takes several."""
    run = with_steps(RUN, model=big)
    one, several = (trained("stage3", disk(tmp_path, params=True, chunk=chunk), run) for chunk in (1 << 26, 1 << 16))
    same([one, several])


def big() -> GPT:
    return GPT(dim=48, layers=2)
