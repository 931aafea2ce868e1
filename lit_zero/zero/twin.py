"""A twin of the user's optimizer, which steps single portions, on the device or in host memory.

It is an object of the optimizer's class with the hyper-parameters of the moment at which it was made, one portion as
its only parameter, and no hooks. That is right for element-wise optimizers, and only those get masters that are stepped
in portions (``probe``).

[Note: what a state holds] What a state may be kept in depends on what it is: a moment that is never negative needs no
sign, and one that follows the weights (an average of them) is no moment. Names do not tell for optimizers of the
user's own, so it is tried out: a few steps on large weights with small gradients of both signs. A state that stays near
the weights follows them; one without a negative element has no sign.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.core.keeping import Content
from lit_zero.zero.segment import copied_value, is_elementwise

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OWN = ("step", "state", "param_groups", *_HOOKS)  # an optimizer's attributes that a twin has its own of


class Twin:
    """What steps as an optimizer would, were it to step now.

    Args:
        optimizer: the user's. What a scheduler or a loss scaler changes afterwards does not reach the twin.
        away: it steps in host memory; else on the device, as the optimizer does.
        before: the twin of the last step: what it has found out holds as long as no setting but ``lr`` changes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, away: bool, before: Twin | None = None) -> None:
        self._kind, self._away = type(optimizer), away
        mine = _in_host_memory if away else _own
        self._attributes = {key: mine(value) for key, value in vars(optimizer).items() if key not in _OWN}
        self._settings: list[dict[str, Any]] = []  # of each group
        self._numbers: dict[int, int] = {}  # of a group, by the id of a parameter in it
        self._found: dict[tuple[int, torch.dtype], Mapping[str, tuple[torch.dtype, Content]]] = {}
        for number, group in enumerate(optimizer.param_groups):
            settings = {key: mine(value) for key, value in group.items() if key != "params"}
            if away and "capturable" in settings:
                settings["capturable"] = False  # it wants a GPU, and changes where steps are counted, not what is done
            self._settings.append(settings)
            self._numbers |= {id(param): number for param in group["params"]}
        if before is not None and before._away == away and _same_settings(before._settings, self._settings, {"lr"}):
            self._found = before._found

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

    def states(self, like: nn.Parameter) -> Mapping[str, tuple[torch.dtype, Content]]:
        """Return dtype and content of the element-wise states that the optimizer keeps for a parameter, by key
        [Note: what a state holds].
        """
        key = self._numbers[id(like)], like.dtype
        if key not in self._found:
            self._found[key] = self._try_out(like)
        return self._found[key]

    @torch.no_grad()
    def _try_out(self, like: nn.Parameter) -> Mapping[str, tuple[torch.dtype, Content]]:
        place = torch.device("cpu") if self._away else like.device
        start = torch.tensor([1e3, -1e3, 2e3, -2e3, 5e2, -5e2], device=place).to(like.dtype)
        grad = torch.tensor([1.0, 0.5, -2.0, -1.0, 0.1, -0.1], device=place).to(like.dtype)
        param, state = nn.Parameter(start.clone()), dict[str, Any]()
        for size in (1.0, -0.7, 0.3):
            param.grad = grad * size
            state = self.step(like, param, state)
        return {
            key: (value.dtype, _content(value, start)) for key, value in state.items() if is_elementwise(value, param)
        }

    def same_settings(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer's hyper-parameters are still those with which the twin steps."""
        return _same_settings(self._settings, optimizer.param_groups)

    def _fastest(self, like: nn.Parameter) -> dict[str, Any]:
        """Return the settings under which a step in host memory is fastest: torch's fused kernel for a plain Adam or
        AdamW. Who has said ``foreach=`` or ``fused=`` gets that. A step on the device takes the same kernels as without
        portions, so that its results are the same.
        """
        group = self._settings[self._numbers[id(like)]]
        if not self._away:
            return group
        plain = self._kind in (torch.optim.Adam, torch.optim.AdamW) and like.dtype.is_floating_point
        said = any(group.get(key) is not None for key in ("foreach", "fused"))
        return group if not plain or said or group.get("differentiable") else {**group, "fused": True}


def _in_host_memory(value: Any) -> Any:
    """Return a copy of a setting, tensors in host memory."""
    if isinstance(value, (tuple, list)) and any(isinstance(each, torch.Tensor) for each in value):
        return type(value)(_in_host_memory(each) for each in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _own(value: Any) -> Any:
    """Return a copy of a setting."""
    if isinstance(value, (tuple, list)) and any(isinstance(each, torch.Tensor) for each in value):
        return type(value)(_own(each) for each in value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _same_settings(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], but: Collection[str] = ()
) -> bool:
    """Return whether groups have the same hyper-parameters, except those that ``but`` names."""
    return len(one) == len(other) and all(
        _same(value, mine.get(key))
        for mine, theirs in zip(one, other, strict=True)
        for key, value in theirs.items()
        if key != "params" and key not in but
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)


def _content(state: torch.Tensor, start: torch.Tensor) -> Content:
    """Return what a state holds after some small steps from ``start``."""
    if bool(((state - start).abs() <= 0.25 * start.abs()).all()):
        return Content.WEIGHTS
    return Content.POSITIVE if bool((state >= 0).all()) else Content.SIGNED
