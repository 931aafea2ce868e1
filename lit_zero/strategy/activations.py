"""The strategy's side of ``activation``: which ranks it concerns, when it begins and when it ends.

Order matters: a pipeline divides the module first, then blocks are wrapped, then the engine puts its hooks around them.
So a stage's boundary lies outside of what is computed again, and a repetition finds its unit's parameters there.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_zero.activation.applied import Applied, release
from lit_zero.activation.policy import Activation
from lit_zero.comm.exchange import Exchange
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import ConfigError
from lit_zero.strategy.arguments import instance


class Activations:
    """A choice, and the modules on which it is at work.

    Args:
        activation: what the user has said.

    Attributes:
        policy: the user's choice.
    """

    def __init__(self, activation: str | Activation) -> None:
        given = Activation(activation) if isinstance(activation, str) else activation
        self.policy: Activation = instance("activation", given, Activation)
        self._applied: list[weakref.ref[Applied]] = []  # the blocks hold them
        self._groups: list[Exchange] = []

    def groups(self, data_groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the ranks that share activations out among themselves.

        Args:
            data_groups: ranks that run the same blocks.

        Raises:
            ConfigError: if they cannot be divided so.
        """
        ranks = self.policy.ranks
        if ranks is None:
            return []
        if any(len(group) % ranks for group in data_groups):
            raise ConfigError(
                f"activation.ranks={ranks} does not divide the {len(data_groups[0])} data-parallel "
                f"rank{'s' * (len(data_groups[0]) > 1)} of this run. Start a multiple of {ranks}, or choose another "
                "number."
            )
        return [list(group[at : at + ranks]) for group in data_groups for at in range(0, len(group), ranks)]

    def apply(self, strategy: Any, module: nn.Module, data_groups: Sequence[Sequence[int]]) -> None:
        """Wrap the blocks of a module. All ranks together."""
        release(module)
        group, device = None, strategy.root_device
        if self.policy.variant == "offload" and device.type == "cpu" and strategy.is_global_zero:
            warnings.warn(
                "activation=offload on a CPU: tensors are copied within the same, pageable memory. This shows what "
                "would be moved, and saves nothing.",
                stacklevel=2,
            )
        if self.policy.variant == "partition":
            groups = self.groups(data_groups)
            group = open_exchange(strategy.comm, device, None, strategy.timeout, groups, large=False)
            self._groups.append(group)
        applied = Applied(module, self.policy, strategy.zero.units, device, group)
        self._applied.append(weakref.ref(applied))

    def of(self, module: nn.Module) -> Applied | None:
        """Return what is at work on a module, if anything is."""
        return next((each for each in self._alive() if each.module is module), None)

    def _alive(self) -> list[Applied]:
        return [applied for held in self._applied if (applied := held()) is not None]

    def choose(self, peers: Exchange, crowd: tuple[int, int] = (1, 1)) -> None:
        """Choose, where the first step's forward has to be seen before; no weight has been changed yet. All peers
        together.

        Args:
            peers: ranks that run the same blocks.
            crowd: see ``OnePiece.crowd``.
        """
        for applied in self._alive():
            applied.step_is_over(peers, *crowd)

    def remove(self) -> None:
        """Leave the modules as they were."""
        for applied in self._alive():
            applied.remove()
        for group in self._groups:
            group.close()
        self._applied.clear()
        self._groups.clear()
