"""What ranks tell each other around a checkpoint, on real ranks and in a process without a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_zero.checkpoint.together import on_all, on_zero
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
LENGTHS = [3, 0, 5, 1]


def send_all() -> list[list[list[float]] | None]:
    world = World()
    found: list[list[list[float]] | None] = []
    for number, dtype in enumerate(DTYPES):
        lengths = LENGTHS[number % 4 :] + LENGTHS[: number % 4]  # each rank is once the one with nothing
        mine = torch.arange(lengths[world.rank]).add(world.rank).to(dtype)
        parts = world.gather_to_zero(mine, lengths)
        assert (parts is None) == (world.rank != 0)
        if parts is not None:
            assert all(part.dtype == dtype for part in parts)
        found.append(parts and [part.double().tolist() for part in parts])
    return found


def test_every_dtype_arrives_on_rank_0(ranks: Any) -> None:
    zero, *others = ranks(4).run(send_all)
    assert others == [[None] * len(DTYPES)] * 3
    for number, dtype in enumerate(DTYPES):
        lengths = LENGTHS[number % 4 :] + LENGTHS[: number % 4]
        expected = [torch.arange(n).add(r).to(dtype).double().tolist() for r, n in enumerate(lengths)]
        assert zero[number] == expected, dtype


def send_strided() -> list[list[float]] | None:
    world = World()
    parts = world.gather_to_zero(torch.arange(6.0, requires_grad=True)[::2], [3, 3])
    world.barrier()
    return parts and [part.tolist() for part in parts]


def test_a_strided_tensor_with_a_gradient(ranks: Any) -> None:
    assert ranks(2).run(send_strided) == [[[0.0, 2.0, 4.0]] * 2, None]


def exchange_objects() -> tuple[Any, Any, Any]:
    world = World()
    mine = {"rank": world.rank}
    return world.broadcast_object(mine), world.all_gather_object(mine), world.gather_object_to_zero(mine)


def test_objects(ranks: Any) -> None:
    everyone = [{"rank": 0}, {"rank": 1}]
    assert ranks(2).run(exchange_objects) == [({"rank": 0}, everyone, everyone), ({"rank": 0}, everyone, None)]


def test_without_a_group_there_is_one_rank() -> None:
    world = World()
    assert (world.rank, world.size) == (0, 1)
    world.barrier()
    assert exchange_objects() == ({"rank": 0}, [{"rank": 0}], [{"rank": 0}])
    parts = world.gather_to_zero(torch.ones(2), [2])
    assert parts is not None
    assert [part.tolist() for part in parts] == [[1.0, 1.0]]


def fail(together: str, who: int) -> str:
    world = World()

    def action() -> int:
        if world.rank == who:
            raise OSError(28, "No space left on device")
        return world.rank

    with pytest.raises(CheckpointError) as error:
        (on_zero if together == "zero" else on_all)(world, "Saving 'x'", action)
    assert isinstance(error.value.__cause__, OSError) == (world.rank == who)
    return str(error.value)


@pytest.mark.parametrize(("together", "who"), [("zero", 0), ("all", 0), ("all", 1)])
def test_all_ranks_raise_if_one_does(ranks: Any, together: str, who: int) -> None:
    message = f"Saving 'x' failed on rank {who}: OSError: [Errno 28] No space left on device"
    assert ranks(2).run(fail, together, who) == [message, message]


def succeed() -> tuple[int, int]:
    world = World()
    return on_zero(world, "x", lambda: world.rank), on_all(world, "x", lambda: world.rank)


def test_results_come_back(ranks: Any) -> None:
    assert ranks(2).run(succeed) == [(0, 0), (0, 1)]
