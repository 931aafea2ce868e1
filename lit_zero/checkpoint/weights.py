"""Further state dicts in a sharded checkpoint, beside ``state_dict``: averaged weights, at any place of a Lightning
checkpoint.

On the way out a state dict is a :class:`ShardedWeights` somewhere in the checkpoint; ``take_out`` finds it, its pieces
become tensors of the folder at that place, and the rest stays where it was. On the way in ``put_back`` leaves a
:class:`StoredWeights` there, from which each rank reads its part when it is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lit_zero.checkpoint.dcp import Place
from lit_zero.checkpoint.sharded import WEIGHTS, ShardedCheckpoint
from lit_zero.core.piece import Piece


class ShardedWeights(dict[str, Any]):
    """A state dict of which every rank holds pieces. As a dict it has the entries that are not cut.

    Args:
        others: entries that are the same on every rank (buffers, extra state).
        pieces: what this rank holds of the others.
    """

    def __init__(self, others: Mapping[str, Any], pieces: Iterable[Piece]) -> None:
        super().__init__(others)
        self.pieces = list(pieces)


class StoredWeights(dict[str, Any]):
    """A state dict in an opened sharded checkpoint. As a dict it has the entries that are not cut.

    Args:
        others: those of its entries that lie outside the folder's tensors.
        checkpoint: where the rest lies.
        place: at which place of it.
    """

    def __init__(self, others: Mapping[str, Any], checkpoint: ShardedCheckpoint, place: Place = WEIGHTS) -> None:
        super().__init__(others)
        self._checkpoint, self._place = checkpoint, place

    def load_into(
        self, pieces: Sequence[Piece], *, others: Iterable[str], aliases: Mapping[str, str], strict: bool
    ) -> dict[str, Any]:
        """Read the ranges that this rank holds, see ``ShardedCheckpoint.load_weights``. All ranks must call this."""
        beside = None if self._place == WEIGHTS else self
        return self._checkpoint.load_weights(
            pieces, others=others, aliases=aliases, strict=strict, place=self._place, beside=beside
        )


def take_out(tree: Mapping[str, Any], at: Place = ()) -> tuple[dict[str, Any], dict[Place, list[Piece]]]:
    """Separate the pieces in nested dicts from the rest.

    Returns:
        The dicts with plain ones in place of each ``ShardedWeights``, and the pieces by place.
    """
    rest: dict[str, Any] = {}
    found: dict[Place, list[Piece]] = {}
    for key, value in tree.items():
        rest[key] = value
        if isinstance(value, ShardedWeights):
            rest[key], found[(*at, key)] = dict(value), value.pieces
        elif type(value) is dict:
            rest[key], inside = take_out(value, (*at, key))
            found.update(inside)
    return rest, found


def put_back(tree: dict[str, Any], checkpoint: ShardedCheckpoint) -> dict[str, Any]:
    """Return the extras of a checkpoint with its further state dicts at their places, unread."""
    for place in checkpoint.further:
        holder: dict[Any, Any] = tree
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = StoredWeights(holder[place[-1]], checkpoint, place)
    return tree
