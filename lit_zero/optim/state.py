"""What optimizers with two moments keep for a parameter, under torch's own names."""

from __future__ import annotations

from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def with_moments(state: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """Return ``state``, begun if it is empty: ``step`` (0-d, where the parameter is), ``exp_avg``, ``exp_avg_sq``."""
    if "step" not in state:  # it may hold what another way to step has left
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
    elif state["step"].device != param.device:  # as a checkpoint has it
        state["step"] = state["step"].to(param.device)
    return state
