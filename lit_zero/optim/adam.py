"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from lit_zero.kernels import AdamGroup, adamw_step
from lit_zero.optim.direct import Gathered
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

    def _call_torchs(self, group: dict[str, Any], held: Gathered, grad_scale: torch.Tensor | None) -> None:
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        first, second, *peak = held.states
        beta1, beta2 = map(float, group["betas"])
        kernel(
            held.params,
            held.grads,
            first,
            second,
            peak[0] if peak else [],
            held.steps,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )

    def _kernel(self) -> Callable[..., None]:
        return adamw_step


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW`` that steps flat, see :class:`~lit_zero.optim.flat.Flat`."""

    plain = torch.optim.AdamW
