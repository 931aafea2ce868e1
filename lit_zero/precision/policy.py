"""The dtypes of a training run: what is computed in 2 bytes, what stays in fp32, in what gradients are stored and
summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lit_zero.core.errors import ConfigError, check_choice

# Modules whose parameters autocast would cast to 2 bytes anyway: handing them over in 2 bytes changes no bit of the
# forward.
_MATMUL_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
# Not what such a module computes them from (``weight_v`` of a weight norm, ``weight_orig``): autocast casts the result.
_CAST = frozenset(
    ["weight", "bias", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"] + [f"{each}_proj_weight" for each in "qkv"]
)


_REASONS = {
    "master": "An fp32 original is put together from its bf16 copy, and there is none.",
    "moments": "States are fp32 numbers in those modes.",
    "step": "A loss scaler must see all gradients before the first step; other modes are not tested.",
}


@dataclass(frozen=True)
class Precision:
    """How the mixed modes (``Trainer(precision="bf16-mixed")``, ``"16-mixed"``) treat parameters and gradients, and in
    what form the optimizer's side of them is kept.

    Args:
        reduce_dtype: ``float32``: 2-byte gradients are summed over ranks in fp32. ``compute``: in their own dtype.
        gradient_dtype: how gradients of 2-byte parameters are stored until the step. ``float32``: 4 bytes, and what is
            summed over ranks is not rounded again. ``compute``: 2 bytes, and for the step an fp32 copy of those that
            this rank steps with; ``none`` and ``stage1``, which sum in the stored gradients, also send half as much.
        lower: which parameters travel and compute in 2 bytes. ``matmul``: the weights of linear, convolution and
            attention modules, those that autocast casts, so that the result equals Lightning's own mixed precision.
            ``all``: every parameter (norms and embeddings then round too).
        master: ``bf16-mixed`` only. ``float32``: the fp32 original of a 2-byte parameter takes 4 bytes more. ``split``:
            2 bytes more, from which and from the parameter itself it is put together bit for bit.
        moments: the optimizer's states that are moments of gradients. ``float32``: as the optimizer makes them.
            ``bfloat16``: 2 bytes an element, those that are never negative (``exp_avg_sq``) rounded at random.
            ``int8``: one byte, and one fp32 number for every 256.
        step: ``after``: the optimizer steps when the backward is over. ``backward``: inside it, lane by lane, as soon
            as gradients are complete, so that they never stand all at once. No clipping, no accumulation, no loss
            scaler, automatic optimization. (Clipping by norm would take two backwards, one of them only to
            learn the norm; that is not offered. ``after`` with ``gradient_dtype="compute"`` takes one, and 2 bytes.)

    With ``master``, ``moments`` or ``step`` set, the step goes through the masters in portions, each of which is
    brought to fp32, stepped by the optimizer's own class, and put away again; with 2-byte gradients no fp32 copy of
    them is made but the portion's. Only element-wise optimizers can do that.

    Raises:
        ConfigError: for an unknown choice.
    """

    reduce_dtype: str = "float32"
    gradient_dtype: str = "float32"
    lower: str = "matmul"
    master: str = "float32"
    moments: str = "float32"
    step: str = "after"

    def __post_init__(self) -> None:
        check_choice("precision.reduce_dtype", self.reduce_dtype, ("float32", "compute"))
        check_choice("precision.gradient_dtype", self.gradient_dtype, ("float32", "compute"))
        check_choice("precision.lower", self.lower, ("matmul", "all"))
        check_choice("precision.master", self.master, ("float32", "split"))
        check_choice("precision.moments", self.moments, ("float32", "bfloat16", "int8"))
        check_choice("precision.step", self.step, ("after", "backward"))

    @property
    def small(self) -> tuple[str, ...]:
        """The settings for which the step goes through the masters in portions, as the user types them."""
        defaults = (("master", "float32"), ("moments", "float32"), ("step", "after"))
        return tuple(
            f"precision.{key}={getattr(self, key)}" for key, default in defaults if getattr(self, key) != default
        )

    def check_mode(self, mode: str) -> None:
        """Check that settings of what is kept have an effect in a precision mode of Lightning's.

        Args:
            mode: ``Trainer(precision=...)``.

        Raises:
            ConfigError: naming the setting, and the modes that it is for.
        """
        for key, value, default, modes in (
            ("master", self.master, "float32", ("bf16-mixed",)),
            ("moments", self.moments, "float32", ("32-true", "bf16-mixed", "16-mixed")),
            ("step", self.step, "after", ("32-true", "bf16-mixed")),
        ):
            if value != default and mode not in modes:
                raise ConfigError(
                    f"precision.{key}={value!r} has no place in the mode {mode!r}: expected {' or '.join(modes)}. "
                    f"{_REASONS[key]} Remove precision.{key}, or choose another mode."
                )


@dataclass(frozen=True)
class Lowering:
    """A :class:`Precision` applied to one run.

    Attributes:
        policy: the user's choice.
        dtype: the 2-byte dtype of the mixed mode, ``None`` outside mixed modes: parameters then compute in the dtype
            they have.
    """

    policy: Precision = Precision()
    dtype: torch.dtype | None = None

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """Dtype in which 2-byte gradients are summed, ``None`` for their own."""
        return torch.float32 if self.policy.reduce_dtype == "float32" else None

    def compute_dtype(self, param: nn.Parameter, owners: Sequence[nn.Module]) -> torch.dtype:
        """Return the dtype in which ``param`` is used.

        Args:
            param: the parameter as the user made it; its dtype is that of the master copy.
            owners: every module that holds it.
        """
        if self.dtype is None or param.dtype != torch.float32:
            return param.dtype
        if self.policy.lower == "all" or all(_is_cast(param, owner) for owner in owners):
            return self.dtype
        return param.dtype

    def gradient_dtype(self, compute: torch.dtype, master: torch.dtype) -> torch.dtype:
        """Return the dtype in which gradients of such parameters are stored until the step."""
        return compute if self.policy.gradient_dtype == "compute" else master


def _is_cast(param: nn.Parameter, owner: nn.Module) -> bool:
    """Return whether autocast casts ``param`` where ``owner`` uses it."""
    computed_from = any(held is param and key not in _CAST for key, held in owner._parameters.items())
    return isinstance(owner, _MATMUL_MODULES) and not computed_from
