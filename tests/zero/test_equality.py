"""Every stage gives what one process gives on the whole batch, and all stages give the same bits."""

from __future__ import annotations

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

from lit_zero.zero import Zero
from tests.zero.harness import Outcome, Run, adamw, distance, momentum, one_process, with_engine

STAGES = ("none", "stage1", "stage2", "stage3")
# Optimizer, micro-batches, clipping, ranks: everything with everything on two ranks; on one and on four, each once.
CASES = [
    *itertools.product((adamw, momentum), (1, 3), (0.0, 0.05), (2,)),
    *((adamw, 3, 0.05, size) for size in (1, 4)),
    *((momentum, 1, 0.0, size) for size in (1, 4)),
]


def all_stages(run: Run, accumulate: str | None) -> list[Outcome]:
    stages = STAGES[1:] if accumulate == "reduce" else STAGES
    return [with_engine(run, Zero(stage, accumulate=accumulate)) for stage in stages]


@pytest.mark.thorough("momentum-3-0.05", "adamw-3-0.0-", "momentum-1-0.0-4")
@pytest.mark.parametrize(("optimizer", "micro_batches", "clip", "size"), CASES)
def test_losses_and_weights_equal_one_process(ranks, size, optimizer, micro_batches, clip):
    run = Run(optimizer=optimizer, micro_batches=micro_batches, clip=clip)
    expected = one_process(run)
    for accumulate in ("hold", "reduce") if micro_batches > 1 else (None,):
        outcomes = ranks(size).run(all_stages, run, accumulate)
        for outcome in outcomes[0]:
            assert distance(outcome, expected) < 1e-9, "fp64 agrees to rounding"
            if clip:
                assert max(outcome.notes["norms"]) > clip, "the case must clip"
        first = outcomes[0][0]
        for outcome in itertools.chain(*outcomes):
            assert torch.equal(outcome.flat(), first.flat()), "stages and ranks agree bit for bit"
            assert outcome.losses == first.losses


@pytest.mark.thorough("1-4")
@pytest.mark.parametrize(("micro_batches", "size"), [(3, 1), (3, 2), (1, 4)])
def test_fp32_equals_one_process_to_a_millionth(ranks, size, micro_batches):
    run = Run(optimizer=momentum, micro_batches=micro_batches, clip=0.5, dtype=torch.float32)
    expected = one_process(run)
    outcomes = ranks(size).run(all_stages, run, "hold" if micro_batches > 1 else None)
    for outcome in itertools.chain(*outcomes):
        assert distance(outcome, expected) < 1e-6
        assert torch.equal(outcome.flat(), outcomes[0][0].flat())


def test_fp32_adamw_equals_one_process(ranks):
    # AdamW divides by the gradient's own size, so an element whose true gradient is zero (a key's bias) moves by
    # rounding alone. A larger eps takes those out, and what is left must agree.
    run = Run(optimizer=adamw_with_large_eps, dtype=torch.float32)
    expected = one_process(run)
    for outcome in ranks(2).run(all_stages, run, None)[0]:
        assert distance(outcome, expected) < 1e-6


def adamw_with_large_eps(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["eps"] = 1e-4
    return optimizer


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_by_value(ranks, stage):
    run = Run(optimizer=momentum, clip_value=1e-3)
    expected = one_process(run)
    for outcome in ranks(2).run(with_engine, run, Zero(stage)):
        assert distance(outcome, expected) < 1e-9


def other_ways(run: Run) -> list[Outcome]:
    from lit_zero.comm import Comm

    return [
        with_engine(run, Zero("stage3")),
        with_engine(run, Zero("stage3"), Comm(overlap=False)),
        with_engine(run, Zero("stage3", slots=1)),
        with_engine(run, Zero("stage3", slots=3)),
        with_engine(run, Zero("stage3", poison=True)),
        with_engine(run, Zero("stage3", units=["Linear"])),
        with_engine(run, Zero("stage2", units=["Embedding"])),
        with_engine(run, Zero("stage3", units=["Block", "blocks.*.up"])),
    ]


def cut_into_parcels(run: Run) -> list[Outcome]:
    import lit_zero.zero.build as build
    import lit_zero.zero.unit as unit

    uncut = [with_engine(run, Zero(stage)) for stage in STAGES]
    cut = partial(build.cut_evenly, smallest=1)
    with mock.patch.object(build, "cut_evenly", cut), mock.patch.object(unit, "_SMALL", 1):
        return [*uncut, *(with_engine(run, Zero(stage)) for stage in STAGES)]


def test_units_cut_into_parcels_change_no_bit(ranks):
    outcomes = ranks(2).run(cut_into_parcels, Run(steps=4))
    for outcome in itertools.chain(*outcomes):
        assert torch.equal(outcome.flat(), outcomes[0][0].flat())
    assert outcomes[0][6].notes["bytes"]["slots"] < outcomes[0][2].notes["bytes"]["slots"], "parcels must be smaller"


def test_settings_that_change_memory_or_time_change_no_bit(ranks):
    outcomes = ranks(2).run(other_ways, Run(steps=4))
    for outcome in itertools.chain(*outcomes):
        assert torch.equal(outcome.flat(), outcomes[0][0].flat())
