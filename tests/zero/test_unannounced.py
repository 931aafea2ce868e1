"""``loss.backward()`` of a user who does not go through the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine

STAGES = ("none", "stage1", "stage2", "stage3")
STEPS = 4


class Chain(nn.Module):
    """Blocks and nothing behind them: the first gradient that comes is one of the last block's."""

    reentrant: bool | None = None  # no checkpoint

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5))
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            if number == 2 and self.fails:
                x.register_hook(_fail)
        return x


class Checkpointed(Chain):
    reentrant = False


class Reentrant(Chain):
    reentrant = True


def _fail(grad: torch.Tensor) -> None:
    raise ZeroDivisionError


def trained(kind: type[Chain], stage: str | None, failing: int = -1) -> torch.Tensor:
    """Train under an engine that is told of nothing, or (``None``) in one process.

    Args:
        kind: of model.
        stage: of the engine.
        failing: step whose first try fails in the backward and is left out.
    """
    torch.manual_seed(0)
    model = kind().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    rows = slice(None)
    if stage is not None:
        exchange = open_exchange(Comm(), torch.device("cpu"))
        engine = Engine(model, [optimizer], zero=Zero(stage), exchange=exchange)
        rows = slice(exchange.rank * 4, exchange.rank * 4 + 4)
    for step in range(STEPS):
        for fails in (True, False) if step == failing else (False,):
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + fails), dtype=torch.float64)
            model.fails = fails
            x = batch[rows].requires_grad_()
            try:
                model(x).square().mean().backward()
            except ZeroDivisionError:
                assert fails
                optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    if stage is not None:
        engine.detach()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def in_all_stages(kind: type[Chain], failing: int) -> list[Any]:
    return [trained(kind, stage, failing) for stage in STAGES]


@pytest.mark.parametrize("failing", [-1, 1])
@pytest.mark.parametrize("kind", [Chain, Checkpointed, Reentrant], ids=lambda kind: kind.__name__)
def test_a_backward_that_nobody_announced_is_reduced(ranks, kind, failing):
    expected = trained(kind, None, failing)
    for found in ranks(2).run(in_all_stages, kind, failing):
        for weights in found:
            torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
            assert torch.equal(weights, found[0])
