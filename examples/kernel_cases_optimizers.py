"""The step of the optimizers over the parameters of a GPT: flat segments as the ZeRO engine makes them against torch's
ways over many tensors, and other people's kernels where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark import SIZES
from gpt import GPT
from kernel_timing import Case, Contender, Run
from torch import nn

from lit_zero import Comm, Zero, optim
from lit_zero.comm.open import open_exchange
from lit_zero.zero.engine import Engine

# Settings, and bytes of fp32 for each element: parameter and states are read and written, the gradient is read.
OPTIMIZERS: dict[str, tuple[dict[str, Any], int]] = {
    "AdamW": ({"lr": 1e-3, "weight_decay": 0.1}, 28),
    "Adam": ({"lr": 1e-3}, 28),
    "SGD": ({"lr": 1e-3, "momentum": 0.9}, 20),
    "Lion": ({"lr": 1e-3, "weight_decay": 0.1}, 20),
    "Adagrad": ({"lr": 1e-3}, 20),
}


def cases(device: torch.device, sizes: Sequence[str]) -> list[Case]:
    """Return a case for each optimizer and size of a GPT."""
    found = []
    for size in sizes:
        shapes, lengths = _shapes(size), _lengths(size)
        elements = sum(map(sum, lengths))
        for name, (settings, moved) in OPTIMIZERS.items():
            contenders = _contenders(name, settings, device, shapes, lengths)
            title = f"{name}, {elements / 1e6:.1f} million elements, {sum(map(len, shapes))} tensors"
            found.append(Case(title, elements * moved, contenders))
    return found


def _contenders(
    name: str, settings: dict[str, Any], device: torch.device, shapes: Any, lengths: Any
) -> list[Contender]:
    def ours(sizes: Any, **more: Any) -> Callable[[], Run]:
        return lambda: _run(lambda groups: getattr(optim, name)(groups, **settings, **more), sizes, device)

    def torchs(sizes: Any, **way: bool) -> Callable[[], Run]:
        return lambda: _run(lambda groups: getattr(torch.optim, name)(groups, **settings, **way), sizes, device)

    found = [
        Contender(f"lit_zero, {sum(map(len, lengths))} flat segments", ours(lengths)),
        Contender("lit_zero, many tensors", ours(shapes)),
    ]
    if hasattr(torch.optim, name):
        found += [
            Contender("torch fused, flat segments", torchs(lengths, fused=True)),
            Contender("torch fused", torchs(shapes, fused=True)),
            Contender("torch foreach", torchs(shapes, foreach=True)),
            Contender("torch, one by one", torchs(shapes, foreach=False, fused=False)),
        ]
    else:
        found.append(Contender("plain torch, many tensors", ours(shapes, fused="none")))
    if device.type == "cuda":
        found += [
            Contender(way, lambda make=make: _run(make, shapes, device))
            for way, make in _others(name, settings).items()
        ]
    return found


def _others(name: str, settings: dict[str, Any]) -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """Return other people's kernels for an optimizer, which run where they are installed."""

    def apex(groups: Any) -> torch.optim.Optimizer:
        from apex import optimizers

        kind = {"AdamW": "FusedAdam", "Adam": "FusedAdam", "SGD": "FusedSGD", "Adagrad": "FusedAdagrad"}[name]
        more = {"adam_w_mode": name == "AdamW"} if kind == "FusedAdam" else {}
        made: torch.optim.Optimizer = getattr(optimizers, kind)(groups, **settings, **more)
        return made

    def bitsandbytes(groups: Any) -> torch.optim.Optimizer:
        import bitsandbytes

        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, f"{name}32bit")(groups, **settings)
        return made

    return {"bitsandbytes": bitsandbytes} if name == "Lion" else {"Apex": apex, "bitsandbytes": bitsandbytes}


def _run(make: Callable[[Any], torch.optim.Optimizer], sizes: Sequence[Sequence[Any]], device: torch.device) -> Run:
    """Return the step of an optimizer on parameters of the given sizes, group by group."""
    torch.manual_seed(0)
    groups = [{"params": [nn.Parameter(torch.randn(size, device=device)) for size in group]} for group in sizes]
    for group in groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    return make(groups).step


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim < 2]}]


def _shapes(size: str) -> list[list[torch.Size]]:
    return [[param.shape for param in group["params"]] for group in _groups(GPT(**SIZES[size][0]))]


def _lengths(size: str) -> list[list[int]]:
    """Return the lengths of the segments that the engine puts in the place of the parameters."""
    model = GPT(**SIZES[size][0])
    optimizer = torch.optim.SGD(_groups(model))
    engine = Engine(model, [optimizer], zero=Zero("stage2"), exchange=open_exchange(Comm(), torch.device("cpu")))
    lengths = [[param.numel() for param in group["params"]] for group in optimizer.param_groups]
    engine.detach()
    return lengths
