"""The optimizer's state, parameter by parameter: pieces that tile, a round trip, counts of steps, groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError
from lit_zero.precision import Lowering
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import GPT, adamw, momentum, tokens

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


# ---- state, parameter by parameter


def saved(engine: Engine) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Return this rank's part of weights and optimizer state, as a checkpoint would take it."""
    described = engine.describe_states(0, World().all_gather_object)
    states = [
        (s.index, s.name, {key: (p.start, p.data.clone()) for key, p in s.tensors.items()}, s.scalars)
        for s in engine.optimizer_pieces(0, described)
    ]
    return described, states, [(p.name, p.start, p.data.clone()) for p in engine.parameter_pieces()]


def whole(parts: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Put one tensor's pieces together, and check that they tile it."""
    end, found = 0, []
    for start, data in sorted(((s, d) for s, d in parts if d.numel()), key=lambda part: part[0]):
        assert start == end, "pieces tile: no gap, no element twice"
        end += data.numel()
        found.append(data)
    return torch.cat(found)


def state_pieces(stage: str) -> Any:
    model, optimizer = small()
    engine = engine_on(model, optimizer, stage)
    steps(engine, model, range(3))
    found = saved(engine)
    engine.exchange.close()
    return found


def reference() -> tuple[GPT, torch.optim.Optimizer]:
    model, optimizer = small()
    for number in range(3):
        model.loss(tokens(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_pieces_tile_and_equal_one_process(ranks, size, stage):
    outcomes = ranks(size).run(state_pieces, stage)
    model, optimizer = reference()
    by_name = dict(model.named_parameters())
    order = [next(n for n, q in by_name.items() if q is p) for g in optimizer.param_groups for p in g["params"]]
    for described, states, _ in outcomes:
        assert [(index, name) for index, name, _, _ in states] == list(enumerate(order)), "in the user's own order"
        assert described.keys() == set(order)
    for index, name in enumerate(order):
        expected = optimizer.state[by_name[name]]
        for key in ("exp_avg", "exp_avg_sq"):
            data = whole([outcome[1][index][2][key] for outcome in outcomes])
            torch.testing.assert_close(data, expected[key].flatten(), rtol=1e-9, atol=1e-15)
        for _, states, _ in outcomes:
            assert states[index][3].keys() == {"step"} and states[index][3]["step"].item() == 3
        data = whole([(start, d) for outcome in outcomes for n, start, d in outcome[2] if n == name])
        torch.testing.assert_close(data, by_name[name].detach().flatten(), rtol=1e-9, atol=1e-12)


def resumed(stage: str, optimizer_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    build = {"adamw": adamw, "momentum": momentum}[optimizer_name]
    torch.manual_seed(0)
    model = GPT(layers=2).double()
    engine = engine_on(model, build(model), stage)
    steps(engine, model, range(3))
    described, states, weights = saved(engine)
    steps(engine, model, range(3, 5))
    expected = flat(engine)

    torch.manual_seed(1)
    model = GPT(layers=2).double()
    engine = engine_on(model, build(model), stage)
    steps(engine, model, range(1))  # has state of its own, which must go
    engine.bindings[0].prepare_states(described)
    for into, (_, name, tensors, scalars) in zip(engine.optimizer_pieces(0, described), states, strict=True):
        assert into.name == name
        assert all(torch.equal(torch.as_tensor(into.scalars[k]), torch.as_tensor(v)) for k, v in scalars.items() if v)
        for key, piece in into.tensors.items():
            assert piece.start == tensors[key][0] or not piece.data.numel()
            piece.data.copy_(tensors[key][1])
    for into, (name, start, data) in zip(engine.parameter_pieces(), weights, strict=True):
        assert (into.name, into.start) == (name, start)
        into.data.copy_(data)
    if stage == "none":  # every rank steps with all of it, and has been given its part
        fill_replicated(engine, described, states, weights)
    engine.refresh()
    steps(engine, model, range(3, 5))
    return flat(engine), expected


def fill_replicated(engine: Engine, described: dict[str, Any], states: list[Any], weights: list[Any]) -> None:
    everyones = World().all_gather_object((states, weights))
    for into in engine.parameter_pieces(to_load=True):
        into.data.copy_(whole([(s, d) for _, w in everyones for n, s, d in w if n == into.name]))
    for number, state in enumerate(engine.optimizer_pieces(0, described, to_load=True)):
        for key, piece in state.tensors.items():
            piece.data.copy_(whole([s[number][2][key] for s, _ in everyones]))


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
@pytest.mark.parametrize("stage", STAGES)
def test_loaded_state_continues_bit_for_bit(ranks, stage, optimizer):
    for weights, expected in ranks(2).run(resumed, stage, optimizer):
        assert torch.equal(weights, expected)


def different_counts() -> tuple[int, int, dict[str, float]]:
    """Parameters of one run come from a checkpoint with different numbers of steps."""
    model, optimizer = small()
    engine = engine_on(model, optimizer, "stage2")
    steps(engine, model, range(1))
    described = engine.describe_states(0, World().all_gather_object)
    before = len(engine.bindings[0].segments)
    for number, (_, scalars) in enumerate(described.values()):
        scalars["step"] = torch.tensor(float(number))
    engine.bindings[0].prepare_states(described)
    found = {}
    for segment in engine.bindings[0].segments:
        position = segment.lane.master_start + segment.first
        name = next(e.name for e in segment.lane.layout.entries if e.offset <= position < e.end)
        found[name] = optimizer.state[segment.param]["step"].item() - list(described).index(name)
    engine.exchange.close()
    return before, len(engine.bindings[0].segments), found


def test_parameters_with_different_counts_of_steps_are_split(ranks):
    for before, after, found in ranks(2).run(different_counts):
        assert before < after
        assert set(found.values()) == {0.0}


def test_groups_are_torchs_own_and_others_are_refused():
    model, optimizer = small()
    expected = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    binding = engine_on(model, optimizer, "stage2").bindings[0]
    groups = binding.groups()
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == expected
    assert [g["params"] for g in groups] == [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
    groups[1]["lr"] = 0.5
    binding.load_groups(groups)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.5]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(s.param) for s in binding.segments}, "what is stepped is not replaced"
    with pytest.raises(CheckpointError) as caught:
        binding.load_groups(groups[:1])
    assert str(caught.value) == (
        f"The checkpoint's optimizer has parameter groups of [{sizes[0]}] parameters, this run's configure_optimizers "
        f"gives {sizes}. Load with the same groups, or load only the weights."
    )


class Tiny(nn.Module):
    """Two elements, so that most ranks own none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))


def tiny_states() -> Any:
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = engine_on(model, optimizer, "stage2")
    for _ in range(2):
        engine.backward(model.weight.square().sum())
        engine.step()
    found = saved(engine)
    engine.bindings[0].prepare_states(found[0])
    again = [len(state.tensors) for state in engine.optimizer_pieces(0, found[0])]
    engine.exchange.close()
    return found, again


def test_the_state_of_a_rank_without_a_share_is_empty(ranks):
    for rank, ((described, states, _), again) in enumerate(ranks(4).run(tiny_states)):
        assert described.keys() == {"weight"}
        assert [data.numel() for _, data in states[0][2].values()] == [2 if rank == 0 else 0] * 2
        assert again == [2]
