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
        self._seen = self._now()
        self._told = True  # versions tell of every change; in inference mode they do not

    def share(self) -> None:
        """Send rank 0's buffers to all if a buffer has changed on any rank. All ranks together."""
        if self._exchange.size == 1 or not self._seen:
            return
        now = self._now()
        same = len(now) == len(self._seen) and all(
            one is other and version == before for (one, version), (other, before) in zip(now, self._seen, strict=True)
        )
        changed = torch.tensor([not (same and self._told)], dtype=torch.uint8, device=self._device)
        if bool(self._exchange.maximum(changed).item()):
            if not torch.is_inference_mode_enabled():
                self._leave_inference_mode()
            for buffer in self._model.buffers():
                self._exchange.broadcast(buffer.data)
        self._seen, self._told = self._now(), not torch.is_inference_mode_enabled()

    def _now(self) -> list[tuple[torch.Tensor, int]]:
        # The tensors themselves, since a module may put a new one in a buffer's place, whose version may be that of the
        # old one. Tensors made in inference mode have no version.
        return [(buffer, -1 if buffer.is_inference() else buffer._version) for buffer in self._model.buffers()]

    def _leave_inference_mode(self) -> None:
        """Put copies in the place of buffers that an evaluation has made, which could not be written to any more."""
        copies: dict[torch.Tensor, torch.Tensor] = {}
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_inference():
                    module._buffers[key] = copies.setdefault(buffer, buffer.clone())


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
