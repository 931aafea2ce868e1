"""Models and checks for optimizers that look at whole parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lit_zero.core.ownership import Ownership
from lit_zero.core.shards import WholeParameters
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from lit_zero.zero.sharing import SegmentShards
from tests.zero.harness import GPT, Outcome, Run, with_engine

STAGES = ("none", "stage1", "stage2", "stage3")


class Odd(GPT):
    """A GPT with a tied embedding, frozen parameters, some that no loss reaches, and a vector that is cut in two."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.unused = nn.Linear(5, 7)
        self.long = nn.Parameter(torch.linspace(0.5, 1.5, 500))
        self.blocks[0].norm1.requires_grad_(False)
        self.blocks[1].up.weight.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.long.square().mean()


def groups(model: nn.Module, **outer: Any) -> list[dict[str, Any]]:
    """Return hidden matrices, vectors without decay, and the embedding, which is the output layer too."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in params.items() if p.ndim == 2 and "embedding" not in name]
    return [
        {"params": hidden, "weight_decay": 0.1},
        {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for name, p in params.items() if "embedding" in name], "weight_decay": 0.05, **outer},
    ]


def stages(run: Run, look: Callable[[Engine], Any] | None = None) -> list[Outcome]:
    """Train in every stage; call it on every rank."""
    return [with_engine(run, Zero(stage), look=look) for stage in STAGES]


def layout(engine: Engine) -> dict[str, Any]:
    """Return what is cut, and how the optimizer sees it."""
    [binding] = engine.bindings
    optimizer = binding.optimizer
    assert isinstance(optimizer, WholeParameters) and isinstance(optimizer.shards, SegmentShards)
    ranges = {s.entry.name: s.lane.layout.ranges(s.entry) for s in binding.segments if s.entry is not None}
    shapes = {s.entry.name: optimizer.shards.shape(s.param) for s in binding.segments if s.entry is not None}
    order = [s.entry.name for s in binding.segments if s.entry is not None]
    return {"ranges": ranges, "shapes": shapes, "order": order, "swaps": engine.exchange.counters.swaps}


def cut_dimensions(look: dict[str, Any]) -> set[int]:
    """Return the numbers of dimensions of the parameters that several ranks hold some of; ``look`` is a layout."""
    shared = {name for name, ranges in look["ranges"].items() if sum(first < last for first, last in ranges) > 1}
    return {len(look["shapes"][name]) for name in shared}


def sent_elements(ranges: list[list[tuple[int, int]]], rank: int) -> int:
    """Return what a rank sends for one step of Muon on matrices that are divided so: out and back."""
    plan = Ownership.of(ranges)
    others = [other for other in range(len(ranges[0])) if other != rank]
    out = sum(plan.length(number, rank) for to in others for number in plan.given(rank, to))
    return out + sum(plan.length(number, other) for other in others for number in plan.given(other, rank))
