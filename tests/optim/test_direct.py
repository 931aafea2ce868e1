"""The short way to torch's kernels for a CPU: where it is taken, where not, and that it does what torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_zero import optim
from lit_zero.optim.direct import gather

CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
    ("AdamW", {"lr": torch.tensor(0.1), "betas": (0.8, 0.9), "amsgrad": True, "maximize": True}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
]


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (63,), (1,), (2, 3))]


def step(optimizer: torch.optim.Optimizer, number: int, left_out: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for position, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if position == left_out else grad
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_it_does_what_torchs_class_does(monkeypatch, name, settings, dtype):
    found = []
    for module, way in ((optim, {}), (torch.optim, {"fused": True})):
        given = params(dtype)
        groups = [{"params": given[:2]}, {"params": given[2:], "weight_decay": 0.0}]
        optimizer = getattr(module, name)(groups, **settings, **way)
        step(optimizer, 0, left_out=9)  # makes the states
        if module is optim:
            monkeypatch.setattr(optimizer, "_leave_to_torch", None)  # from here on nobody asks for it
        for number in (1, 2, 3):
            step(optimizer, number, left_out=number)
        states = [value for param in given for _, value in sorted(optimizer.state[param].items())]
        found.append([*(param.detach() for param in given), *states])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_what_lies_otherwise_is_looked_at_more_closely():
    keys = ("exp_avg", "exp_avg_sq")

    def gathered(**changed: Any) -> bool:
        param = nn.Parameter(changed.pop("param", torch.ones(4, 6)))
        param.grad = changed.pop("grad", torch.ones(4, 6).to(param))
        state = {key: torch.zeros_like(param) for key in keys} | {"step": torch.ones(())} | changed
        return (
            gather([param], {param: {key: value for key, value in state.items() if value is not None}}, keys, True)
            is not None
        )

    assert gathered()
    turned = torch.ones(6, 4).t()
    assert not gathered(grad=turned) and not gathered(param=turned) and not gathered(exp_avg=turned)
    assert not gathered(grad=torch.eye(4, 6).to_sparse())
    assert not gathered(exp_avg=None) and not gathered(step=None)
    assert not gathered(exp_avg_sq=torch.ones(4, 6).double())
    assert not gathered(step=torch.ones((), dtype=torch.float64)) and not gathered(step=1.0)
    assert not gathered(param=torch.ones(4, 6, dtype=torch.complex64))
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).double())
    for param in (one, other):
        param.grad = torch.ones_like(param)
    assert gather([one, other], {one: {}, other: {}}, (), False) is None, "a kernel steps one dtype"
    assert gather([one], {}, (), False) is not None, "there is nothing to keep"
    one.grad = None
    assert gather([one], {}, keys, True).params == []
