"""Models with dropout, and what their training gives with and without ``activation``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lit_zero.activation.applied import Applied
from lit_zero.activation.policy import Activation
from lit_zero.comm.exchange import Exchange
from tests.strategy.harness import VOCAB, LitGPT
from tests.zero.harness import GPT, Block

CPU = torch.device("cpu")

# Every variant, with numbers at which the small models here have something to do.
VARIANTS: dict[str, Activation] = {
    "full": Activation("full"),
    "every_n": Activation("every_n", n=2),
    "selective": Activation("selective"),
    "offload": Activation("offload", threshold=256, in_flight=4096),
    "budget": Activation("budget", budget=1 << 20),
    "partition": Activation("partition", ranks=2),
}


class DropBlock(Block):
    """A block with dropout, which counts its forwards with gradient."""

    calls = 0

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()
        return x + self.dropout(super().forward(x) - x)


class DropGPT(GPT):
    """The GPT of the other tests, with dropout in its blocks and around them."""

    def __init__(self, vocab: int = VOCAB, dim: int = 12, layers: int = 3, tied: bool = True) -> None:
        super().__init__(vocab, dim, layers, tied)
        self.blocks = nn.ModuleList(DropBlock(dim) for _ in range(layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.embedding(tokens), 0.1, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LitDropGPT(LitGPT):
    """The LightningModule of the other tests around it."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.1, tied: bool = True, layers: int = 3) -> None:
        super().__init__(optimizer, lr, tied, layers)
        self.model = DropGPT(VOCAB, tied=tied, layers=layers)


def apply(model: nn.Module, policy: Activation, **more: Any) -> Applied:
    """Apply a choice to a model on the CPU."""
    if policy.variant == "partition":
        more.setdefault("group", Exchange())
    return Applied(model, policy, "auto", CPU, **more)


def gradients(model: nn.Module, policy: Activation | None, *inputs: Any, steps: int = 2) -> dict[str, torch.Tensor]:
    """Return the loss and all gradients after some backwards, which add up."""
    applied = None if policy is None else apply(model, policy)
    for number in range(steps):
        torch.manual_seed(number)
        loss = model(*inputs)
        loss = loss if loss.ndim == 0 else loss.square().mean()
        if applied is not None:
            applied.step_is_over(Exchange())
        loss.backward()
    if applied is not None:
        applied.remove()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Require two sets of tensors to be equal bit for bit."""
    assert list(one) == list(other)
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not different, different
