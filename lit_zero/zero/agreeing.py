"""What the ranks compare beside gradients: buffers, and which parameters any loss has reached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange
from lit_zero.zero.lane import Lane


class SharedBuffers:
    """Lets rank 0's buffers (batch statistics) stand for all, as DDP does.

    Args:
        model: the whole module.
        exchange: the ranks.
        device: where the model computes.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, device: torch.device) -> None:
        self._model, self._exchange, self._device = model, exchange, device
        self._versions = self._now()

    def share(self) -> None:
        """Send rank 0's buffers to all if a buffer has changed on any rank. All ranks together."""
        if self._exchange.size == 1 or not self._versions:
            return
        changed = torch.tensor([self._now() != self._versions], dtype=torch.uint8, device=self._device)
        if bool(self._exchange.maximum(changed).item()):
            for buffer in self._model.buffers():
                self._exchange.broadcast(buffer.data)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [0 if buffer.is_inference() else buffer._version for buffer in self._model.buffers()]


class Reach:
    """Knows which parameters the loss of no rank has reached.

    Whether there are any is agreed after the first backward. If there are, ranks compare after every backward; if there
    are none, a parameter that stays out later counts as a zero gradient.

    Args:
        lanes: all trainable lanes.
        exchange: the ranks.
        device: where the model computes.
    """

    def __init__(self, lanes: Sequence[Lane], exchange: Exchange, device: torch.device) -> None:
        self._lanes, self._exchange, self._device = lanes, exchange, device
        self._partial: bool | None = None  # some parameters are not reached; unknown before the first backward

    def unreached(self) -> set[str]:
        """Return the names of the parameters that no rank has reached since gradients were dropped."""
        if self._partial is False and self._exchange.size > 1:
            return set()
        names = [info.name for lane in self._lanes for info in lane.infos]
        flags = [flag for lane in self._lanes for flag in lane.reached]
        reached = self._exchange.maximum(torch.tensor(flags, dtype=torch.uint8, device=self._device))
        unreached = {name for name, flag in zip(names, reached.tolist(), strict=True) if not flag}
        if self._partial is None:
            self._partial = bool(unreached)
        return unreached
