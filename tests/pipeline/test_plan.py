"""Plans are integers: boundaries, who holds what, and what is refused."""

from __future__ import annotations

import itertools
import random

import pytest

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.pipeline.balance import balance, partition
from lit_zero.pipeline.facts import BlockFacts, ModuleFacts, Recording, Skip, Slot, StateFacts
from lit_zero.pipeline.plan import plan_split


def state(name, numel, *regions, written=()):
    return StateFacts(name, (), numel, 4 * numel, regions, written=written)


def recording(count=4, skips=(), extra=(), buffers=(), returned=(), activations=None, slots=None):
    """Return a model of ``count`` blocks with 10 parameters each, an embedding of 30 and a head of 5."""
    blocks = []
    for index in range(count):
        slot = Slot(index, ("args[0]",), (2, 3), "torch.float32", True, max(index - 1, 0))
        saved = (activations or [8] * count)[index]
        found = (slot,) if slots is None else slots[index]
        blocks.append(BlockFacts(f"blocks.{index}", found, 24, 100, saved, "same"))
    parameters = [state("emb.weight", 30, 0)]
    parameters += [state(f"blocks.{index}.w", 10, index) for index in range(count)]
    parameters += [state("head.weight", 5, count - 1), *extra]
    modules = (ModuleFacts("emb", 0, 0, True), ModuleFacts("emb.inner", 0, 0, True), ModuleFacts("head", 3, 3, True))
    return Recording(tuple(blocks), tuple(parameters), tuple(buffers), modules, tuple(skips), tuple(returned))


def test_a_plan_says_who_holds_what():
    plan = plan_split(recording(extra=[state("tied", 7, 0, 3)], buffers=[state("mean", 2, 1, written=(1,))]), [1, 3])
    assert plan.boundaries == (1, 3)
    assert [piece.blocks for piece in plan.stages] == [("blocks.0",), ("blocks.1", "blocks.2"), ("blocks.3",)]
    assert plan.stages[0].parameters == ("emb.weight", "blocks.0.w", "tied")
    assert plan.stages[2].parameters == ("blocks.3.w", "head.weight", "tied")
    assert [piece.numel for piece in plan.stages] == [47, 20, 22]
    assert [piece.buffers for piece in plan.stages] == [(), ("mean",), ()]
    assert [piece.ghosts for piece in plan.stages] == [(), ("emb",), ("emb",)]
    assert plan.tied == {"tied": (0, 2)}
    assert plan.owners["tied"] == 0 and plan.owners["mean"] == 1 and plan.owners["head.weight"] == 2
    assert [len(piece.receives) for piece in plan.stages] == [0, 1, 1]
    assert [len(piece.sends) for piece in plan.stages] == [1, 1, 0]
    assert "tied: tied on stages 0, 2" in str(plan) and "args[0] [2, 3] float32" in str(plan)
    assert "blocks.2: args[0] [2, 3] float32" in str(recording())


@pytest.mark.parametrize("boundaries", [[0], [4], [2, 2], [3, 1], [-1], [1.5], ["2"]])
def test_boundaries_that_are_none(boundaries):
    with pytest.raises(ConfigError, match=r"pipeline.boundaries=.* leaves a stage empty or is out of order: expected"):
        plan_split(recording(), boundaries)


def test_more_stages_than_blocks():
    message = "pipeline.stages=5 is more than the 4 blocks of the block list.*fewer stages.*pipeline.blocks"
    with pytest.raises(ConfigError, match=message):
        balance(recording(), 5)
    with pytest.raises(ConfigError, match=message):
        plan_split(recording(), [1, 2, 3, 4])
    with pytest.raises(ConfigError, match="pipeline.stages=0 is not possible: expected at least 1"):
        balance(recording(), 0)


def test_a_skip_connection_over_a_boundary():
    found = recording(skips=[Skip(0, 2, "'mul' in emb", "'add' in Net")])
    assert found.allowed() == (3,)
    message = (
        "cannot be split there: a skip connection runs between blocks.1 and blocks.2: 'add' in Net uses what 'mul' in "
        "emb has made, and that is not an argument of blocks.2. Choose other boundaries .pipeline.boundaries; "
        "possible: 3. or another block list .pipeline.blocks."
    )
    with pytest.raises(UnsupportedError, match=message):
        plan_split(found, [2])
    assert balance(found, 2) == (3,)
    with pytest.raises(UnsupportedError, match="pipeline.stages=3 needs 2 boundaries, but a skip connection"):
        balance(found, 3)


def test_an_argument_that_only_a_later_block_is_given():
    def slot(number, made):
        return Slot(number, (f"args[{number}]",), (1,), "torch.float32", True, made)

    slots = [(), (slot(1, 0),), (slot(2, 1),), (slot(3, 2), slot(0, 0))]  # tensor 0 comes to block 3 from region 0
    found = recording(slots=slots)
    assert found.allowed() == (3,)
    with pytest.raises(
        UnsupportedError, match="args.0. of blocks.3 was made before, and is not an argument of blocks.2"
    ):
        plan_split(found, [2])


def test_results_and_buffers_on_both_sides():
    with pytest.raises(UnsupportedError, match="the step returns .hidden., which was made before"):
        plan_split(recording(returned=[("[hidden]", 1), ("[loss]", 3)]), [2])
    shared = recording(buffers=[state("codes", 2, 0, 2, written=(2,))])
    assert shared.allowed() == (3,)
    with pytest.raises(UnsupportedError, match="buffer 'codes' is used on both sides of the boundary"):
        plan_split(shared, [1])
    assert recording(buffers=[state("table", 2, 0, 2)]).allowed() == (1, 2, 3)


def test_balance():
    # With the embedding's 30 parameters, block 0 is as heavy as all the others and the head.
    assert balance(recording(), 2) == (1,)
    assert balance(recording(), 2, "flops") == (2,)
    assert balance(recording(activations=[8, 8, 8, 100]), 2, "activations") == (3,)
    assert balance(recording(), 2, [1, 1, 1, 1], before=0, after=2) == (3,)
    assert balance(recording(), 2, [1, 1, 1, 1], before=2) == (1,)
    assert balance(recording(), 1) == ()
    # A tied parameter counts on both stages, and once where one stage uses it twice.
    assert balance(recording(extra=[state("big", 100, 2, 3)]), 2) == (2,)
    with pytest.raises(ConfigError, match="pipeline.balance has 3 costs, but the block list has 4 blocks"):
        balance(recording(), 2, [1, 2, 3])
    with pytest.raises(ConfigError, match="pipeline.balance='parameter' is not known. Did you mean 'parameters'"):
        balance(recording(), 2, "parameter")


def test_the_heaviest_part_is_as_light_as_it_can_be():
    draw = random.Random(0)
    for _ in range(50):
        count = draw.randint(2, 8)
        costs = [draw.randint(0, 9) for _ in range(count)]
        allowed = sorted(draw.sample(range(1, count), draw.randint(1, count - 1)))
        parts = draw.randint(1, len(allowed) + 1)

        def worst(cuts, costs=costs, count=count):
            edges = [0, *cuts, count]
            return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

        found = partition(lambda a, b, costs=costs: sum(costs[a:b]), count, parts, allowed)
        assert len(found) == parts - 1 and set(found) <= set(allowed)
        assert worst(found) == min(worst(cuts) for cuts in itertools.combinations(allowed, parts - 1))
