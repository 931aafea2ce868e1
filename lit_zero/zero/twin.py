"""A twin of the user's optimizer, which steps single portions in host memory.

It is an object of the optimizer's class with the hyper-parameters of the moment at which it was made, one portion as
its only parameter, and no hooks. That is right for element-wise optimizers, and only those get masters that can live
elsewhere (``probe``).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.zero.segment import copied_value, is_elementwise

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OWN = ("step", "state", "param_groups", *_HOOKS)  # an optimizer's attributes that a twin has its own of


class Twin:
    """What steps as an optimizer would, were it to step now.

    Args:
        optimizer: the user's. What a scheduler or a loss scaler changes afterwards does not reach the twin.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._kind = type(optimizer)
        self._attributes = {key: _in_host_memory(value) for key, value in vars(optimizer).items() if key not in _OWN}
        self._groups: dict[int, dict[str, Any]] = {}  # by the id of a parameter in it
        self._found: dict[tuple[int, torch.dtype], Sequence[torch.dtype]] = {}
        for group in optimizer.param_groups:
            settings = {key: _in_host_memory(value) for key, value in group.items() if key != "params"}
            if "capturable" in settings:
                settings["capturable"] = False  # it wants a GPU, and changes where steps are counted, not what is done
            self._groups |= {id(param): settings for param in group["params"]}

    def step(self, like: nn.Parameter, param: nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
        """Step ``param`` with ``state``, by the hyper-parameters of ``like``; return the state after."""
        twin = object.__new__(self._kind)
        settings = {key: copied_value(value) for key, value in self._fastest(like).items()}
        twin.__dict__.update({**self._attributes, **{key: OrderedDict() for key in _HOOKS}})
        twin.param_groups, twin.state = [{**settings, "params": [param]}], defaultdict(dict)
        if state:
            twin.state[param] = dict(state)  # of its own: an optimizer may put new tensors in the place of old ones
        step: Any = self._kind.step  # the class's own: schedulers and profilers wrap the instance's
        step(twin)
        found: dict[str, Any] = twin.state[param]
        return found

    def state_dtypes(self, like: nn.Parameter) -> Sequence[torch.dtype]:
        """Return the dtypes of the element-wise states that the optimizer keeps for a parameter, found by trying."""
        key = id(self._groups[id(like)]), like.dtype
        if key not in self._found:
            param = nn.Parameter(torch.ones(6, dtype=like.dtype, device="cpu"))
            param.grad = torch.ones_like(param)
            with torch.no_grad():
                state = self.step(like, param, {})
            self._found[key] = [value.dtype for value in state.values() if is_elementwise(value, param)]
        return self._found[key]

    def _fastest(self, like: nn.Parameter) -> dict[str, Any]:
        """Return the settings under which a step on the CPU is fastest: torch's fused kernel for a plain Adam or AdamW.
        Who has said ``foreach=`` or ``fused=`` gets that.
        """
        group = self._groups[id(like)]
        plain = self._kind in (torch.optim.Adam, torch.optim.AdamW) and like.dtype.is_floating_point
        said = any(group.get(key) is not None for key in ("foreach", "fused"))
        return group if not plain or said or group.get("differentiable") else {**group, "fused": True}


def _in_host_memory(value: Any) -> Any:
    """Return a copy of a setting, tensors in host memory."""
    if isinstance(value, (tuple, list)) and any(isinstance(each, torch.Tensor) for each in value):
        return type(value)(_in_host_memory(each) for each in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
