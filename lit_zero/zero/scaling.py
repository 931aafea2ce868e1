"""One factor for all gradients of an optimizer: multiplied at once, or owed until the step (``core.owing``).

[Note: the loss scale] Where the step pays, a loss scale is taken off by it too, so that gradients are read twice and
never written: once to see whether all are finite and to sum their squares, and once by the step. The sum is kept: if
nothing has changed them when they are clipped, their norm takes no further pass. An overflow is told to the step, and
nobody waits for the device: hooks after the step run as ever, and gradients are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_zero.core.owing import Owed, Pays, multiply
from lit_zero.kernels import unscale
from lit_zero.zero.lane import Lane
from lit_zero.zero.segment import Segment


class Scaling:
    """The gradients of a binding, and what they are multiplied by.

    Attributes:
        optimizer: the user's.
        segments: what its groups hold.
        owed: what the segments' gradients are still to be multiplied by.
    """

    optimizer: torch.optim.Optimizer
    segments: list[Segment]
    owed: Owed
    _lanes: Sequence[Lane]
    _squares: tuple[torch.Tensor, list[tuple[int, int]]] | None = None  # of which gradients

    def grads(self) -> list[torch.Tensor]:
        """Return the gradients of all segments."""
        return [segment.param.grad for segment in self.segments if segment.param.grad is not None]

    def own_grads(self) -> list[torch.Tensor]:
        """Return the gradients of the elements that this rank owns; over all ranks every element comes once."""
        grads = []
        for segment in self.segments:
            grad = segment.param.grad
            if grad is None or not segment.lane.counts:
                continue
            grad = grad.view(-1)[segment.own]
            if grad.numel():
                grads.append(grad)
        return grads

    @property
    def pays(self) -> bool:
        """Whether steps multiply gradients by what they are owed."""
        optimizer = self.optimizer
        return (isinstance(optimizer, Pays) and optimizer.may_pay) and all(
            not lane.keeper.away and optimizer.pays(lane.master.stand_in(), lane.handed_dtype) for lane in self._lanes
        )

    @property
    def heeds(self) -> bool:
        """Whether steps change nothing where ``found_inf`` says so; the same on all ranks that divide the lanes,
        whichever part of them is here: all take the step then, or none does.
        """
        return self.pays and not any(lane.keeper.walks for lane in self._lanes)

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply the gradients by a 0-d factor, by the end of the next step at the latest."""
        if self.pays:
            self.owed.owe(factor, [segment.param for segment in self.segments])
        else:
            multiply(self.grads(), factor)

    def unscale(self, factor: torch.Tensor, found_inf: torch.Tensor) -> bool:
        """Let the step multiply the gradients by ``factor`` [Note: the loss scale].

        Args:
            factor: 0-d.
            found_inf: 0-d, fp32: becomes 1 if one of the elements that this rank owns is infinite or NaN.

        Returns:
            Whether it can. If not, nothing is done.
        """
        if not self.pays:
            return False
        if any(grad.dtype == torch.float16 or not grad.is_contiguous() for grad in self.grads()):
            return False  # a loss scaler refuses the former; the latter are not reduced yet
        squares = unscale(self.own_grads(), None, found_inf, found_inf.device)
        self.scale(factor)
        self._squares = squares, self._present()
        return True

    def squares(self) -> torch.Tensor | None:
        """Return the sum of the squares of ``own_grads``, 0-d, if it is known."""
        if self._squares is None or self._squares[1] != self._present():
            return None
        with self.owed.lent() as factor:
            return self._squares[0] if factor is None else self._squares[0] * factor.to(self._squares[0]).square()

    def _present(self) -> list[tuple[int, int]]:
        """Return where the gradients lie, and how often they have been written to."""
        with self.owed.lent():
            return [(grad.data_ptr(), grad._version) for grad in self.grads()]
