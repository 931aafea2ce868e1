"""A small model, and one optimizer of ours beside torch's under the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lit_zero import optim

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]

# Class of both modules: settings that ask for all that it can do.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "AdamW": [{"lr": 1e-2}, {"lr": 1e-2, "amsgrad": True, "maximize": True, "weight_decay": 0.3, "betas": (0.8, 0.9)}],
    "Adam": [{"lr": 1e-2, "weight_decay": 0.1}],
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "maximize": True},
    ],
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}],
}
CASES = [(name, settings) for name, each in SETTINGS.items() for settings in each]
NAMES = [f"{name}-{number}" for name, each in SETTINGS.items() for number in range(len(each))]


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of the paper, word by word."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = beta1 * m + (1 - beta1) * p.grad
                p.sub_(group["lr"] * (update.sign() + group["weight_decay"] * p))
                self.state[p]["exp_avg"] = beta2 * m + (1 - beta2) * p.grad


def model(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 1, bias=False)).to(device, dtype)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices and vectors apart, the latter with another learning rate."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim < 2], "lr": 0.05, "weight_decay": 0.0},
    ]


def set_gradients(module: nn.Module, number: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in module.parameters():
        grad = torch.randn(p.shape, generator=generator) * scale
        p.grad = torch.empty_like(p).copy_(grad)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: Iterable[int]) -> torch.Tensor:
    """Take a step with each of the numbered gradients; return all weights end to end."""
    for number in numbers:
        set_gradients(module, number)
        optimizer.step()
    return flat(module)


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).cpu()


def build(source: Any, name: str, settings: dict[str, Any], **more: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model with an optimizer of ``torch.optim`` or ``lit_zero.optim``."""
    module = model(**more)
    return module, getattr(source, name)(groups(module), **settings)


def lion(module: nn.Module, kind: Any = optim.Lion) -> torch.optim.Optimizer:
    return kind(groups(module), lr=1e-2, weight_decay=0.1)
