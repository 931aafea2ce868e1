"""One training loop as Fabric's users write it: on the ranks of a pool, or on one device with stock Fabric.

Both see the same whole batches: rank ``r`` of ``n`` takes the ``r``-th of ``n`` equal parts of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from lit_zero import ZeroStrategy
from tests.zero.harness import BATCH, GPT, adamw, tokens

STAGES = ("none", "stage1", "stage2", "stage3")


class Parted(GPT):
    """A GPT with a method beside ``forward`` that runs it, and a buffer that changes in training."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.batches += 1
        return super().forward(tokens)


def one_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer with two groups, and an ``eps`` that takes elements out whose true gradient is zero."""
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    return [optimizer]


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Two optimizers of different kinds, which share no parameter but units."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [torch.optim.AdamW(matrices, lr=1e-2, eps=1e-3), torch.optim.SGD(vectors, lr=0.1, momentum=0.9)]


@dataclass
class Loop:
    """How to train.

    Attributes:
        zero: arguments of ``ZeroStrategy``, a strategy, or its name.
        devices: ranks.
        fabric: further arguments of Fabric.
        model: builds the module.
        optimizers: builds the optimizers.
        steps: optimizer steps.
        micro_batches: whole batches per step.
        clip: arguments of ``fabric.clip_gradients``, ``None`` not to clip.
        apart: set up the module first, then the optimizers.
        init: build under ``fabric.init_module``.
        look: called with Fabric, the module and the optimizers at the end; its result becomes ``Outcome.notes``.
        before: the same before the first step.
    """

    zero: dict[str, Any] | str = "auto"
    devices: int = 1
    fabric: dict[str, Any] = field(default_factory=lambda: {"precision": "64-true"})
    model: Callable[[], nn.Module] = Parted
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]] = one_adamw
    steps: int = 4
    micro_batches: int = 1
    clip: dict[str, Any] | None = None
    apart: bool = False
    init: bool = False
    look: Callable[[Fabric, Any, list[Any]], Any] | None = None
    before: Callable[[Fabric, Any, list[Any]], Any] | None = None


@dataclass
class Outcome:
    """What a loop gave.

    Attributes:
        weights: the whole state dict; empty on ranks other than 0.
        losses: of whole batches.
        norms: gradient norms before clipping.
        notes: what ``look`` returned.
    """

    weights: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    notes: Any = None


def make_fabric(loop: Loop) -> Fabric:
    """Return Fabric, launched."""
    strategy = ZeroStrategy(**loop.zero) if isinstance(loop.zero, dict) else loop.zero
    fabric = Fabric(accelerator="cpu", devices=loop.devices, strategy=strategy, **loop.fabric)
    fabric.launch()
    return fabric


def set_up(fabric: Fabric, loop: Loop) -> tuple[Any, list[Any]]:
    """Return the module and the optimizers, set up."""
    torch.manual_seed(0)
    if loop.init:
        with fabric.init_module():
            model = loop.model()
    else:
        model = loop.model()
    if loop.apart:
        prepared = fabric.setup_module(model)
        optimizers = [fabric.setup_optimizers(each) for each in loop.optimizers(prepared)]
    else:
        prepared, *optimizers = fabric.setup(model, *loop.optimizers(model))
    prepared.mark_forward_method("loss")
    return prepared, optimizers


def train(loop: Loop) -> Outcome:
    """Run a loop; call it on every rank."""
    fabric = make_fabric(loop)
    model, optimizers = set_up(fabric, loop)
    if loop.before is not None:
        loop.before(fabric, model, optimizers)
    losses, norms = go_on(fabric, model, optimizers, loop, range(loop.steps))
    notes = loop.look(fabric, model, optimizers) if loop.look else None
    return Outcome(whole(fabric, model), losses, norms, notes)


def train_all(loops: list[Loop]) -> list[Outcome]:
    """Run several loops one after the other: fewer calls of the pool."""
    return [train(loop) for loop in loops]


def go_on(
    fabric: Fabric, model: Any, optimizers: list[Any], loop: Loop, steps: range
) -> tuple[list[float], list[float]]:
    """Train for some steps; return the losses and the norms."""
    share = BATCH // loop.devices
    rows = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
    losses, norms = [], []
    for step in steps:
        total = 0.0
        for micro in range(loop.micro_batches):
            last = micro == loop.micro_batches - 1
            with fabric.no_backward_sync(model, enabled=not last):
                loss = loss_of(model, tokens(step * loop.micro_batches + micro, rows)) / loop.micro_batches
                fabric.backward(loss)
            total += fabric.all_reduce(loss.detach().double().clone()).item()
        for optimizer in optimizers:
            if loop.clip is not None:
                norm = fabric.clip_gradients(model, optimizer, **loop.clip)
                norms += [] if norm is None else [norm.item()]
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss by way of the module's forward: on one device, Fabric's precision covers nothing else."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def whole(fabric: Fabric, model: Any) -> dict[str, torch.Tensor]:
    """Return the whole state dict, on rank 0."""
    state = fabric.strategy.get_module_state_dict(model)
    return {name: value.clone() for name, value in state.items()}


def save(fabric: Fabric, path: Path, model: Any, optimizers: list[Any], step: int, **more: Any) -> None:
    """Save everything."""
    named = {f"optimizer{number}": each for number, each in enumerate(optimizers)}
    fabric.save(path, {"model": model, **named, "step": step}, **more)
