"""What a loss scaler gives the step of an optimizer."""

from __future__ import annotations

import torch


class Scaled:
    """A mixin for an optimizer whose step takes the scale of a loss scaler and its verdict.

    Outside of lit_zero's strategies Lightning refuses ``gradient_clip_val`` for such an optimizer with
    ``precision="16-mixed"``: it would clip what is still scaled.

    Attributes:
        grad_scale: what gradients are to be divided by, 0-d; set for the time of a step, as is the next.
        found_inf: not zero: the step changes nothing, counts included; 0-d.
    """

    _step_supports_amp_scaling = True
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None

    def _is_skipped(self) -> bool:
        """Return whether the step is skipped, as far as one knows without waiting for a device."""
        found = getattr(self, "found_inf", None)
        return found is not None and found.device.type == "cpu" and bool(found)

    def _factor(self, device: torch.device) -> torch.Tensor | None:
        """Return what gradients are multiplied by, 0-d fp32, if by anything."""
        scale = getattr(self, "grad_scale", None)
        return None if scale is None else scale.to(device, torch.float64).reciprocal().float()

    def _found(self, device: torch.device) -> torch.Tensor | None:
        """Return what says whether the step is skipped, 0-d fp32, if anything does."""
        found = getattr(self, "found_inf", None)
        return None if found is None else found.to(device, torch.float32)
