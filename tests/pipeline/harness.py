"""Run the stages of a pipeline one after the other in this process, and compare with the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_zero.pipeline.balance import balance
from lit_zero.pipeline.facts import Recording
from lit_zero.pipeline.plan import SplitPlan, plan_split
from lit_zero.pipeline.recording import record
from lit_zero.pipeline.splitting import Crossing, Finished, Split

Step = Callable[[Any, Any], torch.Tensor]


@dataclass
class Stages:
    """Copies of a model, each split for its own stages."""

    splits: list[Split]
    recording: Recording
    plan: SplitPlan

    def of(self, number: int) -> Split:
        return next(split for split in self.splits if number in split.local)


def divide(
    model: nn.Module,
    step: Step,
    batch: Any,
    stages: int,
    boundaries: Sequence[int] | None = None,
    ranks: int | None = None,
    **options: Any,
) -> Stages:
    """Record ``model`` and split copies of it: one for each stage, or ``ranks`` copies with several stages each."""
    recording = record(model, lambda: step(model, batch), **options)
    plan = plan_split(recording, balance(recording, stages) if boundaries is None else boundaries)
    splits = []
    for rank in range(ranks or stages):
        split = Split(copy.deepcopy(model), recording, plan, range(rank, stages, ranks or stages))
        split.apply()
        splits.append(split)
    return Stages(splits, recording, plan)


def run(stages: Stages, step: Step, batch: Any, backward: bool = True) -> torch.Tensor:
    """Run one micro-batch forward and backward through all stages; random states travel with the tensors."""
    sent: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    received: list[torch.Tensor] = []
    start = state = torch.get_rng_state()
    result: Any = None
    for number in range(len(stages.plan.stages)):
        split = stages.of(number)
        torch.set_rng_state(start)  # every stage has drawn the same numbers when the step begins

        def on_entry(state: torch.Tensor = state, number: int = number) -> None:
            if number:
                torch.set_rng_state(state)

        outcome = split.run(
            number, lambda split=split: step(split.model, batch), lambda given=received: given, on_entry
        )
        state = torch.get_rng_state()
        if isinstance(outcome, Finished):
            result = outcome.result
            break
        assert isinstance(outcome, Crossing)
        before = received
        slots = stages.plan.stages[number].sends
        received = [
            t.detach().requires_grad_(s.requires_grad and torch.is_grad_enabled())
            for t, s in zip(outcome.tensors, slots, strict=True)
        ]
        sent.append((outcome.tensors, received))
        del before
    if backward:
        result.backward()
        for outputs, leaves in reversed(sent):
            pairs = [(out, leaf.grad) for out, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    return result.detach()


def gradients(stages: Stages) -> dict[str, torch.Tensor]:
    """Return the gradients of all stages; those of tied parameters summed."""
    found: dict[str, torch.Tensor] = {}
    for split in stages.splits:
        for name, param in split.model.named_parameters():
            if param.grad is not None:
                assert split.is_local(param), f"{name} is absent and has a gradient"
                found[name] = found[name] + param.grad if name in found else param.grad.clone()
    return found


def check(model: nn.Module, step: Step, batches: Sequence[Any], stages: int, **options: Any) -> Stages:
    """Check that the stages give the loss and gradients of the plain model, for batches of several shapes."""
    divided = divide(model, step, batches[0], stages, **options)
    plain = copy.deepcopy(model)
    for batch in batches:
        for each in [plain, *(split.model for split in divided.splits)]:
            each.zero_grad()
        torch.manual_seed(7)
        loss = step(plain, batch)
        loss.backward()
        after = torch.get_rng_state()
        torch.manual_seed(7)
        assert torch.equal(run(divided, step, batch), loss.detach())
        assert torch.equal(torch.get_rng_state(), after), "the last stage ends with another random state"
        compare(gradients(divided), plain, divided.plan)
    return divided


def compare(found: dict[str, torch.Tensor], plain: nn.Module, plan: SplitPlan) -> None:
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        if name in plan.tied:  # summed in another order
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], gradient), name


def memory(module: nn.Module) -> int:
    """Return the bytes that the parameters of a module really take."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(found.values())
