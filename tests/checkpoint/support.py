"""Tensors of awkward shapes, cut into pieces as the engine cuts them, on real and on pretended ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_zero.checkpoint import sharded
from lit_zero.checkpoint.parts import OptimizerParts
from lit_zero.comm.world import World
from lit_zero.core.layout import FlatLayout
from lit_zero.core.piece import ParamState, Piece

# Cut between 2, 3 or 4 ranks, boundaries fall inside rows, inside planes and inside one-element tensors' neighbors.
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (37, 11),
    "conv.weight": (5, 4, 3),
    "conv.bias": (7,),
    "scale": (),
    "one": (1,),
    "nothing": (0, 3),
    "head.weight": (33, 29),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def tensors(seed: int = 1, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    """Return random whole tensors; dtypes take turns."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[number % 3])
        for number, (name, shape) in enumerate(shapes.items())
    }


def cut(whole: Mapping[str, torch.Tensor], rank: int, world: int, align: int = 1) -> list[Piece]:
    """Return what ``rank`` of ``world`` holds: one flat buffer per dtype, cut between elements; copies."""
    found = {}
    for dtype in dict.fromkeys(t.dtype for t in whole.values()):
        mine = [(n, tuple(t.shape), 0) for n, t in whole.items() if t.dtype == dtype]
        layout = FlatLayout.pack(mine, world, align)
        flat = torch.full((layout.shard_numel,), float("nan"), dtype=dtype)
        for part in layout.overlaps(*layout.shard(rank)):
            name, n = part.entry.name, part.length
            data = flat[part.local : part.local + n]
            data.copy_(whole[name].reshape(-1)[part.start : part.start + n])
            found[name] = Piece(name, part.entry.shape, part.start, data)
    return [found[name] for name in whole]


def blank(whole: Mapping[str, torch.Tensor], rank: int, world: int, align: int = 1) -> list[Piece]:
    """Return pieces like those of ``cut`` with NaN in them."""
    return cut({n: torch.full_like(t, float("nan")) for n, t in whole.items()}, rank, world, align)


def differing(whole: Mapping[str, torch.Tensor], pieces: list[Piece]) -> list[str]:
    """Return the names of the pieces that are not bit-equal to their part of ``whole``."""
    wrong = []
    for piece in pieces:
        expected = whole[piece.name].reshape(-1)[piece.start : piece.start + piece.data.numel()]
        if piece.shape != tuple(whole[piece.name].shape) or not torch.equal(piece.data, expected):
            wrong.append(piece.name)
    return wrong


def adam(whole: Mapping[str, torch.Tensor], seed: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """Return a whole state of Adam: ``{key: {name: tensor}}``."""
    shapes = {n: tuple(t.shape) for n, t in whole.items()}
    return {key: tensors(seed + i, shapes) for i, key in enumerate(("exp_avg", "exp_avg_sq"))}


def groups(count: int = len(SHAPES), lr: float = 0.25) -> list[dict[str, Any]]:
    """Return two parameter groups as ``torch.optim`` saves them."""
    return [
        {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": list(range(3))},
        {"lr": lr / 2, "betas": (0.9, 0.95), "weight_decay": 0.0, "params": list(range(3, count))},
    ]


def parts(
    state: Mapping[str, Mapping[str, torch.Tensor]],
    rank: int,
    world: int,
    fill: bool = True,
    skip: tuple[str, ...] = (),
) -> OptimizerParts:
    """Return what ``rank`` of ``world`` holds of ``state``. The parameters named in ``skip`` have no state."""
    pieces = {key: {p.name: p for p in (cut if fill else blank)(whole, rank, world)} for key, whole in state.items()}
    names = list(next(iter(state.values())))
    states = []
    for index, name in enumerate(names):
        own = {key: found[name] for key, found in pieces.items()} if name not in skip else {}
        scalars = {"step": torch.tensor(float(10 + index))} if fill and own else {}
        states.append(ParamState(index, name, own, scalars))
    return OptimizerParts(states, groups(len(names)))


def save_here(path: Path, world: World, seed: int = 1, **changes: Any) -> None:
    """Save one sharded checkpoint of the usual content on this rank; ``changes`` replace arguments of ``save``."""
    whole = tensors(seed)
    arguments: dict[str, Any] = {
        "weights": cut(whole, world.rank, world.size),
        "others": {"buffer": torch.arange(6).view(2, 3) + seed, "extra._extra_state": {"counter": seed}},
        "aliases": {"tied.weight": "embed.weight"},
        "optimizers": [parts(adam(whole), world.rank, world.size)],
        "extras": {"epoch": seed, "global_step": 10 * seed, "hyper_parameters": {"width": 3}},
    }
    sharded.save(path, **{**arguments, **changes}, world=world)


def save_on_rank(path: str, seed: int = 1) -> None:
    """The same, to be called on the ranks of a pool."""
    save_here(Path(path), World(), seed)


def names_in(folder: Path) -> list[str]:
    """Return what is in a folder, hidden names too."""
    return sorted(p.name for p in folder.iterdir())
