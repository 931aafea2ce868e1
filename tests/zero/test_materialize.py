"""Modules built on the meta device get the values of an eager build, or an error that names them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import UnsupportedError
from lit_zero.zero.materialize import materialize, on_meta
from tests.zero.harness import GPT

CPU = torch.device("cpu")


def eager(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def deferred(build: Callable[[], nn.Module], seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the module and what went to the sink."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = build()
    values: dict[str, torch.Tensor] = {}

    def sink(name: str, value: torch.Tensor) -> None:
        assert name not in values, f"{name} came twice"
        values[name] = value.clone()

    materialize(model, CPU, Exchange(), sink)
    return model, values


class Norm(nn.Module):
    """Constants from a factory in the constructor, as many have it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Tied(nn.Module):
    """A head that is tied to the embedding but has a bias of its own, and layers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.bare = nn.Linear(4, 7, bias=False)
        self.bare.weight = self.embedding.weight
        self.after = nn.Linear(4, 4)


class Twice(nn.Module):
    """One parameter under two names in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5))
        self.again = self.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "GPT": GPT,
    "convolutions and batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ConvTranspose1d(2, 2, 2)
    ),
    "bilinear and PReLU": lambda: nn.Sequential(nn.Bilinear(2, 3, 4), nn.PReLU(), nn.GroupNorm(2, 4)),
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "factories": lambda: nn.Sequential(nn.Linear(3, 3), Norm(3), nn.Linear(3, 3)),
    "tied": Tied,
    "one parameter, two names": Twice,
    "a shared module": lambda: (lambda layer: nn.Sequential(layer, nn.Linear(3, 3), layer))(nn.Linear(3, 3)),
    "fp64 and bf16": lambda: nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 3, dtype=torch.bfloat16)),
    "no elements": lambda: nn.Sequential(nn.Linear(3, 3), nn.Embedding(0, 3)),
}


@pytest.mark.parametrize("case", BUILDS)
def test_values_equal_those_of_an_eager_build(case):
    expected = {name: p.detach() for name, p in eager(BUILDS[case]).named_parameters()}
    model, values = deferred(BUILDS[case])
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.shape == expected[name].shape and value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    assert not on_meta(model) and not any(b.is_meta for b in model.buffers())
    for (name, buffer), other in zip(model.named_buffers(), eager(BUILDS[case]).buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_a_recurrent_layer_still_runs():
    model, values = deferred(lambda: nn.GRU(3, 4, bidirectional=True))
    for name, param in model.named_parameters():
        param.data = values[name]
    expected = eager(lambda: nn.GRU(3, 4, bidirectional=True))
    x = torch.randn(5, 2, 3)
    assert torch.equal(model(x)[0], expected(x)[0])


def test_another_seed_gives_other_values():
    assert not torch.equal(deferred(GPT, 0)[1]["embedding.weight"], deferred(GPT, 1)[1]["embedding.weight"])


def test_parameters_keep_their_identity_and_their_flags():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    materialize(model, CPU, Exchange(), lambda name, value: None)
    assert all(param is before[name] for name, param in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


def test_only_one_module_is_whole_at_a_time():
    sizes = []
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(5)))

    def sink(name: str, value: torch.Tensor) -> None:
        sizes.append(sum(p.numel() for p in model.parameters() if not p.is_meta))

    materialize(model, CPU, Exchange(), sink)
    assert sizes == [100] * 5


def test_a_model_that_has_memory_is_left_alone():
    model, state = GPT(), torch.get_rng_state()
    materialize(model, CPU, Exchange(), lambda name, value: pytest.fail("nothing to do"))
    assert torch.equal(torch.get_rng_state(), state)


# ---- partly on the meta device


def half_loaded() -> nn.Module:
    """The first layer's weight and a buffer have been loaded already."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.full((3, 3), 7.0, device="cpu"))
    model[1].running_mean = torch.full((3,), 5.0, device="cpu")
    return model


def test_what_is_on_a_real_device_keeps_its_value():
    model, values = deferred(half_loaded)
    assert model[0].weight.eq(7.0).all() and model[0].weight.shape == (3, 3)
    assert model[1].running_mean.eq(5.0).all()
    assert model[1].running_var.eq(1.0).all()
    assert sorted(values) == ["0.bias", "1.bias", "1.weight", "2.bias", "2.weight"]
    expected = eager(half_loaded)
    assert all(torch.equal(value, expected.get_parameter(name)) for name, value in values.items())


# ---- refused


class Unset(nn.Module):
    def __init__(self, buffer: bool = False, complex_: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.table: torch.Tensor
        self.register_buffer("table", torch.empty(3, dtype=torch.complex64 if complex_ else None) if buffer else None)

    def reset_parameters(self) -> None:
        if self.table is not None:
            nn.init.ones_(self.weight)


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))


class NoResetForBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(3.0))


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.randn(3))


class Watched(nn.Module):
    """Something watches its parameter through a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.watch = weakref.ref(self.weight)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


def initialised_again() -> nn.Module:
    model = GPT()
    nn.init.normal_(model.blocks[1].up.weight, std=0.02)
    return model


def scaled_afterwards() -> nn.Module:
    model = GPT()
    with torch.no_grad():
        model.blocks[2].down.weight.mul_(0.5)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no reset_parameters": (
        NoReset,
        "Module 'block' (NoReset) is on the meta device and has no reset_parameters() to initialise it. Add one, or "
        "build the module on a real device.",
    ),
    "no reset_parameters for a buffer": (
        NoResetForBuffers,
        "Module 'block' (NoResetForBuffers) is on the meta device and has no reset_parameters() to initialise it. Add "
        "one, or build the module on a real device.",
    ),
    "a parameter that is not set": (
        Unset,
        "Module 'block' (Unset) is on the meta device and its reset_parameters() does not set 'weight'. Set it there, "
        "or build the module on a real device.",
    ),
    "a buffer that is not set": (
        lambda: Unset(buffer=True),
        "Module 'block' (Unset) is on the meta device and its reset_parameters() does not set 'table'. Set it there, "
        "or build the module on a real device.",
    ),
    "a complex buffer that is not set": (
        lambda: Unset(buffer=True, complex_=True),
        "Module 'block' (Unset) is on the meta device and its reset_parameters() does not set 'table'. Set it there, "
        "or build the module on a real device.",
    ),
    "a parameter that is replaced": (
        Replacing,
        "Module 'block' (Replacing) is on the meta device and its reset_parameters() puts a new parameter in the place "
        "of 'weight', which optimizers do not know. Write to the one that is there (with nn.init), or build the module "
        "on a real device.",
    ),
    "watched": (
        Watched,
        "Module 'block' (Watched) is on the meta device, and its 'weight' cannot be given memory: Cannot swap t1 "
        "because it has weakref associated with it. Build the module on a real device.",
    ),
    "initialised again": (
        initialised_again,
        "Module 'block.blocks.1.up' (Linear) is on the meta device, but 'weight' has been initialised again after it "
        "was constructed, and that value would be lost. Initialise it in the module's reset_parameters(), or build the "
        "module on a real device.",
    ),
    "scaled afterwards": (
        scaled_afterwards,
        "Module 'block.blocks.2.down' (Linear) is on the meta device, but 'weight' has been initialised again after it "
        "was constructed, and that value would be lost. Initialise it in the module's reset_parameters(), or build the "
        "module on a real device.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_come_out_wrong_is_refused_by_name(case):
    build, message = REFUSED[case]
    with pytest.raises(UnsupportedError) as caught:
        deferred(lambda: nn.ModuleDict({"block": build()}))
    assert str(caught.value) == message


# ---- ranks


def random_states(seed_by_rank: bool) -> Any:
    import torch.distributed as dist

    from lit_zero.comm import Comm
    from lit_zero.comm.open import open_exchange

    torch.manual_seed(dist.get_rank() if seed_by_rank else 0)
    with torch.device("meta"):
        model = GPT()
    values: dict[str, torch.Tensor] = {}
    exchange = open_exchange(Comm(), CPU)
    materialize(model, CPU, exchange, lambda name, value: values.update({name: value.clone()}))
    exchange.close()
    return values


def test_every_rank_makes_the_values_of_rank_zero(ranks):
    expected = {name: p.detach() for name, p in eager(GPT).named_parameters()}
    for values in ranks(2).run(random_states, True):
        assert values.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in values.items())
