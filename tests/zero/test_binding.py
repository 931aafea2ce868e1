"""The optimizer on flat shards: segments, splitting, state parameter by parameter, and what is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import LitZeroError, UnsupportedError
from lit_zero.precision import Lowering, Precision
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import GPT, Run, adamw, distance, momentum, one_process, tokens, with_engine

STAGES = ("none", "stage1", "stage2", "stage3")
CPU = torch.device("cpu")


def engine_on(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, stage: str, lowering: Lowering | None = None, **zero: Any
) -> Engine:
    optimizers = [] if optimizer is None else [optimizer]
    return Engine(model, optimizers, zero=Zero(stage, **zero), exchange=open_exchange(Comm(), CPU), lowering=lowering)


def small(seed: int = 0) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = GPT(layers=2).double()
    return model, adamw(model)


def steps(engine: Engine, model: GPT, numbers: range) -> None:
    for number in numbers:
        engine.backward(model.loss(tokens(number)))
        engine.step()


def flat(engine: Engine) -> torch.Tensor:
    """Return all weights, whole, end to end."""
    engine.detach()
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


# ---- segments


def segments(stage: str) -> dict[str, Any]:
    model, optimizer = small()
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    named = {id(p): name for name, p in model.named_parameters()}
    engine = engine_on(model, optimizer, stage)
    (binding,) = engine.bindings
    covered: dict[str, list[tuple[int, int, int]]] = {}  # parameter: (group, first element, one past the last)
    for segment in binding.segments:
        (number,) = [
            n for n, group in enumerate(optimizer.param_groups) if any(p is segment.param for p in group["params"])
        ]
        assert segment.param.shape == (segment.last - segment.first,)
        assert segment.param.data_ptr() == segment.lane.master.part(segment.first, segment.last).read().data_ptr(), (
            "a view, not a copy"
        )
        for part in segment.lane.layout.overlaps(
            segment.lane.master_start + segment.first, segment.lane.master_start + segment.last
        ):
            if part.length:
                covered.setdefault(part.entry.name, []).append((number, part.start, part.start + part.length))
    wanted = {named[key]: number for number, group in enumerate(groups) for key in group}
    engine.exchange.close()
    return {"covered": covered, "wanted": wanted, "decay": [g["weight_decay"] for g in optimizer.param_groups]}


@pytest.mark.parametrize("stage", STAGES)
def test_segments_cover_every_parameter_with_its_own_group(ranks, stage):
    found = ranks(2).run(segments, stage)
    sizes = {name: p.numel() for name, p in small()[0].named_parameters()}
    for each in found:
        assert each["decay"] == [0.1, 0.0]
        for name, parts in each["covered"].items():
            assert {number for number, _, _ in parts} == {each["wanted"][name]}
    for name, size in sizes.items():
        parts = sorted({part[1:] for each in found for part in each["covered"].get(name, [])})
        end = 0
        for first, last in parts:
            assert first == end
            end = last
        assert end == size


def without_some(stage: str) -> Any:
    """The optimizer is given one group that is empty, and not all parameters."""
    model, _ = small()
    held = [p for name, p in model.named_parameters() if "blocks.1" not in name and "norm" not in name]
    groups = [{"params": held[:2]}, {"params": [], "lr": 1.0}, {"params": held[2:], "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5)
    engine = engine_on(model, optimizer, stage)
    before = {name: piece.clone() for name, piece in pieces(engine).items()}
    steps(engine, model, range(3))
    engine.clip_grad_norm(1.0)
    after = pieces(engine)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    state = [len(group["params"]) for group in engine.bindings[0].groups()]
    return changed, {n for n, p in model.named_parameters() if any(p is h for h in held)}, state, flat(engine)


def pieces(engine: Engine) -> dict[str, torch.Tensor]:
    return {piece.name: piece.data for piece in engine.parameter_pieces()}


def test_parameters_in_no_optimizer_stay_and_empty_groups_are_no_trouble(ranks):
    torch.manual_seed(0)
    model, _ = small()
    held = [p for name, p in model.named_parameters() if "blocks.1" not in name and "norm" not in name]
    optimizer = torch.optim.AdamW([{"params": held[:2]}, {"params": held[2:], "lr": 0.02}], lr=0.01, weight_decay=0.5)
    for number in range(3):
        model.loss(tokens(number)).backward()
        optimizer.step()
        model.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for stage in STAGES:
        outcomes = ranks(2).run(without_some, stage)
        assert set().union(*(changed for changed, _, _, _ in outcomes)) == outcomes[0][1]
        for changed, names, state, weights in outcomes:
            assert changed <= names
            assert state == [2, 0, len(names) - 2]
            torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


# ---- splitting


def split_midway(stage: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    plain = small()
    engine = engine_on(*plain, stage)
    steps(engine, plain[0], range(4))
    expected = flat(engine)
    model, optimizer = small()
    engine = engine_on(model, optimizer, stage)
    steps(engine, model, range(2))
    count = [len(engine.bindings[0].segments)]
    engine.bindings[0].split()
    engine.bindings[0].split()  # a second time changes nothing
    count.append(len(engine.bindings[0].segments))
    assert len(optimizer.state) == count[1], "state moves along, and nothing of the old stays"
    steps(engine, model, range(2, 4))
    return flat(engine), expected, count


@pytest.mark.parametrize("stage", STAGES)
def test_splitting_moves_the_state_and_changes_no_bit(ranks, stage):
    for weights, expected, (before, after) in ranks(2).run(split_midway, stage):
        assert before < after
        assert torch.equal(weights, expected)


# ---- what is noticed


def more_groups(stage: str) -> str:
    model, _ = small()
    model.embedding.requires_grad_(False)
    optimizer = momentum(model)
    engine = engine_on(model, optimizer, stage)
    steps(engine, model, range(1))
    model.embedding.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.embedding.parameters())})
    try:
        steps(engine, model, range(1))
    except LitZeroError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_group_that_nobody_has_followed_is_an_error(ranks, stage):
    for message in ranks(2).run(more_groups, stage):
        assert message == (
            "The parameter groups of SGD were changed in the middle of a step. Add groups before a training step "
            "begins: in a hook such as on_train_epoch_start."
        )


def zeroed(stage: str, low: str, held: bool) -> tuple[str, float]:
    """Gradients are zeroed in place, and another backward follows without a step."""
    torch.manual_seed(0)
    model = GPT(layers=2)
    optimizer = momentum(model)
    zero = {} if stage == "none" else {"accumulate": "hold" if held else "reduce"}
    lowering = Lowering(Precision(gradient_dtype=low), torch.bfloat16) if low else None
    engine = engine_on(model, optimizer, stage, lowering, **zero)

    def backward(number: int, more: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(low)):
            loss = model.loss(tokens(number))
        if more:
            with engine.no_reduce():
                engine.backward(loss)
        else:
            engine.backward(loss)

    backward(0)
    expected = [grad.clone() for grad in engine.bindings[0].grads()]
    optimizer.zero_grad()
    backward(1, more=held)
    optimizer.zero_grad(set_to_none=False)
    try:
        backward(0)
    except LitZeroError as error:
        return str(error), 0.0
    differences = [(a - b).abs().max() for a, b in zip(engine.bindings[0].grads(), expected, strict=True)]
    return "", torch.stack(differences).max().item()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("low", ["", "float32", "compute"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_zeroed_in_place_are_zero_or_an_error(ranks, stage, low, held):
    for message, difference in ranks(2).run(zeroed, stage, low, held):
        assert difference == 0.0
        if held and (stage == "stage1" or (low and stage != "none")):  # they stand for a sum that is still to come
            assert message.startswith("Gradients were changed in place (by zero_grad(set_to_none=False)")
        elif not held:
            assert message == ""


# ---- shares of nothing


class Tiny(nn.Module):
    """Two elements, so that most ranks own none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch[:, :2].to(self.weight.dtype) / 31).square().mean()


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, foreach=True),
    "AdamW one by one": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, foreach=False),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1),
}
RUNS = {
    "plain": {},
    "accumulated": {"micro_batches": 3},
    "clipped": {"clip": 0.01},
    "clipped by value": {"clip_value": 0.01, "micro_batches": 2},
}


def tiny(optimizer: str, settings: dict[str, Any]) -> list[Any]:
    run = Run(model=Tiny, loss=Tiny.loss, optimizer=OPTIMIZERS[optimizer], steps=4, **settings)
    found = []
    for stage in STAGES:
        for accumulate in ("hold", "reduce") if stage != "none" else ("hold",):
            found.append(with_engine(run, Zero(stage, accumulate=accumulate)))
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("settings", RUNS)
def test_ranks_without_a_share_keep_in_step(ranks, size, settings):
    run = Run(model=Tiny, loss=Tiny.loss, optimizer=OPTIMIZERS["SGD"], steps=4, **RUNS[settings])
    expected = one_process(run)
    for outcomes in ranks(size).run(tiny, "SGD", RUNS[settings]):
        assert all(distance(outcome, expected) < 1e-12 for outcome in outcomes)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_kind_of_step_takes_a_share_of_nothing(ranks, optimizer):
    expected = one_process(Run(model=Tiny, loss=Tiny.loss, optimizer=OPTIMIZERS[optimizer], steps=4))
    for outcomes in ranks(4).run(tiny, optimizer, {}):
        assert all(distance(outcome, expected) < 1e-12 for outcome in outcomes)


class Uneven(nn.Module):
    """A unit of two elements, which lie on one rank, beside one of many."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(1, 2, bias=False), nn.Linear(2, 500)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.many(self.few(batch[:, :1] / 31)).square().mean()


def moved() -> tuple[int, str]:
    """Move a parameter of which only one rank holds a state; return the number of states here, and the refusal."""
    torch.manual_seed(0)
    model = Uneven()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = engine_on(model, optimizer, "stage2", units=["Linear"])
    engine.backward(model.loss(tokens(0)))
    engine.step()
    states = len(optimizer.state)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(model.many.parameters())})
    optimizer.add_param_group({"params": [model.few.weight]})
    try:
        engine.follow_groups()
    except UnsupportedError as error:
        return states, str(error)
    return states, ""


def test_a_state_that_one_rank_would_lose_is_refused_on_all(ranks):
    (first, one), (second, other) = ranks(2).run(moved, timeout=60)
    assert (first, second) == (2, 1)
    assert one == other
    assert one.startswith("Parameter 'few.weight' was moved to another parameter group after the optimizer had stepped")
