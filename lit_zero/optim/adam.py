"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from lit_zero.kernels import AdamGroup, adamw_step
from lit_zero.optim.flat import Flat


class Adam(Flat, torch.optim.Adam):
    """``torch.optim.Adam`` (weight decay is an L2 penalty) that steps flat, see :class:`~lit_zero.optim.flat.Flat`."""

    plain: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    rule = "adamw_rule"

    def _keys(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any], begins: bool) -> AdamGroup:
        beta1, beta2 = map(float, group["betas"])
        return AdamGroup(
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
        )

    def _kernel(self) -> Callable[..., None]:
        return adamw_step


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW`` that steps flat, see :class:`~lit_zero.optim.flat.Flat`."""

    plain = torch.optim.AdamW
