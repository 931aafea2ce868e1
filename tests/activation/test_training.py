"""Every variant, in every ZeRO stage and in pipelines, trains bit for bit as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_zero.activation.policy import Activation
from lit_zero.pipeline.policy import Pipeline
from tests.activation.harness import VARIANTS, LitDropGPT
from tests.strategy.harness import STAGES, Fit, Outcome, same_bits, train_all

NONE = Activation()
ALONE = {name: policy for name, policy in VARIANTS.items() if name != "partition"}


def fit(stage: str, activation: Activation, devices: int = 2, **more: Any) -> Fit:
    zero = {"zero": stage, "activation": activation, **more}
    return Fit(zero, devices, module=LitDropGPT, arguments={"layers": 4}, rows=16, epochs=1)


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


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_in_a_pipeline(ranks: Any, schedule: str, stage: str, tmp_path: Path) -> None:
    pipeline = Pipeline(schedule, stages=2, micro_batches=4)
    fits = [fit(stage, policy, pipeline=pipeline) for policy in (NONE, *ALONE.values())]
    bit_equal(ranks(2).run(train_all, fits, tmp_path)[0])
