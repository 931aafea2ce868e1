"""What the ranks compare beside gradients: buffers, and which parameters any loss reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange, Gather, Ticket
from lit_zero.zero.lane import Lane


class SharedBuffers:
    """Lets rank 0's buffers (batch statistics) stand for all, as DDP does.

    Whether any rank has changed a buffer is asked when a backward begins and looked up by the next forward, so nobody
    waits for the answer.

    Args:
        model: the whole module.
        exchange: the ranks.
        device: where the model computes.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, device: torch.device) -> None:
        self._model, self._exchange, self._device = model, exchange, device
        self._seen = self._now()
        self._asked: Ticket | None = None
        self._resting = False
        self._answers = torch.zeros(exchange.size, dtype=torch.uint8, device=device)

    def ask(self) -> None:
        """Begin to find out whether a buffer has changed on any rank. All ranks together."""
        if self._exchange.size == 1 or not self._seen or self._asked is not None:
            return
        now = self._now()
        same = len(now) == len(self._seen) and all(
            one is other and version == before for (one, version), (other, before) in zip(now, self._seen, strict=True)
        )
        own = torch.tensor([not same], dtype=torch.uint8, device=self._device)
        self._asked = self._exchange.all_gather([Gather(self._answers, own)])

    def share(self) -> None:
        """Send rank 0's buffers to all if one had changed when it was asked for. All ranks together."""
        if not torch.is_inference_mode_enabled():
            self._leave_inference_mode()
        if self._asked is None or self._resting:
            return
        self._asked.wait()
        self._asked = None
        if bool(self._answers.any()):
            for buffer in self._model.buffers():
                self._exchange.broadcast(buffer.data)
        self._seen = self._now()

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, nothing is sent: ranks may run different numbers of forwards."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def _now(self) -> list[tuple[torch.Tensor, int]]:
        # The tensors themselves, since a module may put a new one in a buffer's place, whose version may be that of the
        # old one. Tensors made in inference mode have no version.
        return [(buffer, -1 if buffer.is_inference() else buffer._version) for buffer in self._model.buffers()]

    def _leave_inference_mode(self) -> None:
        """Put copies in the place of buffers that an evaluation has made, which could not be written to any more."""
        if not any(buffer.is_inference() for buffer, _ in self._now()):
            return
        copies: dict[torch.Tensor, torch.Tensor] = {}
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_inference():
                    module._buffers[key] = copies.setdefault(buffer, buffer.clone())


class Reach:
    """Knows which parameters the loss of some rank reaches, and which that of none.

    With one optimizer, whether there are any out of reach is agreed after the first backward. If there are, ranks
    compare after every backward; if there are none, a parameter that stays out later counts as a zero gradient. With
    several, a loss is usually meant for some of the parameters: ranks look before every backward.

    Args:
        lanes: all trainable lanes.
        exchange: the ranks.
        device: where the model computes.
        several: there are several optimizers.
    """

    def __init__(self, lanes: Sequence[Lane], exchange: Exchange, device: torch.device, several: bool) -> None:
        self._lanes, self._exchange, self._device, self._several = lanes, exchange, device, several
        self._partial: bool | None = None  # some parameters are not reached; unknown before the first backward
        self._looked = False  # before this backward

    def look(self, loss: torch.Tensor | None) -> dict[Lane, list[int]] | None:
        """Return, for every lane, which of its parameters the graphs of all ranks' losses lead to (1) or not (0).

        Args:
            loss: this rank's; ``None`` if it is not known.

        Returns:
            ``None`` if it takes a backward to know. The same on every rank.

        Source: ``find_unused_parameters`` of torch's DistributedDataParallel walks the graph in the same way.
        """
        self._looked = self._several and loss is not None
        if not self._looked or loss is None:
            return None
        found = _leaves(loss)
        flags = [
            int(info.param in found or lane.filled[index])  # filled: a held micro-batch waits to be reduced
            for lane in self._lanes
            for index, info in enumerate(lane.infos)
        ]
        agreed = iter(self._exchange.maximum(torch.tensor(flags, dtype=torch.uint8, device=self._device)).tolist())
        return {lane: [next(agreed) for _ in lane.infos] for lane in self._lanes}

    def unreached(self, lanes: Sequence[Lane]) -> set[str]:
        """Return the names of the parameters that no rank has reached since gradients were dropped.

        Args:
            lanes: those that the backward has reached.
        """
        frozen = {
            info.name
            for lane in lanes
            for index, info in enumerate(lane.infos)
            if not info.param.requires_grad and not lane.reached[index]
        }
        if self._partial is False and self._exchange.size > 1 and not self._several:
            return frozen
        names = [info.name for lane in lanes for info in lane.infos]
        flags = [flag for lane in lanes for flag in lane.reached]
        if not self._looked and flags:
            flags = self._exchange.maximum(torch.tensor(flags, dtype=torch.uint8, device=self._device)).tolist()
        unreached = {name for name, flag in zip(names, flags, strict=True) if not flag}
        if self._partial is None:
            self._partial = bool(unreached)
        return unreached | frozen


def _leaves(loss: torch.Tensor) -> set[torch.Tensor]:
    """Return the leaves that the graph of ``loss`` leads to."""
    found: set[torch.Tensor] = set()
    seen = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(node.variable)  # type: ignore[attr-defined]
        nodes += [following for following, _ in node.next_functions]
    return found
