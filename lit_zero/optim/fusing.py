"""Turns an optimizer of torch's into one that steps flat."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from lit_zero.core.errors import ConfigError, UnsupportedError, did_you_mean
from lit_zero.kernels import Tables
from lit_zero.optim.adagrad import Adagrad
from lit_zero.optim.adam import Adam, AdamW
from lit_zero.optim.flat import Flat, refuse_other_ways
from lit_zero.optim.sgd import SGD

_KINDS: dict[type[torch.optim.Optimizer], type[Flat]] = {kind.plain: kind for kind in (AdamW, Adam, SGD, Adagrad)}


def fuse(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let a plain ``torch.optim.AdamW``, ``Adam``, ``SGD`` or ``Adagrad`` step flat from now on; return it.

    It stays the same object, with its groups and states, and gets the class of that name of ``lit_zero.optim``.
    Schedulers that hold it go on.

    Args:
        optimizer: of torch's class itself: a subclass may step in another way. One of ours is returned as it is.

    Raises:
        ConfigError: for another optimizer, for one of ours that was made with ``fused="none"``, or for a setting that
            asks for another way to step (``foreach``, ``capturable``, ``differentiable``).
        UnsupportedError: if something else has been put in the place of its ``step``.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, Flat):
        if optimizer._fused == "none":
            raise ConfigError(f"optimizer.fused='none' of {name} contradicts fuse(). Remove one of them.")
        return optimizer
    kind = _KINDS.get(type(optimizer))
    if kind is None:
        known = [f"torch.optim.{each.__name__}" for each in _KINDS]
        raise ConfigError(f"{name} has no fused step here. {did_you_mean(f'torch.optim.{name}', known)}")
    for group in optimizer.param_groups:
        refuse_other_ways(name, group)
    wrapped = vars(optimizer).get("step")
    if wrapped is not None and not getattr(wrapped, "_wrapped_by_lr_sched", False):
        raise UnsupportedError(
            f"Something has been put in the place of the step of this {name}. Call fuse() before it is, best where the "
            "optimizer is made."
        )
    fused: Any = optimizer
    fused.__class__ = kind
    fused._fused, fused._tables, fused._step_supports_amp_scaling = "auto", Tables(), True
    fused._patch_step_function()  # hooks and profilers run around the step of this class too
    if wrapped is not None:
        fused.step = _noted(fused, kind)
    return optimizer


def _noted(optimizer: Any, kind: Any) -> Any:
    """Return a ``step`` that tells schedulers that it has been called, as the one that they have put there."""
    held = weakref.ref(optimizer)

    @functools.wraps(kind.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        stepped = held()
        assert stepped is not None
        stepped._opt_called = True
        return kind.step(stepped, *args, **kwargs)

    vars(step)["_wrapped_by_lr_sched"] = True
    return step
