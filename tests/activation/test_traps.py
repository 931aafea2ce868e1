"""One process: what is easily computed again otherwise without a word. It is computed alike, or refused by name."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_zero.activation import applied, compiling
from lit_zero.activation.policy import Activation
from lit_zero.core.errors import LitZeroError
from tests.activation.harness import VARIANTS, DropBlock, DropGPT, apply, gradients, same
from tests.activation.test_models import Stack, run
from tests.zero.harness import tokens

AGAIN = ("full", "selective", "partition")


class Refilled(nn.Module):
    """A stream in a dictionary, which the blocks are given and the caller fills anew."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(6, 64))
        self.blocks = nn.ModuleList(InDictionary() for _ in range(count))

    def forward(self) -> torch.Tensor:
        state: dict[str, Any] = {"x": self.start * 1.0, "seen": [self.start * 2.0]}
        for block in self.blocks:
            state["x"] = block(state)
            state["seen"].insert(0, state["x"])
        return state["x"]


class InDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, state: dict[str, Any]) -> torch.Tensor:
        return torch.tanh(self.linear(state["x"])) * state["seen"][0] + state["x"]


class OwnGenerators(nn.Module):
    """Draws from generators of its own, and from one that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(2)
        self.new, self.old = np.random.default_rng(3), np.random.RandomState(4)

    def forward(self, x: torch.Tensor, given: torch.Generator | None = None) -> torch.Tensor:
        x = torch.tanh(self.linear(x)) * torch.rand(8, generator=self.torch) * (1 + self.python.random())
        x = torch.sin(x) * torch.rand(8, generator=given)
        return torch.cos(x) * float(self.new.random()) * float(self.old.rand())


class Given(Stack):
    def __init__(self) -> None:
        super().__init__(OwnGenerators)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self) -> torch.Tensor:
        x = self.start * 1.0
        for block in self.blocks:
            x = block(x, given=self.generator)
        return x


class Sure(nn.Module):
    """Writes to its buffer the same number each time: a repetition must find it as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale: torch.Tensor
        y = torch.tanh(self.linear(x)) * self.scale.clone()
        self.scale.clamp_(0.1, 0.9)
        return y


class Inner(Stack):
    """Blocks in blocks, and both are named."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(DropBlock(8), nn.Tanh(), DropBlock(8)))

    def forward(self) -> torch.Tensor:
        x = self.start[None] * 1.0
        for block in self.blocks:
            x = block(x)
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "refilled": Refilled,
    "own generators": Given,
    "sure": lambda: Stack(Sure),
}


@pytest.mark.parametrize("name", MODELS)
def test_equal_bit_for_bit(name: str) -> None:
    expected = run(MODELS[name], None)
    for variant in AGAIN:
        same(run(MODELS[name], VARIANTS[variant]), expected)


@pytest.mark.parametrize("variant", ["full", "selective", "offload"])
def test_blocks_in_blocks(variant: str) -> None:
    policy = Activation(variant, blocks=["Sequential", "DropBlock"])
    same(run(Inner, policy), run(Inner, None))


class Noisy(nn.Module):
    """Draws in an operator whose result ``selective`` keeps, and then in others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = F.dropout(torch.tanh(self.linear(x + torch.rand_like(x))), 0.4)
        return x * torch.sigmoid(x)


@pytest.mark.parametrize("operators", [["aten.rand_like"], ["aten.rand_like", "matmul"], ["attention", "aten.tanh"]])
def test_what_is_drawn_after_a_kept_draw(operators: list[str]) -> None:
    policy = Activation("selective", operators=operators)
    same(run(lambda: Stack(Noisy), policy), run(lambda: Stack(Noisy), None))


class Overwriting(nn.Module):
    """Changes what tanh has saved, and goes on; or another function, of which the backward needs nothing."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.linear, self.wrong = nn.Linear(8, 8), wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x)) if self.wrong else self.linear(x) * 2.0
        return torch.sin(y.mul_(3.0))


def test_what_torch_refuses_is_refused() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(lambda: Stack(lambda: Overwriting(True)), None)
    for policy in (VARIANTS["full"], Activation("offload")):
        with pytest.raises(
            LitZeroError,
            match=r"Block 'blocks.2' has saved a tensor of shape \[6, 8\] for its backward, which has been changed in "
            r"place since. Use the operation that is not in place: torch refuses this one without activation too.",
        ):
            run(lambda: Stack(lambda: Overwriting(True)), policy)
        same(
            run(lambda: Stack(lambda: Overwriting(False)), policy), run(lambda: Stack(lambda: Overwriting(False)), None)
        )


class Sometimes(nn.Module):
    """Writes to its buffer in every second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(8, 8), 0
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean: torch.Tensor
        if self.count % 2:
            self.mean.add_(1.0)
        self.count += torch._C._current_graph_task_id() == -1
        return torch.tanh(self.linear(x) + self.mean)


def test_a_buffer_that_is_written_now_and_then_is_named() -> None:
    with pytest.raises(
        LitZeroError,
        match="Block 'blocks.0' has written to its buffer 'mean', and had not when it first ran, so there is no copy "
        "with which it could be computed again. Let it write in every forward or in none, or leave the block out with "
        "activation.blocks.",
    ):
        run(lambda: Stack(Sometimes), VARIANTS["full"])


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.left = nn.Linear(8, 8), [1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x * self.left.pop()))


def test_a_block_that_fails_the_second_time_is_named() -> None:
    model = Stack(Once)
    apply(model, VARIANTS["full"])
    with pytest.raises(IndexError) as caught:
        model().sum().backward()
    assert caught.value.__notes__ == [
        "Block 'blocks.2' does something else when it is computed again: it did not fail in the forward, and now it "
        "has. What it does may depend on its arguments, parameters and random numbers only, not on what it has stored "
        "elsewhere (a cache: use_cache=False; a counter). Leave the block out with activation.blocks, or use "
        "activation='offload'."
    ]


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, state: SimpleNamespace) -> torch.Tensor:
        state.mask = torch.ones(8)  # what a block adds does no harm
        return torch.tanh(self.linear(state.x))


@pytest.mark.parametrize("replaced", [False, True])
def test_an_object_whose_tensors_are_replaced_is_named(replaced: bool) -> None:
    model = Stack(Holder)
    apply(model, VARIANTS["full"])
    state = SimpleNamespace(x=model.start * 1.0)
    y = model.blocks[0](state)
    if not replaced:
        y.sum().backward()
        return
    state.x = y
    with pytest.raises(
        LitZeroError,
        match="Block 'blocks.0' is to be computed again, but an object among its arguments holds other tensors than it "
        "did. Give it one that does not change, or leave the block out with activation.blocks.",
    ):
        y.sum().backward()


def test_a_module_can_be_pickled() -> None:
    model = DropGPT()
    apply(model, VARIANTS["full"])
    twin = pickle.loads(pickle.dumps(model))
    for each in (model, twin):
        torch.manual_seed(0)
        each.logits = each(tokens(0))
    assert torch.equal(model.logits, twin.logits)
    calls = twin.blocks[0].calls
    twin.logits.sum().backward()
    assert twin.blocks[0].calls == calls, "a copy is as the user made the module"


def test_a_torch_without_the_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    expected = gradients(DropGPT(), None, tokens(0))
    monkeypatch.setattr(compiling, "_watch", compiling._nobody)
    monkeypatch.setattr(applied, "watcher", compiling._nobody)
    torch.manual_seed(0)
    same(gradients(DropGPT(), VARIANTS["full"], tokens(0)), expected)
