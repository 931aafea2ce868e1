"""Boundaries by measured time: the step is timed on rank 0, and leaves no trace."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_zero.core.errors import UnsupportedError
from lit_zero.pipeline import measuring
from lit_zero.pipeline.balance import balance
from lit_zero.pipeline.measuring import measure
from lit_zero.pipeline.recording import record
from tests.pipeline import models
from tests.pipeline.models import DIM, Deep, Layer, on_tokens
from tests.pipeline.reference import Random
from tests.pipeline.test_refusals import refusals
from tests.pipeline.test_training import equal, piped
from tests.pipeline.test_ways_to_run import Checkpointed, CheckpointedPair, Segments
from tests.strategy.harness import VOCAB, Fit, LitGPT, train
from tests.zero.harness import GPT, Block

TOKENS = torch.randint(0, models.VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


class Clock:
    """Tells how much work has been done, and one more each time it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


CLOCK = Clock()


def churn(x: torch.Tensor, times: int) -> torch.Tensor:
    """Return ``x`` after so much work, which changes nothing."""
    CLOCK.now += times
    return x.clone()


def toil(x: torch.Tensor, times: int) -> torch.Tensor:
    """Return ``x`` after so many products that change nothing: work for a real clock."""
    one = torch.eye(x.shape[-1], dtype=x.dtype)
    for _ in range(times):
        x = x @ one
    return x


@pytest.fixture
def work_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the work that is done be what is measured, so that nothing depends on what else the machine does."""
    monkeypatch.setattr(measuring, "time", CLOCK)


class Slow(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return churn(super().forward(x), 400)


class Uneven(Deep):
    """Its first block takes most of the time, its last one has most of the parameters. Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        stack = self.trunk.inner["stack"]
        stack[0] = Slow()
        stack[3].ballast = nn.Parameter(torch.zeros(1000))
        self.norm = nn.BatchNorm1d(DIM)
        self.calls: list[float] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(random.random())
        self.norm(self.embedding(tokens).mT)
        return super().forward(tokens)


def seconds(model: nn.Module, step: Any = on_tokens, **given: Any) -> tuple[float, ...]:
    recording = record(model, lambda: step(model, TOKENS))
    return measure(model, [b.name for b in recording.blocks], lambda: step(model, TOKENS), CPU, **given)


@pytest.mark.parametrize("training", [True, False])
def test_a_slow_block_is_a_stage_of_its_own(training: bool, work_is_time: None) -> None:
    model = Uneven()
    found = seconds(model, training=training)
    assert found == (401, 1, 1, 1)
    recording = record(model, lambda: on_tokens(model, TOKENS))
    assert balance(recording, 2, found) == (1,)
    assert balance(recording, 2, "parameters") == (3,)


def test_the_backward_is_measured_too(work_is_time: None) -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return churn(grad, 2000)

    model = Deep()
    model.trunk.inner["stack"][2].register_forward_hook(lambda module, args, output: Function.apply(output))
    assert seconds(model) == (1, 1, 2001, 1)
    assert seconds(model, training=False) == (1, 1, 1, 1)


def test_what_runs_before_and_after_the_blocks_counts(work_is_time: None) -> None:
    model = Deep()
    model.embedding.register_forward_hook(lambda module, args, output: churn(output, 700))
    assert seconds(model) == (701, 1, 1, 1)
    model = Deep()
    model.head.register_forward_hook(lambda module, args, output: churn(output, 700))
    assert seconds(model) == (1, 1, 1, 701)


def test_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model = Uneven()
    before = copy.deepcopy(model.state_dict())
    versions = {name: param._version for name, param in model.named_parameters()}
    parameters, states = dict(model.named_parameters()), (torch.get_rng_state(), random.getstate())
    seconds(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert model.calls == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, param in model.named_parameters():
        assert param is parameters[name] and param.grad is None and param._version == versions[name]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "build",
    [
        models.Encoder,
        models.Pairs,
        models.Conditioned,
        models.InPlace,
        models.Untied,
        models.Skipping,
        models.sequential,
        Checkpointed,
        CheckpointedPair,
        Segments,
    ],
)
def test_any_model_is_measured(build: Any) -> None:
    assert min(seconds(build())) > 0


def test_frozen_blocks_are_measured() -> None:
    model = Deep()
    model.embedding.requires_grad_(False)
    model.trunk.inner["stack"][:2].requires_grad_(False)
    assert min(seconds(model)) > 0


# ---- in the Trainer


class SlowBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return toil(super().forward(x), 200)


class SlowStart(Random):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.blocks[0] = SlowBlock(12)


def boundaries(trainer: pl.Trainer) -> Any:
    return trainer.strategy.stages._plan.boundaries  # type: ignore[attr-defined]


def test_equals_one_process(ranks: Any, tmp_path: Path) -> None:
    """Dropout and batch statistics too: measuring takes no random number and moves no average."""
    given = {"module": SlowStart, "epochs": 1}
    arguments = {"layers": 4, "norms": True}
    alone = train(Fit(arguments={**arguments, "pieces": True}, **given), tmp_path / "alone")
    fit = replace(piped("stage2", balance="time"), arguments=arguments, look=boundaries, **given)
    found = ranks(2).run(train, fit, tmp_path, timeout=120)
    assert [each.notes for each in found] == [(1,), (1,)]  # by parameters it would be 2
    equal(found[0], alone)


class Late(LitGPT):
    """Built on the meta device."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        del self.model

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            with torch.device("meta"):
                self.model = GPT(VOCAB, tied=True, layers=4)


class Fails(LitGPT):
    """Takes values of a parameter for something that they are not."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        [0, 1][1 + int(self.model.embedding.weight[0, 0].isfinite())]
        return super().training_step(batch, batch_idx)


def test_where_it_cannot_be_measured(ranks: Any, tmp_path: Path) -> None:
    fits = [replace(piped("stage3", balance="time"), module=module) for module in (Late, Fails)]
    found = ranks(2).run(refusals, fits, tmp_path)
    advice = "Use pipeline.balance='flops', 'parameters' or 'activations', or give a number for each block."
    for outcomes in found:
        assert outcomes == [
            (
                "UnsupportedError",
                "pipeline.balance='time' runs the whole module on rank 0, but 'model.embedding.weight' has no values "
                f"there: it is on the meta device, on other ranks, or read from a file later. {advice}",
            ),
            (
                "UnsupportedError",
                "pipeline.balance='time' runs the step on rank 0 with the whole module, and that failed: "
                f"IndexError('list index out of range'). {advice}",
            ),
        ]


def test_too_little_memory() -> None:
    model = Deep()

    def step(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        loss = on_tokens(model, tokens)
        if type(loss) is torch.Tensor and not torch.compiler.is_compiling() and float(loss.detach()) != 1:
            raise torch.OutOfMemoryError("of 1 GiB")
        return loss

    with pytest.raises(UnsupportedError, match=r"that failed: OutOfMemoryError.*Use pipeline.balance='flops'"):
        seconds(model, step)
