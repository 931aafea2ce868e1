"""LAMB and Muon with a loss scaler: as if gradients had been unscaled before the step, or nothing if it is skipped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.optim import LAMB, Muon
from lit_zero.optim.loss_scale import Scaled

SHAPES = ((6, 4), (5,), (3, 2, 2), (4, 6))
KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "LAMB": lambda params: LAMB(params, lr=0.1, weight_decay=0.1, takes_scale=True),
    "Muon": lambda params: Muon(params, lr=0.1, ns_dtype="float32", takes_scale=True),
    "Muon, simple": lambda params: Muon(params, lr=0.1, ns_dtype="float32", nesterov=False, takes_scale=True),
}


def build(name: str, other_order: bool = False) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    if other_order:  # AdamW steps it, and torch's fused kernels cannot
        params.append(nn.Parameter(torch.randn(4, 8, generator=generator)[:, :4]))
        return params, Muon(
            [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}], lr=0.1, takes_scale=True
        )
    return params, KINDS[name](params)


def set_gradients(params: list[nn.Parameter], number: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * scale


def values(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [state for param in params for _, state in sorted(optimizer.state[param].items())]
    return [each.detach().clone() for each in (*params, *states)]


@pytest.mark.parametrize(
    ("name", "way"),
    [("LAMB", "kernels"), *itertools.product([*KINDS, "Muon, other order"], ["plain", "unread"])],
)
def test_a_loss_scaler_is_obeyed(request, monkeypatch, name, way):
    """Steps 1 and 4 overflow; of the others the scaled gradients must count as the true ones."""
    if way == "kernels":
        request.getfixturevalue("interpreted")
    if way == "unread":  # as on a GPU, where the verdict is not read before the step
        monkeypatch.setattr(Scaled, "_is_skipped", lambda self: False)
    (params, optimizer), (others, other) = (build(name, "order" in name) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for number in range(6):
        scaler.scale(torch.zeros(()))  # makes the scale
        set_gradients(params, number, scaler.get_scale())
        before = values(params, optimizer)
        if number in (1, 4):
            for param, bad in zip(params, (torch.inf, torch.nan, torch.inf, torch.nan), strict=False):
                param.grad.view(-1)[1] = bad
        scaler.step(optimizer)
        scaler.update()
        if number in (1, 4):
            for now, old in zip(values(params, optimizer), before, strict=True):
                assert torch.equal(now, old)
            continue
        set_gradients(others, number, 1.0)
        other.step()
    assert scaler.get_scale() == 2.0
    for one, expected in zip(values(params, optimizer), values(others, other), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_first_step_that_is_skipped_counts_as_none(monkeypatch, name):
    monkeypatch.setattr(Scaled, "_is_skipped", lambda self: False)
    (params, optimizer), (others, other) = build(name), build(name)
    set_gradients(params, 0, torch.inf)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(params, others, strict=True))
    optimizer.found_inf = torch.zeros(())
    for each, stepped in ((params, optimizer), (others, other)):
        set_gradients(each, 1, 1.0)
        stepped.step()
    for one, expected in zip(values(params, optimizer), values(others, other), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)
