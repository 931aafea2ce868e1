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
