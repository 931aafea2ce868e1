"""Muon: the momentum of a matrix, orthogonalised, is its update; what is no hidden matrix is stepped by AdamW."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from lit_zero.core.errors import check_choice
from lit_zero.core.shards import WholeParameters
from lit_zero.kernels.newton_schulz import COEFFICIENTS, STACKED_BYTES, orthogonalize, stacks
from lit_zero.optim.flat import is_torchs_own, same_order
from lit_zero.optim.loss_scale import Scaled
from lit_zero.optim.settings import check_length, check_settings
from lit_zero.optim.state import MOMENTS, with_moments

SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)}


class Muon(Scaled, WholeParameters, torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, in every ZeRO stage.

    Moments are divided as the parameters are. Where a matrix is, its momentum goes to one of the ranks that hold some
    of it, is orthogonalised there, and the update goes back: two rounds of messages a step, for the matrices that a
    boundary between ranks cuts. Where every rank holds all of the optimizer's state, each does its share of the
    matrices and sends the updates to the others. Matrices of one shape are orthogonalised together.

    Parameters of two and more dimensions are hidden matrices (all but the first are taken together, as in a
    convolution), unless their group says otherwise. Embeddings and the output layer should: put them into a group with
    ``use_muon=False``.

    Args:
        params: parameters or groups of them. A group may say ``use_muon``.
        lr: learning rate, of both.
        momentum: how slowly the momentum of matrices forgets.
        nesterov: look ahead by one step of it.
        weight_decay: decoupled, of both.
        adjust_lr_fn: how an update is scaled. ``match_rms_adamw``: to the size of AdamW's, so that both take one
            learning rate. ``original``: to the shape, as Jordan does; what AdamW steps then wants an ``lr`` of its own.
        ns_steps: steps of the orthogonalisation.
        ns_coefficients: of its polynomial.
        ns_dtype: of its products, and of what travels: ``bfloat16``, ``float32`` or ``float64``.
        betas: of AdamW.
        eps: of AdamW.
        takes_scale: the step takes the scale of a loss scaler, see :class:`~lit_zero.optim.loss_scale.Scaled`.

    Raises:
        ValueError: for a setting that cannot be.

    Source: Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is Scalable for
    LLM Training", section 2.2 (``match_rms_adamw``, weight decay).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr_fn: str = "match_rms_adamw",
        ns_steps: int = 5,
        ns_coefficients: Sequence[float] = COEFFICIENTS,
        ns_dtype: str = "bfloat16",
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        takes_scale: bool = False,
    ) -> None:
        self._step_supports_amp_scaling = takes_scale
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "betas": betas,
            "eps": eps,
            "use_muon": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = {**self.defaults, **param_group}
        check_settings(settings)
        check_length("ns_coefficients", settings["ns_coefficients"], 3)
        if settings["ns_steps"] < 1:
            raise ValueError(
                f"optimizer.ns_steps={settings['ns_steps']!r} is not valid: expected a whole number of at least 1."
            )
        check_choice("adjust_lr_fn", settings["adjust_lr_fn"], SCALES)
        check_choice("ns_dtype", settings["ns_dtype"], DTYPES)
        super().add_param_group(param_group)
        if settings["use_muon"]:
            for param in self.param_groups[-1]["params"]:
                if param.dim() < 2:
                    raise ValueError(
                        f"A parameter of shape {tuple(param.shape)} is in a group with use_muon=True, but Muon steps "
                        "matrices. Leave use_muon out, or put it into a group with use_muon=False, which AdamW steps."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; with several ranks, all together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_skipped():
            return loss
        matrices: dict[str, list[tuple[dict[str, Any], torch.Tensor]]] = {}
        for group in self.param_groups:
            held = [param for param in group["params"] if param.grad is not None]
            hidden = [param for param in held if self._is_hidden(group, param)]
            matrices.setdefault(group["ns_dtype"], []).extend((group, param) for param in hidden)
            self._step_others(group, [param for param in held if not self._is_hidden(group, param)])
        for dtype, each in matrices.items():
            self._step_matrices(each, DTYPES[dtype])
        return loss

    def _is_hidden(self, group: dict[str, Any], param: torch.Tensor) -> bool:
        return len(self.shards.shape(param)) >= 2 if group["use_muon"] is None else bool(group["use_muon"])

    def _step_matrices(self, held: Sequence[tuple[dict[str, Any], torch.Tensor]], dtype: torch.dtype) -> None:
        if not held:
            return
        params = [param for _, param in held]
        wholes = self.shards.collect(params, [self._momentum(group, param).to(dtype) for group, param in held])
        self._orthogonalize(wholes, [group for group, _ in held])
        for (group, param), update in zip(held, self.shards.spread(params, wholes, dtype), strict=True):
            rows, *others = self.shards.shape(param)
            scale = SCALES[group["adjust_lr_fn"]](rows, math.prod(others))
            with self._unless_skipped(param) as stepped:
                stepped.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    @staticmethod
    def _orthogonalize(wholes: dict[int, torch.Tensor], groups: Sequence[dict[str, Any]]) -> None:
        """Put what is orthogonalised in the place of each matrix; ``wholes``: by position, as ``groups``."""
        numbers = list(wholes)
        if not numbers:
            return
        kinds = [
            (wholes[n].flatten(1).shape, wholes[n].device, groups[n]["ns_steps"], tuple(groups[n]["ns_coefficients"]))
            for n in numbers
        ]
        limit = STACKED_BYTES.get(wholes[numbers[0]].device.type, STACKED_BYTES["cuda"])
        for stack in stacks(kinds, [wholes[number].nbytes for number in numbers], limit):
            *_, steps, coefficients = kinds[stack[0]]
            each = [wholes[numbers[position]].flatten(1) for position in stack]
            found = orthogonalize(torch.stack(each) if len(each) > 1 else each[0], steps, coefficients)
            for position, matrix in zip(stack, found.unbind() if len(each) > 1 else [found], strict=True):
                wholes[numbers[position]] = matrix.view(wholes[numbers[position]].shape)

    def _momentum(self, group: dict[str, Any], param: torch.Tensor) -> torch.Tensor:
        """Update the momentum of a parameter's part; return what is to be orthogonalised."""
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        momentum: torch.Tensor = state["momentum_buffer"]
        factor = self._factor(param.device)
        grad = grad if factor is None else grad * factor
        with self._unless_skipped(momentum) as moved:
            moved.lerp_(grad, 1.0 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    @contextlib.contextmanager
    def _unless_skipped(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give a tensor to be changed in place of ``tensor``, which takes it over unless the step is skipped. Nothing
        is read back from the device, and what came of infinite gradients leaves no trace.
        """
        found = self._found(tensor.device)
        changed = tensor if found is None else tensor.clone()
        yield changed
        if found is not None:
            tensor.copy_(torch.where(found != 0, tensor, changed))

    def _step_others(self, group: dict[str, Any], params: Sequence[torch.Tensor]) -> None:
        params = [param for param in params if param.numel()]
        if not params:
            return
        states = [with_moments(self.state[param], param) for param in params]
        moments = [(param, state[key]) for param, state in zip(params, states, strict=True) for key in MOMENTS]
        in_order = all(map(is_torchs_own, params)) and all(same_order(value, param) for param, value in moments)
        grads = [param.grad for param in params if param.grad is not None]
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not in_order:  # torch's other ways know neither
            if found is not None and bool(found):
                return
            grads = [grad if scale is None else grad / scale.to(grad.device) for grad in grads]
            scale = found = None
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=in_order,  # one pass over memory, on a CPU too
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=scale,
            found_inf=found,
        )
