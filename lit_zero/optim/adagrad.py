"""Adagrad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lit_zero.kernels import AdagradGroup, adagrad_step
from lit_zero.optim.direct import Gathered
from lit_zero.optim.flat import Flat


class Adagrad(Flat, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` that steps flat, see :class:`~lit_zero.optim.flat.Flat`. States are made by the first
    step and not before: a strategy puts shards in the place of parameters in between.
    """

    plain, rule = torch.optim.Adagrad, "adagrad_rule"

    def __init__(self, params: Any, *args: Any, fused: str | bool | None = "auto", **kwargs: Any) -> None:
        super().__init__(params, *args, fused=fused, **kwargs)
        if self._fused == "auto":
            self.state.clear()

    def _keys(self, group: dict[str, Any]) -> Sequence[str]:
        return ("sum",)

    def _numbers(self, group: dict[str, Any], begins: bool) -> AdagradGroup:
        lr, decay = float(group["lr"]), group["lr_decay"]
        return AdagradGroup(lr, decay, group["eps"], group["weight_decay"], group["maximize"])

    def _call_torchs(self, group: dict[str, Any], held: Gathered, grad_scale: torch.Tensor | None) -> None:
        torch._fused_adagrad_(
            held.params,
            held.grads,
            held.states[0],
            held.steps,
            lr=float(group["lr"]),
            lr_decay=group["lr_decay"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )

    def _kernel(self) -> Callable[..., None]:
        return adagrad_step

    def _first_value(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])
