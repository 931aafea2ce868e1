"""What a loss scaler gives the step of an optimizer."""

from __future__ import annotations

import torch


class Scaled:
    """A mixin for an optimizer whose step can take the scale of a loss scaler and its verdict, so that nothing waits
    for the device.

    Outside of lit_zero's strategies Lightning refuses ``gradient_clip_val`` for an optimizer that takes them, with
    ``precision="16-mixed"``: it would clip what is still scaled. So it does only when asked to.

    Attributes:
        grad_scale: what gradients are to be divided by, 0-d; set for the time of a step, as is the next.
        found_inf: not zero: the step changes nothing, counts included; 0-d.
    """

    _step_supports_amp_scaling = False
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None

    def _is_skipped(self) -> bool:
        """Return whether the step is skipped, as far as one knows without waiting for a device."""
        found = getattr(self, "found_inf", None)
        return found is not None and found.device.type == "cpu" and bool(found)

    def _factor(self, device: torch.device) -> torch.Tensor | None:
        """Return what gradients are multiplied by, 0-d fp32, if by anything."""
        return as_factor(getattr(self, "grad_scale", None), device)

    def _found(self, device: torch.device) -> torch.Tensor | None:
        """Return what says whether the step is skipped, 0-d fp32, if anything does."""
        return as_verdict(getattr(self, "found_inf", None), device)


def as_factor(grad_scale: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return what gradients are multiplied by, 0-d fp32, that are to be divided by ``grad_scale``."""
    return None if grad_scale is None else grad_scale.to(device, torch.float64).reciprocal().float()


def as_verdict(found_inf: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return a loss scaler's verdict as kernels read it: 0-d fp32."""
    return None if found_inf is None else found_inf.to(device, torch.float32)
