"""Models of odd dtypes, strides, shapes of data flow, and compiled blocks equal one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import GPT, Block, Run, distance, momentum, one_process, with_engine

STAGES = ("none", "stage1", "stage2", "stage3")
CPU = torch.device("cpu")


def engine_on(model: nn.Module, *optimizers: torch.optim.Optimizer, stage: str) -> Engine:
    return Engine(model, optimizers, zero=Zero(stage), exchange=open_exchange(Comm(), CPU))


class Mixed(nn.Module):
    """Parameters of every dtype, trained and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float32) for _ in range(3))
        self.high = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.middle = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.index = nn.Parameter(torch.arange(4).flip(0), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True, False, True, True]), requires_grad=False)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.low:
            x = torch.tanh(layer(x))
        x = (x * self.phase).abs()[:, self.index] * self.mask
        x = self.middle(x.bfloat16()).double()
        for layer in self.high:
            x = torch.tanh(layer(x))
        return x * self.scale

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch[:, :4].float() / 31).square().mean()

    def to(self, dtype: torch.dtype) -> Mixed:  # type: ignore[override]  # the harness's wish for one dtype
        return self


class NoBlocks(nn.Module):
    """Nothing repeats: everything is in the root unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))

    loss = GPT.loss


class Strided(nn.Module):
    """Weights that do not lie in rows, as after ``.to(memory_format=torch.channels_last)``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3))
        self.net = self.net.to(memory_format=torch.channels_last)
        self.mix = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("table", torch.arange(3.0).expand(5, 3))
        assert not self.mix.is_contiguous() and not self.net[2].weight.is_contiguous()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = F.linear(self.net(images).flatten(1), self.mix)
        return out * self.table[:, 0].to(out.dtype).add(1)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch[:, :9].reshape(-1, 1, 3, 3).to(self.mix.dtype) / 31).square().mean()


class Cross(nn.Module):
    """All blocks read one context, as decoder blocks read the encoder's output."""

    def __init__(self, leaf: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 12)
        self.context = nn.Parameter(torch.randn(8, 12)) if leaf else None
        self.blocks = nn.ModuleList(Reading() for _ in range(6))
        self.head = nn.Linear(12, 31)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        context = torch.sin(x) if self.context is None else self.context
        for block in self.blocks:
            x = block(x, context)
        return self.head(x)

    loss = GPT.loss


class Reading(Block):
    def __init__(self) -> None:
        super().__init__(12)
        self.key = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + torch.tanh(self.key(context)))


class UNet(Cross):
    """Late blocks read what early blocks made."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, made = self.embedding(tokens), []
        for block in self.blocks[:3]:
            x = block(x, x)
            made.append(x)
        for block in self.blocks[3:]:
            x = block(x, made.pop())
        return self.head(x)


class Parallel(Cross):
    """All blocks read the same input, and their outputs are added."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(sum(block(x, x) for block in self.blocks))


class OutOfOrder(Cross):
    """The order of the blocks is not that of registration, and another one in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        self.turn += 1
        for number in (4, 2, 0, 5, 3, 1) if self.turn % 2 else (5, 0, 1, 2, 4, 3):
            x = self.blocks[number](x, torch.sin(x))
        return self.head(x)


class Recurrent(nn.Module):
    """Recurrent layers as units; they keep weak references to their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 12)
        self.layers = nn.ModuleList(nn.GRU(12, 12, batch_first=True) for _ in range(3))
        self.head = nn.Linear(12, 31)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x)

    loss = GPT.loss


def leaf_context() -> Cross:
    return Cross(leaf=True)


MODELS: dict[str, Run] = {
    "mixed dtypes": Run(model=Mixed, loss=Mixed.loss, clip=0.1),
    "no blocks": Run(model=NoBlocks, loss=NoBlocks.loss),
    "strided": Run(model=Strided, loss=Strided.loss, optimizer=momentum),
    "one context for all": Run(model=Cross, loss=Cross.loss),
    "a parameter as context": Run(model=leaf_context, loss=Cross.loss),
    "U-net": Run(model=UNet, loss=UNet.loss),
    "parallel": Run(model=Parallel, loss=Parallel.loss),
    "out of order": Run(model=OutOfOrder, loss=OutOfOrder.loss),
    "recurrent": Run(model=Recurrent, loss=Recurrent.loss),
}


def odd_model(name: str) -> list[Any]:
    run = MODELS[name]
    run.steps = 4
    return [with_engine(run, Zero(stage)) for stage in STAGES] + [with_engine(run, Zero("stage3", poison=True))]


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", MODELS)
def test_odd_models_equal_one_process(ranks, name):
    MODELS[name].steps = 4
    expected = one_process(MODELS[name])
    for outcomes in ranks(2).run(odd_model, name):
        for outcome in outcomes:
            # A bf16 gradient and an fp32 one round in each rank's sum, and AdamW makes much of small differences.
            assert distance(outcome, expected) < (1e-2 if name == "mixed dtypes" else 1e-9)
            assert torch.equal(outcome.flat(), outcomes[0].flat()), "all stages give the same bits"


def frozen_only(stage: str) -> tuple[torch.Tensor, float, int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    engine = engine_on(model, stage=stage)
    x = torch.ones(2, 3, requires_grad=True)
    engine.backward(model(x).sum())
    norm = engine.clip_grad_norm(1.0).item()
    engine.clip_grad_value(1.0)
    engine.step()
    assert x.grad is not None
    engine.detach()
    return x.grad, norm, engine.parameter_count


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_is_all_frozen_passes_gradients_through(ranks, stage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.ones(2, 3, requires_grad=True)
    model(x).sum().backward()
    for grad, norm, count in ranks(2).run(frozen_only, stage):
        torch.testing.assert_close(grad, x.grad)
        assert (norm, count) == (0.0, 24)


BUFFERS = {
    "bool": torch.tensor([True, False]),
    "int8": torch.tensor([1, -1], dtype=torch.int8),
    "bf16": torch.ones(2, dtype=torch.bfloat16),
    "complex": torch.ones(2, dtype=torch.complex64),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "no elements": torch.empty(0, 3),
    "no dimension": torch.tensor(3),
    "expanded": torch.ones(1).expand(4),
    "transposed": torch.arange(6.0).view(2, 3).t(),
}


def odd_buffers() -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for name, value in BUFFERS.items():
        model.register_buffer(name, value.clone() if dist.get_rank() == 0 else torch.zeros_like(value))
    engine = engine_on(model, stage="stage3")
    engine.detach()
    # as fp32 where it is fp8, which pickle does not take
    return {name: value.float() if "float8" in name else value for name, value in model.named_buffers()}


def test_buffers_of_every_kind_are_rank_zeros(ranks):
    for found in ranks(2).run(odd_buffers):
        for name, value in BUFFERS.items():
            value = value.float() if name == "float8" else value
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def shared_statistics() -> list[tuple[torch.Tensor, int]]:
    found = []
    for stage in STAGES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        engine = engine_on(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + engine.exchange.rank)
            engine.backward(model(torch.randn(8, 4, generator=generator)).square().mean())
            engine.step()
        model.eval()
        model(torch.zeros(1, 4))
        found.append((model[1].running_mean.clone(), int(model[1].num_batches_tracked)))
        engine.detach()
    return found


def test_batch_statistics_are_rank_zeros(ranks):
    zero, one = ranks(2).run(shared_statistics)
    for (mean, count), (other, other_count) in zip(zero, one, strict=True):
        assert torch.equal(mean, other) and mean.abs().sum() > 0
        assert count == other_count == 3


# ---- compiled blocks


class Recomputed(GPT):
    def __init__(self) -> None:
        super().__init__(layers=4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def compiled() -> Recomputed:
    model = Recomputed()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    return model


def with_compiled_blocks() -> list[Any]:
    torch._dynamo.reset()
    run = Run(model=compiled, steps=3)
    try:
        return [with_engine(run, Zero("stage2")), with_engine(run, Zero("stage3", poison=True))]
    finally:
        torch._dynamo.reset()


def test_blocks_may_be_compiled(ranks):
    expected = one_process(Run(model=Recomputed, steps=3))
    for outcomes in ranks(2).run(with_compiled_blocks):
        assert all(distance(outcome, expected) < 1e-9 for outcome in outcomes)
