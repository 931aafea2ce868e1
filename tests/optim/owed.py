"""A small engine under the interpreter, and what is counted of its steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero import optim
from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.owing import Owing
from lit_zero.optim.flat import Flat
from lit_zero.zero import Zero
from lit_zero.zero.access import Access
from lit_zero.zero.engine import Engine
from tests.optim.beside import groups, model

CLIP = 1e-2  # of gradients whose norm is some 3


class Counts:
    """How often what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.looks = self.products = self.passes = 0
        walk = importlib.import_module("lit_zero.kernels.triton_walk")
        look = importlib.import_module("lit_zero.kernels.triton_unscale")
        for where, what, name in (
            (walk, "launch", "steps"),
            (look, "launch", "looks"),
            (torch, "_foreach_mul_", "products"),
            (torch, "_amp_foreach_non_finite_check_and_unscale_", "passes"),
        ):
            monkeypatch.setattr(where, what, partial(self._count, name, getattr(where, what)))

    def _count(self, name: str, inner: Callable[..., Any], *args: Any) -> Any:
        setattr(self, name, getattr(self, name) + 1)
        return inner(*args)

    def take(self) -> tuple[int, int, int, int]:
        """Return the numbers of steps, looks at gradients, products with them and passes of torch's scaler."""
        found = self.steps, self.looks, self.products, self.passes
        self.steps = self.looks = self.products = self.passes = 0
        return found


@pytest.fixture
def counts(interpreted, monkeypatch) -> Counts:
    return Counts(monkeypatch)


def adamw(net: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return optim.AdamW(groups(net), lr=1e-2, **more)


def engine_on(make: Callable[[nn.Module], Any] = adamw, stage: str = "none", **more: Any) -> Engine:
    net = model()
    made = make(net)
    optimizers = made if isinstance(made, list) else [made]
    exchange = open_exchange(Comm(), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:  # the probe's many steps need no kernels
        patch.delenv("TRITON_INTERPRET", raising=False)
        return Engine(net, optimizers, zero=Zero(stage), exchange=exchange, **more)


def loss_of(net: nn.Module, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return net(torch.randn(5, 7, generator=generator)).square().mean()


def masters(engine: Engine) -> torch.Tensor:
    return torch.cat([lane.master.read().detach().clone() for lane in engine.lanes])


def gradients(engine: Engine) -> torch.Tensor:
    return torch.cat([grad.flatten() for binding in engine.bindings for grad in binding.grads()])


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clipping multiply, as it does for other optimizers."""
    monkeypatch.setattr(Flat, "pays", lambda *_: False)


def accumulate(engine: Engine) -> None:
    engine.backward(loss_of(engine.model, 7))


def read(engine: Engine) -> None:
    assert Access(engine).gradient("0.weight").norm() < CLIP


def by_hand(engine: Engine) -> None:
    param = engine.bindings[0].segments[0].param
    assert isinstance(param, Owing) and param.grad is not None
    param.grad.add_(0.25)


def infinite_norm(engine: Engine) -> None:
    assert engine.grad_norm(float("inf")) < CLIP


def clip_values(engine: Engine) -> None:
    engine.clip_grad_value(CLIP / 10)
