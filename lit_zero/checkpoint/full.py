"""The full format: one plain Lightning ``.ckpt``, which opens with ``torch.load`` where lit_zero is not installed.

Saving, on every rank in the same order::

    world = World()
    checkpoint["state_dict"] = collect(pieces, world)                      # rank 0: {name: host tensor}; others: {}
    checkpoint["optimizer_states"] = [collect_optimizer(parts, world)]     # rank 0: as torch.optim saves it; others: {}
    save(checkpoint, path, world)                                          # rank 0 writes; all raise if that fails

The caller adds what is no parameter (buffers) and the second names of tied parameters; a tensor under two names is
written once.

Loading, on every rank for itself; a rank reads from the disk little more than what it holds::

    checkpoint = load(path, weights_only)
    rest = load_into(parameter_pieces, checkpoint["state_dict"], others=buffer_names, aliases=tied, where=path)
    keys = optimizer_keys(checkpoint["optimizer_states"][0], parts, shapes)   # which state tensors to make room for
    groups = load_optimizer_into(parts, checkpoint["optimizer_states"][0], where=path)
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from lit_zero.checkpoint.files import load_file, save_file_atomic
from lit_zero.checkpoint.parts import OptimizerParts, check_groups, check_states, check_tiling, match_names, on_host
from lit_zero.checkpoint.together import on_zero
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError
from lit_zero.core.piece import Piece

Key = TypeVar("Key", bound=Hashable)


def collect(pieces: Iterable[Piece], world: World) -> dict[str, torch.Tensor]:
    """Bring whole parameters together in rank 0's host memory, one after the other.

    Args:
        pieces: what this rank holds; over all ranks the pieces of a name must cover it exactly once.
        world: all ranks; each must call this.

    Returns:
        ``{name: tensor of the global shape}`` on rank 0, in the order of its pieces; ``{}`` elsewhere.

    Raises:
        CheckpointError: on every rank, if elements of a parameter are held by no rank or by two.
    """
    return _gather([(piece.name, piece) for piece in pieces], world)


def collect_optimizer(parts: OptimizerParts, world: World) -> dict[str, Any]:
    """Bring one optimizer's state together in rank 0's host memory, one tensor after the other.

    Args:
        parts: what this rank holds of it.
        world: all ranks; each must call this.

    Returns:
        ``{"state": {position: {...}}, "param_groups": [...]}`` on rank 0, as ``torch.optim.Optimizer.state_dict``
        returns it; ``{}`` elsewhere.

    Raises:
        CheckpointError: on every rank, if elements of a state tensor are held by no rank or by two.
    """
    scalars = world.gather_object_to_zero(parts.own_scalars(world.rank))
    tensors = _gather([((s.index, key), piece) for s in parts.states for key, piece in s.tensors.items()], world)
    if scalars is None:
        return {}
    state: dict[int, dict[str, Any]] = {s.index: {} for s in sorted(parts.states, key=lambda s: s.index)}
    for found in scalars:
        for index, values in found.items():
            state[index].update(values)
    for (index, key), tensor in tensors.items():
        state[index][key] = tensor
    groups = [{k: on_host(v) for k, v in group.items()} for group in parts.param_groups]
    return {"state": {index: values for index, values in state.items() if values}, "param_groups": groups}


def save(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], world: World) -> None:
    """Let rank 0 write ``checkpoint`` to one file that appears whole or not at all.

    Args:
        checkpoint: what to write; looked at on rank 0 only.
        path: the file; its folder is made if need be.
        world: all ranks; each must call this.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write; the previous file is then untouched.
    """
    on_zero(world, f"Saving the checkpoint '{path}'", lambda: save_file_atomic(dict(checkpoint), path))


def load(path: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
    """Open a plain Lightning checkpoint; tensors stay on the disk until they are touched.

    Args:
        path: the file.
        weights_only: as in ``torch.load``; ``None`` means true.

    Raises:
        CheckpointError: if the file is missing, damaged, not a Lightning checkpoint, or refused by ``weights_only``.
    """
    checkpoint = load_file(path, weights_only)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        came = (
            f"a dict with the keys {sorted(map(str, checkpoint))[:8]}"
            if isinstance(checkpoint, dict)
            else type(checkpoint).__name__
        )
        raise CheckpointError(
            f"'{path}' is not a Lightning checkpoint: a dict with the key 'state_dict' was expected, it holds {came}."
        )
    return checkpoint


def load_into(
    pieces: Sequence[Piece],
    tensors: Mapping[str, Any],
    *,
    others: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
    strict: bool = True,
    where: str | os.PathLike[str] = "state_dict",
) -> dict[str, Any]:
    """Copy from whole tensors the ranges that this rank holds.

    Args:
        pieces: where to write; values are cast to the pieces' dtype.
        tensors: whole tensors by name, as in a checkpoint's ``state_dict``.
        others: names of the model's other entries (buffers, extra state).
        aliases: second names of tied parameters, ``{alias: name of a piece}``.
        strict: refuse names that only the model or only the checkpoint has.
        where: the checkpoint, for messages.

    Returns:
        The values of ``others`` that the checkpoint holds; the caller puts them into the model.

    Raises:
        CheckpointError: naming what does not fit; nothing has been written then.
    """
    others = list(others)
    saved = {n: tuple(t.shape) if isinstance(t, torch.Tensor) else None for n, t in tensors.items()}
    sources = match_names({p.name: p.shape for p in pieces}, others, aliases or {}, saved, {}, strict, str(where))
    for piece in pieces:
        if piece.name in sources:
            _copy_range(piece, tensors[sources[piece.name]])
    return {name: tensors[name] for name in others if name in tensors}


def optimizer_keys(
    saved: Mapping[str, Any], parts: OptimizerParts, shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[str]]:
    """Return which state tensors a checkpoint holds for each parameter, so that room can be made for them.

    Args:
        saved: one optimizer's state as ``torch.optim`` saves it.
        parts: the optimizer to load into; its states' ``tensors`` may still be empty.
        shapes: global shape of each parameter by name.

    Returns:
        ``{parameter name: keys}``, for example ``{"weight": ["exp_avg", "exp_avg_sq"]}``; counters such as ``step``
        are not among them.
    """
    like: set[str] = set()
    unlike = {"step"}  # a counter has no dimension, and so looks like the state of a parameter without one
    for state in parts.states:
        for key, value in saved["state"].get(state.index, {}).items():
            same = isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(shapes[state.name])
            (like if same else unlike).add(key)
    return {s.name: [key for key in saved["state"].get(s.index, {}) if key in like - unlike] for s in parts.states}


def load_optimizer_into(
    parts: OptimizerParts, saved: Mapping[str, Any], *, where: str | os.PathLike[str] = "optimizer_states"
) -> list[dict[str, Any]]:
    """Copy from one optimizer's whole state the ranges that this rank holds.

    Parameters are matched by position, as ``torch.optim`` does. A parameter for which the checkpoint has no state at
    all (it never had a gradient) keeps what it has.

    Args:
        parts: where to write: ``states[...].tensors`` in place, ``states[...].scalars`` replaced. Its groups are only
            compared.
        saved: one optimizer's state as ``torch.optim`` saves it.
        where: the checkpoint, for messages.

    Returns:
        The saved parameter groups, for the caller to apply (learning rates and the like).

    Raises:
        CheckpointError: if groups, keys or shapes differ; nothing has been written then.
    """
    groups = [dict(group) for group in saved["param_groups"]]
    check_groups(groups, parts.param_groups, str(where))
    found = {s.index: saved["state"][s.index] for s in parts.states if saved["state"].get(s.index)}
    for state in parts.states:
        if state.index in found:
            values = found[state.index]
            inside = [
                k for k, v in values.items() if isinstance(v, torch.Tensor) and (k in state.tensors or v.ndim > 0)
            ]
            check_states(state, {k: tuple(values[k].shape) for k in inside}, str(where))
    for state in parts.states:
        if state.index in found:
            values = found[state.index]
            for key, piece in state.tensors.items():
                _copy_range(piece, values[key])
            state.scalars = {k: on_host(v) for k, v in values.items() if k not in state.tensors}
    return groups


def _copy_range(piece: Piece, whole: torch.Tensor) -> None:
    piece.write(whole.detach().reshape(-1)[piece.start : piece.end])


def _gather(items: Sequence[tuple[Key, Piece]], world: World) -> dict[Key, torch.Tensor]:
    """Bring whole tensors together on rank 0. A rank that holds nothing of a tensor may leave it out of ``items``."""
    # Rank 0 learns who holds what, then tells all in which order the tensors travel: both ends of a transfer must
    # agree on it.
    held = {key: (piece.start, piece.numel, tuple(piece.shape), piece.dtype) for key, piece in items}
    holdings = world.gather_object_to_zero(held)
    order: list[Key] = on_zero(world, "Gathering a checkpoint", lambda: _order(holdings or []))
    pieces = dict(items)
    whole: dict[Key, torch.Tensor] = {}
    for key in order:
        if holdings is None:
            if key in pieces:
                world.gather_to_zero(pieces[key].read(), [])
            continue
        ranges = [h[key][:2] if key in h else (0, 0) for h in holdings]
        _, _, shape, dtype = next(h[key] for h in holdings if key in h)
        own = pieces[key].read() if key in pieces else torch.empty(0, dtype=dtype, device="cpu")
        flat = torch.empty(sum(n for _, n in ranges), dtype=dtype, device="cpu")
        parts = world.gather_to_zero(own, [n for _, n in ranges]) or []
        for (start, length), part in zip(ranges, parts, strict=True):
            flat[start : start + length].copy_(part)
        whole[key] = flat.view(shape)
    return whole


def _order(holdings: Sequence[Mapping[Key, tuple[int, int, tuple[int, ...], torch.dtype]]]) -> list[Key]:
    """Return all tensors in the order of the first rank that has them, once each is found to be held exactly once."""
    order = list(dict.fromkeys(key for held in holdings for key in held))
    for key in order:
        found = [held[key] for held in holdings if key in held]
        if len({entry[2:] for entry in found}) > 1:
            raise CheckpointError(
                f"Cannot save {key!r}: shape and dtype differ between ranks: {sorted({str(e[2:]) for e in found})}."
            )
        check_tiling(str(key), found[0][2], [entry[:2] for entry in found])
    return order
