"""Shards that live elsewhere and blocks that are computed again, at the same time: the training is that of neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lit_zero import Activation, Offload, Pipeline
from tests.activation.harness import DropGPT, LitDropGPT
from tests.fabric import harness as fabric
from tests.strategy.harness import Fit, Outcome, Short, distance, same_bits, train_all

pytestmark = pytest.mark.thorough

WAYS = [("stage3", "disk", "full"), ("stage2", "cpu", "selective")]
PIPELINE = Pipeline("1f1b", stages=2, micro_batches=4)


def away(where: str, stage: str, folder: Path) -> Offload:
    more: dict[str, Any] = {"folder": folder, "chunk": 1 << 16} if where == "disk" else {}
    return Offload(where, params=stage == "stage3", **more)


def fits(
    stage: str, offload: Offload, word: str | Activation, devices: int = 2, optimizer: str = "sgd", **more: Any
) -> list[Fit]:
    """Return fits with neither, with each alone, and with both."""
    arguments = {"layers": 4, "optimizer": optimizer, "lr": 0.1 if optimizer == "sgd" else 1e-2}
    chosen = [(place, each) for place in (Offload(), offload) for each in ("none", word)]
    return [
        Short(
            {"zero": stage, "offload": place, "activation": activation, **more},
            devices,
            {"gradient_clip_val": 0.3},
            LitDropGPT,
            arguments,
            rows=32,
            epochs=1,
            look=at_work,
        )
        for place, activation in chosen
    ]


def at_work(trainer: pl.Trainer) -> tuple[int, int]:
    """Return how often blocks have run forward with gradients on this rank, and the bytes that lie elsewhere."""
    found = trainer.strategy.engine.model_state_bytes()  # type: ignore[attr-defined]
    calls = sum(block.calls for block in trainer.lightning_module.model.blocks)
    return calls, found["host"] + found["file"]


def same(one: Outcome, other: Outcome) -> None:
    assert one.rows and one.rows == other.rows
    assert same_bits(one.weights, other.weights)


def both_at_work(found: list[list[Outcome]]) -> None:
    for rank in found:
        (calls, here), (more, _), (_, elsewhere), (as_many, as_far) = (outcome.notes for outcome in rank)
        assert here == 0 < elsewhere == as_far
        assert calls < more == as_many


@pytest.mark.parametrize(("stage", "where", "word"), WAYS)
def test_both_equal_neither(ranks: Any, stage: str, where: str, word: str, tmp_path: Path) -> None:
    found = ranks(2).run(train_all, fits(stage, away(where, stage, tmp_path / "states"), word), tmp_path)
    both_at_work(found)
    neither, *others = found[0]
    for other in others:
        same(other, neither)


@pytest.mark.parametrize(("stage", "where", "word"), WAYS[:1])
def test_in_a_pipeline_of_shards(ranks: Any, stage: str, where: str, word: str, tmp_path: Path) -> None:
    """Two stages on two data-parallel ranks each."""
    chosen = fits(stage, away(where, stage, tmp_path / "states"), word, 4, pipeline=PIPELINE)
    found = ranks(4).run(train_all, chosen, tmp_path, timeout=180)
    both_at_work(found)
    neither, *others = found[0]
    for other in others:
        same(other, neither)


@pytest.mark.parametrize(("stage", "where", "word"), WAYS[1:])
def test_in_a_pipeline_of_single_ranks(ranks: Any, stage: str, where: str, word: str, tmp_path: Path) -> None:
    """A rank that holds its stage alone has flat shards with offload only, in which a kernel rounds otherwise."""
    chosen = fits(stage, away(where, stage, tmp_path / "states"), word, pipeline=PIPELINE)
    found = ranks(2).run(train_all, chosen, tmp_path)
    both_at_work(found)
    neither, activation, offload, both = found[0]
    same(activation, neither)
    same(both, offload)
    assert distance(both.weights, neither.weights) < 1e-6


def test_with_the_fused_kernel(ranks: Any, tmp_path: Path) -> None:
    """AdamW as most people write it is stepped by another kernel elsewhere."""
    offload = away("disk", "stage3", tmp_path / "states")
    neither, activation, alone, both = ranks(2).run(train_all, fits("stage3", offload, "full", 2, "adamw"), tmp_path)[0]
    same(activation, neither)
    same(both, alone)
    assert distance(both.weights, neither.weights) < 1e-6


def test_saved_tensors_and_shards_both_leave(ranks: Any, tmp_path: Path) -> None:
    """Two mechanisms of one name: ``activation=offload`` moves what blocks save, ``offload=`` what the engine holds."""
    word = Activation("offload", threshold=256, in_flight=4096)
    neither, *others = ranks(2).run(train_all, fits("stage2", Offload("cpu"), word, 2), tmp_path)[0]
    for other in others:
        same(other, neither)


def test_in_fabric(ranks: Any, tmp_path: Path) -> None:
    chosen = [
        fabric.Loop(
            {"zero": "stage3", "offload": place, "activation": word},
            2,
            {},
            DropGPT,
            steps=2,
            micro_batches=2,
            clip={"max_norm": 0.3},
        )
        for place in (Offload(), away("disk", "stage3", tmp_path))
        for word in ("none", "full")
    ]
    neither, activation, alone, both = ranks(2).run(fabric.train_all, chosen)[0]
    assert same_bits(activation.weights, neither.weights) and same_bits(both.weights, alone.weights)
    assert both.losses == alone.losses and both.norms == alone.norms
    assert distance(both.weights, neither.weights) < 1e-6
