"""One process: models that break checkpointing, each equal bit for bit to the same model without."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_zero.activation.policy import Activation
from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import LitZeroError
from tests.activation.harness import VARIANTS, DropBlock, DropGPT, apply, gradients, same
from tests.zero.harness import GPT, tokens


class Stack(nn.Module):
    """Some blocks on one stream, which is a leaf that wants a gradient."""

    def __init__(self, make: Callable[[], nn.Module], count: int = 3) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(6, 8))
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self) -> torch.Tensor:
        x = self.start * 1.0
        for block in self.blocks:
            x = block(x)
        return x


class OwnDice(nn.Module):
    """Draws from Python's and numpy's generators too, as layer drop does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if random.random() < 0.5:
            x = torch.tanh(self.one(x))
        return F.gelu(self.other(F.dropout(x, 0.3))) * float(np.random.rand())


class Normed(nn.Module):
    """Batch statistics, and a spectral norm whose vectors every forward in training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(self.norm(x)))


class Inside(nn.Module):
    """Checkpoints that the user has put inside the block."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = checkpoint(
                lambda y, linear=linear: F.dropout(torch.tanh(linear(y)), 0.2), x, use_reentrant=self.reentrant
            )
            x = x * torch.sigmoid(x)
        return x


class Outside(Stack):
    """Checkpoints that the user has put around the blocks."""

    reentrant = False

    def forward(self) -> torch.Tensor:
        x = self.start * 1.0
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class OutsideReentrant(Outside):
    reentrant = True


class Twice(DropGPT):
    """The blocks run twice; a weight is shared by two of them; one stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks.append(self.blocks[1])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))


class Frozen(DropGPT):
    """The stream wants no gradient before the second block, and only parts of that do."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.embedding.requires_grad_(False)
        self.blocks[0].requires_grad_(False)
        self.blocks[1].qkv.requires_grad_(False)


class Containers(nn.Module):
    """Takes keywords and containers, and gives a dictionary with a tensor that passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, pair: dict[str, Any], *, scale: tuple[float, torch.Tensor]) -> dict[str, Any]:
        x = torch.tanh(self.linear(pair["x"])) * scale[0] + scale[1]
        return {"x": x, "aside": [pair["x"], 3]}


class Nested(Stack):
    def __init__(self) -> None:
        super().__init__(Containers)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self) -> torch.Tensor:
        pair: dict[str, Any] = {"x": self.start * 1.0}
        for block in self.blocks:
            pair = block(pair, scale=(0.5, self.bias))
        return pair["x"] + pair["aside"][0]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.linear(x), inplace=True).mul(2.0) + 1.0


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own dice": lambda: Stack(OwnDice),
    "batch norm": lambda: Stack(Normed),
    "reentrant inside": lambda: Stack(lambda: Inside(True)),
    "checkpoints inside": lambda: Stack(lambda: Inside(False)),
    "checkpoints outside": lambda: Outside(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))),
    "reentrant outside": lambda: OutsideReentrant(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))),
    "containers": Nested,
    "in place": lambda: Stack(InPlace),
}
GPTS: dict[str, Callable[[], nn.Module]] = {"gpt": DropGPT, "twice": Twice, "frozen": Frozen}


def run(make: Callable[[], nn.Module], policy: Activation | None, *inputs: Any) -> dict[str, torch.Tensor]:
    """Return gradients and buffers."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = make()
    found = gradients(model, policy, *inputs)
    return {**found, **{f"buffer {name}": value.clone() for name, value in model.named_buffers()}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*MODELS, *GPTS])
def test_equal_bit_for_bit(name: str, variant: str) -> None:
    if (name, variant) == ("in place", "selective"):
        pytest.skip("what is kept is changed: see test_selective_says_what_is_changed")
    make = {**MODELS, **GPTS}[name]
    inputs = (tokens(0),) if name in GPTS else ()
    same(run(make, VARIANTS[variant], *inputs), run(make, None, *inputs))


def test_selective_says_what_is_changed() -> None:
    with pytest.raises(RuntimeError, match="cached during selective activation checkpoint has been mutated"):
        run(MODELS["in place"], VARIANTS["selective"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str) -> None:
    def train(policy: Activation | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = DropGPT()
        applied = None if policy is None else apply(model, policy)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens(0)).square().mean()
        loss.backward()  # outside: the repetition must find autocast by itself
        if applied is not None:
            applied.remove()
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}

    same(train(VARIANTS[variant]), train(None))


def test_default_dtype_is_that_of_the_forward() -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.linear(x) + torch.ones(8))

    model = Stack(Made).double()
    apply(model, VARIANTS["full"])
    torch.set_default_dtype(torch.float64)
    try:
        loss = model().sum()
    finally:
        torch.set_default_dtype(torch.float32)
    loss.backward()
    assert torch.get_default_dtype() is torch.float32
    assert model.start.grad is not None and model.start.grad.dtype is torch.float64


@pytest.mark.parametrize("variant", ["full", "selective", "offload"])
def test_a_graph_that_is_kept_is_gone_through_again(variant: str) -> None:
    torch.manual_seed(0)
    model = DropGPT()
    apply(model, VARIANTS[variant])
    loss = model(tokens(0)).square().mean()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_gradients() -> None:
    def second(policy: Activation | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Stack(OwnDice)
        if policy is not None:
            apply(model, policy)
        random.seed(0)
        np.random.seed(0)
        (grad,) = torch.autograd.grad(model().square().sum(), model.start, create_graph=True)
        weights = [param for param in model.parameters() if param is not model.start]
        return [g for g in torch.autograd.grad(grad.square().sum(), weights, allow_unused=True) if g is not None]

    for variant in ("full", "offload"):
        found, expected = second(VARIANTS[variant]), second(None)
        assert len(expected) > 3
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), variant


def test_the_random_stream_goes_on_as_without() -> None:
    def draws(policy: Activation | None) -> tuple[float, ...]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Stack(OwnDice)
        if policy is not None:
            apply(model, policy)
        model().sum().backward()
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    assert draws(VARIANTS["full"]) == draws(None)


class Counted(DropBlock):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_is_as_without(context: Any) -> None:
    model = GPT(layers=0)
    model.blocks = nn.ModuleList(Counted(12) for _ in range(3))
    applied = apply(model, VARIANTS["full"])
    model.eval()
    Counted.calls = 0
    with context():
        logits = model(tokens(0))
    assert Counted.calls == 3 and not logits.requires_grad
    model(tokens(0)).sum().backward()
    assert Counted.calls == 3 + 6, "with gradient each block runs twice, in eval() too"
    applied.remove()
    model(tokens(0)).sum().backward()
    assert Counted.calls == 3 + 6 + 3


def test_the_module_is_as_before() -> None:
    model = DropGPT()
    keys, before = list(model.state_dict()), [vars(block).keys() - {"calls"} for block in model.blocks]
    applied = apply(model, VARIANTS["full"])
    assert list(model.state_dict()) == keys
    assert all(type(block) is DropBlock for block in model.blocks)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    one = twin(tokens(0))
    before_copy = twin.blocks[0].calls
    one.sum().backward()
    assert twin.blocks[0].calls == before_copy, "a copy is as the user made the module"
    torch.manual_seed(0)
    assert torch.equal(one, model(tokens(0)))
    applied.remove()
    assert [vars(block).keys() - {"calls"} for block in model.blocks] == before


def test_a_forward_of_the_instance_comes_back() -> None:
    model = DropGPT()
    block, own = model.blocks[0], model.blocks[0].forward
    block.forward = lambda x: own(x) + 1
    mine = block.forward
    applied = apply(model, VARIANTS["offload"])
    assert block.forward is not mine
    applied.remove()
    assert block.forward is mine


class Cached(nn.Module):
    """Stores something elsewhere in its forward: what Hugging Face's models do with use_cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.cache: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.append(x.detach())
        return torch.tanh(self.linear(torch.cat(self.cache)))[: len(x)]


def test_a_block_that_does_something_else_the_second_time_is_named() -> None:
    model = Stack(Cached)
    apply(model, VARIANTS["full"])
    with pytest.raises(
        LitZeroError,
        match=r"Block 'blocks.2' does something else when it is computed again: the saved tensor 0 was \[6, 8\] "
        r"torch.float32, and now is \[12, 8\] torch.float32.*use_cache=False",
    ):
        model().sum().backward()


def test_an_argument_that_is_changed_is_named() -> None:
    model = Stack(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    apply(model, VARIANTS["full"])
    x = model.start * 1.0
    loss = model.blocks[0](x).sum()
    x.add_(1)
    with pytest.raises(
        LitZeroError,
        match=r"Block 'blocks.0' is to be computed again, but an argument of it, shape \[6, 8\], has been written to "
        r"since. Do not change it in place, or leave the block out with activation.blocks.",
    ):
        loss.backward()


def test_what_is_dropped_is_freed_node_by_node() -> None:
    """Autograd lets go of a repeated tensor as of one that was kept: nothing waits for the end of the backward."""
    from benchmark_worker import TensorMemory

    def peak(policy: Activation | None) -> int:
        torch.manual_seed(0)
        model = DropGPT(layers=8)
        if policy is not None:
            apply(model, policy)
        model(tokens(0)).sum().backward()  # gradients are there from now on
        with TensorMemory() as memory:
            loss = model(tokens(0)).sum()
            memory.peak = 0
            loss.backward()
            return memory.peak

    assert peak(VARIANTS["full"]) < 0.6 * peak(None)


def test_offload_of_a_backward_that_never_comes_leaves_nothing() -> None:
    model = DropGPT()
    applied = apply(model, VARIANTS["offload"])
    assert applied.host is not None
    loss = model(tokens(0)).sum()
    assert applied.host.held > 0
    del loss
    assert applied.host.held == 0
    loss = model(tokens(0)).sum()
    loss.backward()
    assert (applied.host.held, applied.host.ahead) == (0, 0)
    assert 0 < applied.host.most <= max(4096, 8 * 9 * 48 * 4), "the limit, or one tensor that is larger"
    applied.step_is_over(Exchange())
