"""Lion, which torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lit_zero.core.errors import ConfigError
from lit_zero.kernels import LionGroup, Segment, lion_step
from lit_zero.kernels.lion import lion_reference
from lit_zero.kernels.segments import in_portions
from lit_zero.optim.flat import Flat


class Lion(Flat):
    """Lion: steps by the sign of a moving average, with decoupled weight decay.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; about a third to a tenth of AdamW's.
        betas: of the average that is stepped by, and of the one that is kept; each at least 0 and below 1.
        weight_decay: decoupled; three to ten times AdamW's, for the same product with ``lr``.
        maximize: go up instead of down.
        fused: ``auto``, or ``none`` for plain torch operations everywhere. On a CPU both step by these.

    Raises:
        ConfigError: for a number out of its range.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", algorithm 2.
    """

    counts, rule = False, "lion_rule"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        fused: str | bool | None = "auto",
    ) -> None:
        if not lr >= 0.0 or not weight_decay >= 0.0:
            raise ConfigError(f"Lion: lr={lr}, weight_decay={weight_decay} are not valid: expected at least 0.")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"Lion: betas={betas} are not valid: expected at least 0 and below 1.")
        settings = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "maximize": maximize}
        self._choose(fused, {})
        torch.optim.Optimizer.__init__(self, params, settings)

    def _keys(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg",)

    def _numbers(self, group: dict[str, Any], begins: bool) -> LionGroup:
        beta1, beta2 = map(float, group["betas"])
        return LionGroup(float(group["lr"]), beta1, beta2, group["weight_decay"], group["maximize"])

    def _kernel(self) -> Callable[..., None]:
        return lion_step if self._fused == "auto" else _plainly

    def _needs_walk(self, group: dict[str, Any]) -> bool:
        return True  # there is no class of torch's

    def _plain_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._walk(list(self._held()))
        return loss


def _plainly(segments: Sequence[Segment], groups: Sequence[LionGroup], *_: Any) -> None:
    """Step by the reference, on whatever device."""
    for segment in segments:
        in_portions(segment, partial(lion_reference, group=groups[segment.group]), None)
