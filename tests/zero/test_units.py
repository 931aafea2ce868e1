"""Which modules become units, which unit a parameter belongs to, and how a unit is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.precision import Lowering, Precision
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.units import UnitPlan, cut_evenly, plan_units


class Block(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Holder(nn.Module):
    """Whatever it is given, and a small parameter of its own."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        for name, child in children.items():
            setattr(self, name, child)


def blocks(count: int, dim: int = 4) -> nn.ModuleList:
    return nn.ModuleList(Block(dim) for _ in range(count))


def plan(model: nn.Module, units: Any = "auto", lowering: Lowering | None = None) -> dict[str, UnitPlan]:
    plans = plan_units(model, units, lowering or Lowering())
    assert plans[0].name == "", "the root comes first"
    return {each.name: each for each in plans}


def names(plans: dict[str, UnitPlan]) -> list[str]:
    return [name for name in plans if name]


def params(each: UnitPlan) -> list[str]:
    return [info.name for info in each.infos]


# ---- auto


AUTO: dict[str, tuple[Any, list[str]]] = {
    "a list": (lambda: Holder(blocks=blocks(3)), ["blocks.0", "blocks.1", "blocks.2"]),
    "a sequential": (lambda: Holder(net=nn.Sequential(Block(), Block())), ["net.0", "net.1"]),
    "the root is the sequential": (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["0", "2"]),
    "encoder and decoder": (
        lambda: Holder(encoder=Holder(layers=blocks(2)), decoder=Holder(layers=blocks(2))),
        ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"],
    ),
    "a list within blocks": (
        lambda: Holder(blocks=nn.ModuleList(Holder(experts=blocks(2)) for _ in range(2))),
        ["blocks.0", "blocks.1"],
    ),
    "a small list beside a large one": (
        lambda: Holder(blocks=blocks(2, dim=32), heads=nn.ModuleList(nn.Linear(2, 2) for _ in range(2))),
        ["blocks.0", "blocks.1"],
    ),
    "entries without parameters": (
        lambda: Holder(net=nn.Sequential(Block(), nn.ReLU(), Block(), nn.Dropout())),
        ["net.0", "net.2"],
    ),
    "another class among the blocks": (
        lambda: Holder(net=nn.Sequential(nn.Linear(4, 4), Block(), Block())),
        ["net.0", "net.1", "net.2"],
    ),
    "no list": (lambda: Holder(one=Block(), other=Block()), []),
    "a list without repetition": (lambda: Holder(net=nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))), []),
    "a list of one": (lambda: Holder(blocks=blocks(1)), []),
    "a list below a list without repetition": (
        lambda: Holder(net=nn.Sequential(nn.Linear(2, 2), nn.Sequential(Block(), Block()))),
        ["net.1.0", "net.1.1"],
    ),
    "a dictionary is no list": (lambda: Holder(blocks=nn.ModuleDict({"a": Block(), "b": Block()})), []),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_finds_the_repeated_blocks(case):
    build, expected = AUTO[case]
    assert sorted(names(plan(build()))) == sorted(expected)


# ---- chosen by the user


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (["Block"], ["blocks.0", "blocks.1", "tail"]),
        (["blocks.*.up"], ["blocks.0.up", "blocks.1.up"]),
        (["tail"], ["tail"]),
        (["Block", "blocks.1.up"], ["blocks.0", "blocks.1", "blocks.1.up", "tail"]),
        (["blocks.?"], ["blocks.0", "blocks.1"]),
        (lambda name, module: isinstance(module, nn.Linear), None),
        (lambda name, module: False, []),
        ([], []),
    ],
)
def test_units_by_class_name_pattern_or_callable(units, expected):
    model = Holder(blocks=blocks(2), tail=Block())
    if expected is None:
        expected = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(names(plan(model, units))) == sorted(expected)


def test_a_callable_sees_names_and_modules_but_never_the_root():
    seen = {}
    model = Holder(blocks=blocks(1))
    plan(model, lambda name, module: seen.setdefault(name, module) is None)
    assert seen == {name: module for name, module in model.named_modules() if name}


def test_an_unknown_unit_is_named_with_the_nearest_class():
    with pytest.raises(ConfigError) as caught:
        plan(Holder(blocks=blocks(1)), ["Blok"])
    assert str(caught.value) == (
        "zero.units names 'Blok', but no module of that class or name exists. "
        "Did you mean 'Block'? Choose one of: Block, Linear, ModuleList."
    )


@pytest.mark.parametrize("units", [["ModuleList"], ["blocks"], lambda name, module: name == "blocks"])
def test_a_unit_without_a_forward_is_refused(units):
    with pytest.raises(
        ConfigError, match="chooses 'blocks', but a ModuleList has no forward: nothing could be done when"
    ):
        plan(Holder(blocks=blocks(1)), units)


# ---- homes


def test_every_parameter_has_one_home():
    model = Holder(blocks=blocks(2), head=nn.Linear(4, 4))
    plans = plan(model)
    assert params(plans[""]) == ["scale", "head.weight", "head.bias"]
    assert params(plans["blocks.1"]) == [f"blocks.1.{name}" for name, _ in model.blocks[1].named_parameters()]
    listed = [name for each in plans.values() for name in params(each)]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


def test_inner_units_take_their_parameters_from_outer_ones():
    plans = plan(Holder(blocks=blocks(1)), ["Block", "blocks.0.up"])
    assert params(plans["blocks.0"]) == ["blocks.0.down.weight", "blocks.0.down.bias"]
    assert params(plans["blocks.0.up"]) == ["blocks.0.up.weight", "blocks.0.up.bias"]
    assert {name: each.outer for name, each in plans.items()} == {"": True, "blocks.0": True, "blocks.0.up": False}


def test_a_name_that_begins_like_another_is_not_inside_it():
    plans = plan(Holder(up=nn.Linear(2, 2), upper=nn.Linear(2, 2)), ["up", "upper"])
    assert not plans["up"].outer and not plans["upper"].outer


def test_a_unit_without_parameters_of_its_own_is_left_out():
    assert names(plan(Holder(blocks=blocks(1)), ["Block", "Linear"])) == ["blocks.0.up", "blocks.0.down"]


def test_tied_between_units_goes_to_the_root_with_all_its_names():
    model = Holder(blocks=blocks(2))
    model.blocks[1].up.weight = model.blocks[0].up.weight
    plans = plan(model)
    (tied,) = [info for info in plans[""].infos if info.aliases]
    assert (tied.name, tied.aliases) == ("blocks.0.up.weight", ["blocks.1.up.weight"])
    assert not any("up.weight" in name for each in ("blocks.0", "blocks.1") for name in params(plans[each]))


def test_tied_within_a_unit_stays_there():
    model = Holder(blocks=blocks(2))
    model.blocks[0].other = nn.Linear(4, 8)
    model.blocks[0].other.weight = model.blocks[0].up.weight
    (tied,) = [info for info in plan(model)["blocks.0"].infos if info.aliases]
    assert tied.aliases == ["blocks.0.other.weight"]


def test_tied_between_a_unit_and_the_root_goes_to_the_root():
    model = Holder(blocks=blocks(2), head=nn.Linear(4, 8))
    model.head.weight = model.blocks[0].up.weight
    assert "blocks.0.up.weight" in params(plan(model)[""])


def test_a_block_in_two_places_is_one_unit():
    shared = Block()
    plans = plan(Holder(blocks=nn.ModuleList([Block(), shared, Block(), shared])))
    assert params(plans["blocks.1"]) == [f"blocks.1.{name}" for name, _ in shared.named_parameters()]
    assert plans["blocks.1"].infos[0].aliases == ["blocks.3.up.weight"]
    assert "blocks.3" not in plans


def test_parameters_without_elements_are_left_out():
    model = Holder(blocks=blocks(2))
    model.nothing = nn.Parameter(torch.empty(0, 3))
    assert params(plan(model)[""]) == ["scale"]


def test_frozen_and_lowered_parameters_are_noted():
    model = Holder(head=nn.Linear(2, 2))
    model.head.bias.requires_grad_(False)
    (scale, weight, bias) = plan(model, lowering=Lowering(Precision(), torch.bfloat16))[""].infos
    assert [info.trainable for info in (scale, weight, bias)] == [True, True, False]
    dtypes = [(info.compute_dtype, info.master_dtype) for info in (scale, weight, bias)]
    low = (torch.bfloat16, torch.float32)
    assert dtypes == [(torch.float32, torch.float32), low, low]


def test_a_model_without_parameters_has_an_empty_root():
    plans = plan(nn.ReLU())
    assert list(plans) == [""] and plans[""].infos == []


# ---- what cannot be managed


def test_lazy_parameters_are_refused():
    with pytest.raises(UnsupportedError, match="Parameter 'weight' of a lazy module has no shape yet. Run one forward"):
        plan(nn.LazyLinear(3))
    with pytest.raises(UnsupportedError, match="Parameter '1.weight' of a lazy module"):
        plan(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)))


def test_sparse_parameters_are_refused():
    model = Holder()
    model.sparse = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(
        UnsupportedError, match="Parameter 'sparse' is a Tensor of layout torch.sparse_coo; lit_zero shards"
    ):
        plan(model)


def test_complex_parameters_are_refused_unless_frozen():
    model = Holder()
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match="Parameter 'phase' is complex; lit_zero trains real parameters"):
        plan(model)
    model.phase.requires_grad_(False)
    assert "phase" in params(plan(model)[""])


def test_tensor_subclasses_are_refused():
    model = Holder()
    model.odd = nn.Parameter(torch.ones(3).as_subclass(Odd), requires_grad=False)
    with pytest.raises(UnsupportedError, match="Parameter 'odd' is a Odd of layout torch.strided"):
        plan(model)


class Odd(torch.Tensor):
    pass


# ---- cutting


def infos_of(sizes: list[int]) -> list[ParamInfo]:
    params = [nn.Parameter(torch.empty(size)) for size in sizes]
    return [ParamInfo(str(n), p, torch.float32, torch.float32) for n, p in enumerate(params)]


@pytest.mark.parametrize("sizes", [[1], [3, 3, 3], [10, 1, 1], [1, 1, 10], [5, 4, 3, 2, 1, 9], [2] * 17, [7, 7]])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_cut_evenly_makes_the_largest_run_as_small_as_possible(sizes, parts):
    runs = cut_evenly(infos_of(sizes), parts, smallest=1)
    assert [info.name for run in runs for info in run] == [str(number) for number in range(len(sizes))]
    assert len(runs) <= parts and all(runs)
    largest = max(sum(sizes[int(info.name)] for info in run) for run in runs)
    assert largest == min(best_cut(sizes, min(parts, len(sizes), sum(sizes))))


def best_cut(sizes: list[int], parts: int) -> list[int]:
    """Return the largest run of every way to cut into at most ``parts`` runs."""
    if parts == 1:
        return [sum(sizes)]
    found = [sum(sizes)]
    for first in range(1, len(sizes)):
        found += [max(sum(sizes[:first]), rest) for rest in best_cut(sizes[first:], parts - 1)]
    return found


def test_small_units_are_not_cut():
    assert len(cut_evenly(infos_of([100, 100]), parts=3, smallest=101)) == 1
    assert len(cut_evenly(infos_of([100, 100]), parts=3, smallest=100)) == 2
