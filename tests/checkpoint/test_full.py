"""The full format: what torch and Lightning save and load, gathered from ragged pieces and cut into them again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_zero.checkpoint import full
from lit_zero.checkpoint.parts import OptimizerParts
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError
from lit_zero.core.piece import ParamState, Piece
from tests.checkpoint.support import (
    SHAPES,
    adam,
    blank,
    cut,
    differing,
    groups,
    names_in,
    parts,
    tensors,
)


def equal(one: Any, other: Any) -> bool:
    """Compare nested containers, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and set(one) == set(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# ---- gathering ----


def gather(align: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    world = World()
    whole = tensors()
    weights = full.collect(iter(cut(whole, world.rank, world.size, align)), world)
    own = parts(adam(whole), world.rank, world.size, skip=("conv.bias",))
    for state in own.states:  # a rank without elements of a parameter may know nothing of its state
        if not any(piece.data.numel() for piece in state.tensors.values()) and state.name != "nothing":
            state.tensors, state.scalars = {}, {}
    return weights, full.collect_optimizer(own, world)


@pytest.mark.parametrize(("size", "align"), [(1, 1), (2, 1), (4, 1), (4, 8)])
def test_whole_tensors_arrive_on_rank_0_alone(ranks: Any, size: int, align: int) -> None:
    (weights, optimizer), *others = ranks(size).run(gather, align)
    assert others == [({}, {})] * (size - 1)
    whole = tensors()
    assert list(weights) == list(SHAPES)
    assert equal(weights, whole)
    names = [name for name in SHAPES if name != "conv.bias"]
    assert list(optimizer) == ["state", "param_groups"]
    assert optimizer["param_groups"] == groups()
    assert list(optimizer["state"]) == [list(SHAPES).index(name) for name in names]
    for name in names:
        index = list(SHAPES).index(name)
        expected = {key: values[name] for key, values in adam(whole).items()}
        assert equal(optimizer["state"][index], {"step": torch.tensor(10.0 + index), **expected}), name


def test_what_is_gathered_is_a_copy() -> None:
    piece = Piece("w", (2,), 0, torch.zeros(2))
    state = ParamState(0, "w", {"exp_avg": piece}, {"step": torch.tensor(1.0)})
    own = OptimizerParts([state], [{"lr": torch.tensor(1.0), "params": [0]}])
    weights, optimizer = full.collect([piece], World()), full.collect_optimizer(own, World())
    piece.data.fill_(9)
    state.scalars["step"].fill_(9)
    own.param_groups[0]["lr"].fill_(9)
    assert weights["w"].tolist() == [0, 0]
    assert optimizer["state"][0]["step"].item() == 1
    assert optimizer["state"][0]["exp_avg"].tolist() == [0, 0]
    assert optimizer["param_groups"][0]["lr"].item() == 1


def gather_wrongly(kind: str) -> str:
    world = World()
    pieces = cut(tensors(), world.rank, world.size)
    if kind == "twice" and world.rank == 1:
        pieces[-1].start -= 1
    if kind == "shape" and world.rank == 1:
        pieces[0].shape = (11, 37)
    with pytest.raises(CheckpointError) as error:
        full.collect(pieces, world)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("twice", "are held twice. This is a bug in lit_zero."), ("shape", "shape and dtype differ between ranks")],
)
def test_pieces_that_do_not_tile_are_refused_on_all_ranks(ranks: Any, kind: str, words: str) -> None:
    one, other = ranks(2).run(gather_wrongly, kind)
    assert one == other
    assert one.startswith("Cannot save '")
    assert words in one


# ---- loading ----


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranges_are_copied_into_pieces(world: int) -> None:
    whole = tensors()
    saved = {
        "state": {
            i: {k: v[n] for k, v in adam(whole).items()} | {"step": torch.tensor(1.0)} for i, n in enumerate(whole)
        },
        "param_groups": groups(),
    }
    for rank in range(world):
        pieces = blank(whole, rank, world)
        given = {**whole, "tied": whole["embed.weight"], "buffer": torch.ones(2)}
        rest = full.load_into(pieces, given, others=["buffer"], aliases={"tied": "embed.weight"})
        assert differing(whole, pieces) == []
        assert list(rest) == ["buffer"]
        own = parts(adam(whole), rank, world, fill=False)
        assert full.load_optimizer_into(own, saved) == groups()
        for key, values in adam(whole).items():
            assert differing(values, [s.tensors[key] for s in own.states]) == []
        assert [s.scalars for s in own.states] == [{"step": torch.tensor(1.0)}] * len(SHAPES)


def test_a_transposed_tensor_in_the_file() -> None:
    whole = torch.arange(6.0).view(3, 2).t()
    piece = Piece("w", (2, 3), 1, torch.zeros(4))
    full.load_into([piece], {"w": whole})
    assert piece.data.tolist() == [2.0, 4.0, 1.0, 3.0]


def test_which_state_tensors_to_make_room_for() -> None:
    state = {
        0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 3), "mu_product": torch.tensor(1.0)},
        1: {"step": torch.tensor(1.0), "exp_avg": torch.tensor(0.0), "mu_product": torch.tensor(1.0)},
    }
    own = OptimizerParts([ParamState(0, "w"), ParamState(1, "scale"), ParamState(2, "unused")], [])
    keys = full.optimizer_keys({"state": state}, own, {"w": (2, 3), "scale": (), "unused": (4,)})
    assert keys == {"w": ["exp_avg"], "scale": ["exp_avg"], "unused": []}


def test_nothing_is_written_if_anything_does_not_fit() -> None:
    pieces = blank(tensors(), 0, 2)
    with pytest.raises(CheckpointError) as error:
        full.load_into(pieces, {**tensors(), "conv.bias": torch.zeros(9), "one": "text"}, where="my.ckpt")
    assert str(error.value) == (
        "The checkpoint 'my.ckpt' is not one of this model. different shapes (2): conv.bias is (9,) in the checkpoint"
        " and (7,) in the model; one is not a tensor in the checkpoint and (1,) in the model. Build the model with the"
        " settings that wrote the checkpoint."
    )
    assert all(piece.data.isnan().all() for piece in pieces)


def test_another_optimizer() -> None:
    whole = tensors()
    saved = {"state": {0: {"momentum_buffer": whole["embed.weight"]}}, "param_groups": groups()}
    own = parts(adam(whole), 0, 1, fill=False)
    with pytest.raises(CheckpointError, match="holds momentum_buffer as the optimizer's state of 'embed.weight', but"):
        full.load_optimizer_into(own, saved)
    saved = {"state": {0: {k: torch.zeros(3) for k in adam(whole)}}, "param_groups": groups()}
    with pytest.raises(CheckpointError) as error:
        full.load_optimizer_into(own, saved, where="my.ckpt")
    assert str(error.value) == (
        "The optimizer's 'exp_avg' of 'embed.weight' is (3,) in the checkpoint 'my.ckpt' and (37, 11) in this"
        " optimizer. Build the model with the settings that wrote the checkpoint."
    )
    with pytest.raises(CheckpointError) as error:
        full.load_optimizer_into(own, {"state": {}, "param_groups": groups()[:1]}, where="my.ckpt")
    assert str(error.value) == (
        "The optimizer in the checkpoint 'my.ckpt' has parameter groups of [3] parameters, this one of [3, 4]. Return"
        " the same groups from configure_optimizers, or load the weights alone."
    )


def test_not_a_lightning_checkpoint(tmp_path: Path) -> None:
    torch.save({"model": {}, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        full.load(tmp_path / "x.pt")
    assert str(error.value) == (
        f"'{tmp_path / 'x.pt'}' is not a Lightning checkpoint: a dict with the key 'state_dict' was expected, it holds"
        " a dict with the keys ['epoch', 'model']."
    )
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="it holds list"):
        full.load(tmp_path / "x.pt")


def save_badly(path: str) -> str:
    with pytest.raises(CheckpointError) as error:
        full.save({"state_dict": {}}, path, World())
    return str(error.value)


def test_all_ranks_raise_if_rank_0_cannot_write(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x.ckpt"
    one, other = ranks(2).run(save_badly, str(path))
    assert one == other
    assert one.startswith(f"Saving the checkpoint '{path}' failed on rank 0: ")


# ---- Lightning's own files ----


class Small(pl.LightningModule):
    """Two groups, a tied weight, a buffer, dimensions that no number of ranks divides."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = torch.nn.Embedding(7, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.head = torch.nn.Linear(width, 7)
        self.head.weight = self.embed.weight

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(self.norm(self.embed(batch))), batch)

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest}], lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        return torch.utils.data.DataLoader(torch.randint(0, 7, (12,), generator=generator), batch_size=4)


NAMES = ["embed.weight", "norm.weight", "norm.bias", "head.bias"]
BUFFERS = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def trainer(folder: Path, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def through_pieces(source: str, target: str) -> None:
    """Load Lightning's checkpoint into pieces on every rank, and save it again from them."""
    world = World()
    checkpoint = full.load(source)
    whole = {name: checkpoint["state_dict"][name] for name in NAMES}
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    pieces = blank(whole, world.rank, world.size)
    rest = full.load_into(
        pieces, checkpoint["state_dict"], others=BUFFERS, aliases={"head.weight": "embed.weight"}, where=source
    )
    saved = checkpoint["optimizer_states"][0]
    own = OptimizerParts([ParamState(i, name) for i, name in enumerate(NAMES)], saved["param_groups"])
    for name, keys in full.optimizer_keys(saved, own, shapes).items():
        state = own.states[NAMES.index(name)]
        state.tensors = {key: blank({name: whole[name]}, world.rank, world.size)[0] for key in keys}
    own.param_groups = full.load_optimizer_into(own, saved, where=source)
    weights = full.collect(pieces, world)
    optimizer = full.collect_optimizer(own, world)
    if world.rank == 0:
        weights.update(rest)
        weights["head.weight"] = weights["embed.weight"]
    full.save({**checkpoint, "state_dict": weights, "optimizer_states": [optimizer]}, target, world)


def test_lightning_resumes_from_what_went_through_pieces(ranks: Any, tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    model = Small()
    first = trainer(tmp_path, 1)
    first.fit(model)
    first.save_checkpoint(tmp_path / "plain.ckpt")
    ranks(2).run(through_pieces, str(tmp_path / "plain.ckpt"), str(tmp_path / "ours.ckpt"))
    plain = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    ours = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    assert equal(plain, ours)
    assert plain["optimizer_states"][0]["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert ours["state_dict"]["head.weight"].data_ptr() == ours["state_dict"]["embed.weight"].data_ptr()
    results = []
    for name in ("plain.ckpt", "ours.ckpt"):
        pl.seed_everything(2, verbose=False)
        resumed = Small()
        trainer(tmp_path, 3).fit(resumed, ckpt_path=str(tmp_path / name))
        results.append(resumed.state_dict())
    assert equal(*results)
    assert not equal(results[0], plain["state_dict"])
    assert names_in(tmp_path) == ["ours.ckpt", "plain.ckpt"]


ELSEWHERE = """
import sys
sys.modules["lit_zero"] = None  # importing it fails
import torch
checkpoint = torch.load(sys.argv[1], weights_only=True)
assert not any(name.startswith("lit_zero.") for name in sys.modules)
print(sorted(checkpoint["state_dict"]))
"""


def test_the_file_opens_where_this_package_is_not_installed(tmp_path: Path) -> None:
    weights = full.collect(cut(tensors(), 0, 1), World())
    optimizer = full.collect_optimizer(parts(adam(tensors()), 0, 1), World())
    full.save({"state_dict": weights, "optimizer_states": [optimizer]}, tmp_path / "x.ckpt", World())
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "x.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(SHAPES))
