"""Sharded checkpoints: any number of ranks into any other, every dtype, torch's own tools, and bad input."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lit_zero.checkpoint import sharded
from lit_zero.checkpoint.header import FORMAT_VERSION
from lit_zero.checkpoint.sharded import ShardedCheckpoint, is_sharded
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError
from lit_zero.core.piece import Piece
from tests.checkpoint.support import (
    SHAPES,
    adam,
    blank,
    cut,
    differing,
    groups,
    names_in,
    parts,
    save_here,
    save_on_rank,
    tensors,
)

OTHERS = ["buffer", "extra._extra_state"]
TIED = {"tied.weight": "embed.weight"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one rank."""
    save_here(tmp_path / "last.ckpt", World())
    return tmp_path / "last.ckpt"


def check_load(path: Path, rank: int, world: int, align: int = 1) -> None:
    """Load one rank's part and compare every bit."""
    whole = tensors()
    checkpoint = ShardedCheckpoint(path, World())
    pieces = blank(whole, rank, world, align)
    rest = checkpoint.load_weights(pieces, others=OTHERS, aliases=TIED)
    assert differing(whole, pieces) == []
    assert torch.equal(rest["buffer"], torch.arange(6).view(2, 3) + 1)
    assert rest["extra._extra_state"] == {"counter": 1}
    state = adam(whole)
    own = parts(state, rank, world, fill=False)
    assert checkpoint.load_optimizer(0, own) == groups()
    for key, values in state.items():
        assert differing(values, [s.tensors[key] for s in own.states]) == []
    assert [s.scalars["step"].item() for s in own.states if s.tensors] == [10.0 + i for i in range(len(SHAPES))]
    assert checkpoint.extras() == {"epoch": 1, "global_step": 10, "hyper_parameters": {"width": 3}}


def load_on_rank(path: str) -> None:
    world = World()
    check_load(Path(path), world.rank, world.size, align=4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_into_any_other(ranks: Any, tmp_path: Path, size: int) -> None:
    path = tmp_path / "last.ckpt"
    ranks(size).run(save_on_rank, str(path))
    assert names_in(tmp_path) == ["last.ckpt"]
    for world in (1, 2, 3, 4):
        for rank in range(world):
            check_load(path, rank, world)


@pytest.mark.parametrize(("size", "other"), [(1, 4), (4, 2)])
def test_real_ranks_load_what_other_ranks_saved(ranks: Any, tmp_path: Path, size: int, other: int) -> None:
    ranks(size).run(save_on_rank, str(tmp_path / "last.ckpt"))
    ranks(other).run(load_on_rank, str(tmp_path / "last.ckpt"))


def save_tiny(path: str) -> list[int]:
    """On 4 ranks two elements: ranks 2 and 3 hold nothing, and say nothing of optimizer state."""
    world = World()
    whole = {"w": torch.tensor([1.5, 2.5])}
    own = parts({"exp_avg": whole}, world.rank, world.size, skip=("w",) if world.rank > 1 else ())
    own.param_groups = [{"lr": 1.0, "params": [0]}]
    sharded.save(
        path,
        weights=cut(whole, world.rank, world.size),
        others={},
        aliases={},
        optimizers=[own],
        extras={},
        world=world,
    )
    return [piece.data.numel() for piece in cut(whole, world.rank, world.size)]


def test_ranks_that_hold_nothing(ranks: Any, tmp_path: Path) -> None:
    assert ranks(4).run(save_tiny, str(tmp_path / "last.ckpt")) == [[1], [1], [0], [0]]
    checkpoint = ShardedCheckpoint(tmp_path / "last.ckpt", World())
    flat = torch.zeros(2)
    checkpoint.read(flat, "w")
    assert flat.tolist() == [1.5, 2.5]
    checkpoint.read_state(flat.zero_(), 0, "w", "exp_avg")
    assert flat.tolist() == [1.5, 2.5]
    assert checkpoint.scalars(0)["w"]["step"].item() == 10.0


def test_values_are_cast_to_the_dtype_of_the_model(saved: Path) -> None:
    whole = {n: t.to(torch.float16) for n, t in tensors().items()}
    pieces = blank(whole, 1, 3)
    ShardedCheckpoint(saved, World()).load_weights(pieces, others=OTHERS, aliases=TIED)
    assert differing(whole, pieces) == []


def test_torch_opens_the_folder(saved: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(saved, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    whole = tensors()
    assert set(plain) == {"state_dict", "optimizer_states"}
    assert torch.equal(plain["state_dict"].pop("buffer"), torch.arange(6).view(2, 3) + 1)
    assert set(plain["state_dict"]) == set(whole)
    assert all(torch.equal(plain["state_dict"][name], tensor) for name, tensor in whole.items())
    for key, values in adam(whole).items():
        for name, tensor in values.items():
            assert torch.equal(plain["optimizer_states"][0]["state"][name][key], tensor)
    target = {"state_dict": {name: torch.zeros_like(tensor) for name, tensor in whole.items()}}
    dcp.load(target, checkpoint_id=saved, no_dist=True)
    assert all(torch.equal(target["state_dict"][name], tensor) for name, tensor in whole.items())


def test_a_second_name_of_a_tied_parameter_is_stored_once_and_found(saved: Path) -> None:
    embed = tensors()["embed.weight"]
    assert "tied.weight" not in ShardedCheckpoint(saved, World()).header.parameters
    # Into a model that calls the same parameter by its second name only, and into one that has it twice, untied.
    shapes = {name: shape for name, shape in SHAPES.items() if name != "embed.weight"}
    rest = blank(tensors(shapes={"embed.weight": embed.shape, **shapes}), 0, 1)[1:]
    for names in (["tied.weight"], ["tied.weight", "embed.weight"]):
        mine = [Piece(name, tuple(embed.shape), 0, torch.zeros(embed.numel())) for name in names]
        ShardedCheckpoint(saved, World()).load_weights([*rest, *mine], others=OTHERS, strict=len(names) == 2)
        assert all(torch.equal(piece.data.view(embed.shape), embed) for piece in mine)


def test_a_tied_model_loads_an_untied_checkpoint_by_any_of_its_names(tmp_path: Path) -> None:
    whole = {"head": torch.randn(3, 2)}
    sharded.save(
        tmp_path / "x", weights=cut(whole, 0, 1), others={}, aliases={}, optimizers=[], extras={}, world=World()
    )
    piece = Piece("embed", (3, 2), 0, torch.zeros(6))
    ShardedCheckpoint(tmp_path / "x", World()).load_weights([piece], aliases={"head": "embed"})
    assert torch.equal(piece.data.view(3, 2), whole["head"])


def test_a_parameter_without_state_keeps_what_it_has(tmp_path: Path) -> None:
    state = adam(tensors())
    save_here(tmp_path / "x", World(), optimizers=[parts(state, 0, 1, skip=("scale",))])
    own = parts(state, 0, 1, fill=False)
    checkpoint = ShardedCheckpoint(tmp_path / "x", World())
    assert checkpoint.optimizer_keys(0)["scale"] == []
    assert checkpoint.optimizer_keys(0)["one"] == ["exp_avg", "exp_avg_sq"]
    checkpoint.load_optimizer(0, own)
    assert own.states[3].name == "scale"
    assert own.states[3].scalars == {}
    assert own.states[3].tensors["exp_avg"].data.isnan().all()


def test_not_strict_loads_what_both_have(saved: Path) -> None:
    piece = Piece("conv.bias", (7,), 0, torch.zeros(7, dtype=torch.float64))
    other = Piece("new.bias", (7,), 0, torch.zeros(7, dtype=torch.float64))
    rest = ShardedCheckpoint(saved, World()).load_weights([piece, other], others=["buffer", "new"], strict=False)
    assert torch.equal(piece.data, tensors()["conv.bias"].double())
    assert other.data.eq(0).all()
    assert list(rest) == ["buffer"]


def test_a_new_save_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for seed in (1, 2):
        save_here(path, World(), seed)
        assert ShardedCheckpoint(path, World()).extras()["epoch"] == seed
        assert names_in(tmp_path) == ["last.ckpt"]


def test_a_folder_replaces_a_plain_file_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_text("the plain checkpoint of an earlier run")
    save_here(path, World())
    assert is_sharded(path)
    assert names_in(tmp_path) == ["last.ckpt"]


def fail_on_rank_1(path: str) -> str:
    world = World()
    weights = cut(tensors(), world.rank, world.size)
    if world.rank == 1:
        weights[0].data = weights[0].data[:-1]  # as if an element were lost
        weights[1].start = 10**6
    with pytest.raises(CheckpointError) as error:
        save_here(Path(path), world, 2, weights=weights)
    return str(error.value)


def test_if_one_rank_fails_all_raise_and_the_old_checkpoint_stays(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    ranks(2).run(save_on_rank, str(path))
    messages = ranks(2).run(fail_on_rank_1, str(path))
    assert messages[0] == messages[1]
    assert (
        f"Saving the checkpoint '{path}' (every rank must see that folder) failed on rank 1: ValueError" in messages[0]
    )
    check_load(path, 0, 1)
    assert names_in(tmp_path) == ["last.ckpt"]


def leave_a_gap(path: str) -> str:
    world = World()
    weights = cut(tensors(), world.rank, world.size)
    if world.rank == 1:
        weights[-1].data = weights[-1].data[:-1]
    with pytest.raises(CheckpointError) as error:
        save_here(Path(path), world, weights=weights)
    return str(error.value)


def test_elements_that_nobody_holds_are_noticed(ranks: Any, tmp_path: Path) -> None:
    messages = ranks(2).run(leave_a_gap, str(tmp_path / "last.ckpt"))
    assert "Cannot save 'state_dict.head.weight': 957 elements expected, 956 held." in messages[0]
    assert messages[0] == messages[1]
    assert names_in(tmp_path) == []


def load_broken_part(path: str) -> str:
    world = World()
    with pytest.raises(CheckpointError) as error:
        ShardedCheckpoint(path, world).load_weights(
            blank(tensors(), world.rank, world.size), others=OTHERS, aliases=TIED
        )
    return str(error.value)


def test_a_file_that_only_one_rank_needs_is_broken_for_all(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    ranks(2).run(save_on_rank, str(path))
    file = path / "__1_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)  # of the right size, so that only reading finds it
    messages = ranks(2).run(load_broken_part, str(path))
    assert messages[0] == messages[1]
    assert f"The checkpoint '{path}' is damaged: a tensor cannot be read (" in messages[0]
    assert "Copy it again as a whole, or go on from an earlier checkpoint." in messages[0]


# ---- bad input ----


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        ShardedCheckpoint(path, World())
    return str(error.value)


def test_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"There is no checkpoint '{tmp_path / 'none'}'."
    assert not is_sharded(tmp_path / "none")


def test_a_file_where_a_folder_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}}, file)
    assert refusal(file) == (
        f"'{file}' is a file; a sharded checkpoint is a folder. If it is a plain .ckpt, it needs no conversion."
    )
    assert not is_sharded(file)


def test_another_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"The folder '{tmp_path}' is not a lit_zero checkpoint: it holds no lit_zero.json."
    dcp.save({"w": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    assert "It is a folder of torch.distributed.checkpoint, which torch's dcp_to_torch_save opens." in refusal(tmp_path)


def test_a_save_does_not_replace_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    with pytest.raises(CheckpointError, match="that is a folder, and not one that lit_zero wrote. Choose another path"):
        save_here(tmp_path / "data", World())
    assert names_in(tmp_path) == ["data"]
    assert names_in(tmp_path / "data") == ["precious"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "extras.pt", "state.pt", ".metadata"])
def test_truncated_and_missing_files(saved: Path, name: str) -> None:
    size = (saved / name).stat().st_size
    with open(saved / name, "r+b") as file:
        file.truncate(size // 2)
    assert refusal(saved) == (
        f"The checkpoint '{saved}' is damaged: {name} has {size // 2} bytes of {size}. Copy it again as a whole, or go"
        " on from an earlier checkpoint."
    )
    (saved / name).unlink()
    assert f"is damaged: {name} is missing. Copy it again as a whole" in refusal(saved)


def test_a_damaged_header(saved: Path) -> None:
    header = saved / "lit_zero.json"
    text = header.read_text()
    header.write_text(text[: len(text) // 2])
    assert f"The checkpoint '{saved}' is damaged: lit_zero.json cannot be read" in refusal(saved)
    header.write_text('{"format_version": 1}')
    assert f"The checkpoint '{saved}' is damaged: lit_zero.json cannot be read" in refusal(saved)


def test_a_newer_format_version(saved: Path) -> None:
    header = json.loads((saved / "lit_zero.json").read_text())
    header.update(format_version=FORMAT_VERSION + 1, lit_zero="7.0.0", something_new=[1])
    (saved / "lit_zero.json").write_text(json.dumps(header))
    message = refusal(saved)
    assert f"'{saved}' has format version {FORMAT_VERSION + 1}, written by lit_zero 7.0.0; lit_zero " in message
    assert f"reads up to format version {FORMAT_VERSION}. Upgrade with: pip install --upgrade lit-zero" in message


def test_an_index_that_would_run_code_is_refused(saved: Path, tmp_path: Path) -> None:
    index = saved / ".metadata"
    size = index.stat().st_size
    attack = pickle.dumps(Path(tmp_path / "harmless").touch)
    index.write_bytes(attack + b"\0" * (size - len(attack)))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read \(it asks for .*, which no index needs\)"):
        ShardedCheckpoint(saved, World()).load_weights(blank(tensors(), 0, 1))


def test_another_model(saved: Path) -> None:
    whole = tensors(shapes={**{k: v for k, v in SHAPES.items() if k != "one"}, "conv.bias": (8,), "new": (2,)})
    pieces = blank(whole, 0, 1)
    with pytest.raises(CheckpointError) as error:
        ShardedCheckpoint(saved, World()).load_weights(pieces, others=["buffer"], aliases=TIED)
    assert str(error.value) == (
        f"The checkpoint '{saved}' is not one of this model. not in the checkpoint (1): new; only in the checkpoint"
        " (2): one, extra._extra_state; different shapes (1): conv.bias is (7,) in the checkpoint and (8,) in the"
        " model. Build the model with the settings that wrote the checkpoint."
    )
    assert all(piece.data.isnan().all() for piece in pieces)


def test_many_names_are_cut_short(saved: Path) -> None:
    pieces = [Piece(f"layer.{i}", (1,), 0, torch.zeros(1)) for i in range(7)]
    with pytest.raises(CheckpointError) as error:
        ShardedCheckpoint(saved, World()).load_weights(pieces)
    assert "not in the checkpoint (7): layer.0, layer.1, layer.2, layer.3, layer.4, ...;" in str(error.value)
    assert "or set strict_loading=False on the LightningModule to load what has the same name." in str(error.value)


def test_shapes_must_agree_even_if_not_strict(saved: Path) -> None:
    piece = Piece("conv.bias", (8,), 0, torch.zeros(8))
    with pytest.raises(CheckpointError, match=r"conv.bias is \(7,\) in the checkpoint and \(8,\) in the model"):
        ShardedCheckpoint(saved, World()).load_weights([piece], strict=False)


def test_another_optimizer(saved: Path) -> None:
    checkpoint = ShardedCheckpoint(saved, World())
    momentum = parts({"momentum_buffer": tensors()}, 0, 1, fill=False)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_optimizer(0, momentum)
    assert str(error.value) == (
        f"The checkpoint '{saved}' holds exp_avg, exp_avg_sq as the optimizer's state of 'embed.weight', but this"
        " optimizer has momentum_buffer. Use the optimizer that wrote the checkpoint, or load the weights alone."
    )
    fewer = parts(adam(tensors()), 0, 1, fill=False)
    fewer.param_groups = fewer.param_groups[:1]
    with pytest.raises(CheckpointError, match=r"has parameter groups of \[3, 4\] parameters, this one of \[3\]"):
        checkpoint.load_optimizer(0, fewer)
    renamed = parts(adam(tensors()), 0, 1, fill=False)
    renamed.states[2].name = "conv.shift"
    with pytest.raises(CheckpointError, match=r"does not hold the parameter 'conv.shift'"):
        checkpoint.load_optimizer(0, renamed)
    with pytest.raises(CheckpointError, match=r"holds no optimizer number 1: it holds 1\."):
        checkpoint.optimizer_keys(1)


def test_weights_alone(tmp_path: Path) -> None:
    save_here(tmp_path / "x", World(), optimizers=[])
    with pytest.raises(CheckpointError, match=r"holds no optimizer number 0: it was saved with the weights alone\."):
        ShardedCheckpoint(tmp_path / "x", World()).load_optimizer(0, parts(adam(tensors()), 0, 1))


def test_objects_need_trust(tmp_path: Path) -> None:
    save_here(tmp_path / "x", World(), extras={"hyper_parameters": {"error": CheckpointError("an object")}})
    with pytest.raises(CheckpointError, match="If you trust the file, load it with weights_only=False"):
        ShardedCheckpoint(tmp_path / "x", World()).extras()
    extras = ShardedCheckpoint(tmp_path / "x", World(), weights_only=False).extras()
    assert str(extras["hyper_parameters"]["error"]) == "an object"


def test_a_moved_checkpoint_still_opens(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    check_load(tmp_path / "elsewhere", 0, 1)
