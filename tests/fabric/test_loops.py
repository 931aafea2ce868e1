"""Loops as users of Fabric write them: what they do beside backward and step."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from lit_zero import ZeroStrategy
from lit_zero.core.errors import LitZeroError
from lit_zero.zero.engine import Engine

STAGES = ("none", "stage1", "stage2", "stage3")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def data(step: int, fabric: Fabric) -> torch.Tensor:
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    return rows[fabric.global_rank :: fabric.world_size]


def make(stage: str, devices: int = 2) -> Fabric:
    strategy: Any = ZeroStrategy(stage) if devices > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    fabric.launch()
    return fabric


def average(stage: str, devices: int = 2) -> torch.Tensor:
    """Keep a moving average of the weights, read from the parameters right after the step."""
    fabric, model = make(stage, devices), net()
    averages = copy.deepcopy(model)
    door, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        fabric.backward(door(data(step, fabric)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, param in zip(averages.parameters(), model.parameters(), strict=True):
                kept.lerp_(param, 0.5)
    return torch.cat([param.detach().flatten() for param in averages.parameters()])


@pytest.mark.parametrize("stage", STAGES[:3])
def test_parameters_are_whole_after_a_step(ranks, stage):
    alone = average("auto", 1)
    for averages in ranks(2).run(average, stage):
        assert torch.allclose(averages, alone, atol=1e-6)


def without_zero_grad(stage: str, devices: int = 2) -> float:
    fabric, model = make(stage, devices), net()
    door, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        loss = door(data(step, fabric)).square().mean()
        fabric.backward(loss)
        optimizer.step()
    return float(fabric.all_reduce(loss.detach()))


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_stay_until_zero_grad(ranks, stage):
    assert ranks(2).run(without_zero_grad, stage)[0] == pytest.approx(without_zero_grad("auto", 1), rel=1e-5)


class Gate(nn.Module):
    """On one rank the loss does not reach the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, through: bool) -> torch.Tensor:
        return self.layer(x) if through else x.detach().clone().requires_grad_()


def with_a_teacher(stage: str) -> list[float]:
    """Train beside a frozen module, in several folds, with a batch that does not reach the model on rank 1."""
    fabric, losses = make(stage), []
    for _ in range(2):
        teacher = fabric.setup_module(net().requires_grad_(False))
        model = Gate()
        door, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(2):
            x = data(step, fabric)
            loss = F.mse_loss(door(x, fabric.global_rank == 0), teacher(x).detach())
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        del teacher, model, door, optimizer
        gc.collect()
    left = [each for each in gc.get_objects() if isinstance(each, Engine)]
    return [*losses, len(left)]


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_folds_beside_a_frozen_module(ranks, stage):
    for first, second, left in ranks(2).run(with_a_teacher, stage):
        assert first == first and second == second
        assert left <= 2, "those of an earlier fold are gone"


def thaw(stage: str, devices: int = 2) -> float:
    """Unfreeze a layer that the optimizer knows, and add one that it does not."""
    fabric, model = make(stage, devices), net()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters(), *model[3].parameters()], lr=0.1)
    door, optimizer = fabric.setup(model, optimizer)
    for step in range(4):
        if step == 1:
            model[0].requires_grad_(True)
        if step == 2:
            model[1].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[1].parameters())})
        loss = door(data(step, fabric)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return float(fabric.all_reduce(loss.detach()))


@pytest.mark.parametrize("stage", STAGES)
def test_layers_that_are_thawed_later(ranks, stage):
    assert ranks(2).run(thaw, stage)[0] == pytest.approx(thaw("auto", 1), rel=1e-5)


def norms(stage: str) -> tuple[float, float, bool]:
    """Look at gradients between backward and step."""
    fabric, model = make(stage), net()
    door, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(door(data(0, fabric)).square().mean())
    full = fabric.strategy.full(door)
    grads = [full.gradient(name) for name, _ in model.named_parameters()]
    return float(fabric.strategy.gradient_norm(door)), float(torch.cat([g.flatten() for g in grads]).norm()), True


def test_gradients_can_be_seen(ranks):
    for norm, counted, _ in ranks(2).run(norms, "stage3"):
        assert norm == pytest.approx(counted, rel=1e-6)


def refused() -> list[str]:
    fabric, model = make("stage2"), net()
    _, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    found = []
    for action in (
        lambda: copy.deepcopy(model),
        lambda: optimizer.load_state_dict(torch.optim.SGD(net().parameters(), lr=0.1).state_dict()),
        lambda: fabric.setup_module(nn.Sequential(model[0])),
    ):
        with pytest.raises(LitZeroError) as error:
            action()
        found.append(str(error.value))
    return found


def test_refusals(ranks):
    copied, loaded, shared = ranks(2).run(refused)[0]
    assert copied.startswith("Sequential cannot be copied once it is sharded: a copy has no ranks of its own.")
    assert loaded == (
        "SGD.load_state_dict would take the state of whole parameters for that of shards. Load a checkpoint: "
        "trainer.fit(ckpt_path=...), or fabric.load(path, {'optimizer': optimizer})."
    )
    assert shared == (
        "Parameter '0.weight' of Sequential, which Fabric has set up, is in Sequential too. Set up one module that "
        "holds both."
    )
