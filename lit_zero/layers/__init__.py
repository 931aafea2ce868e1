"""Layers that do their work in one kernel: to build models with, or put in the place of those of a model as it is.

* ``LayerNorm``, ``RMSNorm``, ``SwiGLU``, ``GEGLU``, ``LinearCrossEntropy`` and the functions of the same work are for
  models that choose them by name. Parameters and state dicts are those of torch's own modules.
* ``Layers("fused")``, the strategy's choice, replaces what is known in any model, while it trains (``replacing``): what
  is known says ``known``. Parameters, names and classes stay, so that ZeRO and checkpoints see no difference.

On a GPU a Triton kernel runs, elsewhere plain torch, which saves the same tensors for the backward and no more.
"""

from lit_zero.kernels.gated import gated
from lit_zero.kernels.linear_cross_entropy import linear_cross_entropy
from lit_zero.kernels.normalization import layer_norm, rms_norm
from lit_zero.kernels.rotary import angles, rotary
from lit_zero.layers.modules import GEGLU, LayerNorm, LinearCrossEntropy, RMSNorm, SwiGLU
from lit_zero.layers.policy import Layers

__all__ = [
    "GEGLU",
    "LayerNorm",
    "Layers",
    "LinearCrossEntropy",
    "RMSNorm",
    "SwiGLU",
    "angles",
    "gated",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
]
