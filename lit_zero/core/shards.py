"""What an optimizer asks that looks at whole parameters, where it may hold but parts of them.

Most optimizers treat every element by itself: given flat shards in place of parameters, they do the right thing without
knowing it. Some do not: LAMB wants the norm of each parameter, Muon whole matrices. Such a class is one of
``WholeParameters`` and asks its ``shards``, which by themselves say that everything is here. An engine that divides
parameters puts others in their place. The optimizer then holds one tensor for each parameter, in the same order on
every rank, empty where the rank has nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


class Shards:
    """Every parameter is whole. Base class of those that are divided over ranks."""

    def shape(self, param: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of the parameter that ``param`` is a part of."""
        return tuple(param.shape)

    def own(self, param: torch.Tensor) -> slice:
        """Return which elements of the flattened ``param`` this rank answers for: over all ranks, each comes once."""
        return slice(0, param.numel())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a small tensor over the ranks; the same bits on each. All ranks together."""
        return values

    def collect(self, params: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Put tensors together that are divided as their parameters are, each on one rank. All ranks together.

        Args:
            params: what the optimizer holds, the same parameters on every rank.
            parts: this rank's part of each tensor, contiguous, as many elements as the ``param``; all of one dtype.

        Returns:
            By position in ``params``, those that have come to this rank, in the parameter's shape; they may share
            memory with ``parts``.
        """
        return {number: part.view(self.shape(params[number])) for number, part in enumerate(parts)}

    def spread(
        self, params: Sequence[torch.Tensor], wholes: Mapping[int, torch.Tensor], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Divide tensors as their parameters are: the way back. All ranks together.

        Args:
            params: as in :meth:`collect`.
            wholes: by position, those that ``collect`` has brought to this rank; contiguous.
            dtype: of all of them, on every rank.

        Returns:
            This rank's part of every tensor, in the shape of its ``param``.
        """
        return [wholes[number].view(param.shape) for number, param in enumerate(params)]


class WholeParameters:
    """A mixin for an optimizer that asks ``shards`` wherever it needs more of a parameter than single elements.

    Attributes:
        shards: says what of the parameters is here, and carries between ranks.
    """

    shards: Shards = Shards()
