"""Fused layers as modules, to build models with. Parameters have the names and shapes of torch's own modules, or of
those that models on Hugging Face are made of.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lit_zero.core.errors import check_choice
from lit_zero.kernels.gated import ACTIVATIONS, gated
from lit_zero.kernels.linear_cross_entropy import linear_cross_entropy
from lit_zero.kernels.normalization import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, with the same arguments and state dict."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, with the same arguments and state dict."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """A gated feed-forward layer: ``down_proj(silu(gate_proj(x)) * up_proj(x))``.

    Args:
        dim: width of what comes in and goes out.
        hidden: width in between.
        bias: whether the three linear layers have one.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.

    Raises:
        ConfigError: for another activation.
    """

    def __init__(self, dim: int, hidden: int, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.gate_proj = nn.Linear(dim, hidden, bias)
        self.up_proj = nn.Linear(dim, hidden, bias)
        self.down_proj = nn.Linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))
        return down


class GEGLU(SwiGLU):
    """``SwiGLU`` with GELU in the place of SiLU.

    Args:
        dim: width of what comes in and goes out.
        hidden: width in between.
        bias: whether the three linear layers have one.
        activation: ``gelu``, or ``gelu_tanh``, its approximation.
    """

    def __init__(self, dim: int, hidden: int, bias: bool = False, activation: str = "gelu") -> None:
        super().__init__(dim, hidden, bias, activation)


class LinearCrossEntropy(nn.Linear):
    """A model's last linear layer and its loss: logits never stand whole.

    Weight and bias are those of ``torch.nn.Linear(dim, vocabulary)``; for tied weights, assign the embedding's to
    ``weight``.

    Args:
        in_features: dim.
        out_features: size of the vocabulary.
        bias: whether there is one.
        ignore_index: the target of a row that does not count.
        label_smoothing: share of the uniform distribution in the targets, from 0 to 1.
        z_loss: factor of the mean squared logarithm of the softmax's normaliser, which is added to the loss.
        reduction: ``mean``, ``sum`` or ``none``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.z_loss, self.reduction = z_loss, reduction

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the loss, or without ``targets`` the logits [..., vocabulary].

        Args:
            input: [..., dim].
            targets: class of each row [...], int64.
        """
        if targets is None:
            return super().forward(input)
        loss: Tensor = linear_cross_entropy(
            input,
            self.weight,
            targets,
            self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )
        return loss
