"""LAMB: Adam's update, scaled so that each parameter moves by a fixed part of its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lit_zero.core.errors import UnsupportedError
from lit_zero.core.shards import WholeParameters
from lit_zero.kernels.lamb import LambGroup, LambPiece, lamb_apply, lamb_moments
from lit_zero.optim.loss_scale import Scaled
from lit_zero.optim.settings import check_settings
from lit_zero.optim.state import MOMENTS, with_moments


class LAMB(Scaled, WholeParameters, torch.optim.Optimizer):
    """Adam for large batches, in every ZeRO stage: the norms of parameters that are divided over ranks take one sum of
    two numbers for each parameter a step.

    Args:
        params: parameters or groups of them.
        lr: learning rate: by which part of its norm a parameter moves.
        betas: how slowly the two moments forget.
        eps: added to the root of the second moment.
        weight_decay: added to the update as this multiple of the parameter, before its norm is taken.
        adapt: scale updates to the parameters' norms. A group for which it is false takes the learning rate as it is;
            often chosen for norms and biases, together with ``weight_decay=0``.
        takes_scale: the step takes the scale of a loss scaler, see :class:`~lit_zero.optim.loss_scale.Scaled`.

    Raises:
        ValueError: for a setting that cannot be.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2, with the
    identity for the scaling function.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
        takes_scale: bool = False,
    ) -> None:
        self._step_supports_amp_scaling = takes_scale
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; with several ranks, all together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_skipped():
            return loss
        pieces: dict[torch.device, list[LambPiece]] = {}
        for group in self.param_groups:
            lr, others = float(group["lr"]), (group["eps"], group["weight_decay"], group["adapt"])
            settings = LambGroup(lr, *group["betas"], *others)
            for param in group["params"]:
                if param.grad is not None:
                    pieces.setdefault(param.device, []).append(self._piece(param, settings))
        for device, each in pieces.items():
            found = self._found(device)
            lamb_apply(each, self.shards.sum(lamb_moments(each, self._factor(device), found)), found)
        return loss

    def _piece(self, param: torch.Tensor, settings: LambGroup) -> LambPiece:
        if not param.is_contiguous():
            raise UnsupportedError(
                f"LAMB steps contiguous parameters, but one of shape {tuple(param.shape)} has stride {param.stride()}. "
                "Make it contiguous (param.data = param.data.contiguous()) before the optimizer is built."
            )
        state = with_moments(self.state[param], param)
        assert param.grad is not None
        for key in MOMENTS:
            state[key] = state[key].contiguous()  # what has been loaded may lie in another order, and is written here
        moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        flat = param.view(-1), param.grad.reshape(-1), *moments
        return LambPiece(settings, *flat, step=state["step"], own=self.shards.own(param))
