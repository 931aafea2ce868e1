"""Whole parameters, gradients and states are read and written alike in every stage; what would be lost is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.precision import Lowering, Precision
from lit_zero.zero import Zero
from lit_zero.zero.access import Access
from lit_zero.zero.engine import Engine
from tests.pool import RankFailure
from tests.zero.harness import BATCH, GPT, Block, adamw, tokens

STAGES = ("none", "stage1", "stage2", "stage3")
NAMES = ("embedding.weight", "blocks.1.qkv.weight", "blocks.2.down.bias", "norm.weight")


def build(stage: str, lowering: Lowering | None = None, model: Callable[[], nn.Module] = GPT, **more: Any) -> Engine:
    torch.manual_seed(0)
    net = model()
    optimizer = adamw(net)
    exchange = open_exchange(Comm(), torch.device("cpu"))
    return Engine(net, [optimizer], zero=Zero(stage), exchange=exchange, lowering=lowering, **more)


def rows(engine: Engine) -> slice:
    share = BATCH // engine.exchange.size
    return slice(engine.exchange.rank * share, (engine.exchange.rank + 1) * share)


def step(engine: Engine, number: int) -> None:
    mixed = any(lane.lowered for lane in engine.lanes)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = engine.model.loss(tokens(number, rows(engine)))
    engine.backward(loss)
    engine.step()


def look(stage: str) -> dict[str, Any]:
    """Read everything after one step and a backward; then write everything and read it again."""
    engine = build(stage)
    step(engine, 0)
    engine.backward(engine.model.loss(tokens(1, rows(engine))))
    full = Access(engine)

    def read() -> dict[str, torch.Tensor]:
        found = {}
        for name in NAMES:
            found[name] = full.parameter(name)
            found[f"{name} gradient"] = full.gradient(name)
            found[f"{name} exp_avg"] = full.state(name, "exp_avg")
        return found

    before = read()
    for name in NAMES:
        value = before[name]
        full.set_parameter(name, value * 2)
        full.set_gradient(name, value * 3)
        full.set_state(name, "exp_avg", value * 4)
    after = read()
    by_object = torch.equal(full.parameter(engine.model.head.weight), after["embedding.weight"])
    used = engine.model.loss(tokens(2, rows(engine))).item()
    engine.step()
    stepped = read_parameters(full)
    none = full.gradient(NAMES[0])
    engine.detach()
    return {"before": before, "after": after, "by_object": by_object, "used": used, "stepped": stepped, "none": none}


def read_parameters(full: Access) -> dict[str, torch.Tensor]:
    return {name: full.parameter(name) for name in NAMES}


def alone() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = GPT()
    optimizer = adamw(net)
    net.loss(tokens(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    net.loss(tokens(1)).backward()
    found = {}
    for name in NAMES:
        param = net.get_parameter(name)
        found[name], found[f"{name} gradient"] = param.detach().clone(), param.grad.clone()
        found[f"{name} exp_avg"] = optimizer.state[param]["exp_avg"].clone()
    with torch.no_grad():
        for name in NAMES:
            param, value = net.get_parameter(name), found[name]
            param.copy_(value * 2)
            param.grad.copy_(value * 3)
            optimizer.state[param]["exp_avg"].copy_(value * 4)
    found["used"] = torch.stack([net.loss(tokens(2)[part : part + 4]) for part in (0, 4)])
    optimizer.step()
    return {**found, **{f"{name} stepped": net.get_parameter(name).detach() for name in NAMES}}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_whole_values_are_read_and_written(ranks, stage, size):
    expected = alone()
    for rank, found in enumerate(ranks(size).run(look, stage)):
        for name, value in found["before"].items():
            assert value.shape == expected[name].shape
            assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name
        for name in NAMES:
            value = found["before"][name]
            for suffix, factor in (("", 2), (" gradient", 3), (" exp_avg", 4)):
                assert torch.equal(found["after"][name + suffix], value * factor)
            assert torch.allclose(found["stepped"][name], expected[f"{name} stepped"], rtol=1e-4, atol=1e-5)
        assert found["by_object"]
        assert found["none"] is None
        if size == 2:
            assert found["used"] == pytest.approx(expected["used"][rank].item(), rel=1e-4)


def test_stages_agree_bit_for_bit(ranks):
    first, *others = (ranks(2).run(look, stage)[0] for stage in STAGES)
    for other in others:
        for moment in ("before", "after", "stepped"):
            assert all(torch.equal(other[moment][name], value) for name, value in first[moment].items())


class PartlyFrozen(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)


def complain(stage: str) -> list[str]:
    engine = build(stage, model=PartlyFrozen)
    full = Access(engine)
    step(engine, 0)
    said = []
    for ask in (
        lambda: full.parameter("norm.wieght"),
        lambda: full.parameter(nn.Parameter(torch.zeros(1))),
        lambda: full.set_parameter("norm.weight", torch.zeros(3)),
        lambda: full.gradient("blocks.0.norm1.weight"),
        lambda: full.set_gradient("norm.weight", torch.zeros(12)),
        lambda: full.state("norm.weight", "exp_avgs"),
        lambda: engine.bindings_of(torch.optim.SGD([nn.Parameter(torch.zeros(1))])),
    ):
        with pytest.raises(LitZeroError) as caught:
            ask()
        said.append(str(caught.value))
    frozen = full.parameter("blocks.0.norm1.weight")
    assert torch.equal(frozen, torch.ones(12))
    engine.detach()
    return said


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_wrong_questions_are_answered_in_words(ranks, stage):
    for said in ranks(2).run(complain, stage):
        assert said[0].startswith("There is no parameter 'norm.wieght'. Did you mean 'norm.weight'?")
        assert said[1] == "This tensor is not a parameter of the module that the strategy trains."
        assert said[2] == "'norm.weight' has shape (12,), but the new value has shape (3,)."
        assert said[3].startswith("'blocks.0.norm1.weight' is in no optimizer, so it has no gradient")
        assert said[4] == "'norm.weight' has no gradient to overwrite; run a backward first."
        assert said[5].startswith("The optimizer keeps no state 'exp_avgs' of 'norm.weight'. Did you mean 'exp_avg'?")
        assert said[6].startswith("This SGD is not one of the optimizers")


# ---- what would be lost


MIXED = Lowering(Precision(), torch.bfloat16)


def write_in_place(stage: str, lowering: Lowering | None, name: str) -> None:
    engine = build(stage, lowering, PartlyFrozen)
    step(engine, 0)
    with torch.no_grad():
        engine.model.get_parameter(name).mul_(0.5)
    step(engine, 1)


@pytest.mark.parametrize(
    ("stage", "lowering", "name"),
    [
        ("stage3", None, "blocks.1.up.weight"),
        ("stage3", None, "blocks.0.up.weight"),
        ("stage2", None, "blocks.1.up.weight"),
        ("none", MIXED, "blocks.1.up.weight"),
        ("stage1", MIXED, "blocks.0.up.weight"),
    ],
)
def test_writing_to_a_parameter_is_refused_where_it_would_be_lost(ranks, stage, lowering, name):
    with pytest.raises(RankFailure, match=f"'{name}' were changed in place outside the optimizer.*set_parameter"):
        ranks(2).run(write_in_place, stage, lowering, name)


@pytest.mark.parametrize(
    ("stage", "name"),
    [("none", "blocks.1.up.weight"), ("stage1", "blocks.0.up.weight"), ("stage2", "blocks.0.up.weight")],
)
def test_writing_to_a_parameter_is_allowed_where_every_rank_has_it(ranks, stage, name):
    ranks(2).run(write_in_place, stage, None, name)


def thaw(stage: str) -> None:
    model = PartlyFrozen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, [optimizer], zero=Zero(stage), exchange=open_exchange(Comm(), torch.device("cpu")))
    model.blocks[0].requires_grad_(True)
    step(engine, 0)


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_a_frozen_parameter_that_wants_a_gradient_later_is_refused(ranks, stage):
    with pytest.raises(RankFailure, match="was frozen at setup and requires a gradient now, too late"):
        ranks(2).run(thaw, stage)


def freeze_later(stage: str | None) -> list[torch.Tensor]:
    """Freeze a block after two steps: momentum and weight decay must not move it any more."""
    torch.manual_seed(0)
    net = GPT().double()
    optimizer = adamw(net)
    engine = None
    if stage is not None:
        exchange = open_exchange(Comm(), torch.device("cpu"))
        engine = Engine(net, [optimizer], zero=Zero(stage), exchange=exchange)
    for number in range(5):
        if number == 2:
            net.blocks[1].requires_grad_(False)
        loss = net.loss(tokens(number, rows(engine)) if engine else tokens(number))
        if engine:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if engine:
        engine.detach()
    return [param.detach().clone() for param in net.blocks[1].parameters()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_frozen_later_stands_still(ranks, stage):
    expected = freeze_later(None)
    for found in ranks(2).run(freeze_later, stage):
        assert all(torch.allclose(mine, theirs, rtol=1e-9) for mine, theirs in zip(found, expected, strict=True))


# ---- several optimizers: what travels


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ModuleList(Block(12) for _ in range(3)), nn.ModuleList(Block(12) for _ in range(3))

    def run(self, blocks: nn.ModuleList, number: int, part: slice) -> torch.Tensor:
        x = torch.randn(BATCH, 5, 12, generator=torch.Generator().manual_seed(number))[part]
        for block in blocks:
            x = block(x)
        return x.square().mean()


def count(stage: str) -> list[dict[str, int]]:
    """Return what three backwards send: of the first network, of the second, of both."""
    torch.manual_seed(0)
    pair = Pair()
    exchange = open_exchange(Comm(overlap=False), torch.device("cpu"))
    optimizers = [torch.optim.AdamW(blocks.parameters()) for blocks in (pair.first, pair.second)]
    engine = Engine(pair, optimizers, zero=Zero(stage), exchange=exchange, keep_gradients=True)
    assert not any(
        len({info.optimizer for lane in parcel.lanes for info in lane.infos}) > 1
        for unit in engine.units
        for parcel in unit.parcels
    )
    sent = []
    for number, used in enumerate([(pair.first,), (pair.second,), (pair.first, pair.second), (pair.first,)]):
        engine.begin_forward()
        loss = sum(pair.run(blocks, number, rows(engine)) for blocks in used)
        exchange.counters.reset()
        engine.backward(loss)
        sent.append({"elements": exchange.counters.sent_elements, "reductions": exchange.counters.reductions})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    engine.detach()
    return sent


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_only_what_the_loss_reaches_is_reduced(ranks, stage):
    for first, second, both, again in ranks(2).run(count, stage):
        assert first["reductions"] == second["reductions"] == again["reductions"] == both["reductions"] // 2 > 0
        assert first == again
        assert both["elements"] == pytest.approx(2 * first["elements"], rel=1e-2)


def norm_after_one_that_is_no_number(stage: str) -> tuple[float, float, float]:
    """Scale gradients by NaN, drop them, and take the next ones; return three norms."""
    engine = build(stage)
    full = Access(engine)

    def norm(number: int) -> float:
        engine.backward(engine.model.loss(tokens(number, rows(engine))))
        return engine.grad_norm().item()

    expected = norm(1)
    engine.bindings[0].optimizer.zero_grad()
    norm(0)
    full.set_gradient("norm.weight", torch.full_like(full.gradient("norm.weight"), float("nan")))
    bad = engine.clip_grad_norm(0.5).item()
    engine.bindings[0].optimizer.zero_grad()
    return expected, bad, norm(1)


@pytest.mark.parametrize("stage", STAGES)
def test_a_norm_that_is_no_number_leaves_nothing_behind(ranks, stage):
    for expected, bad, after in ranks(2).run(norm_after_one_that_is_no_number, stage):
        assert bad != bad
        assert after == expected
