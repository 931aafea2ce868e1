"""Every variant, in every ZeRO stage and in pipelines, trains bit for bit as without."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from lit_zero.activation.policy import Activation
from lit_zero.pipeline.policy import Pipeline
from tests.activation.harness import VARIANTS, LitDropGPT
from tests.strategy.harness import STAGES, Fit, Outcome, Short, same_bits, train_all

NONE = Activation()
ALONE = {name: policy for name, policy in VARIANTS.items() if name != "partition"}


def fit(stage: str, activation: Activation, devices: int = 2, **more: Any) -> Fit:
    zero = {"zero": stage, "activation": activation, **more}
    return Short(zero, devices, module=LitDropGPT, arguments={"layers": 4}, rows=16, epochs=1)


def bit_equal(found: list[Outcome]) -> None:
    """The first is trained without."""
    reference, *others = found
    assert reference.column("train_loss_step")[0] != reference.column("train_loss_step")[1]
    for each in others:
        assert each.rows == reference.rows
        assert same_bits(each.weights, reference.weights)


@pytest.mark.parametrize("stage", STAGES)
def test_every_variant_equals_none_bit_for_bit(ranks: Any, stage: str, tmp_path: Path) -> None:
    fits = [fit(stage, policy) for policy in (NONE, *ALONE.values())]
    bit_equal(ranks(2).run(train_all, fits, tmp_path)[0])


# By schedule: which variants are tried in which stages. Each schedule meets each variant, and so does each stage.
PIPELINES: dict[str, dict[str, list[str]]] = {
    "gpipe": {"none": ["full", "offload"], "stage1": ["every_n", "selective", "budget"]},
    "1f1b": {"stage2": ["full", "selective"], "stage3": ["every_n", "offload", "budget"]},
    "interleaved": {"none": ["every_n", "selective", "budget"], "stage3": ["full", "offload"]},
    "zero_bubble": {"stage1": ["full", "offload"], "stage3": ["every_n", "selective", "budget"]},
    "zbv": {"stage1": ["full", "selective"], "stage2": ["every_n", "offload", "budget"]},
}


@pytest.mark.thorough("gpipe", "zbv", "interleaved", "zero_bubble")
@pytest.mark.parametrize("schedule", PIPELINES)
def test_in_a_pipeline(ranks: Any, schedule: str, tmp_path: Path) -> None:
    pipeline = Pipeline(schedule, stages=4 if schedule in ("interleaved", "zbv") else 2, micro_batches=4)
    tried = [(stage, [NONE, *(VARIANTS[each] for each in words)]) for stage, words in PIPELINES[schedule].items()]
    fits = [fit(stage, policy, pipeline=pipeline) for stage, policies in tried for policy in policies]
    found = iter(ranks(2).run(train_all, fits, tmp_path, timeout=120)[0])
    for _, policies in tried:
        bit_equal([next(found) for _ in policies])


def test_every_pair_is_tried() -> None:
    for words in PIPELINES.values():
        assert sorted(itertools.chain(*words.values())) == sorted(ALONE)
    pairs = {(stage, word) for words in PIPELINES.values() for stage, each in words.items() for word in each}
    assert len(pairs) == len(STAGES) * len(ALONE)


def test_in_a_pipeline_of_ranks_that_shard(ranks: Any, tmp_path: Path) -> None:
    """Two pipelines of two ranks: parameters are gathered for what is computed again, in both halves of a backward."""
    pipeline = Pipeline("zero_bubble", stages=2, micro_batches=2)
    fits = [fit("stage3", policy, 4, pipeline=pipeline) for policy in (NONE, VARIANTS["full"], VARIANTS["offload"])]
    bit_equal(ranks(4).run(train_all, fits, tmp_path, timeout=120)[0])
