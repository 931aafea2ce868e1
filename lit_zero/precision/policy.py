"""The dtypes of a training run: what is computed in 2 bytes, what stays in fp32, in what gradients are stored and
summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lit_zero.core.errors import check_choice

# Modules whose parameters autocast would cast to 2 bytes anyway: handing them over in 2 bytes changes no bit of the
# forward.
_MATMUL_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
# Not what such a module computes them from (``weight_v`` of a weight norm, ``weight_orig``): autocast casts the result.
_CAST = frozenset(
    ["weight", "bias", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"] + [f"{each}_proj_weight" for each in "qkv"]
)


@dataclass(frozen=True)
class Precision:
    """How the mixed modes (``Trainer(precision="bf16-mixed")``, ``"16-mixed"``) treat parameters and gradients.

    Args:
        reduce_dtype: ``float32``: 2-byte gradients are summed over ranks in fp32. ``compute``: in their own dtype.
        gradient_dtype: how gradients of 2-byte parameters are stored until the step. ``float32``: 4 bytes, and what is
            summed over ranks is not rounded again. ``compute``: 2 bytes, and for the step an fp32 copy of those that
            this rank steps with; ``none`` and ``stage1``, which sum in the stored gradients, also send half as much.
        lower: which parameters travel and compute in 2 bytes. ``matmul``: the weights of linear, convolution and
            attention modules, those that autocast casts, so that the result equals Lightning's own mixed precision.
            ``all``: every parameter (norms and embeddings then round too).

    Raises:
        ConfigError: for an unknown choice.
    """

    reduce_dtype: str = "float32"
    gradient_dtype: str = "float32"
    lower: str = "matmul"

    def __post_init__(self) -> None:
        check_choice("precision.reduce_dtype", self.reduce_dtype, ("float32", "compute"))
        check_choice("precision.gradient_dtype", self.gradient_dtype, ("float32", "compute"))
        check_choice("precision.lower", self.lower, ("matmul", "all"))


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
