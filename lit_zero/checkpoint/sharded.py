"""The sharded format: a folder of torch.distributed.checkpoint (DCP) to which every rank writes what it holds.

What lies in the folder::

    lit_zero.json    names, aliases, format version, sizes of all files (``header.py``); written last
    .metadata        DCP's index: which box of which tensor lies where
    __R_0.distcp     what rank R held
    extras.pt        the rest of the Lightning checkpoint: loops, callbacks, schedulers, hyper-parameters, scaler
    state.pt         parameter groups, optimizer counters, and state_dict entries that are no tensors

Tensors go by the module's own names and global shapes: ``state_dict.NAME`` for parameters and buffers,
``optimizer_states.I.state.NAME.KEY`` for optimizer ``I``. Further state dicts (averaged weights) go by their place in
the Lightning checkpoint: ``current_model_state.NAME``. No trace of stage or rank, so any stage and world size loads it,
and so do DCP's own tools: ``dcp_to_torch_save`` gives ``{"state_dict": {...}, "optimizer_states": [{"state": {NAME:
{KEY: ...}}}]}``.

Saving, on every rank in the same order::

    save(path, weights=pieces, others=buffers, aliases=tied, optimizers=[parts], extras=the_rest, world=World())

Loading, on every rank in the same order; each rank reads from the disk what it holds::

    checkpoint = ShardedCheckpoint(path, World(), weights_only)
    extras = checkpoint.extras()                               # goes back to Lightning
    rest = checkpoint.load_weights(pieces, others=buffer_names, aliases=tied)
    keys = checkpoint.optimizer_keys(0)                        # which state tensors to make room for
    groups = checkpoint.load_optimizer(0, parts)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_zero.checkpoint import dcp
from lit_zero.checkpoint.dcp import Place, Stored
from lit_zero.checkpoint.files import (
    load_file,
    prepare,
    put_in_place,
    remove,
    standing,
    sync_folder,
    temporary_name,
    write_file_atomic,
)
from lit_zero.checkpoint.header import Header, is_sharded, read_header, write_header
from lit_zero.checkpoint.parts import OptimizerParts, check_groups, check_states, match_names, on_host
from lit_zero.checkpoint.together import on_all, on_zero
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError
from lit_zero.core.piece import Piece

__all__ = ["OptimizerParts", "ShardedCheckpoint", "is_sharded", "save"]

EXTRAS, STATE = "extras.pt", "state.pt"
WEIGHTS: Place = ("state_dict",)
# In the extras, if the user has chosen names for the parts: {"weights": name, "optimizers": [names]}. A Trainer's are
# "state_dict" and "optimizer_states".
KEYS = "lit_zero.keys"


class _Written(NamedTuple):
    """What one rank tells rank 0: the tensors it wrote, and the counters it speaks for, per optimizer."""

    tensors: dcp.Written
    scalars: list[dict[int, dict[str, Any]]]


def save(
    path: str | os.PathLike[str],
    *,
    weights: Iterable[Piece],
    others: Mapping[str, Any],
    aliases: Mapping[str, str],
    optimizers: Sequence[OptimizerParts],
    extras: Mapping[str, Any],
    world: World,
    further: Mapping[Place, Iterable[Piece]] | None = None,
) -> None:
    """Write a sharded checkpoint that appears whole or not at all, and replaces one of the same name only then.

    Args:
        path: the folder; it must lie on a file system that all ranks see.
        weights: what this rank holds of the parameters; over all ranks the pieces of a name must cover it exactly once.
        others: every other entry of ``module.state_dict()`` (buffers, extra state); rank 0's are written.
        aliases: second names of tied parameters, ``{alias: name of a piece}``.
        optimizers: this rank's part of each optimizer; empty to save the weights alone.
        extras: the rest of the Lightning checkpoint; rank 0's is written.
        world: all ranks; each must call this.
        further: what this rank holds of more tensors by parameter names, as ``weights``, for other places of the
            Lightning checkpoint than ``state_dict``; ``extras`` has a dict at each of these places.

    Raises:
        CheckpointError: on every rank, if any rank could not write; a previous checkpoint of that name is then
            untouched.
    """
    path = Path(path)
    doing = f"Saving the checkpoint '{path}' (every rank must see that folder)"
    temporary: Path = on_zero(world, doing, lambda: _make_folder(path))
    try:

        def write() -> _Written:
            stored = _stored({WEIGHTS: weights, **(further or {})}, others if world.rank == 0 else {}, optimizers)
            return _Written(
                dcp.write(temporary, stored, world.rank), [parts.own_scalars(world.rank) for parts in optimizers]
            )

        written = world.gather_object_to_zero(on_all(world, doing, write))

        def finish() -> None:
            _describe(temporary, written or [], others, aliases, optimizers, extras)
            put_in_place(temporary, path)

        on_zero(world, doing, finish)
    except BaseException:
        if world.rank == 0:
            remove(temporary)
        raise


def _make_folder(path: Path) -> Path:
    prepare(path)
    temporary = temporary_name(path)
    temporary.mkdir()
    return temporary


def _stored(
    weights: Mapping[Place, Iterable[Piece]], others: Mapping[str, Any], optimizers: Sequence[OptimizerParts]
) -> list[Stored]:
    found = [Stored((*place, piece.name), piece) for place, pieces in weights.items() for piece in pieces]
    for name, value in others.items():
        if isinstance(value, torch.Tensor):
            found.append(Stored((*WEIGHTS, name), Piece(name, tuple(value.shape), 0, value.detach().reshape(-1))))
    for number, parts in enumerate(optimizers):
        for state in parts.states:
            found += [Stored(_state_place(number, state.name, key), piece) for key, piece in state.tensors.items()]
    return found


def _state_place(number: int, name: str, key: str) -> Place:
    return ("optimizer_states", number, "state", name, key)


def _describe(
    folder: Path,
    written: Sequence[_Written],
    others: Mapping[str, Any],
    aliases: Mapping[str, str],
    optimizers: Sequence[OptimizerParts],
    extras: Mapping[str, Any],
) -> None:
    """Write on rank 0 what describes the whole, after all ranks have written their parts."""
    places = dcp.write_index(folder, [rank.tensors for rank in written])
    states, kept = [], []
    for number, parts in enumerate(optimizers):
        scalars: dict[int, dict[str, Any]] = {}
        for rank in written:
            scalars.update(rank.scalars[number])
        states.append(
            {"param_groups": [{k: on_host(v) for k, v in g.items()} for g in parts.param_groups], "scalars": scalars}
        )
        keys: dict[str, list[str]] = {}
        for place in places:
            if place[:2] == ("optimizer_states", number):
                keys.setdefault(str(place[3]), []).append(str(place[4]))
        kept.append(
            {
                "parameters": [
                    [s.index, s.name, keys.get(s.name, [])] for s in sorted(parts.states, key=lambda s: s.index)
                ]
            }
        )
    objects = {name: value for name, value in others.items() if not isinstance(value, torch.Tensor)}
    write_file_atomic(folder / EXTRAS, lambda file: torch.save(dict(extras), file))
    write_file_atomic(folder / STATE, lambda file: torch.save({"optimizers": states, "others": objects}, file))

    files = {name: (folder / name).stat().st_size for name in (dcp.METADATA, EXTRAS, STATE)}
    for rank in written:
        files.update(rank.tensors.files)
    header = Header(
        parameters=[str(place[1]) for place in places if place[0] == "state_dict" and place[1] not in others],
        buffers=[name for name in others if name not in objects],
        aliases=dict(aliases),
        optimizers=kept,
        ranks=len(written),
        files=files,
    )
    write_header(folder, header)
    sync_folder(folder)


class ShardedCheckpoint:
    """A sharded checkpoint, opened and found complete.

    Args:
        path: the folder.
        world: all ranks. Each must construct this, and call each ``load_...`` method, in the same order; the other
            methods are local.
        weights_only: as in ``torch.load``, for the extras and the counters; ``None`` means true.

    Attributes:
        path: the folder.
        header: what it says of itself: names, aliases, optimizers, versions.

    Raises:
        CheckpointError: on every rank, if it is missing, incomplete, something else, or of a newer format version.
    """

    def __init__(self, path: str | os.PathLike[str], world: World, weights_only: bool | None = None) -> None:
        def open_it() -> tuple[Path, Header]:
            folder = standing(Path(path))
            return folder, read_header(folder)

        self._world, self._weights_only = world, weights_only
        self.path, self.header = on_zero(world, f"Opening the checkpoint '{path}'", open_it)
        self._reader = dcp.Reader(self.path)

    def extras(self) -> dict[str, Any]:
        """Return the Lightning checkpoint without ``state_dict`` and ``optimizer_states``."""
        extras: dict[str, Any] = load_file(self.path / EXTRAS, self._weights_only)
        return extras

    def optimizer_keys(self, number: int) -> dict[str, list[str]]:
        """Return ``{parameter name: keys of its state tensors}`` of optimizer ``number``, to make room for them."""
        return {name: list(keys) for _, name, keys in self._optimizer(number)["parameters"]}

    def param_groups(self, number: int) -> list[dict[str, Any]]:
        """Return the parameter groups of optimizer ``number`` as ``torch.optim`` saves them."""
        self._optimizer(number)
        groups: list[dict[str, Any]] = self._state["optimizers"][number]["param_groups"]
        return groups

    def scalars(self, number: int) -> dict[str, dict[str, Any]]:
        """Return ``{parameter name: counters and the like}`` of optimizer ``number``."""
        parameters = self._optimizer(number)["parameters"]
        saved = self._state["optimizers"][number]["scalars"]
        return {name: dict(saved.get(index, {})) for index, name, _ in parameters}

    @property
    def further(self) -> list[Place]:
        """The places of further tensors by parameter names, see ``save``."""
        places = [place[:-1] for place in self._reader.places()]
        return [p for p in dict.fromkeys(places) if p != WEIGHTS and p[0] != "optimizer_states"]

    def names(self, place: Place = WEIGHTS) -> list[str]:
        """Return the names of the tensors that lie at a place."""
        if place == WEIGHTS:
            return [*self.header.parameters, *self.header.buffers]
        return [str(found[-1]) for found in self._reader.places() if found[:-1] == place]

    def objects(self) -> dict[str, Any]:
        """Return the entries of ``state_dict`` that are no tensors."""
        return dict(self._state["others"])

    def shape(self, name: str, place: Place = WEIGHTS) -> tuple[int, ...]:
        """Return the global shape of a parameter or buffer."""
        return self._reader.shape((*place, name))

    def dtype(self, name: str, place: Place = WEIGHTS) -> torch.dtype:
        """Return the dtype of a parameter or buffer."""
        return self._reader.dtype((*place, name))

    def state_dtype(self, number: int, name: str, key: str) -> torch.dtype:
        """Return the dtype of one state tensor of optimizer ``number``; its shape is the parameter's."""
        return self._reader.dtype(_state_place(number, name, key))

    def read(self, flat: torch.Tensor, name: str, place: Place = WEIGHTS) -> None:
        """Read one whole parameter or buffer into ``flat``, shape ``[numel]``."""
        self._reader.read([Stored((*place, name), Piece(name, self.shape(name, place), 0, flat))])

    def read_state(self, flat: torch.Tensor, number: int, name: str, key: str) -> None:
        """Read one whole state tensor of optimizer ``number`` into ``flat``, shape ``[numel]``."""
        place = _state_place(number, name, key)
        self._reader.read([Stored(place, Piece(name, self._reader.shape(place), 0, flat))])

    def load_weights(
        self,
        pieces: Sequence[Piece],
        *,
        others: Iterable[str] = (),
        aliases: Mapping[str, str] | None = None,
        strict: bool = True,
        place: Place = WEIGHTS,
        beside: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Read the ranges that this rank holds of the parameters.

        Args:
            pieces: where to write; values are cast to the pieces' dtype.
            others: names of the model's other entries (buffers, extra state).
            aliases: second names of tied parameters, ``{alias: name of a piece}``.
            strict: refuse names that only the model or only the checkpoint has.
            place: where the parameters lie, ``state_dict`` or one of ``further``.
            beside: values of ``others`` that do not lie there; the module's entries that are no tensors by default.

        Returns:
            The values of ``others`` that the checkpoint holds, whole, on the host; the caller puts them into the model.

        Raises:
            CheckpointError: on every rank, naming what does not fit (nothing has been written then) or what could not
                be read.
        """

        def action() -> dict[str, Any]:
            found, wanted = dict(self.objects() if beside is None else beside), list(others)
            saved: dict[str, tuple[int, ...] | None] = {n: self.shape(n, place) for n in self.names(place)}
            saved.update({n: tuple(v.shape) if isinstance(v, torch.Tensor) else None for n, v in found.items()})
            shapes = {p.name: tuple(p.shape) for p in pieces}
            sources = match_names(shapes, wanted, aliases or {}, saved, self.header.aliases, strict, str(self.path))
            stored = [Stored((*place, sources[p.name]), p) for p in pieces if p.name in sources]
            for name in wanted:
                shape = saved.get(name)
                if shape is not None and name not in found:
                    found[name] = torch.empty(shape, dtype=self.dtype(name, place), device="cpu")
                    stored.append(Stored((*place, name), Piece(name, shape, 0, found[name].view(-1))))
            self._reader.read(stored)
            return {name: found[name] for name in wanted if name in found}

        return on_all(self._world, f"Loading the checkpoint '{self.path}'", action)

    def load_optimizer(self, number: int, parts: OptimizerParts) -> list[dict[str, Any]]:
        """Read the ranges that this rank holds of one optimizer's state. Parameters are matched by name.

        A parameter for which the checkpoint has no state at all (it never had a gradient) keeps what it has.

        Args:
            number: which optimizer.
            parts: where to write: ``states[...].tensors`` in place, ``states[...].scalars`` replaced. Its groups are
                only compared.

        Returns:
            The saved parameter groups, for the caller to apply (learning rates and the like).

        Raises:
            CheckpointError: on every rank, if there is no such optimizer, or parameters, groups, keys or shapes differ.
        """

        def action() -> list[dict[str, Any]]:
            keys, groups, scalars = self.optimizer_keys(number), self.param_groups(number), self.scalars(number)
            check_groups(groups, parts.param_groups, str(self.path))
            wanted, stored = [], []
            for state in parts.states:
                source = state.name if state.name in keys else self.header.aliases.get(state.name)
                if source not in keys:
                    raise CheckpointError(
                        f"The optimizer in the checkpoint '{self.path}' does not hold the parameter {state.name!r}."
                        " Build the model and the optimizer with the settings that wrote the checkpoint, or load the"
                        " weights alone."
                    )
                if keys[source] or scalars[source]:
                    places = {key: _state_place(number, source, key) for key in keys[source]}
                    check_states(
                        state, {key: self._reader.shape(place) for key, place in places.items()}, str(self.path)
                    )
                    stored += [Stored(places[key], piece) for key, piece in state.tensors.items()]
                    wanted.append((state, scalars[source]))
            self._reader.read(stored)
            for state, values in wanted:
                state.scalars = values
            return groups

        return on_all(self._world, f"Loading the checkpoint '{self.path}'", action)

    def _optimizer(self, number: int) -> dict[str, Any]:
        count = len(self.header.optimizers)
        if not 0 <= number < count:
            reason = "it was saved with the weights alone" if count == 0 else f"it holds {count}"
            raise CheckpointError(f"The checkpoint '{self.path}' holds no optimizer number {number}: {reason}.")
        return self.header.optimizers[number]

    @cached_property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = load_file(self.path / STATE, self._weights_only)
        return state
