"""SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lit_zero.kernels import SGDGroup, sgd_step
from lit_zero.optim.direct import Gathered
from lit_zero.optim.flat import Flat


class SGD(Flat, torch.optim.SGD):
    """``torch.optim.SGD`` that steps flat, see :class:`~lit_zero.optim.flat.Flat`."""

    plain = torch.optim.SGD
    counts, rule = False, "sgd_rule"

    def _keys(self, group: dict[str, Any]) -> Sequence[str]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _numbers(self, group: dict[str, Any], begins: bool) -> SGDGroup:
        return SGDGroup(
            float(group["lr"]),
            group["momentum"],
            group["dampening"],
            float(group["weight_decay"]),
            group["nesterov"],
            group["maximize"],
            begins and self._needs_walk(group),
        )

    def _call_torchs(self, group: dict[str, Any], held: Gathered, grad_scale: torch.Tensor | None) -> None:
        torch._fused_sgd_(
            held.params,
            held.grads,
            held.states[0] if held.states else [],
            weight_decay=float(group["weight_decay"]),
            momentum=group["momentum"],
            lr=float(group["lr"]),
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,
            grad_scale=grad_scale,
        )

    def _kernel(self) -> Callable[..., None]:
        return sgd_step

    def _needs_walk(self, group: dict[str, Any]) -> bool:
        # The first step takes the gradient whole. Without dampening a buffer of zeros gives the same, and there is
        # nothing to tell torch's kernel, which knows a first step of all parameters only.
        return bool(group["momentum"] and group["dampening"])
