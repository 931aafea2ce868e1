"""Lightning's precision plugins, with the engine where they touch gradients.

The user's ``Trainer(precision=...)`` makes the plugin; a class of the same name is laid over it. The name matters: it
is the key under which a checkpoint keeps the loss scaler, so that plain Lightning and lit_zero read each other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lit_zero.core.errors import LitZeroError, UnsupportedError
from lit_zero.strategy.flavour import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lit_zero.zero.engine import Engine

_KNOWN = (Precision, MixedPrecision, HalfPrecision, DoublePrecision)


class _OnShards:
    """What a precision plugin does differently when gradients are shards. The engine is asked for late: it is made
    in ``setup``.
    """

    _engine: Callable[[], Engine]
    _strict = False  # a norm that is not finite is an error

    def _refuse_norm(self, norm: torch.Tensor) -> bool:
        # With a loss scaler, an infinite norm is the sign on which the step is skipped.
        return self._strict and getattr(self, "scaler", None) is None and not bool(norm.isfinite())

    def backward(self, tensor: torch.Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        engine = self._engine()
        engine.begin_backward(tensor)
        super().backward(tensor, model, optimizer, *args, **kwargs)  # type: ignore[misc]
        engine.end_backward()

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        engine = self._engine()
        norm = engine.clip_grad_norm(clip_val, optimizer=bare(optimizer))
        if self._refuse_norm(norm):
            raise LitZeroError(
                f"The gradient norm is {norm.item()} and cannot be clipped to {clip_val}. No weight has been changed "
                "by it. Set nonfinite_norm='ignore' in ZeroStrategy to train on."
            )

    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        self._engine().clip_grad_value(clip_val, optimizer=bare(optimizer))


class _AgreeingScaler(torch.amp.GradScaler):
    """A loss scaler on which all ranks agree: one rank's overflow skips the step everywhere.

    Attributes:
        skipped: by the id of each optimizer, on the device: not zero if its last step was skipped.
    """

    _engine: Callable[[torch.optim.Optimizer], Engine]
    skipped: dict[int, torch.Tensor]

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        engine = self._engine(optimizer)
        flag = engine.unscale(optimizer, inv_scale)
        if flag is None:
            # Gradients are views that share one buffer with others of the group, so they are not grouped by storage.
            found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
            flag = torch.zeros((), device=engine.device)
            for here in found.values():  # by device
                flag = torch.maximum(flag, here.to(engine.device))
        flag = engine.everyone.maximum(flag)
        self.skipped[id(optimizer)] = flag.clone()  # the scaler adds those of other optimizers to it
        return {flag.device: flag}

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self._engine(optimizer).heeds(optimizer):
            return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        vars(optimizer)["found_inf"] = self.skipped[id(optimizer)]  # nobody waits for the device
        try:
            return optimizer.step(*args, **kwargs)
        finally:
            del vars(optimizer)["found_inf"]


def over_shards(plugin: Precision, engine: Callable[[], Engine], strict: bool) -> Precision:
    """Return ``plugin`` with gradients taken from the engine.

    Args:
        plugin: what Lightning made of ``Trainer(precision=...)`` or ``Trainer(plugins=...)``.
        engine: returns the engine once it exists.
        strict: a gradient norm that is to be clipped and is not finite is an error.

    Raises:
        UnsupportedError: for a plugin that replaces the model's layers.
    """
    if isinstance(plugin, _OnShards):
        plugin._engine, plugin._strict = engine, strict
        return plugin
    base = type(plugin)
    if not any(base is known or (issubclass(base, known) and known is not Precision) for known in _KNOWN):
        raise UnsupportedError(
            f"The precision plugin {base.__name__} does not work with ZeroStrategy. Use Trainer(precision=...) with "
            "one of "
            "'32-true', '64-true', 'bf16-mixed', '16-mixed', 'bf16-true', '16-true'."
        )
    kind = type(base.__name__, (_OnShards, base), {"__qualname__": base.__qualname__, "__module__": base.__module__})
    covered: Any = object.__new__(kind)
    covered.__dict__.update(vars(plugin))
    covered._engine, covered._strict = engine, strict
    scaler = getattr(plugin, "scaler", None)
    if scaler is not None:
        covered.scaler = agreeing_scaler(scaler, lambda _: engine())
    result: Precision = covered
    return result


def agreeing_scaler(
    scaler: torch.amp.GradScaler, engine: Callable[[torch.optim.Optimizer], Engine]
) -> torch.amp.GradScaler:
    """Return a loss scaler that goes on from ``scaler`` and on which all ranks agree.

    Args:
        scaler: the user's, or the one that Lightning has made.
        engine: returns the engine that an optimizer belongs to, whose ranks are to agree.
    """
    agreeing = object.__new__(_AgreeingScaler)
    agreeing.__dict__.update(vars(scaler))
    agreeing._engine, agreeing.skipped = engine, {}
    return agreeing


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """Return an optimizer without Lightning's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


def lowered_dtype(plugin: Any) -> torch.dtype | None:
    """Return the 2-byte dtype of a mixed mode, ``None`` for the others."""
    modes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return modes.get(str(plugin.precision))


def hold_with_skipped_steps(scheduler: Any, plugin: Precision) -> None:
    """Let ``scheduler`` stand still when the loss scaler has skipped its optimizer's step.

    The scheduler gets a class of the same name whose ``step`` looks first; its state, which goes into checkpoints, is
    untouched.
    """
    scaler = getattr(plugin, "scaler", None)
    if scaler is None:
        return
    base = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        own = getattr(self, "optimizer", None)  # some schedulers steer by other means than an optimizer of theirs
        if not (any(scaler.skipped.values()) if own is None else bool(scaler.skipped.get(id(own), False))):
            base.step(self, *args, **kwargs)

    scheduler.__class__ = type(
        base.__name__, (base,), {"step": step, "__qualname__": base.__qualname__, "__module__": base.__module__}
    )
