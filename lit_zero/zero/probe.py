"""Is an optimizer element-wise? Found out by trying, not by a list of names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import UnsupportedError
from lit_zero.core.shards import WholeParameters
from lit_zero.zero.policy import Placement, Row


def is_shaped(optimizer: torch.optim.Optimizer, row: Row, walks: str = "") -> bool:
    """Return whether the optimizer needs parameters in their real shapes, which only whole masters have.

    Args:
        optimizer: the user's.
        row: the ZeRO stage.
        walks: the settings for which masters are stepped portion by portion, if they are.

    Raises:
        UnsupportedError: if it does, and masters are sharded.
    """
    if isinstance(optimizer, WholeParameters):
        if walks:
            raise UnsupportedError(
                f"{type(optimizer).__name__} looks at whole parameters, but with {walks} the step walks through the "
                "masters in portions. Leave that setting out, or use an element-wise optimizer (AdamW, SGD, Lion, ...)."
            )
        return False  # it asks for what it needs
    try:
        require_elementwise(optimizer)
    except UnsupportedError as error:
        if walks:
            raise UnsupportedError(
                f"{error} With {walks} that holds on one process too, because the step walks through the masters in "
                "portions. Leave that setting out: an optimizer like this needs them whole."
            ) from error
        if row.optimizer is Placement.SHARD or isinstance(optimizer, torch.optim.LBFGS):
            raise
        return True
    return False


def require_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer does to a shard what it does to the parameters in it.

    A probe takes a few steps on a small matrix, and on the two parts of its flattened elements with an optimizer of its
    own for each, as two ranks would have. The results must agree up to rounding, for the hyper-parameters of every
    group.

    Raises:
        UnsupportedError: if they do not, or if the optimizer cannot be probed.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            f"{name} evaluates the loss several times per step and works on all parameters at once; lit_zero cannot "
            "run it in any stage. Use another optimizer (AdamW, SGD, Lion, ...)."
        )
    for number in range(len(optimizer.param_groups)):
        try:
            with torch.random.fork_rng(devices=[]):
                reason = _difference(optimizer, number)
        except Exception as error:
            raise UnsupportedError(
                f"lit_zero could not find out whether {name} is element-wise: a copy of it could not step on a 4x6 "
                f"matrix ({type(error).__name__}: {error}). "
                "Sharded stages need an element-wise optimizer (AdamW, SGD, Lion, ...); zero.stage='none' takes any."
            ) from error
        if reason is not None:
            raise UnsupportedError(
                f"{name} is not element-wise: {reason}, so sharding would change the result. "
                "Use an element-wise optimizer (AdamW, SGD, Lion, ...), or zero.stage='none'."
            )


def _difference(optimizer: torch.optim.Optimizer, number: int) -> str | None:
    """Say how a matrix and its parts fare differently under the hyper-parameters of group ``number``, or ``None``."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator)
    start[2:] *= 5  # so that every norm differs from part to part
    sizes = (1.0, 30.0, 0.1, 3.0, 0.01, 10.0)  # what clips its updates does so in some of the steps
    grads = [size * torch.randn(4, 6, generator=generator) for size in sizes]
    whole = _stepped(optimizer, number, start, grads)
    change = (whole - start).abs().max()
    if not change > 0:
        raise ValueError("nothing moved")
    try:
        parts = [
            _stepped(optimizer, number, start.flatten()[part], [grad.flatten()[part] for grad in grads])
            for part in (slice(10), slice(10, None))
        ]
    except Exception as error:
        return f"it steps on a matrix but not on its flattened parts ({type(error).__name__}: {error})"
    if not (whole.flatten() - torch.cat(parts)).abs().max() <= 1e-3 * change:
        return "a step on a matrix differs from the same step on its flattened parts"
    return None


def _stepped(
    optimizer: torch.optim.Optimizer, number: int, value: torch.Tensor, grads: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return what ``value`` becomes under a copy of ``optimizer`` with the hyper-parameters of group ``number``."""
    param = nn.Parameter(value.clone())
    group = {key: copy.copy(each) for key, each in optimizer.param_groups[number].items()}
    for key in group.keys() & {"lr", "betas"}:
        group[key] = _plain(group[key])
    if "lr" in group:
        group["lr"] = max(group["lr"], 0.01)  # a warm-up may begin at zero, and nothing would move
    if "capturable" in group:
        group["capturable"] = False  # it wants a GPU, and changes where the step is counted, not what is done
    group.pop("param_names", None)
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(
        {
            key: copy.copy(each) if isinstance(each, (dict, list, set)) else each
            for key, each in vars(optimizer).items()
            if not isinstance(each, torch.Tensor)
        }
    )
    state = type(optimizer.state)(dict) if optimizer.state is not None else {}
    twin.__setstate__({**vars(twin), "state": state, "param_groups": [{**group, "params": [param]}]})
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if hooks in vars(twin):
            vars(twin)[hooks] = type(vars(twin)[hooks])()
    step: Any = type(twin).step  # the class's own: schedulers and profilers wrap the instance's
    for grad in grads:
        param.grad = grad.clone()
        step(twin)
    return param.detach()


def _plain(value: Any) -> Any:
    """Return numbers for tensors of one element, which some steps take on a GPU only."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(each) for each in value)
    return value.item() if isinstance(value, torch.Tensor) else value
