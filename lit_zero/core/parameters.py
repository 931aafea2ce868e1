"""Let a parameter become another tensor and stay the same object."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn

from lit_zero.core.errors import UnsupportedError


def exchange(model: nn.Module, params: Collection[nn.Parameter], make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Let every one of ``params`` become what ``make`` makes of it, and stay the object that it is.

    Raises:
        UnsupportedError: naming a parameter that other objects refer to in a way that forbids it.
    """
    left = set(params)
    for name, module in model.named_modules():
        for key, param in module._parameters.items():
            if param is None or param not in left:
                continue
            left.remove(param)
            try:
                become(module, param, make(param))
            except RuntimeError as error:
                raise UnsupportedError(
                    f"The {key!r} of module {name!r} ({type(module).__name__}) cannot wait for its value: {error}. "
                    "Load its weights before the Trainer runs, in __init__."
                ) from error


def become(module: nn.Module, param: nn.Parameter, other: nn.Parameter) -> None:
    """Let ``param`` be ``other``; it stays the same object, which optimizers and other modules may hold, with all
    attributes that somebody has given it.

    Args:
        module: holds ``param``.
        param: keeps its identity.
        other: gives shape, dtype, device and memory.

    Raises:
        RuntimeError: if other objects refer to ``param`` in a way that forbids it.
    """
    if param._backward_hooks or param._post_accumulate_grad_hooks:
        raise RuntimeError("hooks are registered on it, which would be lost")
    attributes = dict(vars(param))
    if isinstance(module, nn.RNNBase):
        module._flat_weight_refs = []  # weak references, which swap_tensors does not allow
    torch.utils.swap_tensors(param, other)
    vars(param).update(attributes)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
