"""Gradients that are computed in one piece, and so have no gradient themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward of an autograd function, which refuses ``create_graph=True``.

    torch's own decorator hands out a gradient without a graph where what comes in has none: a penalty on it would be
    lost without a word.

    Args:
        backward: computes gradients by other means than recorded operations.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "lit_zero's fused layers and losses have no second derivative, which create_graph=True (a gradient "
                "penalty, for one) asks for. Use layers=plain and torch's own modules there."
            )
        return once(ctx, *grads)

    return checked
