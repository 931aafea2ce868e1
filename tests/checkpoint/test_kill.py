"""A save killed at every one of its steps: the checkpoint is the complete old one or the complete new one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero.checkpoint import files
from lit_zero.checkpoint.files import save_file_atomic
from lit_zero.checkpoint.sharded import ShardedCheckpoint, is_sharded
from lit_zero.comm.world import World
from tests.checkpoint.support import blank, differing, names_in, save_here, tensors
from tests.pool import RankFailure

STEPS = [(os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (files, "exchange")]


def die_before(number: int) -> None:
    """Let this process be killed before the ``number``-th call that changes what is on the disk, counted from 1."""
    left = number

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for place, name in STEPS:
        setattr(place, name, watched(getattr(place, name)))


def undo() -> dict[tuple[Any, str], Any]:
    return {(place, name): getattr(place, name) for place, name in STEPS}


def save_and_die(kind: str, path: str, number: int, swap: bool, rank: int = 0) -> None:
    """Save the second checkpoint; ``rank`` is killed before its ``number``-th step."""
    world = World()
    before = undo()
    if not swap:
        files.exchange = lambda one, other: False
    if world.rank == rank:
        die_before(number)
    try:
        if kind == "full":
            save_file_atomic({"seed": 2, "weights": tensors(2)}, path)
        else:
            save_here(Path(path), world, 2)
    finally:
        for (place, name), call in before.items():
            setattr(place, name, call)


def save_first(kind: str, path: Path) -> None:
    if kind == "full":
        save_file_atomic({"seed": 1, "weights": tensors(1)}, path)
    else:
        save_here(path, World(), 1)


def seed_of(kind: str, path: Path) -> int:
    """Return which checkpoint is at ``path``, after comparing every bit of it."""
    if kind == "full":
        content = torch.load(path)
        assert all(torch.equal(t, content["weights"][n]) for n, t in tensors(content["seed"]).items())
        return content["seed"]
    assert is_sharded(path)
    checkpoint = ShardedCheckpoint(path, World())
    seed = checkpoint.extras()["epoch"]
    pieces = blank(tensors(seed), 0, 1)
    checkpoint.load_weights(pieces, strict=False)
    assert differing(tensors(seed), pieces) == []
    return seed


# The steps before the folder is put in place are the same with and without a swap: the last case leaves them out.
@pytest.mark.thorough("sharded-True", "sharded-False")
@pytest.mark.parametrize(
    ("kind", "swap", "first", "steps"), [("full", True, 1, 3), ("sharded", True, 1, 10), ("sharded", False, 10, 3)]
)
def test_killed_before_every_step(ranks: Any, tmp_path: Path, kind: str, swap: bool, first: int, steps: int) -> None:
    path = tmp_path / "last.ckpt"
    seen, aside = [], 0
    for number in range(first, 100):
        save_first(kind, path)  # also: a save works, and cleans up, after one that was killed
        assert names_in(tmp_path) == ["last.ckpt"]
        try:
            ranks(1).run(save_and_die, kind, str(path), number, swap)
        except RankFailure as failure:
            assert "signal SIGKILL" in str(failure)
        else:
            break
        aside += not path.exists()
        seen.append(seed_of(kind, path))
    assert seed_of(kind, path) == 2
    assert names_in(tmp_path) == ["last.ckpt"]
    assert len(seen) >= steps
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert aside == (not swap)  # without a swap there is one moment at which the old one has only its hidden name


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_killed(ranks: Any, tmp_path: Path, rank: int) -> None:
    path = tmp_path / "last.ckpt"
    save_here(path, World(), 1)
    with pytest.raises(RankFailure, match="signal SIGKILL"):
        ranks(2).run(save_and_die, "sharded", str(path), 2 if rank == 0 else 1, True, rank)
    assert seed_of("sharded", path) == 1
    assert len(names_in(tmp_path)) <= 2
    ranks(2).run(save_and_die, "sharded", str(path), 10**6, True)
    assert seed_of("sharded", path) == 2
    assert names_in(tmp_path) == ["last.ckpt"]


def test_killed_where_there_was_nothing(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(RankFailure, match="signal SIGKILL"):
        ranks(1).run(save_and_die, "sharded", str(path), 3, True)
    assert not is_sharded(path)
    assert not path.exists()
    assert [name for name in names_in(tmp_path) if not name.startswith(".")] == []
