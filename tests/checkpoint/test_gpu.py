"""Pieces that lie on a GPU, in both formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lit_zero.checkpoint import full
from lit_zero.checkpoint.parts import OptimizerParts
from lit_zero.checkpoint.sharded import ShardedCheckpoint
from lit_zero.comm.world import World
from lit_zero.core.piece import Piece
from tests.checkpoint.support import SHAPES, adam, blank, cut, differing, groups, parts, save_here, tensors

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["no group", "nccl"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "nccl":
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield World()
    if request.param == "nccl":
        dist.destroy_process_group()


def on_gpu(pieces: list[Piece]) -> list[Piece]:
    return [Piece(p.name, p.shape, p.start, p.data.cuda()) for p in pieces]


def on_host(pieces: list[Piece]) -> list[Piece]:
    return [Piece(p.name, p.shape, p.start, p.data.cpu()) for p in pieces]


def parts_on_gpu(fill: bool = True) -> OptimizerParts:
    own = parts(adam(tensors()), 0, 1, fill)
    for state in own.states:
        state.tensors = {key: on_gpu([piece])[0] for key, piece in state.tensors.items()}
        state.scalars = {key: value.cuda() for key, value in state.scalars.items()}
    return own


def test_sharded(world: World, tmp_path: Path) -> None:
    whole = tensors()
    save_here(tmp_path / "x", world, weights=on_gpu(cut(whole, 0, 1)), optimizers=[parts_on_gpu()])
    checkpoint = ShardedCheckpoint(tmp_path / "x", world)
    for pieces in (on_gpu(blank(whole, 1, 3)), blank(whole, 1, 3)):
        checkpoint.load_weights(pieces, strict=False)
        assert differing(whole, on_host(pieces)) == []
    own = parts_on_gpu(fill=False)
    checkpoint.load_optimizer(0, own)
    for key, values in adam(whole).items():
        assert differing(values, on_host([state.tensors[key] for state in own.states])) == []
    assert all(state.scalars["step"].device.type == "cpu" for state in own.states)


def test_full(world: World) -> None:
    whole = tensors()
    weights = full.collect(on_gpu(cut(whole, 0, 1)), world)
    assert all(tensor.device.type == "cpu" for tensor in weights.values())
    assert all(torch.equal(weights[name], whole[name]) for name in SHAPES)
    optimizer = full.collect_optimizer(parts_on_gpu(), world)
    assert optimizer["param_groups"] == groups()
    assert all(value.device.type == "cpu" for state in optimizer["state"].values() for value in state.values())
    pieces = on_gpu(blank(whole, 1, 3))
    full.load_into(pieces, weights)
    assert differing(whole, on_host(pieces)) == []
