"""The gradient norm of an engine, and clipping by norm or value."""

from __future__ import annotations

import torch

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.zero.binding import Binding
from lit_zero.zero.norms import grad_norm, scale_to_norm
from lit_zero.zero.passing import Passing


class Clipping(Passing):
    """What can be asked of, and done to, the reduced gradients between a backward and its step.

    Attributes:
        bindings: what stands for each optimizer.
        everyone: all ranks.
        device: where gradients lie.
    """

    everyone: Exchange
    device: torch.device

    def bindings_of(self, optimizer: torch.optim.Optimizer | None) -> list[Binding]:
        """Return what stands for ``optimizer``, in a list; for ``None`` all.

        Raises:
            LitZeroError: if it is not one of those that the engine was built on.
        """
        found = [binding for binding in self.bindings if optimizer is None or binding.optimizer is optimizer]
        if optimizer is not None and not found:
            raise LitZeroError(
                f"This {type(optimizer).__name__} is not one of the optimizers that configure_optimizers returned."
            )
        return found

    def grad_norm(self, norm_type: float = 2.0, optimizer: torch.optim.Optimizer | None = None) -> torch.Tensor:
        """Return the norm of the reduced gradients of one optimizer, or of all, over all their parameters and ranks,
        see ``norms.grad_norm``.
        """
        self._refuse_passed()
        return grad_norm(self.bindings_of(optimizer), self.everyone, self.device, norm_type)

    def clip_grad_norm(
        self, max_norm: float, norm_type: float = 2.0, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.Tensor:
        """Scale the gradients of one optimizer, or of all, so that their norm is at most ``max_norm``; return the norm
        before.
        """
        norm = self.grad_norm(norm_type, optimizer)
        scale_to_norm(self.bindings_of(optimizer), norm, max_norm)
        return norm

    def unscale(self, optimizer: torch.optim.Optimizer, factor: torch.Tensor) -> torch.Tensor | None:
        """Multiply the gradients of an optimizer by ``factor`` if its step can do so in passing.

        Returns:
            0-d, fp32: whether one of the elements that this rank answers for is infinite or NaN. ``None`` if the step
            cannot: nothing is done.
        """
        found = torch.zeros((), device=self.device)
        binding = next((each for each in self.bindings if each.optimizer is optimizer), None)
        return None if binding is None or not binding.unscale(factor.to(self.device), found) else found

    def heeds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the next step of ``optimizer`` changes nothing where its ``found_inf`` says so."""
        return any(binding.heeds for binding in self.bindings if binding.optimizer is optimizer)

    def clip_grad_value(self, max_value: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Clamp every gradient element of one optimizer, or of all, to ``[-max_value, max_value]``."""
        self._refuse_passed()
        for binding in self.bindings_of(optimizer):
            for grad in binding.grads():
                grad.clamp_(-max_value, max_value)
