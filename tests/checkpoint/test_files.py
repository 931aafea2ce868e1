"""Files and folders that appear whole or not at all, and what is said of a file that cannot be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch

from lit_zero.checkpoint import Checkpoint, files
from lit_zero.checkpoint.files import load_file, save_file_atomic, write_file_atomic
from lit_zero.checkpoint.sharded import ShardedCheckpoint, is_sharded
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError, ConfigError
from tests.checkpoint.support import names_in, save_here


def test_the_policy_names_the_key_and_the_nearest_choice() -> None:
    assert Checkpoint().format == "full"
    assert Checkpoint("sharded").format == "sharded"
    with pytest.raises(ConfigError) as error:
        Checkpoint("shard")
    assert str(error.value) == (
        "checkpoint.format='shard' is not known. Did you mean 'sharded'? Choose one of: full, sharded."
    )


def test_save_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.ckpt"
    for value in (1, 2):
        save_file_atomic({"value": value}, path)
        assert torch.load(path) == {"value": value}
        assert names_in(path.parent) == ["x.ckpt"]


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("not this one")


def test_a_failed_save_leaves_the_old_file_and_nothing_temporary(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    save_file_atomic({"value": 1}, path)
    with pytest.raises(ValueError, match="not this one"):
        save_file_atomic({"large": torch.zeros(1000), "value": Unpicklable()}, path)
    assert torch.load(path) == {"value": 1}
    assert names_in(tmp_path) == ["x.ckpt"]


def test_an_interrupted_save_too(tmp_path: Path) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file_atomic(tmp_path / "x", write)
    assert names_in(tmp_path) == []


def test_leftovers_of_dead_saves_of_this_name_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.ckpt.tmp-dead").touch()
    (tmp_path / ".x.ckpt.tmp-dead2").mkdir()
    (tmp_path / ".x.ckpt.tmp-dead2" / "file").touch()
    (tmp_path / ".other.ckpt.tmp-alive").touch()
    save_file_atomic({}, tmp_path / "x.ckpt")
    assert names_in(tmp_path) == [".other.ckpt.tmp-alive", "x.ckpt"]


def test_a_link_is_replaced_and_not_its_target(tmp_path: Path) -> None:
    save_file_atomic({"value": 1}, tmp_path / "epoch=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    save_file_atomic({"value": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "epoch=1.ckpt") == {"value": 1}
    assert torch.load(tmp_path / "last.ckpt") == {"value": 2}
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    save_here(tmp_path / "last.ckpt", World())
    assert is_sharded(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "epoch=1.ckpt") == {"value": 1}


def test_a_link_to_a_sharded_checkpoint_is_replaced_and_not_its_target(tmp_path: Path) -> None:
    save_here(tmp_path / "epoch=1.ckpt", World())
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    save_here(tmp_path / "last.ckpt", World(), 2)
    assert ShardedCheckpoint(tmp_path / "epoch=1.ckpt", World()).extras()["epoch"] == 1
    assert ShardedCheckpoint(tmp_path / "last.ckpt", World()).extras()["epoch"] == 2
    assert names_in(tmp_path) == ["epoch=1.ckpt", "last.ckpt"]


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])
def test_a_file_replaces_a_sharded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    if not swap:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    save_here(tmp_path / "x", World())
    save_file_atomic({"value": 1}, tmp_path / "x")
    assert torch.load(tmp_path / "x") == {"value": 1}
    assert names_in(tmp_path) == ["x"]


def test_two_renames_where_the_file_system_cannot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    for seed in (1, 2):
        save_here(tmp_path / "x", World(), seed)
        assert ShardedCheckpoint(tmp_path / "x", World()).extras()["epoch"] == seed
        assert names_in(tmp_path) == ["x"]


def test_exchange_says_when_it_cannot(tmp_path: Path) -> None:
    assert not files.exchange(tmp_path / "none", tmp_path / "nor this")


def test_a_system_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name, use_errno: SimpleNamespace())
    assert not files.exchange(tmp_path, tmp_path)


def test_a_file_does_not_replace_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    with pytest.raises(CheckpointError) as error:
        save_file_atomic({}, tmp_path / "x")
    assert str(error.value) == (
        f"Cannot save a checkpoint as '{tmp_path / 'x'}': that is a folder, and not one that lit_zero wrote. Choose"
        " another path or remove it."
    )
    assert names_in(tmp_path) == ["x"]


# ---- reading ----


def refusal(path: Path, weights_only: bool | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        load_file(path, weights_only)
    return str(error.value)


def test_missing_and_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.ckpt") == f"There is no checkpoint '{tmp_path / 'x.ckpt'}'."
    assert refusal(tmp_path) == f"'{tmp_path}' is a folder where one checkpoint file was expected."


@pytest.mark.parametrize("kept", [0, 3, 100, 5000])
@pytest.mark.parametrize("weights_only", [True, False])
def test_truncated(tmp_path: Path, kept: int, weights_only: bool) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(10_000)}}, path)
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(path, weights_only)
    assert message.startswith(f"The checkpoint '{path}' ({kept} bytes) is damaged or not a checkpoint (")
    assert message.endswith(
        "It may have been cut short while it was copied: copy it again, or go on from an earlier checkpoint."
    )


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_text("Dear diary,\n")
    assert "is damaged or not a checkpoint (" in refusal(tmp_path / "x.ckpt")


def test_objects_need_trust(tmp_path: Path) -> None:
    torch.save({"object": CheckpointError("mine")}, tmp_path / "x.ckpt")
    assert refusal(tmp_path / "x.ckpt") == (
        f"The checkpoint '{tmp_path / 'x.ckpt'}' holds objects (lit_zero.core.errors.CheckpointError) other than"
        " tensors and plain containers; opening them may run code. If you trust the file, load it with"
        " weights_only=False (lit-zero consolidate: --trust)."
    )
    assert str(load_file(tmp_path / "x.ckpt", weights_only=False)["object"]) == "mine"


class Vanishing:
    """Looks to pickle as if it came from a module that is not there."""


def test_a_class_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"object": Vanishing()}, tmp_path / "x.ckpt")
    monkeypatch.delattr(f"{__name__}.Vanishing")
    message = refusal(tmp_path / "x.ckpt", weights_only=False)
    assert "holds an object whose class cannot be imported here: " in message
    assert "Vanishing" in message
    assert message.endswith("Install or import what defines it.")


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert load_file(tmp_path / "x.ckpt")["w"].tolist() == [0, 1, 2]
