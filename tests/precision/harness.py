"""Train under the engine with small state, with the backward inside ``optimizer.step`` as Lightning runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.keeping import Keeping
from lit_zero.precision import Lowering, Precision
from lit_zero.precision.small import Small
from lit_zero.zero import Zero
from lit_zero.zero.access import Access
from lit_zero.zero.engine import Engine
from tests.zero.harness import BATCH, GPT, Run, adamw, tokens

CPU = torch.device("cpu")
STAGES = ("none", "stage1", "stage2", "stage3")


def autocast_loss(model: GPT, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16):
        return GPT.loss(model, batch)


@dataclass
class Job:
    """A training with small state, or without.

    Attributes:
        stage: of ZeRO.
        small: settings of ``Precision``.
        mixed: compute in bf16.
        run: how to train.
        look: called with the engine after the last step.
        still: how the names of parameters begin that are never stepped.
        alike: every rank is given the rows of the first.
        zero: further settings of ``Zero``.
        device: where the model computes.
    """

    stage: str = "none"
    small: dict[str, str] = field(default_factory=dict)
    mixed: bool = True
    run: Run = field(default_factory=lambda: Run(loss=autocast_loss, steps=6, dtype=torch.float32))
    look: Callable[[Engine], Any] | None = None
    still: tuple[str, ...] = ()
    alike: bool = False
    zero: dict[str, Any] = field(default_factory=dict)
    device: torch.device = CPU


@dataclass
class Found:
    """What a training gave.

    Attributes:
        losses: of the whole batch, one per step.
        weights: full masters by name.
        states: full states of the optimizer by name and key.
        sizes: bytes of model states on this rank.
        count: parameters.
        ties: of the masters, how many lie half-way between two bf16 numbers: before the first step, and after each.
        look: what the job's ``look`` returned.
    """

    losses: list[float]
    weights: dict[str, torch.Tensor]
    states: dict[str, dict[str, torch.Tensor]]
    sizes: dict[str, int]
    count: int
    ties: list[int]
    look: Any = None

    @property
    def per_parameter(self) -> float:
        """Bytes of model states for each parameter."""
        return sum(self.sizes[kind] for kind in ("parameter", "master", "gradient", "optimizer")) / self.count


def build(job: Job) -> tuple[nn.Module, torch.optim.Optimizer, Engine]:
    torch.manual_seed(0)
    model = job.run.model().to(job.run.dtype)
    optimizer = job.run.optimizer(model)
    policy = Precision(**{"lower": "all", **job.small}) if job.mixed else Precision(**job.small)
    engine = Engine(
        model,
        [optimizer],
        zero=Zero(job.stage, **job.zero),
        exchange=open_exchange(Comm(), job.device),
        device=job.device,
        lowering=Lowering(policy, torch.bfloat16 if job.mixed else None),
        keeping=Small(policy, job.device) if policy.small else Keeping(),
    )
    return model, optimizer, engine


def steps(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    first: int = 0,
    after: Callable[[], None] = lambda: None,
) -> list[float]:
    """Take the steps of a job, beginning with number ``first``; call ``after`` after each."""
    exchange, run, losses = engine.exchange, job.run, []
    share = BATCH // exchange.size
    position = 0 if job.alike else exchange.rank
    rows = slice(position * share, (position + 1) * share) if not job.alike else slice(0, BATCH // 2)
    for step in range(first, first + run.steps):
        total = torch.zeros((), dtype=torch.float64)

        def closure(step: int = step, total: torch.Tensor = total) -> None:
            for micro in range(run.micro_batches):
                batch = tokens(step * run.micro_batches + micro, rows).to(job.device)
                loss = run.loss(model, batch) / run.micro_batches
                total += loss.detach().double().cpu()
                if micro < run.micro_batches - 1:
                    with engine.no_reduce():
                        engine.backward(loss)
                else:
                    engine.backward(loss)
            if run.clip:
                engine.clip_grad_norm(run.clip)

        optimizer.step(closure)  # type: ignore[arg-type]
        losses.append(exchange.sum_in_rank_order(total.to(job.device)).item() / exchange.size)
        after()
    return losses


def half_way(values: torch.Tensor) -> int:
    """Return how many numbers lie exactly half-way between two bf16 numbers."""
    return int(((values.view(torch.int32) & 0xFFFF) == 0x8000).sum())


def trained(job: Job) -> Found:
    """Train; call it on every rank."""
    model, optimizer, engine = build(job)
    access, names = Access(engine), [info.name for info in engine.infos]
    stepped = [info.name for info in engine.infos if info.optimizer >= 0]

    def count() -> None:
        ties.append(sum(half_way(access.parameter(name)) for name in names) if job.mixed else 0)

    ties: list[int] = []
    count()
    losses = steps(job, model, optimizer, engine, after=count)
    keys = sorted({key for state in optimizer.state.values() for key, value in state.items() if value.dim()})
    states = {
        name: {key: access.state(name, key) for key in keys}
        for name in stepped
        if keys and not (job.still and name.startswith(job.still))
    }
    weights = {name: access.parameter(name) for name in names}
    sizes, numel = engine.model_state_bytes(), engine.parameter_count
    look = None if job.look is None else job.look(engine)
    engine.detach()
    return Found(losses, weights, states, sizes, numel, ties, look)


def all_trained(jobs: list[Job]) -> list[Found]:
    return [trained(job) for job in jobs]


def same(one: Found, other: Found) -> bool:
    """Return whether losses, masters and states are equal bit for bit."""
    return (
        one.losses == other.losses
        and all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)
        and all(
            torch.equal(one.states[name][key], other.states[name][key])
            for name in other.states
            for key in other.states[name]
        )
    )


def with_run(job: Job, **changes: Any) -> Job:
    return replace(job, run=replace(job.run, **changes))


__all__ = [
    "CPU",
    "STAGES",
    "Found",
    "Job",
    "adamw",
    "all_trained",
    "autocast_loss",
    "build",
    "half_way",
    "same",
    "steps",
    "trained",
    "with_run",
]
